"""A shard's rows, rendered and sorted by their tokens, written in pieces that can be read without the rest.

First step of a corpus plan: each shard becomes one sorted run, or several where it is larger than a worker's memory is
to hold. A run is one object of groups, each an Arrow IPC stream: distinct prompts in order, with all rows that have
them. Knows no Ray; holds one run's rows at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.requests import RowError
from pipeline.corpus_plan.manifest import PlannedShard
from pipeline.job import Job
from pipeline.prefix_plan import PackedRow, pack_row, render_rows
from pipeline.shards import Shard
from pipeline.storage import Storage

ROW_WEIGHT = 64
"""What a row takes besides its tokens, in tokens: some 250 bytes."""

RUN_WEIGHT = 24 * 2**20
"""Tokens and rows' weights that are sorted at once, 4 bytes each: about 400 MB of memory at the peak."""

GROUP_WEIGHT = 2**20
"""Tokens and rows' weights of a group, which is read whole: a range of keys reads up to two that it needs a part of."""

MIN_GROUPS = 4
"""A run has at least so many groups if it has as many prompts: their borders are all that is known of its keys."""

TOKEN_BYTES = 4

NO_ROWS: NDArray[np.int64] = np.empty(0, np.int64)

ROW_TYPE = pa.struct(
    [
        ("row_index", pa.int64()),
        ("sampling_overrides", pa.string()),
        ("seed", pa.int64()),
        ("fold", pa.binary(16)),
        ("error", pa.struct([("kind", pa.string()), ("message", pa.string())])),
    ]
)
GROUP_SCHEMA = pa.schema([("order", pa.large_binary()), ("rows", pa.large_list(ROW_TYPE))])
"""order: token ids as big-endian uint32, so that bytes sort as tokens do. fold: rows with the same tokens and the same
`fold` get the same answer; null where a row's noise is its own."""


@dataclass(frozen=True, slots=True)
class SortedRun:
    """One object of sorted groups. separators: per group, bytes above all before it and not above its first prompt.
    offsets: where each group begins, and the end of the last. weights: of each group."""

    path: str
    separators: list[bytes]
    offsets: list[int]
    weights: list[int]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "separators": [separator.hex() for separator in self.separators]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SortedRun:
        return cls(**{**data, "separators": [bytes.fromhex(separator) for separator in data["separators"]]})


@dataclass(frozen=True, slots=True)
class SortedShard:
    """What the next step has to know of a sorted shard; a few hundred bytes and some keys per run. num_answered: rows
    that are in no run, since an earlier plan has answered them."""

    shard: PlannedShard
    runs: list[SortedRun]
    num_answered: int = 0


@dataclass(slots=True)
class _Rows:
    """Rows on their way into a run, column by column."""

    orders: list[bytes] = field(default_factory=list)
    row_index: list[int] = field(default_factory=list)
    overrides: list[str | None] = field(default_factory=list)
    seed: list[int] = field(default_factory=list)
    fold: list[bytes | None] = field(default_factory=list)
    error: list[RowError | None] = field(default_factory=list)
    weight: int = 0

    def add(self, row: PackedRow, fold: bytes | None) -> None:
        self.orders.append(row.order)
        self.row_index.append(row.row_index)
        self.overrides.append(row.overrides)
        self.seed.append(row.seed)
        self.fold.append(fold)
        self.error.append(row.error)
        self.weight += len(row.order) // TOKEN_BYTES + ROW_WEIGHT


def sort_shard(
    job: Job,
    shard: Shard,
    storage: Storage,
    folder: str,
    tokenizer: Any,
    run_weight: int = RUN_WEIGHT,
    answered: NDArray[np.int64] = NO_ROWS,
) -> SortedShard:
    """Render, tokenise and sort a shard, and write its runs to `<folder>/sorted/`. ShardError if it cannot be read.

    job: resolved. tokenizer: a transformers tokenizer. run_weight: what to hold at once. answered: rows to leave out,
    each once. The same shard gives the same runs, whatever else is planned with it; those that a run which was killed
    has left in this folder, which is one for each set of answered rows, are used again.
    """
    planned = PlannedShard(shard.name, shard.etag, shard.num_rows)
    record = f"{folder}/sorted/{shard.name}.json"
    known = _read_runs(storage, record, run_weight)
    if known is not None:
        return SortedShard(planned, known, len(answered))
    runs: list[SortedRun] = []

    def write(rows: _Rows) -> None:
        runs.append(_write_run(rows, storage, f"{folder}/sorted/{shard.name}-{len(runs):05d}.arrows"))

    rows, folds = _Rows(), _FoldDigests()
    is_answered = np.zeros(shard.num_rows, bool)
    is_answered[answered] = True
    rendered_rows = render_rows(job, shard, tokenizer) if len(answered) < shard.num_rows else ()
    for index, rendered in enumerate(rendered_rows):
        if is_answered[index]:
            continue
        row = pack_row(job, shard, index, rendered)
        rows.add(row, folds.of(row))
        if rows.weight >= run_weight:
            write(rows)
            rows = _Rows()
    if rows.orders:
        write(rows)
    storage.write_whole(
        record, json.dumps({"run_weight": run_weight, "runs": [run.to_json() for run in runs]}).encode()
    )
    return SortedShard(planned, runs, len(answered))


def _read_runs(storage: Storage, record: str, run_weight: int) -> list[SortedRun] | None:
    """The runs of a shard that was sorted before, if all are there; None if it is to be sorted."""
    try:
        data = json.loads(storage.read_bytes(record))
    except FileNotFoundError:
        return None
    runs = [SortedRun.from_json(run) for run in data["runs"]]
    sizes = [info.size_bytes if (info := storage.info(run.path)) is not None else -1 for run in runs]
    is_whole = data["run_weight"] == run_weight and sizes == [run.offsets[-1] for run in runs]
    return runs if is_whole else None


class _FoldDigests:
    """Fold keys as 16 bytes, equal where the keys are: parameters are canonical, so their JSON tells them apart."""

    def __init__(self) -> None:
        self._known: dict[str | None, bytes] = {}

    def of(self, row: PackedRow) -> bytes | None:
        if row.fold_key is None:
            return None
        if row.overrides not in self._known:
            if len(self._known) >= 10_000:  # where each row has its own there is nothing to remember
                self._known.clear()
            text = row.fold_key.model_dump_json()  # type: ignore[attr-defined]
            self._known[row.overrides] = hashlib.blake2b(text.encode(), digest_size=16).digest()
        return self._known[row.overrides]


def _write_run(rows: _Rows, storage: Storage, path: str) -> SortedRun:
    places = sorted(range(len(rows.orders)), key=rows.orders.__getitem__)  # stable: equal ones by row
    firsts = [0, *(i for i in range(1, len(places)) if rows.orders[places[i]] != rows.orders[places[i - 1]])]
    bounds = [*firsts, len(places)]
    weights = np.array(
        [len(rows.orders[places[a]]) // TOKEN_BYTES + ROW_WEIGHT * (b - a) for a, b in pairwise(bounds)], np.int64
    )
    borders = _cut_groups(weights)
    data = bytearray()
    offsets, separators = [0], []
    for start, end in pairwise(borders):
        data += _group_bytes(rows, places, bounds[start : end + 1])
        offsets.append(len(data))
        before = rows.orders[places[bounds[start - 1]]] if start else None
        separators.append(_separate(before, rows.orders[places[bounds[start]]]))
    storage.write_whole(path, bytes(data))
    return SortedRun(path, separators, offsets, np.add.reduceat(weights, borders[:-1]).tolist())


def _cut_groups(weights: np.ndarray) -> list[int]:
    """Where groups begin, counted in distinct prompts, and the end."""
    target = max(1, min(GROUP_WEIGHT, int(weights.sum()) // MIN_GROUPS))
    group = (np.cumsum(weights) - weights) // target
    return [*np.flatnonzero(np.diff(group, prepend=-1)).tolist(), len(weights)]


def _group_bytes(rows: _Rows, places: Sequence[int], bounds: Sequence[int]) -> bytes:
    """One IPC stream of the distinct prompts that begin at all `bounds` but the last."""
    own = places[bounds[0] : bounds[-1]]
    columns: list[pa.Array] = [
        pa.array([rows.row_index[i] for i in own], pa.int64()),
        pa.array([rows.overrides[i] for i in own], pa.string()),
        pa.array([rows.seed[i] for i in own], pa.int64()),
        pa.array([rows.fold[i] for i in own], pa.binary(16)),
        _error_array([rows.error[i] for i in own]),
    ]
    lists = pa.LargeListArray.from_arrays(
        pa.array(np.asarray(bounds) - bounds[0], pa.int64()),
        pa.StructArray.from_arrays(columns, fields=list(ROW_TYPE)),
    )
    orders = pa.array([rows.orders[places[start]] for start in bounds[:-1]], pa.large_binary())
    return stream_bytes(pa.record_batch([orders, lists], schema=GROUP_SCHEMA))


def _error_array(errors: Sequence[RowError | None]) -> pa.Array:
    """Errors as a column; null where there is none."""
    values = [error and {"kind": error.kind, "message": error.message} for error in errors]
    return pa.array(values, ROW_TYPE.field("error").type)


def stream_bytes(batch: pa.RecordBatch) -> bytes:
    """One compressed IPC stream; several may stand one after the other in an object."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def read_groups(storage: Storage, path: str, start: int, end: int) -> Iterator[pa.Table]:
    """The groups between two offsets of a run, in one request."""
    (data,) = storage.read_ranges(path, [(start, end)])
    source = pa.BufferReader(data)
    while source.tell() < len(data):
        with pa.ipc.open_stream(source) as reader:
            yield reader.read_all()


def _separate(before: bytes | None, first: bytes) -> bytes:
    """The shortest beginning of `first`, in whole tokens, that is above `before`."""
    if before is None:
        return first
    shared = count_shared(before, first)
    return first[: (shared + 1) * TOKEN_BYTES]


def count_shared(one: bytes, other: bytes) -> int:
    """How many first tokens two orders have in common."""
    length = min(len(one), len(other)) // TOKEN_BYTES
    one_N, other_N = np.frombuffer(one, ">u4", length), np.frombuffer(other, ">u4", length)
    differs = one_N != other_N
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length
