"""The next step while the device computes the one before, supposing how that ends: async scheduling, in vLLM's words.

A step that is launched is supposed to give every sequence that it samples one token more. On that the next one is
planned, prepared and launched; the tokens go from one to the other on the device, and are read when the next step is on
its way. So Python's time is hidden behind the device's, as long as it is shorter. (SGLang calls this overlap
scheduling; NanoFlow, arXiv 2408.12757, schedules asynchronously, too.)

What depends on a token that is not read yet cannot be supposed; `may_look_ahead` says when, and the step is then read
before the next is planned. A sequence that turns out to have ended has a token too many in the next step: it is thrown
away, its time is on the sequence's row, and neither pages nor the row are given back before that step is read, too.

Knows no tensors and decides nothing about pages. Called by the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.sampled_tokens import SampledTokens
from actors.scheduler import StepPlan
from actors.sequence import UNKNOWN_TOKEN, Sequence
from actors.speculation import Speculation


@dataclass(slots=True)
class LaunchedStep:
    """A step on its way: its plan, what it samples, and what each sequence of the plan bears of its time, as weights.

    supposed: sequences whose last token stands for the one that this step samples, while the next is planned.
    """

    plan: StepPlan
    sampled: SampledTokens
    weights: list[float]
    is_committed: bool = False
    supposed: list[Sequence] = field(default_factory=list)

    def suppose_tokens(self, wanting: list[Sequence]) -> None:
        """Let sequences go on by a token that nobody knows yet."""
        self.supposed = wanting
        for sequence in wanting:
            sequence.token_ids.append(UNKNOWN_TOKEN)

    def forget_supposed(self) -> None:
        """Take these tokens back, for the real ones are to come."""
        for sequence in self.supposed:
            sequence.token_ids.pop()
        self.supposed = []


def may_look_ahead(plan: StepPlan, speculation: Speculation | None) -> bool:
    """Whether the step after a launched one can be prepared before the tokens of this one are read.

    Not when it verifies drafts, whose number of accepted tokens is unknown; not when drafts are to be guessed for the
    next one, or learned from, as drafters continue the tokens themselves (so speculation is looked past only in its
    pauses, or where it is off); not when a sequence that gets a token follows a grammar or has penalties, for both
    change the logits after it by what it was. Stop strings, stop tokens and `min_tokens` are no reason: they end a
    sequence, which is seen a step later, or count its tokens.
    """
    if plan.drafts or (speculation is not None and not speculation.is_resting):
        return False
    return not any(sequence.matcher is not None or sequence.request.sampling.has_penalties for sequence in plan.wanting)
