"""`shoal quality MODEL_A MODEL_B`: how far B is from A on one's own prompts, per shard and in total.

A is the reference. The two are loaded one after the other, each as its engine settings say; see `actors.quality` for
what is measured. Prints a table and writes it as Parquet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from actors.config import EngineConfig
from actors.quality import METRICS, Estimate, Part, Quality, QualityError, RowQuality, compare_configs, summarise
from actors.requests import SamplingParams
from actors.weights.checkpoint import check_model, load_tokenizer
from jobs.run import named_models
from pipeline.bill.progress import new_console
from pipeline.fields.field_gain import settle_field_order
from pipeline.job import Job, JobError, explain_validation_error, job_from_dict, load_job
from pipeline.parquet import to_parquet
from pipeline.prompts import Renderer
from pipeline.quality.prompt_sample import SampledPrompt, sample_prompts
from pipeline.shards import list_shards
from pipeline.storage import Storage, absolute_uri, public_uri, split_uri

PARTS: tuple[Part, ...] = ("answer", "prompt")
MAX_PRINTED_SHARDS = 20

_HEADINGS = {
    "perplexity_a": "perplexity of A",
    "perplexity_b": "perplexity of B",
    "kl_mean": "KL(A || B), mean",
    "kl_p99": "99th percentile",
    "top1_agreement": "top-1 agreement",
    "exact_match": "exact match",
}


@dataclass(frozen=True, slots=True)
class Prompts:
    """Where prompts come from: Parquet files with one of the columns, or a job file's own input and prompt."""

    path: str | None = None
    prompt_column: str | None = None
    messages_column: str | None = None
    system: str | None = None
    job: str | None = None


@dataclass(frozen=True, slots=True)
class ReportRow:
    """The figures of one part of one shard, or of all (shard None)."""

    shard: str | None
    part: Part
    quality: Quality


def quality(
    model_a: str,
    model_b: str,
    prompts: Prompts,
    *,
    settings_a: Sequence[str] = (),
    settings_b: Sequence[str] = (),
    num_rows: int = 256,
    max_tokens: int = 128,
    seed: int = 0,
    out: str | None = None,
) -> int:
    """Compare, print, and write the report to `out`; returns 0. ValueError for what cannot be compared.

    settings_*: engine settings, KEY=VALUE with a YAML value.
    """
    console = new_console()
    job = _job(model_a, prompts, _parse_settings(settings_a), max_tokens)
    other = job.model_copy(update={"engine": _engine(model_b, _parse_settings(settings_b)), "model": model_b})
    job, other = job.resolve(named_models()), other.resolve(named_models())
    for one in (job, other):
        check_model(one.model)
    shards = list_shards(job).good
    job = settle_field_order(job, shards, Storage(job.output.path), keep=False)
    renderer = Renderer(job, load_tokenizer(job.engine.tokenizer or job.model))
    sample = sample_prompts(renderer, shards, num_rows, seed)
    if not sample.prompts:
        raise QualityError(f"none of the {sample.num_unusable} rows drawn has a prompt that can be answered")
    rows = compare_configs(job.engine, other.engine, [p.token_ids for p in sample.prompts], job.sampling)
    report = build_report(sample.prompts, rows, seed)
    about = {
        "model_a": public_uri(job.model),
        "model_b": public_uri(other.model),
        "settings_a": list(settings_a),
        "settings_b": list(settings_b),
        "rows_drawn": len(sample.prompts) + sample.num_unusable,
        "rows_compared": len(rows),
        "max_tokens": job.sampling.max_tokens,
        "seed": seed,
    }
    print_report(console, report, about)
    if out is not None:
        _write(out, report, about)
        console.print(f"report: {out}", highlight=False, soft_wrap=True)
    return 0


def build_report(prompts: Sequence[SampledPrompt], rows: Sequence[RowQuality], seed: int = 0) -> list[ReportRow]:
    """Summarise all rows, then those of each shard, by part; a part without tokens has no row."""
    shards: dict[str | None, list[RowQuality]] = {None: list(rows)}
    for row in rows:
        shards.setdefault(prompts[row.index].shard, []).append(row)
    return [
        ReportRow(shard, part, summarise(own, part, seed))
        for shard, own in shards.items()
        for part in PARTS
        if any(_num_tokens(row, part) for row in own)
    ]


def report_table(report: Sequence[ReportRow]) -> pa.Table:
    """A row per shard and part, the total's shard being null; three columns per figure."""
    types: dict[str, pa.DataType] = {"shard": pa.string(), "part": pa.string()}
    types |= {"num_rows": pa.int64(), "num_tokens": pa.int64()}
    types |= {name + end: pa.float64() for name in METRICS for end in ("", "_low", "_high")}
    rows = [{"shard": row.shard, "part": row.part, **row.quality.to_row()} for row in report]
    return pa.Table.from_pylist(rows, schema=pa.schema(types))


def print_report(console: Console, report: Sequence[ReportRow], about: Mapping[str, Any]) -> None:
    """Print all figures of the total, and the main ones of the answers of the first shards, with their intervals."""
    console.print(
        f"A {about['model_a']} {' '.join(about['settings_a'])}\nB {about['model_b']} {' '.join(about['settings_b'])}\n"
        f"{about['rows_compared']} of {about['rows_drawn']} rows drawn could be compared; A is the reference",
        highlight=False,
        soft_wrap=True,
    )
    total = [row for row in report if row.shard is None]
    console.print(_total_table(total), highlight=False)
    by_shard = [row for row in report if row.shard is not None and row.part == "answer"]
    if len(by_shard) > 1:
        console.print(_shard_table(by_shard[:MAX_PRINTED_SHARDS]), highlight=False)
    if len(by_shard) > MAX_PRINTED_SHARDS:
        console.print(f"and {len(by_shard) - MAX_PRINTED_SHARDS} more shards, in the report", highlight=False)


def _total_table(total: Sequence[ReportRow]) -> Table:
    """A line per figure, and a column per part of the text."""
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for row in total:
        table.add_column(f"{row.part}s", justify="right")
        table.add_column("95 % interval", style="dim")
    table.add_row("tokens", *(cell for row in total for cell in (f"{row.quality.num_tokens:,}", "")))
    for metric in METRICS:
        cells = [_show(metric, getattr(row.quality, metric)) for row in total]
        table.add_row(_HEADINGS[metric], *(cell for pair in cells for cell in pair))
    return table


def _shard_table(rows: Sequence[ReportRow]) -> Table:
    """A line per shard: its answers' main figures, each with its interval below."""
    metrics = ("kl_mean", "kl_p99", "top1_agreement", "exact_match")
    table = Table(box=None, pad_edge=False)
    table.add_column("shard")
    for heading in ("rows", *(_HEADINGS[metric] for metric in metrics)):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [_show(metric, getattr(row.quality, metric)) for metric in metrics]
        shown = [f"{value}\n[dim]{interval}[/dim]" for value, interval in cells]
        table.add_row(row.shard, f"{row.quality.num_rows:,}", *shown)
    return table


def _show(metric: str, estimate: Estimate) -> tuple[str, str]:
    """A figure and its interval as text."""
    if metric in ("top1_agreement", "exact_match"):
        return f"{estimate.value:.2%}", f"{100 * estimate.low:.1f} to {estimate.high:.1%}"
    digits = "#.5g" if metric.startswith("perplexity") else ".2g"
    return f"{estimate.value:{digits}}", f"{estimate.low:{digits}} to {estimate.high:{digits}}"


def _num_tokens(row: RowQuality, part: Part) -> int:
    return row.num_prompt if part == "prompt" else len(row.kl_T) - row.num_prompt


def _job(model: str, prompts: Prompts, settings: Mapping[str, Any], max_tokens: int) -> Job:
    """A job that has the prompts, and A as its model; its output is never written."""
    if (prompts.path is None) == (prompts.job is None):
        raise JobError("give either --prompts with a column, or --job with a job file, whose prompts are taken")
    if prompts.job is not None:
        job = load_job(prompts.job)
        sampling = job.sampling.model_copy(update={"max_tokens": min(max_tokens, job.sampling.max_tokens)})
        sampling = sampling.model_copy(update={"min_tokens": min(sampling.min_tokens, sampling.max_tokens)})
        update = {"model": model, "engine": _engine(model, settings), "sampling": sampling, "quality": None}
        return job.model_copy(update=update)
    columns = {"prompt_column": prompts.prompt_column, "messages_column": prompts.messages_column}
    if not any(columns.values()):
        columns["prompt_column"] = "prompt"
    assert prompts.path is not None
    return job_from_dict(
        {
            "input": {"path": absolute_uri(prompts.path, Path.cwd()), **columns},
            "prompt": {"system": prompts.system, "chat_template": True} if prompts.system else {},
            "model": model,
            "engine": _engine(model, settings).model_dump(),
            "sampling": SamplingParams(max_tokens=max_tokens).model_dump(),
            "output": {"path": "memory://no-output"},
        },
        "shoal quality",
    )


def _engine(model: str, settings: Mapping[str, Any]) -> EngineConfig:
    try:
        return EngineConfig.model_validate({"model": model, **settings})
    except ValidationError as error:
        lines = "; ".join(explain_validation_error(error, EngineConfig))
        raise JobError(f"the engine settings of {model} are not valid: {lines}") from error


def _parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    parsed = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise JobError(f"{setting!r} is no engine setting; write KEY=VALUE, such as kv_cache_dtype=int8")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise JobError(f"{setting!r}: the value is not valid YAML: {error}") from error
    return parsed


def _write(out: str, report: Sequence[ReportRow], about: Mapping[str, Any]) -> None:
    storage, name = split_uri(absolute_uri(out, Path.cwd()))
    storage.write_whole(name, to_parquet(report_table(report), {"quality": about}))
