"""Slice objects: answered rows on their way to a shard's results, and the checkpoint of a run.

One Parquet file per slice, `_slices/<shard>/<slice>.parquet`, written whole or not at all; that it is there is the mark
that it is done. Those of a corpus plan, by `shared_slices`, lie in `_slices/_corpus/`. Knows no Ray and no engine;
published by `slice_runner`, put together by `results`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.requests import Completion, SamplingParams, TokenLogprob
from pipeline.bill.pricing import Price
from pipeline.drafts import DraftCounts
from pipeline.parquet import METADATA_KEY, read_metadata, to_parquet
from pipeline.prefix_plan import PlannedRow, ShardPlan, Slice
from pipeline.shards import ShardError
from pipeline.storage import FileInfo, Storage

SLICES = "_slices"
FOOTER_THREADS = 16
_SLICE_NAME = re.compile(r"(\d{5,})-of-(\d{5,})-([0-9a-f]{12})-([0-9a-f]{8})-([0-9a-f]{8})\.parquet")

ERROR_TYPE = pa.struct([("kind", pa.string()), ("message", pa.string())])
_TOP_TYPE = pa.struct([("token_id", pa.int64()), ("token", pa.string()), ("logprob", pa.float64())])
_LOGPROB_TYPE = pa.struct(
    [("token_id", pa.int64()), ("token", pa.string()), ("logprob", pa.float64()), ("top", pa.list_(_TOP_TYPE))]
)


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
        return cls.of_plan(index, part.num_slices, fingerprint, etag, part.plan_id)

    @classmethod
    def of_plan(cls, index: int, num_slices: int, fingerprint: str, etag: str, plan_id: str) -> SliceName:
        return cls(index, num_slices, fingerprint[:12], _short_hash(etag), _short_hash(plan_id))

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
    evicted_prefix_tokens: int = 0
    border_prefix_tokens: int = 0
    short_prefix_tokens: int = 0
    drafts: DraftCounts = field(default_factory=DraftCounts)
    notes: list[str] = field(default_factory=list)


def slice_table(
    sampling: SamplingParams, rows: Sequence[PlannedRow], completions: Sequence[Completion], price: Price
) -> pa.Table:
    """One table row per planned row; the rows folded onto it are named in `duplicates` and written out at the merge."""
    assert len(rows) == len(completions), f"{len(rows)} rows and {len(completions)} completions"
    usages = [completion.usage for completion in completions]
    seconds = [usage.device_seconds for usage in usages]
    columns: dict[str, Sequence[Any]] = {
        "row_index": [row.key for row in rows],
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
    return pa.table(columns, schema=slice_schema(sampling))


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
    return output.write_whole(name.path(shard), to_parquet(table, metadata))


def list_slices(output: Storage, shard: str = "") -> dict[str, dict[str, SliceName]]:
    """Shard name -> path -> name of every slice object there is, of one shard or of all; one listing."""
    found: dict[str, dict[str, SliceName]] = {}
    for file in output.list(f"{SLICES}/{shard}" if shard else SLICES):
        _, shard_name, file_name = file.path.split("/", 2)
        name = SliceName.parse(file_name)
        if name is not None and file.size_bytes > 0:
            found.setdefault(shard_name, {})[file.path] = name
    return found


def drop_damaged(output: Storage, slices: Mapping[str, Mapping[str, SliceName]]) -> dict[str, dict[str, SliceName]]:
    """Remove the slices that an earlier run left unreadable, and return the others; one footer per slice."""
    paths = [path for names in slices.values() for path in names]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        infos = pool.map(output.info, paths)
        readable = pool.map(lambda info: info is not None and bool(read_metadata(output, info)), infos)
        is_readable = dict(zip(paths, readable))
    for path in paths:
        if not is_readable[path]:
            output.remove(path)
    return {shard: {path: name for path, name in names.items() if is_readable[path]} for shard, names in slices.items()}


def complete_set(slices: Mapping[str, SliceName], fingerprint: str, etag: str) -> list[str] | None:
    """The paths of a shard's slices, in order, if each is there exactly once; else None and a plan must tell."""
    current = {path: name for path, name in slices.items() if name.belongs_to(fingerprint, etag)}
    plans = {(name.num_slices, name.plan) for name in current.values()}
    indices = sorted(name.index for name in current.values())
    if len(plans) != 1 or indices != list(range(plans.pop()[0])):
        return None
    return sorted(current, key=lambda path: current[path].index)


def read_slices(
    sampling: SamplingParams, output: Storage, slice_paths: Sequence[str]
) -> tuple[pa.Table, list[SliceTimes]]:
    """The answers of all these slices as one table; ShardError if one is damaged, which is then removed."""
    tables, times = [slice_schema(sampling).empty_table()], []
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
        times.append(times_of(own))
    return pa.concat_tables(tables).combine_chunks(), times


def times_of(own: Mapping[str, Any]) -> SliceTimes:
    """The times in a slice object's own metadata."""
    known = {f.name: own[f.name] for f in fields(SliceTimes) if f.name in own}
    if "drafts" in known:  # slices from before there was speculation have none
        known["drafts"] = DraftCounts.from_json(known["drafts"])
    return SliceTimes(**known)


def slice_schema(sampling: SamplingParams) -> pa.Schema:
    """The columns of a slice object."""
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


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
