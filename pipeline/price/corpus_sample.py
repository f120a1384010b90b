"""What a corpus is made of, in numbers: counted where it is small, else estimated from a seeded sample of its shards.

A run plans shard by shard, so that is the unit here too: as many whole shards as the sample allows, for then duplicates
and shared prefixes are what a run would find. Of shards that are larger some row groups are read, and what the other
rows would add is estimated from what the sample has seen once and twice. Holds the token ids of one shard's sample at a
time, then only lengths. Called by `pipeline.price.estimate`; knows no engine and no time.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.job import Job
from pipeline.prefix_plan import PackedRow, cut_at_borders, order_rows, pack_row
from pipeline.prompts import RenderedRow, Renderer
from pipeline.shards import Shard, ShardError, open_shard
from pipeline.storage import public_uri

_RENDER_BATCH_ROWS = 1024

MIN_SHARDS = 4
"""A sample has rows of at least so many shards, if there are as many."""

MIN_ROW_GROUPS = 4
"""Likewise of a shard that is not read whole: neighbours in a file are often alike."""

NUM_SINGLES = 32
"""Of the prompts for a pilot, so many are single rows, as different as can be."""

RUN_ROWS = 16
"""The others are runs of so many rows which follow each other in the plan, and share with each other what they will."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ShardSample:
    """What was read of a shard. Arrays have an entry per row that would be computed, in the order of computing.

    num_read: rows read, of the shard's `num_rows`. errors: error rows among them, by kind. prompt_tokens: of those
    without an error, duplicates included. num_duplicates: among the rows read, of `expected_duplicates` in the shard.
    shared_N: first tokens that are those of the row before, as far as it was read.
    computed_share: what is computed per row of the whole shard over what the sample alone would need; 1 if it is whole.
    max_output_N, num_samples_N: tokens that a row may write, and completions that it asks for.
    """

    name: str
    num_rows: int
    num_read: int
    errors: Counter[str]
    prompt_tokens: int
    num_duplicates: int
    expected_duplicates: float
    prompt_N: Ints
    shared_N: Ints
    max_output_N: Ints
    num_samples_N: Ints
    share_drawn: float
    slice_starts: list[int]
    computed_share: float

    @property
    def is_whole(self) -> bool:
        return self.num_read == self.num_rows

    @property
    def expected_shared(self) -> Ints:
        """`shared_N` as it would be if all of the shard's rows stood between these."""
        computed_N = self.computed_share * (self.prompt_N - self.shared_N)
        return np.maximum(self.shared_N, np.floor(self.prompt_N - computed_N).astype(np.int64))


@dataclass(frozen=True, slots=True)
class CorpusSample:
    """The shards read, of `num_shards` with `num_rows` rows. `prompts`: token ids of rows for a pilot, NUM_SINGLES
    single ones first, then runs of neighbours."""

    num_shards: int
    num_rows: int
    shards: list[ShardSample]
    prompts: list[PackedRow]

    def as_one_corpus(self, computed_share: float) -> CorpusSample:
        """The sample as a corpus plan finds it: so much is left to compute of what would be, shard by shard."""
        shards = [replace(shard, computed_share=shard.computed_share * computed_share) for shard in self.shards]
        return replace(self, shards=shards)

    @property
    def num_read(self) -> int:
        return sum(shard.num_read for shard in self.shards)

    @property
    def is_whole(self) -> bool:
        return self.num_read == self.num_rows


def sample_corpus(
    job: Job, tokenizer: Any, shards: Sequence[Shard], num_rows: int, seed: int, num_prompts: int = 0
) -> CorpusSample:
    """Read about `num_rows` rows, or all if there are no more; keep the prompts of `num_prompts` of them.

    The same files and seed give the same sample. ShardError for a file that cannot be read.
    """
    rng = random.Random(seed)
    total = sum(shard.num_rows for shard in shards)
    chosen = choose_shards(shards, num_rows, rng)
    num_chosen = sum(shard.num_rows for shard in chosen)
    renderer = Renderer(job, tokenizer)
    samples: list[ShardSample] = []
    singles: list[PackedRow] = []
    runs: list[list[PackedRow]] = []
    for shard in chosen:
        wanted = shard.num_rows if num_chosen <= num_rows else max(1, round(num_rows * shard.num_rows / num_chosen))
        sample, rows = _sample_shard(job, renderer, shard, wanted, rng)
        samples.append(sample)
        share = shard.num_rows / num_chosen if num_chosen else 0.0
        chosen_singles, chosen_runs = _choose_prompts(rows, share, num_prompts, rng)
        singles += chosen_singles
        runs += chosen_runs
    rng.shuffle(singles)
    rng.shuffle(runs)
    num_singles = min(len(singles), NUM_SINGLES)
    prompts = singles[:num_singles] + [row for run in runs for row in run] + singles[num_singles:]
    return CorpusSample(len(shards), total, samples, prompts[:num_prompts])


def _choose_prompts(
    rows: Sequence[PackedRow], share: float, num_prompts: int, rng: random.Random
) -> tuple[list[PackedRow], list[list[PackedRow]]]:
    """A shard's share of the prompts: single rows, and runs of rows which follow each other in its plan."""
    num_singles = min(len(rows), math.ceil(share * min(num_prompts, NUM_SINGLES)))
    single = set(rng.sample(range(len(rows)), num_singles))
    num_runs = min(math.ceil(len(rows) / RUN_ROWS), math.ceil(share * max(0, num_prompts - NUM_SINGLES) / RUN_ROWS))
    starts = rng.sample(range(0, len(rows), RUN_ROWS), num_runs)
    runs = [[rows[i] for i in range(start, min(start + RUN_ROWS, len(rows))) if i not in single] for start in starts]
    return [rows[i] for i in sorted(single)], runs


def choose_shards(shards: Sequence[Shard], num_rows: int, rng: random.Random) -> list[Shard]:
    """All, if the rows are no more than asked for; else at random as many whole ones as fit, at least MIN_SHARDS of
    which parts are read then. In the order of a run, largest first."""
    order = [shard for shard in shards if shard.num_rows]
    if sum(shard.num_rows for shard in order) > num_rows:
        order = rng.sample(order, len(order))
        while len(order) > MIN_SHARDS and sum(shard.num_rows for shard in order) > num_rows:
            order.pop()
    return sorted(order, key=lambda shard: (-shard.size_bytes, shard.name))


def _sample_shard(
    job: Job, renderer: Renderer, shard: Shard, wanted: int, rng: random.Random
) -> tuple[ShardSample, list[PackedRow]]:
    packed: list[PackedRow] = []
    limits: dict[int, tuple[int, int]] = {}
    num_drawn = 0
    for index, rendered in render_sample(renderer, shard, wanted, rng):
        row = pack_row(job, shard, index, rendered)
        packed.append(row)
        if rendered.error is None:
            limits[index] = _max_output(job, rendered), rendered.sampling.n
            num_drawn += not rendered.sampling.is_greedy
    ordered, shared = order_rows(packed)
    is_good = np.array([row.error is None for row in ordered], bool)
    good = [row for row in ordered if row.error is None]
    shared = shared[is_good]  # rows with an error have no tokens: they stand first, and share nothing
    lengths = np.array([len(row.token_ids) for row in good], np.int64)
    borders = cut_at_borders(lengths - shared, shared, job.plan.slice_tokens, job.plan.max_rows_per_slice)
    num_errors = sum(row.error is not None for row in packed)
    num_duplicates = len(packed) - len(ordered)
    num_good = len(packed) - num_errors
    expected = float(num_duplicates)
    computed_share = 1.0
    if len(packed) < shard.num_rows and good:
        num_all_good = num_good * shard.num_rows / len(packed)
        counts = np.array([1 + len(row.duplicates) for row in good])
        num_distinct = expected_rows(counts, num_good, num_all_good)
        expected = num_all_good - num_distinct
        computed = expected_computed(lengths, shared.astype(np.int64), num_distinct / len(good))
        computed_share = min(1.0, computed / num_distinct / max(1e-9, float((lengths - shared).mean())))
    sample = ShardSample(
        name=shard.name,
        num_rows=shard.num_rows,
        num_read=len(packed),
        errors=Counter(row.error.kind for row in packed if row.error is not None),
        prompt_tokens=sum(len(row.token_ids) for row in packed),
        num_duplicates=num_duplicates,
        expected_duplicates=expected,
        prompt_N=lengths,
        shared_N=shared.astype(np.int64),
        max_output_N=np.array([limits[row.row_index][0] for row in good], np.int64),
        num_samples_N=np.array([limits[row.row_index][1] for row in good], np.int64),
        share_drawn=num_drawn / max(1, num_good),
        slice_starts=borders[:-1],
        computed_share=computed_share,
    )
    return sample, good


def render_sample(
    renderer: Renderer, shard: Shard, wanted: int, rng: random.Random
) -> Iterator[tuple[int, RenderedRow]]:
    """Row numbers and rendered rows: all of the shard, or `wanted` of some of its row groups."""
    try:
        with open_shard(shard) as source:
            counts = [source.metadata.row_group(i).num_rows for i in range(source.num_row_groups)]
            groups = choose_groups(counts, wanted, rng)
            num_there = sum(counts[group] for group in groups)
            chosen = iter(sorted(rng.sample(range(num_there), min(wanted, num_there))))
            following = next(chosen, None)
            first = 0  # of the batch, among the rows of the chosen groups
            for group in groups:
                offset = sum(counts[:group]) - first
                for batch in source.iter_batches(_RENDER_BATCH_ROWS, row_groups=[group], columns=renderer.columns):
                    rows = []
                    while following is not None and following < first + len(batch):
                        rows.append(following - first)
                        following = next(chosen, None)
                    taken = batch if len(rows) == len(batch) else batch.take(pa.array(rows, pa.int64()))
                    if rows:
                        yield from zip((offset + first + row for row in rows), renderer.render(taken))
                    first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{public_uri(shard.uri)} cannot be read: {error}") from error


def choose_groups(counts: Sequence[int], wanted: int, rng: random.Random) -> list[int]:
    """Row groups at random until they hold the rows wanted, and at least MIN_ROW_GROUPS; ascending."""
    chosen: list[int] = []
    num_rows = 0
    for group in rng.sample(range(len(counts)), len(counts)):
        if num_rows >= wanted and len(chosen) >= MIN_ROW_GROUPS:
            break
        chosen.append(group)
        num_rows += counts[group]
    return sorted(chosen)


def _max_output(job: Job, rendered: RenderedRow) -> int:
    """Tokens that a row may write at most."""
    limit = job.resolved.max_model_len if job.resolved else None
    room = limit - len(rendered.token_ids) if limit is not None else rendered.sampling.max_tokens
    return max(1, min(rendered.sampling.max_tokens, room))


def expected_rows(counts: Ints, num_read: int, num_all: float) -> float:
    """How many different rows there are among all, when each that was read was read `counts` times."""
    once, twice = float((counts == 1).sum()), float((counts == 2).sum())
    return float(_expected_distinct(len(counts), once, twice, num_read, num_all))


def expected_computed(lengths: Ints, shared: Ints, growth: float) -> float:
    """Tokens to compute of `growth` times as many rows: nodes of their prefix tree (a node is a token with all before
    it), estimated depth by depth, for what is a document at one depth is a question at another."""
    before, after = shared, np.append(shared[1:], 0)
    next_after = np.append(after[1:], 0)
    longest = int(lengths.max())
    seen = _count_by_depth(before, lengths, longest)
    once = _count_by_depth(np.maximum(before, after), lengths, longest)
    # Nodes that a row and the next pass, and neither the row before nor the one after.
    twice = _count_by_depth(np.maximum(before, next_after), after, longest)
    num_read = _count_by_depth(np.zeros_like(lengths), lengths, longest)
    return float(_expected_distinct(seen, once, twice, num_read, growth * num_read).sum())


def _count_by_depth(firsts: Ints, ends: Ints, longest: int) -> Floats:
    """How many of the ranges [first, end) hold each depth below `longest`."""
    changes = np.zeros(longest + 1)
    is_some = ends > firsts
    np.add.at(changes, firsts[is_some], 1)
    np.add.at(changes, ends[is_some], -1)
    return np.cumsum(changes)[:-1]


def _expected_distinct(seen: Any, once: Any, twice: Any, num_read: Any, num_all: Any) -> Floats:
    """How many different things `num_all` draws show, when `num_read` of them showed `seen`, and so many of these once
    and twice: as many again are unseen as Chao 1984 has it, and turn up as fast as Shen, Chao and Lin 2003 say.

    Without anything seen twice every further draw is as new as the last ones were. Numbers, or arrays of one length.
    """
    once, twice = np.asarray(once, np.float64), np.asarray(twice, np.float64)
    fresh = np.maximum(0.0, np.asarray(num_all, np.float64) - num_read) * once / np.maximum(1, num_read)
    unseen = once * once / (2 * np.maximum(twice, 1e-9))
    found = np.where(unseen > 0, unseen * -np.expm1(-fresh / np.maximum(unseen, 1e-9)), 0.0)
    return np.asarray(seen + np.where(twice > 0, found, fresh))
