"""Drafts: guesses of the next tokens of a sequence, and the drafters that make them, combined.

A draft never changes a token, only how many are computed in one step: the engine accepts what equals the tokens that
it samples anyway. So drafters may be wrong, stale or off, and here nothing is ever raised because of one. Knows no
scheduler, no step times and no forward pass of the target; the engine calls `propose` before a step, `observe` and
`count` after it, and `finish` for each sequence that has ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from actors.acceptance import Acceptance
from actors.sequence import Sequence

logger = logging.getLogger(__name__)

MIN_SURVIVAL = 0.02
"""A draft is not continued once the chance that all of it is accepted falls below this."""

SURE_TOKENS = 3.0
"""Sequences whose cheap draft is expected to bring fewer tokens than this are worth a draft model's time."""

MAX_LINKS = 4
"""How many pieces, each of another drafter, a draft is chained from."""


@dataclass(slots=True)
class Draft:
    """A guessed continuation of a sequence's `token_ids`; the lists run in parallel.

    cells: the row of the Acceptance table that a token's chance is estimated in. chances: that a token is accepted,
    given that those before it are. sources: index in `Speculator.drafters` of who guessed it.
    """

    token_ids: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)

    @property
    def num_expected(self) -> float:
        """How many of the tokens will be accepted, on average."""
        total, survival = 0.0, 1.0
        for chance in self.chances:
            survival *= chance
            total += survival
        return total

    @property
    def survival(self) -> float:
        """The chance that all tokens are accepted."""
        survival = 1.0
        for chance in self.chances:
            survival *= chance
        return survival


class Drafter(Protocol):
    """Guesses tokens. It may keep what it knows of a sequence in `sequence.drafting` under its name."""

    name: str

    def propose(self, sequences: SequenceOf[Sequence], drafts: SequenceOf[Draft], limits: SequenceOf[int]) -> None:
        """Extend `token_ids`, `cells` and `chances` of drafts[i], which continues sequences[i].token_ids, up to
        limits[i] tokens in all; by nothing where it knows nothing."""
        ...

    def finish(self, sequence: Sequence) -> None:
        """The sequence is complete: learn from its output_token_ids, forget what was kept about it."""
        ...


@dataclass(slots=True)
class DrafterCounts:
    """What a drafter has done: tokens that were verified, those of them that were accepted, and its own time."""

    num_drafted: int = 0
    num_accepted: int = 0
    num_ns: int = 0


class Speculator:
    """The combination: per sequence the draft that is expected to bring most, chained until nobody knows on.

    With an empty list of drafters all drafts are empty. `expensive` names the drafters that are asked only when the
    caller allows it, and only for sequences whose cheap drafts are unsure. `failed` holds the drafters that were
    switched off, by name with the error.
    """

    def __init__(
        self, drafters: SequenceOf[Drafter] = (), acceptance: Acceptance | None = None, expensive: SequenceOf[str] = ()
    ) -> None:
        self.drafters = list(drafters)
        self.acceptance = acceptance or Acceptance()
        self.counts = {drafter.name: DrafterCounts() for drafter in self.drafters}
        self.failed: dict[str, str] = {}
        self._expensive = frozenset(expensive)

    def propose(
        self, sequences: SequenceOf[Sequence], limits: SequenceOf[int], ask_expensive: bool = True
    ) -> list[Draft]:
        """A draft for each sequence, of at most limits[i] tokens, possibly empty."""
        return [Draft() for _ in sequences]

    def observe(self, draft: Draft, new_token_ids: SequenceOf[int]) -> None:
        """Learn from what the model wrote where `draft` was a guess, whether or not the guess was verified."""
        update = self.acceptance.update
        for cell, guess, token in zip(draft.cells, draft.token_ids, new_token_ids):
            update(cell, guess == token)
            if guess != token:
                break

    def count(self, draft: Draft, num_admitted: int, num_accepted: int) -> None:
        """Add the first num_admitted tokens of a draft, of which num_accepted were accepted, to who guessed them."""
        for i, source in enumerate(draft.sources[:num_admitted]):
            counts = self.counts[self.drafters[source].name]
            counts.num_drafted += 1
            counts.num_accepted += i < num_accepted

    def finish(self, sequence: Sequence) -> None:
        """Let all drafters learn from a sequence that has ended, and forget it."""
        for drafter in self.drafters:
            if drafter.name not in self.failed:
                self._call(drafter, lambda drafter: drafter.finish(sequence))
        sequence.drafting.clear()

    def _call(self, drafter: Drafter, action: Callable[[Drafter], None]) -> None:
        started = time.perf_counter_ns()
        try:
            action(drafter)
        except Exception as error:
            self.failed[drafter.name] = f"{type(error).__name__}: {error}"
            logger.warning("drafter %s is switched off for this run: %s", drafter.name, self.failed[drafter.name])
        self.counts[drafter.name].num_ns += time.perf_counter_ns() - started
