"""A shard's files: `<shard>.parquet` in `results/`, in `metrics/` and, where rows failed, in `errors/`.

Made of the shard's slices and its input. The published results are the done mark: written whole, checked, and read
back before a slice is removed. Knows no Ray and no engine; called by the graph's merge tasks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.batch.batch_output import publish_batch_output
from pipeline.bill.pricing import Price
from pipeline.drafts import DrafterCount, acceptance_length, sum_drafts
from pipeline.job import Job
from pipeline.parquet import ParquetBuffer, read_metadata, to_parquet
from pipeline.shards import Shard, ShardError, open_shard
from pipeline.slices import ERROR_TYPE, SLICES, SliceTimes, answer_fields, read_slices
from pipeline.storage import FileInfo, Storage

RESULTS, METRICS, ERRORS = "results", "metrics", "errors"
MERGE_BATCH_ROWS = 8192
FOOTER_THREADS = 16


class OutputError(ValueError):
    """The output cannot be made of these inputs; the message names the column or file and the way out."""


def passthrough_columns(job: Job, schema: pa.Schema, shard: str) -> list[str]:
    """The input columns that the results of this shard repeat.

    OutputError for a column that Shoal also writes. The `error` column of an errors file, told by its type, is
    Shoal's own and left out, so that failed rows can be the input of another run as they are.
    """
    if job.input.passthrough == "none":
        return []
    if job.input.passthrough == "all":
        names = [name for name in schema.names if not _is_own_error(schema, name)]
    else:
        names = list(job.input.passthrough)
    taken = {column.name for column in answer_fields(job.answer_shape)} & set(names)
    if taken:
        raise OutputError(
            f"shard {shard}: the input column {', '.join(sorted(taken))} has the name of a column that Shoal writes; "
            "rename it, or list the columns to keep in input.passthrough"
        )
    return names


def _is_own_error(schema: pa.Schema, name: str) -> bool:
    return name == "error" and schema.field(name).type == ERROR_TYPE


@dataclass(slots=True)
class ShardMetrics:
    """The one row of `metrics/<shard>.parquet`.

    Token counts are the sums of the results' columns; `duplicate_*` is the part of them that was not computed
    again. `device_seconds` and `cost_usd` are the rows'; load and idle, with their cost in `overhead_usd`, are what
    the workers did besides while this shard's slices were being published. So are `num_verify_steps`, `drafters`,
    their failures and the estimate of what they saved: all that the workers' drafters did meanwhile, for whichever
    shard; over the run they are the whole. Of a slice with rows of several shards each has its share of all that, in
    proportion to its rows' device seconds; in `num_slices` it counts for each of them.

    `achievable_prefix_tokens` is what the prompts of one plan (the shard, or with `plan.scope: corpus` its share of the
    corpus) have in common: each distinct beginning computed once, by a single engine that forgets nothing. With one
    engine and one plan, cached tokens are at most that. They can be more where engines outlive a plan (shards that
    are planned apart and begin alike, a run that is repeated) or where a prompt quotes an answer. They are fewer where
    several engines compute the same beginning, where a row was tried again, and by:
    - `evicted_prefix_tokens`: that the same engine had computed before, and had no pages to keep;
    - `border_prefix_tokens`: what slices' first rows have in common with the row before, which another engine answered,
      or at the same time;
    - `short_prefix_tokens`: of rows that were begun while a row before them computed less than an engine waits for.
    """

    shard: str
    rows_in: int
    rows_ok: int
    rows_error: int
    rows_duplicate: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    duplicate_prompt_tokens: int
    duplicate_completion_tokens: int
    achievable_prefix_tokens: int
    evicted_prefix_tokens: int
    border_prefix_tokens: int
    short_prefix_tokens: int
    num_slices: int
    attempts: int
    wall_seconds: float
    prefill_seconds: float
    decode_seconds: float
    idle_seconds: float
    load_seconds: float
    lost_seconds: float
    write_seconds: float
    device_seconds: float
    cost_usd: float
    overhead_usd: float
    tokens_per_second_per_device: float | None
    prefix_hit_rate: float | None
    prefix_hit_rate_achievable: float | None
    acceptance_rate: float | None
    acceptance_length: float | None
    num_verify_steps: int
    num_drafter_failures: int
    saved_by_speculation_seconds: float
    drafters: list[DrafterCount]
    time_to_first_token_p50_s: float | None
    time_to_first_token_p90_s: float | None
    time_to_first_token_p99_s: float | None
    inter_token_p50_s: float | None
    inter_token_p90_s: float | None
    inter_token_p99_s: float | None
    num_preemptions: int
    peak_pages: int
    energy_joules: float | None
    usd_per_million_tokens: float | None
    usd_per_device_hour: float | None
    price_source: str
    node: str
    device: str
    fingerprint: str
    etag: str
    notes: list[str] = field(default_factory=list)


_METRIC_TYPES = {
    "str": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "float | None": pa.float64(),
    "list[str]": pa.list_(pa.string()),
    "list[DrafterCount]": pa.list_(
        pa.struct([("drafter", pa.string()), ("drafted_tokens", pa.int64()), ("accepted_tokens", pa.int64())])
    ),
}
METRICS_SCHEMA = pa.schema([pa.field(column.name, _METRIC_TYPES[str(column.type)]) for column in fields(ShardMetrics)])


def is_published(output: Storage, shard: Shard, fingerprint: str, results: Mapping[str, FileInfo]) -> bool:
    """Whether this very input has its results, by this very job. `results` maps path to file, from one listing."""
    file = results.get(f"{RESULTS}/{shard.name}.parquet")
    if file is None:
        return False
    metadata = read_metadata(output, file)
    return metadata.get("fingerprint") == fingerprint and metadata.get("etag") == shard.etag


def published_shards(output: Storage, shards: Sequence[Shard], fingerprint: str) -> set[str]:
    """Names of the shards that need nothing more; one listing and one footer per shard."""
    results = {file.path: file for file in output.list(RESULTS)}
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        done = pool.map(lambda shard: is_published(output, shard, fingerprint, results), shards)
        return {shard.name for shard, is_done in zip(shards, done) if is_done}


def merge_shard(job: Job, shard: Shard, output: Storage, slice_paths: Sequence[str], fingerprint: str) -> ShardMetrics:
    """Publish a shard from its slices: metrics, errors, then results; then remove all its slices.

    The results have the input's rows in the input's order. Holds all answers of the shard in memory, and of the
    input a few thousand rows at a time. ShardError if rows are missing or double, or the input has changed.
    """
    started = time.perf_counter()
    answers, times = read_slices(job.answer_shape, output, slice_paths)
    return publish_answers(job, shard, output, answers, times, fingerprint, started)


def publish_answers(
    job: Job,
    shard: Shard,
    output: Storage,
    answers: pa.Table,
    times: Sequence[SliceTimes],
    fingerprint: str,
    started: float,
) -> ShardMetrics:
    """`merge_shard`, of answers that were read before.

    answers: `slice_schema`; a row whose `row_index` is null was computed for another shard, and only its duplicates are
    of this one. started: when reading began, by time.perf_counter.
    """
    folding = _fold_out(answers, shard)
    results, failed = _assemble(job, shard, answers, folding, fingerprint)
    with open_shard(shard):  # raises if the input was changed while it was read
        pass
    metrics = _measure(shard, answers, folding, times, fingerprint)
    publish_batch_output(job, shard, output, results)
    metrics.write_seconds += time.perf_counter() - started
    _publish_shard(output, shard, metrics, results, failed)
    output.remove_tree(f"{SLICES}/{shard.name}")
    return metrics


@dataclass(frozen=True, slots=True)
class _Folding:
    """For each row of the input: which row of the answers table it has, and whether it only shares it."""

    source: np.ndarray
    is_duplicate: np.ndarray


def _fold_out(answers: pa.Table, shard: Shard) -> _Folding:
    """Check that the slices hold each input row exactly once, and say where."""
    is_own = answers["row_index"].is_valid().to_numpy()
    own = answers["row_index"].drop_null().to_numpy()
    num_folded = pc.list_value_length(answers["duplicates"]).to_numpy()
    folded = pc.list_flatten(answers["duplicates"]).to_numpy()
    rows = np.concatenate([own, folded]).astype(np.int64)
    if not np.array_equal(np.sort(rows), np.arange(shard.num_rows)):
        raise ShardError(
            f"its slices hold {len(rows)} rows, {len(np.unique(rows))} of them different, and the input has "
            f"{shard.num_rows}; remove {SLICES} in the output and run the same command again"
        )
    positions = np.arange(answers.num_rows)
    source = np.empty(shard.num_rows, dtype=np.int64)
    source[own] = positions[is_own]
    source[folded] = np.repeat(positions, num_folded)
    is_duplicate = np.zeros(shard.num_rows, dtype=bool)
    is_duplicate[folded] = True
    return _Folding(source, is_duplicate)


def _assemble(
    job: Job, shard: Shard, answers: pa.Table, folding: _Folding, fingerprint: str
) -> tuple[bytes, bytes | None]:
    """The results file, and the errors file if any row failed."""
    added = [column.name for column in answer_fields(job.answer_shape)]
    has_errors = answers["error"].null_count < answers.num_rows
    metadata = {"fingerprint": fingerprint, "etag": shard.etag, "shard": shard.name}
    results, failed = ParquetBuffer(metadata), ParquetBuffer({**metadata, "errors": True})
    with open_shard(shard) as source:
        kept = passthrough_columns(job, source.schema_arrow, shard.name)
        retried = [column for column in source.schema_arrow.names if not _is_own_error(source.schema_arrow, column)]
        results.start(_join_schemas(source.schema_arrow, kept, answer_fields(job.answer_shape)))
        for start, batch in _input_batches(source, retried if has_errors else kept):
            rows = slice(start, start + len(batch))
            answered = _answers_of(answers, folding, rows).select(added)
            results.write(_beside(batch.select(kept), answered))
            if has_errors:
                mask = answered["error"].is_valid()
                failed.write(_beside(batch, answered.select(["error"])).filter(mask))
    return results.finish(), failed.finish() if has_errors else None


def _input_batches(source: pq.ParquetFile, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    start = 0
    for group in range(source.num_row_groups):  # of groups that are asked for at once, all bytes are held to the end
        for batch in source.iter_batches(MERGE_BATCH_ROWS, row_groups=[group], columns=columns):
            yield start, pa.Table.from_batches([batch])
            start += len(batch)
    if start != source.metadata.num_rows:
        raise ShardError(f"its footer promises {source.metadata.num_rows} rows and {start} could be read")


def _answers_of(answers: pa.Table, folding: _Folding, rows: slice) -> pa.Table:
    """The answers of some input rows; one that shares another's answer cost nothing, and all its prompt was cached."""
    table = answers.take(pa.array(folding.source[rows]))
    is_duplicate = pa.array(folding.is_duplicate[rows])
    if not folding.is_duplicate[rows].any():
        return table
    free: dict[str, Any] = {"device_seconds": 0.0, "cost_usd": 0.0, "drafted_tokens": 0, "accepted_tokens": 0}
    free["cached_tokens"] = table["prompt_tokens"]
    for column, value in free.items():
        index = table.schema.get_field_index(column)
        table = table.set_column(index, table.schema.field(column), pc.if_else(is_duplicate, value, table[column]))
    return table


def _join_schemas(schema: pa.Schema, kept: Sequence[str], added: Sequence[pa.Field]) -> pa.Schema:
    return pa.schema([*(schema.field(name) for name in kept), *added])


def _beside(left: pa.Table, right: pa.Table) -> pa.Table:
    return pa.table([*left.columns, *right.columns], schema=pa.schema([*left.schema.remove_metadata(), *right.schema]))


def _measure(
    shard: Shard, answers: pa.Table, folding: _Folding, times: Sequence[SliceTimes], fingerprint: str
) -> ShardMetrics:
    num_errors = int(np.count_nonzero(answers["error"].is_valid().to_numpy()[folding.source]))
    duplicates = folding.source[folding.is_duplicate]
    computed = answers.filter(answers["row_index"].is_valid())

    def total(column: str) -> int:
        return int(computed[column].to_numpy().sum())

    def of_duplicates(column: str) -> int:
        return int(answers[column].to_numpy()[duplicates].sum())

    prices = {t.usd_per_device_hour for t in times}
    prompt_tokens, completion_tokens = total("prompt_tokens"), total("completion_tokens")
    device_seconds = _exact_sum(computed["device_seconds"])
    cost_usd = _exact_sum(computed["cost_usd"])
    overhead_usd = sum((t.load_s + t.idle_s + t.lost_s) * Price(t.usd_per_device_hour, "").cost_usd(1.0) for t in times)
    achievable = sum(t.achievable_prefix_tokens for t in times)
    computed_tokens = prompt_tokens + completion_tokens
    first = _percentiles(computed["time_to_first_token_s"])
    between = _percentiles(computed["inter_token_s"])
    drafts = sum_drafts(t.drafts for t in times)
    return ShardMetrics(
        shard=shard.name,
        rows_in=shard.num_rows,
        rows_ok=shard.num_rows - num_errors,
        rows_error=num_errors,
        rows_duplicate=len(duplicates),
        prompt_tokens=prompt_tokens + of_duplicates("prompt_tokens"),
        cached_tokens=total("cached_tokens") + of_duplicates("prompt_tokens"),
        completion_tokens=completion_tokens + of_duplicates("completion_tokens"),
        drafted_tokens=total("drafted_tokens"),
        accepted_tokens=total("accepted_tokens"),
        duplicate_prompt_tokens=of_duplicates("prompt_tokens"),
        duplicate_completion_tokens=of_duplicates("completion_tokens"),
        achievable_prefix_tokens=achievable,
        evicted_prefix_tokens=sum(t.evicted_prefix_tokens for t in times),
        border_prefix_tokens=sum(t.border_prefix_tokens for t in times),
        short_prefix_tokens=sum(t.short_prefix_tokens for t in times),
        num_slices=len(times),
        attempts=max((t.attempts for t in times), default=0),
        wall_seconds=_wall_seconds(times),
        prefill_seconds=sum(t.prefill_s for t in times),
        decode_seconds=sum(t.decode_s for t in times),
        idle_seconds=sum(t.idle_s for t in times),
        load_seconds=sum(t.load_s for t in times),
        lost_seconds=sum(t.lost_s for t in times),
        write_seconds=sum(t.write_s for t in times),
        device_seconds=device_seconds,
        cost_usd=cost_usd,
        overhead_usd=overhead_usd,
        tokens_per_second_per_device=_ratio(computed_tokens, device_seconds),
        prefix_hit_rate=_ratio(total("cached_tokens"), prompt_tokens),
        prefix_hit_rate_achievable=_ratio(achievable, prompt_tokens),
        acceptance_rate=_ratio(total("accepted_tokens"), total("drafted_tokens")),
        acceptance_length=acceptance_length(drafts.accepted_tokens, drafts.num_verify_steps),
        num_verify_steps=drafts.num_verify_steps,
        num_drafter_failures=drafts.num_failures,
        saved_by_speculation_seconds=drafts.saved_s,
        drafters=drafts.drafters,
        time_to_first_token_p50_s=first[0],
        time_to_first_token_p90_s=first[1],
        time_to_first_token_p99_s=first[2],
        inter_token_p50_s=between[0],
        inter_token_p90_s=between[1],
        inter_token_p99_s=between[2],
        num_preemptions=total("num_preemptions"),
        peak_pages=max((t.peak_pages for t in times), default=0),
        energy_joules=None,
        usd_per_million_tokens=_ratio((cost_usd + overhead_usd) * 1e6, computed_tokens),
        usd_per_device_hour=prices.pop() if len(prices) == 1 else None,
        price_source=_joined(t.price_source for t in times),
        node=_joined(t.node for t in times),
        device=_joined(t.device for t in times),
        fingerprint=fingerprint,
        etag=shard.etag,
        notes=sorted({note for t in times for note in t.notes}),
    )


def _publish_shard(output: Storage, shard: Shard, metrics: ShardMetrics, results: bytes, failed: bytes | None) -> None:
    """Results come last: whoever sees them sees the rest too."""
    assert metrics.rows_in == metrics.rows_ok + metrics.rows_error == shard.num_rows
    table = pa.Table.from_pylist([asdict(metrics)], schema=METRICS_SCHEMA)
    metadata = {"fingerprint": metrics.fingerprint, "etag": metrics.etag, "shard": shard.name}
    output.write_whole(f"{METRICS}/{shard.name}.parquet", to_parquet(table, metadata))
    if failed is None:
        output.remove(f"{ERRORS}/{shard.name}.parquet")
    else:
        output.write_whole(f"{ERRORS}/{shard.name}.parquet", failed)
    published = read_metadata(output, output.write_whole(f"{RESULTS}/{shard.name}.parquet", results))
    if published.get("num_rows") != shard.num_rows or published.get("etag") != shard.etag:
        raise ShardError(f"{RESULTS}/{shard.name}.parquet reads back {published} for {shard.num_rows} rows")


def _wall_seconds(times: Sequence[SliceTimes]) -> float:
    """From the first to the last moment of work on the shard, pauses between runs not counted."""
    return sum(
        max(t.finished_at for t in times if t.run == run) - min(t.started_at for t in times if t.run == run)
        for run in {t.run for t in times}
    )


def _percentiles(column: pa.ChunkedArray) -> list[float | None]:
    values = column.drop_null().to_numpy()
    return [float(value) for value in np.percentile(values, [50, 90, 99])] if len(values) else [None] * 3


def _exact_sum(column: pa.ChunkedArray) -> float:
    return math.fsum(column.to_numpy())


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _joined(words: Iterator[str]) -> str:
    return ", ".join(sorted(set(words)))
