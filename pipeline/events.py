"""What the driver hears of a run: a few hundred bytes per slice, so its memory does not grow with the corpus.

Sent by the graph's tasks and actors, counted by `progress`, acted upon by `jobs.run`. Knows no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from pipeline.results import ShardMetrics


@dataclass(frozen=True, slots=True)
class ShardPlanned:
    shard: str
    num_slices: int
    num_found: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class CorpusPlanning:
    """How far the pass over all shards is. rows: planned so far; spilled_bytes: written to the output's storage."""

    shards_done: int
    num_shards: int
    rows: int
    spilled_bytes: int
    ranges_done: int = 0
    num_ranges: int = 0


@dataclass(frozen=True, slots=True)
class CorpusPlanned:
    """All shards are planned as one corpus, by this run or (`is_new` false) before.

    Tokens are those of rows to compute. wall_s: of the pass over all shards, this run's.
    """

    is_new: bool
    num_slices: int
    num_found: int
    prompt_tokens: int
    achievable_prefix_tokens: int
    num_duplicates_across: int
    wall_s: float


@dataclass(frozen=True, slots=True)
class SliceFailed:
    """A slice of a corpus plan cannot be read; these shards have rows in it."""

    index: int
    shards: list[str]
    reason: str


@dataclass(frozen=True, slots=True)
class SliceDone:
    """A slice is published, by this run or (`is_new` false) before. Token counts are of computed rows, those of drafts
    of all that the worker did meanwhile; `rows` counts folded ones too. by_shard: of a corpus plan's slice, rows and
    error rows of each shard. size_bytes: of its object."""

    shard: str
    is_new: bool
    path: str
    index: int
    num_slices: int
    rows: int
    rows_error: int
    rows_duplicate: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    device_seconds: float
    cost_usd: float
    overhead_s: float
    wall_s: float
    usd_per_device_hour: float
    num_engine_rebuilds: int
    drafted_tokens: int = 0  # a slice from before there was speculation says nothing
    accepted_tokens: int = 0
    num_verify_steps: int = 0
    notes: list[str] = field(default_factory=list)
    by_shard: dict[str, list[int]] = field(default_factory=dict)
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SliceDropped:
    """A slice was not begun, because the run is being stopped."""

    shard: str
    index: int


@dataclass(frozen=True, slots=True)
class ShardDone:
    metrics: ShardMetrics


@dataclass(frozen=True, slots=True)
class ShardFailed:
    """One shard cannot be finished; the others are."""

    shard: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing has happened for a moment; a chance to look at the clock."""


Event = (
    ShardPlanned
    | CorpusPlanning
    | CorpusPlanned
    | SliceDone
    | SliceDropped
    | SliceFailed
    | ShardDone
    | ShardFailed
    | Tick
)
EVENT_TYPES: dict[str, type] = {kind.__name__: kind for kind in get_args(Event)}
