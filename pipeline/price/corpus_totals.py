"""What a sample makes of the whole corpus: sums over all its shards, and the same for samples that might have been.

Called by `pipeline.price.estimate`; knows no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.price.corpus_sample import CorpusSample, ShardSample

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Totals:
    """Of the corpus, or arrays of them. computed: prompt tokens that an engine computes at best; distinct_prompt: of
    rows that are no duplicates, of which there are distinct_rows; completions: theirs."""

    errors: Any
    good_rows: Any
    duplicates: Any
    distinct_rows: Any
    prompt: Any
    distinct_prompt: Any
    computed: Any
    completions: Any


_NUM_FIELDS = len(fields(Totals))


def _shard_totals(
    shard: ShardSample, rows_X: NDArray[np.int64] | None = None, num_errors: float | None = None
) -> Floats:
    """The fields of Totals for a whole shard, as its sample has them; rows_X: as if these rows were the sample."""
    scale = shard.num_rows / shard.num_read
    errors = sum(shard.errors.values()) if num_errors is None else num_errors
    good = (shard.num_read - errors) * scale
    distinct = max(0.0, good - shard.expected_duplicates)
    prompt_X, computed_X = shard.prompt_N, shard.prompt_N - shard.expected_shared
    mean_samples = float(shard.num_samples_N.mean()) if len(prompt_X) else 0.0
    change = 1.0
    if rows_X is not None and len(prompt_X):
        change = float(prompt_X[rows_X].mean()) / float(prompt_X.mean())
        prompt_X, computed_X = prompt_X[rows_X], computed_X[rows_X]
    mean_prompt = float(prompt_X.mean()) if len(prompt_X) else 0.0
    mean_computed = float(computed_X.mean()) if len(prompt_X) else 0.0
    return np.array(
        [
            errors * scale,
            good,
            shard.expected_duplicates,
            distinct,
            shard.prompt_tokens * scale * change,
            distinct * mean_prompt,
            distinct * mean_computed,
            distinct * mean_samples,
        ]
    )


def totals_of(sample: CorpusSample) -> Totals:
    """Of the corpus: each sampled shard stands for as many rows as it has."""
    total, num_rows = np.zeros(_NUM_FIELDS), sum(shard.num_rows for shard in sample.shards)
    for shard in sample.shards:
        total += _shard_totals(shard)
    return Totals(*(total * sample.num_rows / max(1, num_rows)))


def draw_totals(sample: CorpusSample, num_draws: int, rng: np.random.Generator) -> Totals:
    """So many totals as arrays: of what was sampled, shards and rows are drawn again; what was counted whole stays."""
    drawn = np.empty((num_draws, _NUM_FIELDS))
    has_all_shards = sum(shard.num_rows for shard in sample.shards) == sample.num_rows
    whole = {shard.name: _shard_totals(shard) for shard in sample.shards}
    for i in range(num_draws):
        shards: Sequence[ShardSample] = sample.shards
        if not has_all_shards:
            shards = [sample.shards[k] for k in rng.integers(len(shards), size=len(shards))]
        total, num_rows = np.zeros(_NUM_FIELDS), 0
        for shard in shards:
            num_rows += shard.num_rows
            if shard.is_whole and (has_all_shards or len(sample.shards) > 1):
                total += whole[shard.name]
                continue
            rows_X = rng.integers(len(shard.prompt_N), size=len(shard.prompt_N)) if len(shard.prompt_N) else None
            share = sum(shard.errors.values()) / shard.num_read
            total += _shard_totals(shard, rows_X, float(rng.binomial(shard.num_read, share)))
        drawn[i] = total * sample.num_rows / max(1, num_rows)
    return Totals(*drawn.T)
