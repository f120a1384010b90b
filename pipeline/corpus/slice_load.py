"""How long each slice of a corpus plan will take, compared with the others: what dispatch shares out evenly.

By measured step times where there are any, else by counting tokens. What is guessed wrong is evened out while the run
goes on, by workers that help others. Called by `pipeline.corpus.corpus_graph`; knows no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.step_times import StepTimes
from pipeline.corpus_plan.manifest import CorpusManifest
from pipeline.job import Job

USUAL_SHARE_OF_MAX_TOKENS = 0.5
"""Of `max_tokens`, what an answer is taken to have while nobody knows."""

DECODE_BATCH = 64
"""Requests of a step that decodes, at most: what a further token takes is its share of such a step."""


@dataclass(frozen=True, slots=True)
class TokenPrices:
    """What a prompt token and a token of an answer take; in seconds, or in prompt tokens."""

    prompt: float
    answer: float


def token_prices(job: Job, times: StepTimes | None) -> TokenPrices:
    """From a device's step times; without these every token counts the same."""
    if times is None:
        return TokenPrices(1.0, 1.0)
    num_tokens = times.best_num_batched_tokens(max(times.curve_tokens[-1], 1))
    num_prompts = max(1, num_tokens // 256)
    prompt_s = float(times.seconds(num_tokens, num_prompts, num_prompts, num_tokens, num_chunks=0)) / num_tokens
    batch = min(job.engine.max_num_seqs, DECODE_BATCH)
    return TokenPrices(prompt_s, float(times.seconds(batch, batch, batch, batch)) / batch)


def slice_loads(job: Job, manifest: CorpusManifest, prices: TokenPrices) -> NDArray[np.float64]:
    """float64 per slice, all above 0, in the unit of the prices."""
    columns = manifest.slices.columns
    answer_tokens = job.sampling.max_tokens * job.sampling.n * USUAL_SHARE_OF_MAX_TOKENS
    num_rows = columns["num_rows"].astype(np.float64)
    return prices.prompt * (columns["computed_tokens"] + 1.0) + prices.answer * answer_tokens * num_rows
