"""What speculation did, counted: draft tokens per drafter, the steps that verified them, and what that saved.

Knows no files and no Ray. A worker's counts only grow; each slice takes what has come since the slice before, so slices
sum to shards, and shards to the run, with the drafts of answers that were thrown away. Only what a killed worker
drafted since its last slice is on no count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class DrafterCount:
    """The draft tokens of one drafter, and those of them that were also the model's."""

    drafter: str
    drafted_tokens: int
    accepted_tokens: int


@dataclass(slots=True)
class DraftCounts:
    """`num_verify_steps` counts request-steps with at least one draft token, `num_failures` drafters that a worker
    switched off; `saved_s` is an estimate of the engine's, and below 0 where drafts cost more than they saved."""

    num_verify_steps: int = 0
    num_failures: int = 0
    saved_s: float = 0.0
    drafters: list[DrafterCount] = field(default_factory=list)

    @classmethod
    def of_worker(cls, stats: Any) -> DraftCounts:
        """The counts of a worker since it was made, from its `WorkerStats`."""
        return cls(
            stats.num_verify_steps,
            sum(bool(drafter.failed) for drafter in stats.drafters),
            stats.saved_by_speculation_s,
            [DrafterCount(d.name, d.drafted_tokens, d.accepted_tokens) for d in stats.drafters],
        )

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DraftCounts:
        """What `dataclasses.asdict` made of one."""
        return cls(**{**data, "drafters": [DrafterCount(**drafter) for drafter in data["drafters"]]})

    @property
    def drafted_tokens(self) -> int:
        return sum(drafter.drafted_tokens for drafter in self.drafters)

    @property
    def accepted_tokens(self) -> int:
        return sum(drafter.accepted_tokens for drafter in self.drafters)

    def since(self, before: DraftCounts) -> DraftCounts:
        """What has come on top of `before`, which is an earlier state of these counts."""
        seen = {drafter.drafter: drafter for drafter in before.drafters}
        nothing = DrafterCount("", 0, 0)
        return DraftCounts(
            self.num_verify_steps - before.num_verify_steps,
            self.num_failures - before.num_failures,
            self.saved_s - before.saved_s,
            [
                DrafterCount(
                    now.drafter,
                    now.drafted_tokens - seen.get(now.drafter, nothing).drafted_tokens,
                    now.accepted_tokens - seen.get(now.drafter, nothing).accepted_tokens,
                )
                for now in self.drafters
            ],
        )


def sum_drafts(parts: Iterable[DraftCounts]) -> DraftCounts:
    """The sum, each drafter once, by name."""
    parts = list(parts)
    drafted: dict[str, int] = {}
    accepted: dict[str, int] = {}
    for drafter in (drafter for part in parts for drafter in part.drafters):
        drafted[drafter.drafter] = drafted.get(drafter.drafter, 0) + drafter.drafted_tokens
        accepted[drafter.drafter] = accepted.get(drafter.drafter, 0) + drafter.accepted_tokens
    return DraftCounts(
        sum(part.num_verify_steps for part in parts),
        sum(part.num_failures for part in parts),
        math.fsum(part.saved_s for part in parts),
        [DrafterCount(name, drafted[name], accepted[name]) for name in sorted(drafted)],
    )


def acceptance_length(accepted_tokens: int, num_verify_steps: int) -> float | None:
    """Mean tokens that a request gets from a step with drafts, the one that it would have got without them included."""
    return 1 + accepted_tokens / num_verify_steps if num_verify_steps else None


def failures_of(stats: Any) -> list[str]:
    """A note for each drafter that a worker has switched off."""
    return [
        f"the drafter {drafter.name} failed and was switched off: {drafter.failed}"
        for drafter in stats.drafters
        if drafter.failed
    ]
