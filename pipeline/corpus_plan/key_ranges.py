"""Cuts the keys of a corpus into ranges of which one fits into a worker's memory.

Second step of a corpus plan, in one process: of each sorted run it sees a few separators, and of the rows nothing.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline.corpus_plan.manifest import PlannedShard
from pipeline.corpus_plan.sorted_runs import SortedRun, SortedShard
from pipeline.prefix_plan import cut_at_borders

RANGE_WEIGHT = 24 * 2**20
"""Tokens and rows' weights that a range is to have; as samples guess, it may be half as much again."""


@dataclass(frozen=True, slots=True)
class RunPart:
    """Whole groups of a sorted run, as a piece of its object. shard: the number of its shard."""

    path: str
    start: int
    end: int
    shard: int


@dataclass(frozen=True, slots=True)
class KeyRange:
    """All prompts from `low` to below `high` (None: no limit), and the parts of runs that may have some, by shard and
    then row."""

    index: int
    low: bytes | None
    high: bytes | None
    parts: list[RunPart]


def planned_order(shards: Sequence[SortedShard]) -> list[SortedShard]:
    """The shards as they are numbered: by name, whatever the order in which they were done."""
    return sorted(shards, key=lambda sorted_shard: sorted_shard.shard.name)


def choose_ranges(shards: Sequence[SortedShard], max_weight: int = RANGE_WEIGHT) -> list[KeyRange]:
    """Ranges of about `max_weight`, in order, that together hold every prompt once; rows with one prompt stay together.

    The same shards give the same ranges, so max_weight must not depend on who plans.
    """
    ordered = planned_order(shards)
    samples = sorted(
        (separator, weight)
        for one in ordered
        for run in one.runs
        for separator, weight in zip(run.separators, run.weights)
    )
    weights = np.array([weight for _, weight in samples], np.int64)
    # A separator is as long as what the prompt behind it shares with the one before: short ones part prefix groups.
    lengths = np.array([len(separator) for separator, _ in samples], np.int32)
    borders = cut_at_borders(weights, lengths, max_weight, len(samples) + 1)
    splitters = dict.fromkeys(samples[border][0] for border in borders[1:-1])
    limits: list[bytes | None] = [None, *splitters, None]
    return [
        KeyRange(
            index,
            low,
            high,
            [
                part
                for number, one in enumerate(ordered)
                for run in one.runs
                if (part := _part_of(run, number, low, high)) is not None
            ],
        )
        for index, (low, high) in enumerate(pairwise(limits))
    ]


def shards_of(shards: Sequence[SortedShard]) -> list[PlannedShard]:
    """The shards of a plan by number."""
    return [one.shard for one in planned_order(shards)]


def _part_of(run: SortedRun, shard: int, low: bytes | None, high: bytes | None) -> RunPart | None:
    """The groups that may hold a key of the range: a group's keys lie from its separator to below the next one's."""
    first = max(0, bisect_right(run.separators, low) - 1) if low is not None else 0
    end = bisect_left(run.separators, high) if high is not None else len(run.separators)
    return RunPart(run.path, run.offsets[first], run.offsets[end], shard) if first < end else None
