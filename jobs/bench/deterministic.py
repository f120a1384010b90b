"""What deterministic mode costs, and how many rows it saves from differing: two functions for benches to call.

Both modes run in one process, on the same prompts, by turns, with speculation off: the ratio is of arithmetic alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from actors.config import EngineConfig, SpeculativeConfig
from actors.engine import Engine
from actors.requests import SamplingParams


def measure_cost(
    model: str, prompts: Sequence[Sequence[int]], sampling: SamplingParams, num_runs: int = 5, **settings: object
) -> float:
    """Seconds with deterministic mode over seconds without: the median of the ratios of neighbouring runs, each with a
    new and empty prefix cache. 1.3 is 30 % slower."""
    ratios = []
    for i in range(num_runs):
        first, second = (_run(model, prompts, sampling, mode, settings)[0] for mode in (i % 2 == 0, i % 2 == 1))
        ratios.append(first / second if i % 2 == 0 else second / first)
    return statistics.median(ratios)


def share_of_rows_that_differ(
    model: str, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, deterministic: bool, **settings: object
) -> float:
    """The share of rows whose token ids change between all at once and three at a time in small steps."""
    small: dict[str, object] = {"max_num_seqs": 3, "max_num_batched_tokens": 64}
    whole = _run(model, prompts, sampling, deterministic, settings)[1]
    cut = _run(model, prompts, sampling, deterministic, {**settings, **small})[1]
    return sum(a != b for a, b in zip(whole, cut)) / len(whole)


def _run(
    model: str, prompts: Sequence[Sequence[int]], sampling: SamplingParams, deterministic: bool, settings: dict
) -> tuple[float, list[list[int]]]:
    config = EngineConfig(
        model=model, deterministic=deterministic, speculative_config=SpeculativeConfig(method="none"), **settings
    )
    engine = Engine(config)
    engine.generate([[1] * 8], SamplingParams(max_tokens=2, ignore_eos=True))
    started = time.perf_counter()
    completions = engine.generate(prompts, sampling)
    seconds = time.perf_counter() - started
    return seconds, [completion.outputs[0].token_ids for completion in completions]
