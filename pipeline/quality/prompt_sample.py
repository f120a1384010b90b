"""A seeded sample of a corpus's prompts, rendered and tokenised as a run would.

Reads only the row groups that hold a chosen row. Called by `pipeline.quality.quality_gate` and `jobs.quality`.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prompts import Renderer
from pipeline.shards import Shard, open_shard

_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class SampledPrompt:
    """One row's prompt; `row` is its number in the shard."""

    shard: str
    row: int
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class PromptSample:
    """Prompts by shard and row; `num_unusable` rows were drawn that a run would answer with an error row."""

    prompts: list[SampledPrompt]
    num_unusable: int


def sample_prompts(renderer: Renderer, shards: Sequence[Shard], num_rows: int, seed: int) -> PromptSample:
    """Draw rows uniformly, without replacement, over all shards; the same files and seed give the same sample."""
    ordered = sorted(shards, key=lambda shard: shard.name)
    ends = list(accumulate(shard.num_rows for shard in ordered))
    drawn = sorted(random.Random(seed).sample(range(ends[-1]), min(num_rows, ends[-1])))
    rows_of: dict[int, list[int]] = {}
    for number in drawn:
        index = bisect_right(ends, number)
        rows_of.setdefault(index, []).append(number - (ends[index] - ordered[index].num_rows))
    prompts = []
    for index, rows in rows_of.items():
        with open_shard(ordered[index]) as source:
            for row, batch in zip(rows, _read_rows(source, rows, renderer.columns)):
                (rendered,) = renderer.render(batch)
                if rendered.error is None:
                    prompts.append(SampledPrompt(ordered[index].name, row, rendered.token_ids))
    return PromptSample(prompts, len(drawn) - len(prompts))


def _read_rows(source: pq.ParquetFile, rows: Sequence[int], columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Each of the (ascending) rows as a batch of its own."""
    starts = [0, *accumulate(source.metadata.row_group(i).num_rows for i in range(source.num_row_groups))]
    wanted: dict[int, list[int]] = {}
    for row in rows:
        wanted.setdefault(bisect_right(starts, row) - 1, []).append(row)
    for group, group_rows in wanted.items():
        first = starts[group]
        for batch in source.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
            yield from (batch.slice(row - first, 1) for row in group_rows if first <= row < first + len(batch))
            first += len(batch)
            if first > group_rows[-1]:
                break
