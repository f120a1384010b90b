"""Refuse a run whose model is too far from its reference, on a sample of the job's own prompts, before it costs money.

Runs on the machine that submits, before Ray starts. What was measured stays in the output as quality.json, so that
the same job is not measured again. Called by `jobs.run`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from actors.config import EngineConfig
from actors.quality import Estimate, Quality, QualityError, compare_configs, summarise
from actors.weights.checkpoint import check_model, load_tokenizer
from pipeline.job import Job, QualitySection, identify_model
from pipeline.prompts import Renderer
from pipeline.quality.prompt_sample import sample_prompts
from pipeline.shards import Shard
from pipeline.storage import Storage, public_uri

FILE = "quality.json"


@dataclass(frozen=True, slots=True)
class Measured:
    """A job's model against its reference. `key` tells which job, reference and sample it was."""

    key: str
    quality: Quality
    details: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"key": self.key, **self.details, "quality": asdict(self.quality)}


def check_quality(job: Job, shards: Sequence[Shard], output: Storage, say: Callable[[str], None]) -> Measured | None:
    """Measure a resolved job's model, or find it measured in its output; QualityError if it misses a limit.

    None for a job without a `quality` section, and for an output of another job, which is refused elsewhere.
    """
    section = job.quality
    if section is None or _is_of_another_job(job, output):
        return None
    check_model(section.reference)
    key = _key(job, section)
    measured = _read(output, key)
    if measured is None:
        say(f"quality: comparing with {public_uri(section.reference)} on {section.sample} rows first")
        measured = _measure(job, section, shards, key)
    _judge(job, section, measured)
    say(f"quality: {_describe(measured.quality)}")
    return measured


def keep_measured(output: Storage, measured: Measured | None) -> None:
    """Write quality.json, if something was measured."""
    if measured is not None:
        output.write_whole(FILE, json.dumps(measured.to_json(), indent=2).encode())


def reference_config(job: Job, reference: str) -> EngineConfig:
    """The job's engine with the reference in it as it is stored: no rounding at load, keys and values not quantised."""
    return _here(job.engine).model_copy(
        update={"model": reference, "quantization": "auto", "kv_cache_dtype": "auto", "linear_compute": "auto"}
    )


def _here(config: EngineConfig) -> EngineConfig:
    """A machine that only submits may have no GPU: there the same numbers are computed on its CPU."""
    needs_gpu = config.device.startswith("cuda") and not torch.cuda.is_available()
    return config.model_copy(update={"device": "auto"}) if needs_gpu else config


def _measure(job: Job, section: QualitySection, shards: Sequence[Shard], key: str) -> Measured:
    renderer = Renderer(job, load_tokenizer(job.engine.tokenizer or job.model))
    sample = sample_prompts(renderer, shards, section.sample, section.seed)
    if not sample.prompts:
        raise QualityError(
            f"quality: none of {sample.num_unusable} rows drawn can be answered, so nothing can be compared; "
            "raise quality.sample, or see what is wrong with the prompts"
        )
    sampling = job.sampling.model_copy(update={"max_tokens": min(job.sampling.max_tokens, section.max_tokens)})
    sampling = sampling.model_copy(update={"min_tokens": min(sampling.min_tokens, sampling.max_tokens)})
    prompts = [prompt.token_ids for prompt in sample.prompts]
    rows = compare_configs(reference_config(job, section.reference), _here(job.engine), prompts, sampling)
    details = {
        "reference": public_uri(section.reference),
        "model": public_uri(job.model),
        "rows_drawn": len(prompts) + sample.num_unusable,
        "device": "cuda" if torch.cuda.is_available() and job.engine.device != "cpu" else "cpu",
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Measured(key, summarise(rows, "answer", section.seed), details)


def _judge(job: Job, section: QualitySection, measured: Measured) -> None:
    quality = measured.quality
    limits = (
        ("KL", "max_kl", section.max_kl, quality.kl_mean, "above"),
        ("top-1 agreement", "min_top1", section.min_top1, quality.top1_agreement, "below"),
        ("exact match", "min_exact_match", section.min_exact_match, quality.exact_match, "below"),
    )
    missed = [
        f"  {figure} {_show(estimate)} is {side} quality.{key}={limit:g}"
        for figure, key, limit, estimate, side in limits
        if limit is not None and (estimate.value > limit if side == "above" else estimate.value < limit)
    ]
    if missed:
        lines = "\n".join(missed)
        raise QualityError(
            f"quality: {public_uri(job.model)} as this job runs it is too far from {public_uri(section.reference)}, "
            f"on {quality.num_rows} rows of its own prompts ({_describe(quality)}):\n{lines}\n"
            "nothing was run. Give a better quantised model (see shoal quantize), engine.quantization: none, "
            "engine.kv_cache_dtype: auto, a larger quality.sample where the interval is wide, or other limits"
        )


def _describe(quality: Quality) -> str:
    return (
        f"KL {_show(quality.kl_mean)}, 99th percentile {quality.kl_p99.value:.3g}, top-1 "
        f"{_show(quality.top1_agreement)}, exact match {_show(quality.exact_match)}, "
        f"{quality.num_rows} rows, {quality.num_tokens:,} tokens"
    )


def _show(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def _key(job: Job, section: QualitySection) -> str:
    """What decides the figures: the job's fingerprint, the reference, and the sample; not the limits."""
    parts = [job.fingerprint(), identify_model(section.reference), section.sample, section.max_tokens, section.seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _is_of_another_job(job: Job, output: Storage) -> bool:
    try:
        return bool(json.loads(output.read_bytes("run.json"))["fingerprint"] != job.fingerprint())
    except FileNotFoundError:
        return False


def _read(output: Storage, key: str) -> Measured | None:
    try:
        found = json.loads(output.read_bytes(FILE))
    except FileNotFoundError:
        return None
    if found.pop("key") != key:
        return None
    values: dict[str, Any] = found.pop("quality")
    estimates = {name: Estimate(**value) for name, value in values.items() if isinstance(value, dict)}
    return Measured(key, Quality(**{**values, **estimates}), found)
