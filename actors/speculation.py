"""How many draft tokens a step verifies: as many as raise the expected tokens per second, by the measured step times.

Between the drafters, who only guess, and the scheduler, who only has room. Each step: ask for drafts, sort all their
tokens by their chance to survive (those of one draft only get less likely), and admit the first n, where n is the one
that makes tokens per second largest (goodput; compare SmartSpec, arXiv 2406.14066). Where drafts bring less than
guessing them takes, they are asked for ever more rarely; what a grammar forces is no guess, and always drafted. Called
by the engine, once before and once after a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from actors.common_prefix import num_in_common
from actors.config import SpeculativeConfig
from actors.drafters.corpus_index import CorpusIndex
from actors.drafters.drafting import Draft, Speculator
from actors.drafters.grammar import GrammarDrafter
from actors.requests import DrafterStats
from actors.scheduler import Scheduler, StepPlan
from actors.sequence import Sequence
from actors.step_times import StepTimes, StepTimesTracker

MAX_LOGIT_BYTES = 256 << 20
"""Logits of one step at most: draft tokens are admitted below it."""

SHORTEST_PAUSE, LONGEST_PAUSE = 8, 256
"""Steps without drafts once they do not pay; each pause is twice as long as the one before."""

FEWEST_SEEN = 8
"""Steps with drafts before they are judged."""

NUM_PROBED = 8
"""Sequences asked for drafts after a pause: enough to see whether the corpus has become guessable."""

DECAY = 0.9
"""Weight of what was known before, per step, in the averages of what drafts cost and bring."""

TRIAL_STEPS = 32
"""Steps with a draft model before it may be judged."""


class Reads(Protocol):
    """What of the runner matters here."""

    def num_read(self, plan: StepPlan) -> float: ...


@dataclass(slots=True)
class _Average:
    """A decaying mean."""

    value: float = 0.0
    num_seen: int = 0

    def add(self, value: float) -> None:
        self.num_seen += 1
        weight = max(1 - DECAY, 1 / self.num_seen)
        self.value += weight * (value - self.value)


@dataclass(slots=True)
class _Step:
    """The step that is being computed: what was guessed, and what it would take without."""

    drafts: dict[Sequence, Draft] = field(default_factory=dict)
    num_known: dict[Sequence, int] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_per_token: float = 0.0
    is_paused: bool = False
    extra_s: float = 0.0
    proposing_s: float = 0.0
    model_s: float = 0.0


@dataclass(slots=True)
class _Tally:
    """Draft tokens of a step: verified and accepted, in all and of the draft model."""

    num_admitted: int = 0
    num_accepted: int = 0
    num_admitted_of_model: int = 0
    num_accepted_of_model: int = 0


class Speculation:
    """Drafting for one engine. With method "auto" drafts have to pay, else they are taken as they come."""

    def __init__(
        self,
        config: SpeculativeConfig,
        speculator: Speculator,
        times: StepTimes,
        vocab_size: int,
        note: Callable[[str], None],
    ) -> None:
        """note: takes what a user should know."""
        self.speculator = speculator
        self.num_verify_steps = 0
        self.saved_s = 0.0
        self._note = note
        self._must_pay = config.method == "auto"
        self._num_speculative_tokens = config.num_speculative_tokens
        self._times = times
        self._tracker = StepTimesTracker()
        self._max_logit_rows = max(1, MAX_LOGIT_BYTES // (4 * vocab_size))
        self._model = next((i for i, drafter in enumerate(speculator.drafters) if drafter.name == "draft_model"), None)
        self._asks_model = self._model is not None
        self._model_gain = _Average()
        self._gain = _Average()
        self._step = _Step()
        self._pause_left = 0
        self._next_pause = SHORTEST_PAUSE
        self._is_probing = False

    def draft(self, plan: StepPlan, scheduler: Scheduler, reads: Reads) -> None:
        """Put drafts into a plan, as many tokens of each as pay."""
        self._step = step = _Step()
        wanting = plan.wanting
        asked = wanting[:NUM_PROBED] if self._is_probing else wanting
        if self._pause_left > 0:
            self._pause_left -= 1
            self._is_probing = self._pause_left == 0
            step.is_paused = True
            asked = [sequence for sequence in wanting if sequence.matcher is not None]
        room = min(scheduler.num_draftable(plan), self._max_logit_rows - len(wanting))
        if not asked or room <= 0:
            return
        longest = min(self._num_speculative_tokens, room)
        limits = [scheduler.room_for_draft(sequence, longest) for sequence in asked]
        all_ns, model_ns = self._drafting_ns()
        if step.is_paused:
            drafts = self.speculator.propose_forced(asked, limits)
        else:
            drafts = self.speculator.propose(asked, limits, self._asks_model)
        all_now_ns, model_now_ns = self._drafting_ns()
        step.proposing_s, step.model_s = (all_now_ns - all_ns) / 1e9, (model_now_ns - model_ns) / 1e9
        step.drafts = dict(zip(asked, drafts))
        step.num_known = {sequence: len(sequence.token_ids) for sequence in asked}
        for sequence, draft, count in zip(asked, drafts, self._admit(plan, wanting, drafts, room, reads)):
            if count:
                plan.drafts[sequence] = draft.token_ids[:count]

    def learn(self, plan: StepPlan, actual_s: float) -> None:
        """Compare the step's drafts with the tokens that their sequences have got since; the step took `actual_s`, and
        that much more or less than expected all else will have taken too."""
        step = self._step
        if not step.drafts:
            return
        tally = _Tally()
        for sequence, draft in step.drafts.items():
            new_tokens = sequence.token_ids[step.num_known[sequence] :]
            self.speculator.observe(draft, new_tokens)
            num_admitted = len(plan.drafts.get(sequence, ()))
            if num_admitted:
                num_accepted = num_in_common(draft.token_ids[:num_admitted], new_tokens)
                sequence.num_drafted += num_admitted
                sequence.num_accepted += num_accepted
                self._count(draft, num_admitted, num_accepted, tally)
        self._tracker.observe(step.seconds, max(actual_s - step.proposing_s, 1e-9))
        token_s, extra_s = step.seconds_per_token * self._tracker.ratio, step.extra_s * self._tracker.ratio
        saved_s = tally.num_accepted * token_s - extra_s
        self.saved_s += saved_s - step.proposing_s
        model_gain_s = tally.num_accepted_of_model * token_s - step.model_s
        if tally.num_admitted:
            model_gain_s -= extra_s * tally.num_admitted_of_model / tally.num_admitted
        if self._must_pay and not step.is_paused:
            self._judge(saved_s - step.proposing_s - model_gain_s)
            self._judge_model(model_gain_s)

    @property
    def is_resting(self) -> bool:
        """Whether nothing will be guessed for the next step but what grammars force. Then nothing else was for the one
        that is being computed either, since pauses begin in `learn`."""
        return self._pause_left > 0

    def finish(self, sequence: Sequence) -> None:
        """Let the drafters learn from an answer."""
        self.speculator.finish(sequence)

    def drafter_stats(self) -> tuple[DrafterStats, ...]:
        """What each drafter has done so far; without the grammars' one as long as nothing was forced."""
        return tuple(
            DrafterStats(
                name, count.num_drafted, count.num_accepted, count.num_ns / 1e9, self.speculator.failed.get(name, "")
            )
            for name, count in self.speculator.counts.items()
            if name != GrammarDrafter.name or count.num_drafted > 0 or name in self.speculator.failed
        )

    @property
    def corpus_index(self) -> CorpusIndex | None:
        """The index over answers, if the method has one."""
        return next((drafter for drafter in self.speculator.drafters if isinstance(drafter, CorpusIndex)), None)

    def _admit(
        self, plan: StepPlan, wanting: list[Sequence], drafts: list[Draft], room: int, reads: Reads
    ) -> list[int]:
        """How many tokens of each draft are verified."""
        num_wanting, num_known = len(wanting), sum(plan.num_tokens)
        share_drawn = sum(not sequence.request.sampling.is_greedy for sequence in wanting) / num_wanting
        survivals, owners = _sort_by_survival(drafts)
        num_drafts = np.arange(min(len(survivals), room) + 1)
        num_rows, num_read = num_wanting + num_drafts, reads.num_read(plan)
        num_chunks = sum(count > 1 and s.num_computed > 0 for s, count in zip(plan.sequences, plan.num_tokens))
        num_drafted = sum(bool(draft.token_ids) for draft in drafts)
        seconds = self._times.seconds(
            num_known + num_drafts,
            len(plan.sequences),
            num_rows,
            num_read,
            share_drawn * num_rows,
            num_chunks + np.minimum(num_drafts, num_drafted),
        )
        # Prompts in the step are work that has to be done anyway: what counts is decoding without them.
        alone_s = float(seconds[0])
        if num_known > num_wanting:
            alone_s = float(
                self._times.seconds(num_wanting, num_wanting, num_wanting, num_read, share_drawn * num_wanting, 0)
            )
        best = len(num_drafts) - 1
        if self._must_pay:
            num_expected = num_wanting + np.concatenate(([0.0], np.cumsum(survivals[:best])))
            best = int(np.argmax(num_expected / (alone_s + seconds - seconds[0])))
        self._step.seconds = float(seconds[best])
        self._step.seconds_per_token = alone_s / num_wanting
        self._step.extra_s = float(seconds[best] - seconds[0])
        return np.bincount(owners[:best], minlength=len(drafts)).tolist()

    def _count(self, draft: Draft, num_admitted: int, num_accepted: int, tally: _Tally) -> None:
        self.num_verify_steps += 1
        self.speculator.count(draft, num_admitted, num_accepted)
        tally.num_admitted += num_admitted
        tally.num_accepted += num_accepted
        if self._model is not None:
            tally.num_admitted_of_model += draft.sources[:num_admitted].count(self._model)
            tally.num_accepted_of_model += draft.sources[:num_accepted].count(self._model)

    def _judge(self, gain_s: float) -> None:
        """Pause when drafts cost more than they bring; resume when a probe after a pause shows otherwise."""
        if self._is_probing:
            self._is_probing = False
            self._gain = _Average()
            if gain_s <= 0:
                self._stop_for_a_while()
            return
        self._gain.add(gain_s)
        if self._gain.num_seen >= FEWEST_SEEN and self._gain.value < 0:
            self._stop_for_a_while()
        elif self._gain.num_seen >= LONGEST_PAUSE:
            self._next_pause = SHORTEST_PAUSE

    def _stop_for_a_while(self) -> None:
        self._pause_left = self._next_pause
        self._next_pause = min(2 * self._next_pause, LONGEST_PAUSE)

    def _judge_model(self, gain_s: float) -> None:
        if not self._asks_model:
            return
        self._model_gain.add(gain_s)
        if self._model_gain.num_seen >= TRIAL_STEPS and self._model_gain.value < 0:
            self._asks_model = False
            self._note("the draft model takes longer than it saves here, and is off")

    def _drafting_ns(self) -> tuple[int, int]:
        """Time spent by all drafters so far, and by the draft model."""
        counts = self.speculator.counts
        model_ns = counts["draft_model"].num_ns if self._model is not None else 0
        return sum(count.num_ns for count in counts.values()), model_ns


def _sort_by_survival(drafts: list[Draft]) -> tuple[np.ndarray, np.ndarray]:
    """All draft tokens, likeliest to survive first: the chance that a token and all before it are accepted, and the
    index of its draft. The order is stable: of one draft, the earlier token comes first."""
    survivals: list[float] = []
    owners: list[int] = []
    for i, draft in enumerate(drafts):
        survival = 1.0
        for chance in draft.chances:
            survival *= chance
            survivals.append(survival)
            owners.append(i)
    survivals_X, owners_X = np.array(survivals), np.array(owners, dtype=np.int64)
    order = np.argsort(-survivals_X, kind="stable")
    return survivals_X[order], owners_X[order]
