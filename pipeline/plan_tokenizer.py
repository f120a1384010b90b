"""The tokenizer of a planning process, which plans many shards and loads it once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pipeline.job import Job


def planning_tokenizer(job: Job) -> Any:
    """The job's tokenizer; loading it takes longer than planning a small shard."""
    return _load(job.engine.tokenizer or job.model)


@lru_cache(maxsize=1)
def _load(uri: str) -> Any:
    from actors.weights.checkpoint import load_tokenizer  # imports torch, for which a merge would wait too

    return load_tokenizer(uri)
