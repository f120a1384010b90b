"""What a run leaves behind: slice objects while it runs; results, metrics and errors of a shard once it is done.

The published object is the done mark: it is written whole, checked, and read back before anything is removed.
Knows no Ray and no engine; the graph's actor publishes slices, its merge task publishes shards, status reads both.

Layout below the output: `_slices/<shard>/<slice>.parquet`, `results/<shard>.parquet`, `metrics/<shard>.parquet`,
`errors/<shard>.parquet`. Each carries a JSON text under the key `shoal` in its Parquet metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.requests import Completion, SamplingParams, TokenLogprob
from pipeline.job import Job
from pipeline.prefix_plan import PlannedRow, ShardPlan, Slice
from pipeline.pricing import Price
from pipeline.shards import Shard, ShardError, open_shard
from pipeline.storage import FileInfo, Storage

SLICES, RESULTS, METRICS, ERRORS = "_slices", "results", "metrics", "errors"
METADATA_KEY = b"shoal"
MERGE_BATCH_ROWS = 8192
FOOTER_THREADS = 16
_SLICE_NAME = re.compile(r"(\d{5,})-of-(\d{5,})-([0-9a-f]{12})-([0-9a-f]{8})-([0-9a-f]{8})\.parquet")

ERROR_TYPE = pa.struct([("kind", pa.string()), ("message", pa.string())])
_TOP_TYPE = pa.struct([("token_id", pa.int64()), ("token", pa.string()), ("logprob", pa.float64())])
_LOGPROB_TYPE = pa.struct(
    [("token_id", pa.int64()), ("token", pa.string()), ("logprob", pa.float64()), ("top", pa.list_(_TOP_TYPE))]
)


class OutputError(ValueError):
    """The output cannot be made of these inputs; the message names the column or file and the way out."""


# --- columns ---------------------------------------------------------------------------------------------------


def answer_fields(sampling: SamplingParams) -> list[pa.Field]:
    """The columns that Shoal adds to a row. For n > 1 the text columns are lists, one entry per completion."""

    def per_completion(type_: pa.DataType) -> pa.DataType:
        return pa.list_(type_) if sampling.n > 1 else type_

    columns = [
        ("response", per_completion(pa.string())),
        ("finish_reason", per_completion(pa.string())),
        ("error", ERROR_TYPE),
        ("prompt_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("drafted_tokens", pa.int64()),
        ("accepted_tokens", pa.int64()),
        ("mean_logprob", per_completion(pa.float64())),
        ("device_seconds", pa.float64()),
        ("cost_usd", pa.float64()),
    ]
    if sampling.logprobs is not None:
        columns.append(("logprobs", per_completion(pa.list_(_LOGPROB_TYPE))))
    return [pa.field(name, type_) for name, type_ in columns]


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
    taken = {column.name for column in answer_fields(job.sampling)} & set(names)
    if taken:
        raise OutputError(
            f"shard {shard}: the input column {', '.join(sorted(taken))} has the name of a column that Shoal writes; "
            "rename it, or list the columns to keep in input.passthrough"
        )
    return names


def _is_own_error(schema: pa.Schema, name: str) -> bool:
    return name == "error" and schema.field(name).type == ERROR_TYPE


# --- slices ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SliceName:
    """A slice object's name says which rows of which input, answered by which job, it holds.

    The same name always means the same rows, whichever run or attempt wrote it.
    """

    index: int
    num_slices: int
    job: str
    input: str
    plan: str

    @classmethod
    def of(cls, part: Slice | ShardPlan, index: int, fingerprint: str) -> SliceName:
        etag = part.etag if isinstance(part, Slice) else part.shard.etag
        return cls(index, part.num_slices, fingerprint[:12], _short_hash(etag), _short_hash(part.plan_id))

    @classmethod
    def parse(cls, file_name: str) -> SliceName | None:
        match = _SLICE_NAME.fullmatch(file_name)
        if match is None:
            return None
        index, num_slices, job, version, plan = match.groups()
        return cls(int(index), int(num_slices), job, version, plan)

    def __str__(self) -> str:
        return f"{self.index:05d}-of-{self.num_slices:05d}-{self.job}-{self.input}-{self.plan}.parquet"

    def path(self, shard: str) -> str:
        return f"{SLICES}/{shard}/{self}"

    def belongs_to(self, fingerprint: str, etag: str) -> bool:
        return self.job == fingerprint[:12] and self.input == _short_hash(etag)


@dataclass(slots=True)
class SliceTimes:
    """What a worker did between the slice that it published before and this one, so that sums over slices are its
    whole time; and when this slice was worked on (seconds since 1970)."""

    run: str = ""
    worker: str = ""
    node: str = ""
    device: str = ""
    attempts: int = 1
    started_at: float = 0.0
    finished_at: float = 0.0
    load_s: float = 0.0
    idle_s: float = 0.0
    lost_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    write_s: float = 0.0
    peak_pages: int = 0
    usd_per_device_hour: float = 0.0
    price_source: str = ""
    achievable_prefix_tokens: int = 0
    notes: list[str] = field(default_factory=list)


def slice_table(
    sampling: SamplingParams, rows: Sequence[PlannedRow], completions: Sequence[Completion], price: Price
) -> pa.Table:
    """One table row per planned row; the rows folded onto it are named in `duplicates` and written out at the merge."""
    if len(rows) != len(completions):
        raise OutputError(f"{len(rows)} rows and {len(completions)} completions: a row would be lost")
    usages = [completion.usage for completion in completions]
    seconds = [usage.device_seconds for usage in usages]
    columns: dict[str, Sequence[Any]] = {
        "row_index": [row.row_index for row in rows],
        "duplicates": [row.duplicates for row in rows],
        "response": _texts(completions, sampling),
        "finish_reason": _finish_reasons(completions, sampling),
        "error": [completion.error and asdict(completion.error) for completion in completions],
        "prompt_tokens": [usage.prompt_tokens for usage in usages],
        "cached_tokens": [usage.cached_tokens for usage in usages],
        "completion_tokens": [usage.completion_tokens for usage in usages],
        "drafted_tokens": [usage.drafted_tokens for usage in usages],
        "accepted_tokens": [usage.accepted_tokens for usage in usages],
        "mean_logprob": _mean_logprobs(completions, sampling),
        "device_seconds": seconds,
        "cost_usd": [price.cost_usd(s) for s in seconds],
        "time_to_first_token_s": [usage.time_to_first_token_s for usage in usages],
        "inter_token_s": [usage.inter_token_s for usage in usages],
        "num_preemptions": [usage.num_preemptions for usage in usages],
    }
    if sampling.logprobs is not None:
        columns["logprobs"] = _logprobs(completions, sampling)
    return pa.table(columns, schema=_slice_schema(sampling))


def publish_slice(
    output: Storage,
    shard: str,
    name: SliceName,
    table: pa.Table,
    times: SliceTimes,
    summary: Mapping[str, Any],
) -> FileInfo:
    """Write a slice object, whole or not at all. `summary` is whatever a later run wants to know without reading it."""
    metadata = {"summary": summary, **asdict(times)}
    return output.write_whole(name.path(shard), _to_parquet(table, metadata))


def list_slices(output: Storage, shard: str = "") -> dict[str, dict[str, SliceName]]:
    """Shard name -> path -> name of every slice object there is, of one shard or of all; one listing."""
    found: dict[str, dict[str, SliceName]] = {}
    for file in output.list(f"{SLICES}/{shard}" if shard else SLICES):
        _, shard_name, file_name = file.path.split("/", 2)
        name = SliceName.parse(file_name)
        if name is not None and file.size_bytes > 0:
            found.setdefault(shard_name, {})[file.path] = name
    return found


def complete_set(slices: Mapping[str, SliceName], fingerprint: str, etag: str) -> list[str] | None:
    """The paths of a shard's slices, in order, if each is there exactly once; else None and a plan must tell."""
    current = {path: name for path, name in slices.items() if name.belongs_to(fingerprint, etag)}
    plans = {(name.num_slices, name.plan) for name in current.values()}
    indices = sorted(name.index for name in current.values())
    if len(plans) != 1 or indices != list(range(plans.pop()[0])):
        return None
    return sorted(current, key=lambda path: current[path].index)


def _slice_schema(sampling: SamplingParams) -> pa.Schema:
    return pa.schema(
        [
            pa.field("row_index", pa.int64()),
            pa.field("duplicates", pa.list_(pa.int64())),
            *answer_fields(sampling),
            pa.field("time_to_first_token_s", pa.float64()),
            pa.field("inter_token_s", pa.float64()),
            pa.field("num_preemptions", pa.int64()),
        ]
    )


def _texts(completions: Sequence[Completion], sampling: SamplingParams) -> list[Any]:
    return [
        None if c.error else [o.text for o in c.outputs] if sampling.n > 1 else c.outputs[0].text for c in completions
    ]


def _finish_reasons(completions: Sequence[Completion], sampling: SamplingParams) -> list[Any]:
    if sampling.n > 1:
        return [["error"] if c.error else [o.finish_reason for o in c.outputs] for c in completions]
    return ["error" if c.error else c.outputs[0].finish_reason for c in completions]


def _mean_logprobs(completions: Sequence[Completion], sampling: SamplingParams) -> list[Any]:
    return [
        None if c.error else [o.mean_logprob for o in c.outputs] if sampling.n > 1 else c.outputs[0].mean_logprob
        for c in completions
    ]


def _logprobs(completions: Sequence[Completion], sampling: SamplingParams) -> list[Any]:
    return [
        None
        if c.error
        else [_token_logprobs(o.logprobs) for o in c.outputs]
        if sampling.n > 1
        else _token_logprobs(c.outputs[0].logprobs)
        for c in completions
    ]


def _token_logprobs(tokens: list[TokenLogprob] | None) -> list[dict[str, Any]] | None:
    if tokens is None:
        return None
    return [
        {
            "token_id": token.token_id,
            "token": token.token,
            "logprob": token.logprob,
            "top": [{"token_id": id_, "token": text, "logprob": value} for id_, text, value in token.top],
        }
        for token in tokens
    ]


# --- shards ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ShardMetrics:
    """The one row of `metrics/<shard>.parquet`.

    Token counts are the sums of the results' columns; `duplicate_*` is the part of them that was not computed
    again. `device_seconds` and `cost_usd` are the rows'; load and idle, with their cost in `overhead_usd`, are what
    the workers did besides while this shard's slices were being published.
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


def read_metadata(output: Storage, file: FileInfo) -> dict[str, Any]:
    """What Shoal wrote into a Parquet file's footer; empty for a file that is not Shoal's or not readable."""
    try:
        with output.open_input(file.path, file.size_bytes) as source:
            metadata = pq.ParquetFile(source).metadata
            own = json.loads((metadata.metadata or {}).get(METADATA_KEY, b"{}"))
            return {**own, "num_rows": metadata.num_rows}
    except (pa.ArrowException, OSError, ValueError):
        return {}


def merge_shard(job: Job, shard: Shard, output: Storage, slice_paths: Sequence[str], fingerprint: str) -> ShardMetrics:
    """Publish a shard from its slices: metrics, errors, then results; then remove all its slices.

    The results have the input's rows in the input's order. Holds all answers of the shard in memory, and of the
    input a few thousand rows at a time. ShardError if rows are missing or double, or the input has changed.
    """
    started = time.perf_counter()
    answers, times = _read_slices(job, output, slice_paths)
    folding = _fold_out(answers, shard)
    results, failed = _assemble(job, shard, answers, folding, fingerprint)
    with open_shard(shard):  # raises if the input was changed while it was read
        pass
    metrics = _measure(shard, answers, folding, times, fingerprint)
    metrics.write_seconds += time.perf_counter() - started
    _publish_shard(output, shard, metrics, results, failed)
    output.remove_tree(f"{SLICES}/{shard.name}")
    return metrics


@dataclass(frozen=True, slots=True)
class _Folding:
    """For each row of the input: which row of the answers table it has, and whether it only shares it."""

    source: np.ndarray
    is_duplicate: np.ndarray


def _read_slices(job: Job, output: Storage, slice_paths: Sequence[str]) -> tuple[pa.Table, list[SliceTimes]]:
    tables, times = [_slice_schema(job.sampling).empty_table()], []
    for path in slice_paths:
        try:
            with output.open_input(path) as source:
                table = pq.ParquetFile(source).read()
            tables.append(table.select(tables[0].schema.names).cast(tables[0].schema))
            own = json.loads(table.schema.metadata[METADATA_KEY])
        except (pa.ArrowException, KeyError, OSError, ValueError) as error:
            output.remove(path)
            raise ShardError(
                f"the slice {path} cannot be read ({error}) and was removed; run the same command again to compute it"
            ) from error
        times.append(SliceTimes(**{f.name: own[f.name] for f in fields(SliceTimes)}))
    return pa.concat_tables(tables).combine_chunks(), times


def _fold_out(answers: pa.Table, shard: Shard) -> _Folding:
    """Check that the slices hold each input row exactly once, and say where."""
    own = answers["row_index"].to_numpy()
    num_folded = pc.list_value_length(answers["duplicates"]).to_numpy()
    folded = pc.list_flatten(answers["duplicates"]).to_numpy()
    rows = np.concatenate([own, folded]).astype(np.int64)
    if not np.array_equal(np.sort(rows), np.arange(shard.num_rows)):
        raise ShardError(
            f"its slices hold {len(rows)} rows, {len(np.unique(rows))} of them different, and the input has "
            f"{shard.num_rows}; remove {SLICES}/{shard.name} in the output and run the same command again"
        )
    positions = np.arange(len(own))
    source = np.empty(shard.num_rows, dtype=np.int64)
    source[own] = positions
    source[folded] = np.repeat(positions, num_folded)
    is_duplicate = np.zeros(shard.num_rows, dtype=bool)
    is_duplicate[folded] = True
    return _Folding(source, is_duplicate)


def _assemble(
    job: Job, shard: Shard, answers: pa.Table, folding: _Folding, fingerprint: str
) -> tuple[bytes, bytes | None]:
    """The results file, and the errors file if any row failed."""
    added = [column.name for column in answer_fields(job.sampling)]
    has_errors = answers["error"].null_count < answers.num_rows
    metadata = {"fingerprint": fingerprint, "etag": shard.etag, "shard": shard.name}
    results, failed = _ParquetBuffer(metadata), _ParquetBuffer({**metadata, "errors": True})
    with open_shard(shard) as source:
        kept = passthrough_columns(job, source.schema_arrow, shard.name)
        retried = [column for column in source.schema_arrow.names if not _is_own_error(source.schema_arrow, column)]
        results.start(_join_schemas(source.schema_arrow, kept, answer_fields(job.sampling)))
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
    for batch in source.iter_batches(MERGE_BATCH_ROWS, columns=columns):
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

    def total(column: str) -> int:
        return int(answers[column].to_numpy().sum())

    def of_duplicates(column: str) -> int:
        return int(answers[column].to_numpy()[duplicates].sum())

    prices = {t.usd_per_device_hour for t in times}
    prompt_tokens, completion_tokens = total("prompt_tokens"), total("completion_tokens")
    device_seconds = _exact_sum(answers["device_seconds"])
    cost_usd = _exact_sum(answers["cost_usd"])
    overhead_usd = sum((t.load_s + t.idle_s + t.lost_s) * Price(t.usd_per_device_hour, "").cost_usd(1.0) for t in times)
    achievable = sum(t.achievable_prefix_tokens for t in times)
    computed_tokens = prompt_tokens + completion_tokens
    first = _percentiles(answers["time_to_first_token_s"])
    between = _percentiles(answers["inter_token_s"])
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
    output.write_whole(f"{METRICS}/{shard.name}.parquet", _to_parquet(table, metadata))
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


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


# --- Parquet bytes ---------------------------------------------------------------------------------------------


class _ParquetBuffer:
    """A Parquet file made batch by batch in memory: a store takes an object in one PUT or not at all."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = {METADATA_KEY: json.dumps(metadata).encode()}
        self._sink = pa.BufferOutputStream()
        self._writer: pq.ParquetWriter | None = None

    def start(self, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(self._sink, schema.with_metadata(self._metadata), compression="zstd")

    def write(self, table: pa.Table) -> None:
        if self._writer is None:
            self.start(table.schema)
        assert self._writer is not None
        self._writer.write_table(table.replace_schema_metadata(self._metadata))

    def finish(self) -> bytes:
        assert self._writer is not None
        self._writer.close()
        return self._sink.getvalue().to_pybytes()


def _to_parquet(table: pa.Table, metadata: Mapping[str, Any]) -> bytes:
    buffer = _ParquetBuffer(metadata)
    buffer.write(table)
    return buffer.finish()
