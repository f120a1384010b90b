"""Drafts: guesses of the next tokens of a sequence, and the drafters that make them, combined.

A draft never changes a token, only how many are computed in one step: the engine accepts what equals the tokens that
it samples anyway. So drafters may be wrong, stale or off, and here nothing is ever raised because of one. Knows no
scheduler, no step times and no forward pass of the target; the engine calls `propose` before a step, `observe` and
`count` after it, and `finish` for each sequence that has ended.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from actors.config import SpeculativeConfig
from actors.drafters.acceptance import WEAK_CHANCE, Acceptance
from actors.drafters.corpus_index import CorpusIndex
from actors.drafters.grammar import GrammarDrafter
from actors.drafters.prompt_lookup import PromptLookup
from actors.sequence import Sequence

if TYPE_CHECKING:
    from actors.drafters.draft_model import DraftModel

logger = logging.getLogger(__name__)

SURE_CHANCE = 0.8
"""A piece that starts with at least this chance is taken without asking the next drafter."""

CHAIN_SURVIVAL = 0.15
"""Drafts less likely than this to be accepted as a whole are not continued by another piece."""

EXPENSIVE_TOKENS = 2
"""So many tokens an expensive drafter adds before the cheap ones may go on."""

MAX_LINKS = 4
"""How many pieces, each of another drafter, a draft is chained from."""


@dataclass(slots=True)
class Draft:
    """A guessed continuation of a sequence's `token_ids`; the lists run in parallel.

    cells: the row of the Acceptance table that a token's chance is estimated in. chances: that a token is accepted,
    given that those before it are. sources: index in `Speculator.drafters` of who guessed it. survival: the chance that
    all tokens are accepted, up to the piece that is being added.
    """

    token_ids: list[int] = field(default_factory=list)
    cells: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    survival: float = 1.0

    def split(self, start: int) -> Draft:
        """Cut off and return what comes from token `start` on."""
        tail = Draft(self.token_ids[start:], self.cells[start:], self.chances[start:], self.sources[start:])
        del self.token_ids[start:], self.cells[start:], self.chances[start:], self.sources[start:]
        return tail

    def join(self, tail: Draft) -> None:
        """Append another draft."""
        self.token_ids += tail.token_ids
        self.cells += tail.cells
        self.chances += tail.chances
        self.sources += tail.sources

    def gain(self, start: int = 0) -> float:
        """How many of the tokens from `start` on will be accepted on average, given that those before are."""
        total, survival = 0.0, 1.0
        for chance in self.chances[start:] if start else self.chances:
            survival *= chance
            total += survival
        return total


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
        drafts = [Draft() for _ in sequences]
        left_out = set(self._expensive)
        if all(sequence.matcher is None for sequence in sequences):
            left_out.add(GrammarDrafter.name)
        cheap = [drafter for drafter in self._working() if drafter.name not in left_out]
        self._chain(drafts, range(len(drafts)), sequences, limits, cheap)
        if ask_expensive:
            for drafter in self._working():
                if drafter.name in self._expensive:
                    self._ask_expensive(drafter, drafts, sequences, limits, cheap)
        return drafts

    def propose_forced(self, sequences: SequenceOf[Sequence], limits: SequenceOf[int]) -> list[Draft]:
        """Drafts of nothing but what the structured outputs of sequences force."""
        drafts = [Draft() for _ in sequences]
        sure = [drafter for drafter in self._working() if drafter.name == GrammarDrafter.name]
        self._chain(drafts, range(len(drafts)), sequences, limits, sure)
        return drafts

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
            self._call(drafter, lambda drafter: drafter.finish(sequence))
        sequence.drafting.clear()

    def _working(self) -> list[Drafter]:
        return [drafter for drafter in self.drafters if drafter.name not in self.failed]

    def _chain(
        self,
        drafts: list[Draft],
        indices: SequenceOf[int],
        sequences: SequenceOf[Sequence],
        limits: SequenceOf[int],
        drafters: SequenceOf[Drafter],
    ) -> None:
        """Extend drafts in place, piece by piece, each by the drafter whose piece is expected to bring most; where one
        is sure, those after it are not asked."""
        growing = [i for i in indices if len(drafts[i].token_ids) < limits[i]]
        starts = {i: len(drafts[i].token_ids) for i in growing}
        for _ in range(MAX_LINKS):
            unsure = growing
            for drafter in drafters:
                if not unsure:
                    break
                self._extend(drafter, drafts, unsure, starts, sequences, limits)
                if drafter is not drafters[-1]:
                    unsure = [i for i in unsure if not _is_sure(drafts[i], starts[i])]
            growing = [i for i in growing if _end_piece(drafts[i], starts[i], limits[i])]
            if not growing:
                return
            for i in growing:
                starts[i] = len(drafts[i].token_ids)

    def _extend(
        self,
        drafter: Drafter,
        drafts: list[Draft],
        indices: SequenceOf[int],
        starts: dict[int, int],
        sequences: SequenceOf[Sequence],
        limits: SequenceOf[int],
    ) -> None:
        """Replace what drafts have after their starts by a drafter's guess, where that is expected to bring more."""
        tried = [drafts[i] for i in indices]
        others = [
            draft.split(starts[i]) if len(draft.token_ids) > starts[i] else None for i, draft in zip(indices, tried)
        ]
        asked, their_limits = [sequences[i] for i in indices], [limits[i] for i in indices]
        works = self._call(drafter, lambda drafter: drafter.propose(asked, tried, their_limits))
        for sequence, draft in zip(asked, tried):
            if sequence.matcher is not None and works:
                draft.split(sequence.matcher.count_allowed(draft.token_ids))
        source = self.drafters.index(drafter)
        for i, draft, other in zip(indices, tried, others):
            start = starts[i]
            if not works or (other and (len(draft.token_ids) == start or draft.gain(start) <= other.gain())):
                draft.split(start)
                if other:
                    draft.join(other)
            else:
                draft.sources += [source] * (len(draft.token_ids) - start)

    def _ask_expensive(
        self,
        drafter: Drafter,
        drafts: list[Draft],
        sequences: SequenceOf[Sequence],
        limits: SequenceOf[int],
        cheap: SequenceOf[Drafter],
    ) -> None:
        """Let a drafter whose every token costs say the tokens that the cheap ones are unsure of, and these go on."""
        for _ in range(MAX_LINKS if cheap else 1):
            unsure, before = [], []
            for i, draft in enumerate(drafts):
                sure = _sure_part(draft)
                if len(sure.token_ids) < limits[i] and sure.survival > WEAK_CHANCE:
                    unsure.append(i)
                    before.append(sure)
            if not unsure:
                return
            old = [drafts[i] for i in unsure]
            for i, sure in zip(unsure, before):
                drafts[i] = sure
            starts = {i: len(drafts[i].token_ids) for i in unsure}
            ends = [
                min(limit, starts.get(i, 0) + EXPENSIVE_TOKENS) if cheap else limit for i, limit in enumerate(limits)
            ]
            self._extend(drafter, drafts, unsure, starts, sequences, ends)
            changed = []
            for i, draft in zip(unsure, old):
                if drafts[i].gain() > draft.gain():
                    drafts[i].survival = math.prod(drafts[i].chances)
                    changed.append(i)
                else:
                    drafts[i] = draft
            if not changed:
                return
            self._chain(drafts, changed, sequences, limits, cheap)

    def _call(self, drafter: Drafter, action: Callable[[Drafter], None]) -> bool:
        """Run an action of a drafter; False, and it is off from now on, when that raises. False also if it is off."""
        if drafter.name in self.failed:
            return False
        started = time.perf_counter_ns()
        try:
            action(drafter)
        except Exception as error:
            self.failed[drafter.name] = f"{type(error).__name__}: {error}"
            logger.warning("drafter %s is switched off for this run: %s", drafter.name, self.failed[drafter.name])
        self.counts[drafter.name].num_ns += time.perf_counter_ns() - started
        return drafter.name not in self.failed


def make_speculator(
    config: SpeculativeConfig, *, identity: str = "", draft_model: DraftModel | None = None
) -> Speculator:
    """The drafters that a configuration names. identity: what a saved index of answers must have been made with, such
    as the tokenizer's fingerprint. draft_model: loaded already, exactly when config.model is set."""
    acceptance = Acceptance()
    drafters: list[Drafter] = [] if config.method == "none" else [GrammarDrafter(acceptance)]
    if config.method in ("auto", "combined", "corpus"):
        drafters.append(CorpusIndex(acceptance, config.corpus_index_bytes, identity))
    if config.method in ("auto", "combined", "ngram"):
        drafters.append(PromptLookup(acceptance, config.prompt_lookup_min, config.prompt_lookup_max))
    if draft_model is not None:
        draft_model.join(acceptance)
        drafters.append(draft_model)
    return Speculator(drafters, acceptance, expensive=("draft_model",))


def _is_sure(draft: Draft, start: int) -> bool:
    """Whether the piece that starts there starts with a token that is hardly wrong."""
    return len(draft.chances) > start and draft.chances[start] >= SURE_CHANCE


def _end_piece(draft: Draft, start: int, limit: int) -> bool:
    """End a piece before its first weak token after the start, from where another drafter may know better.

    Returns whether the draft is worth continuing."""
    chances = draft.chances
    if len(chances) == start:
        return False
    draft.survival *= chances[start]
    for i in range(start + 1, len(chances)):
        if chances[i] < WEAK_CHANCE:
            draft.split(i)
            break
        draft.survival *= chances[i]
    return len(chances) < limit and draft.survival >= CHAIN_SURVIVAL


def _sure_part(draft: Draft) -> Draft:
    """A copy that ends before the first weak token."""
    end = next((i for i, chance in enumerate(draft.chances) if chance < WEAK_CHANCE), len(draft.chances))
    chances = draft.chances[:end]
    return Draft(draft.token_ids[:end], draft.cells[:end], chances, draft.sources[:end], math.prod(chances))
