"""A shard's plan: its rows folded, ordered by prefix and cut into slices.

Depth-first order of the prefix tree is the order of the token ids: a cache that holds one path then computes every
shared prefix once. Same input, same slices. Knows no Ray; called by the read tasks in `pipeline.graph`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actors.requests import Request, RowError, SamplingParams, derive_seed
from pipeline.job import Job
from pipeline.prompts import RenderedRow, Renderer
from pipeline.shards import Shard, ShardError, open_shard
from pipeline.storage import public_uri

_RENDER_BATCH_ROWS = 1024
_RENDER_BATCH_BYTES = 4 * 2**20
"""Of text, at most, if it is more than one row's: a tokenizer's lists take about ten times as much."""

_BORDER_SEARCH = 0.25
"""A slice may be this share smaller or larger than its target, so that it can end where a prefix group does."""

IntArray = NDArray[np.int32]

MORE_PROMPTS = "more_prompts"

ROW_BITS = 40
"""A row key is the number of its shard, times 2**40, plus the row's index in it: one integer for a row of a corpus."""

ROWS_SCHEMA = pa.schema(
    [
        ("row_index", pa.int64()),
        ("shard_index", pa.int32()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("shared_prefix_tokens", pa.int32()),
        ("sampling_overrides", pa.string()),
        ("seed", pa.int64()),
        ("error", pa.struct([("kind", pa.string()), ("message", pa.string())])),
        ("duplicates", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One row ready for an engine, or its error. `row_index` counts its shard's rows from 0.

    shard_index: which of its slice's `shards` it is of; 0 in a slice of one shard. duplicates: the keys of the rows
    that get the same answer without being computed; in a slice of one shard a key is the row's index.
    shared_prefix_tokens: how many first tokens are those of the row before in the plan.
    sampling_overrides: the row's own sampling as JSON text; under MORE_PROMPTS the further prompts of a Batch file's
        line, whose completions are the row's too, behind those of its first.
    """

    row_index: int
    prompt_token_ids: list[int]
    sampling_overrides: str | None
    seed: int
    error: RowError | None = None
    duplicates: list[int] = field(default_factory=list)
    shard_index: int = 0
    shared_prefix_tokens: int = 0

    @property
    def key(self) -> int:
        """One number that no other row of the slice has."""
        return row_key(self.shard_index, self.row_index)

    def sampling(self, base: SamplingParams) -> SamplingParams:
        """The job's sampling parameters with the row's own laid over them (they were checked when planned)."""
        if self.sampling_overrides is None:
            return base
        own = {key: value for key, value in json.loads(self.sampling_overrides).items() if key != MORE_PROMPTS}
        return SamplingParams.model_validate({**base.model_dump(), **own})

    def requests(self, base: SamplingParams) -> list[Request]:
        """One request, whose id is the row's key; a further prompt's is `<key>.<number>`, with the same seed."""
        sampling = self.sampling(base)
        requests = [Request(str(self.key), self.prompt_token_ids, sampling, self.seed)]
        if self.sampling_overrides is not None and MORE_PROMPTS in self.sampling_overrides:
            more = json.loads(self.sampling_overrides).get(MORE_PROMPTS, [])
            requests += [
                Request(f"{self.key}.{number}", tokens, sampling, self.seed) for number, tokens in enumerate(more, 1)
            ]
        return requests


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive rows of a plan; each input row is in exactly one slice, as a row or as a duplicate.

    shard, etag: of a corpus plan's slice, the word for the corpus and the digest of its shards' versions.
    plan_id: digest of the shard's version and of all its slices' rows; equal exactly where slice `index` of two
        plans means the same rows, so names of slice objects carry it.
    achievable_prefix_tokens: prompt tokens of these rows that are also the beginning of the row before in the
        plan, and so need not be computed by an engine that keeps one path.
    shards: the shards that rows of a corpus plan's slice are of, by their `shard_index`; empty if there is one only.
    """

    shard: str
    etag: str
    index: int
    num_slices: int
    rows: list[PlannedRow]
    plan_id: str = ""
    achievable_prefix_tokens: int = 0
    shards: tuple[str, ...] = ()

    @property
    def row_indices(self) -> list[int]:
        """The keys of all input rows that this slice answers, duplicates included, ascending."""
        return sorted(key for row in self.rows for key in (row.key, *row.duplicates))

    def requests(self, sampling: SamplingParams) -> list[Request]:
        """The engine's requests, one per prompt of rows without an error, in plan order."""
        return [request for row in self.rows if row.error is None for request in row.requests(sampling)]

    def to_bytes(self) -> bytes:
        """One Arrow IPC stream, the slice's own fields in the schema's metadata."""
        head = {
            "shard": self.shard,
            "etag": self.etag,
            "index": self.index,
            "num_slices": self.num_slices,
            "plan_id": self.plan_id,
            "achievable_prefix_tokens": self.achievable_prefix_tokens,
            "shards": self.shards,
        }
        rows = self.rows
        columns = [
            pa.array([row.row_index for row in rows], pa.int64()),
            pa.array([row.shard_index for row in rows], pa.int32()),
            pa.array([row.prompt_token_ids for row in rows], pa.list_(pa.int32())),
            pa.array([row.shared_prefix_tokens for row in rows], pa.int32()),
            pa.array([row.sampling_overrides for row in rows], pa.string()),
            pa.array([row.seed for row in rows], pa.int64()),
            pa.array(
                [row.error and {"kind": row.error.kind, "message": row.error.message} for row in rows],
                ROWS_SCHEMA.field("error").type,
            ),
            pa.array([row.duplicates for row in rows], ROWS_SCHEMA.field("duplicates").type),
        ]
        schema = ROWS_SCHEMA.with_metadata({"slice": json.dumps(head)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        return sink.getvalue().to_pybytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Slice:
        with pa.ipc.open_stream(data) as reader:
            head = json.loads(reader.schema.metadata[b"slice"])
            table = reader.read_all()
        return cls(rows=read_rows(table), **{**head, "shards": tuple(head["shards"])})


def read_rows(table: pa.Table) -> list[PlannedRow]:
    """The rows of a table of ROWS_SCHEMA."""
    return [PlannedRow(**{**row, "error": row["error"] and RowError(**row["error"])}) for row in table.to_pylist()]


def row_key(shard_index: int, row_index: int) -> int:
    return shard_index << ROW_BITS | row_index


@dataclass(slots=True)
class ShardPlan:
    """All of a shard, in the order of computing; iterate it for its slices. Rows are held as packed token ids, and
    a slice is made when asked for. A shard without rows has no slices."""

    shard: Shard
    plan_id: str
    num_rows: int
    num_error_rows: int
    num_duplicate_rows: int
    prompt_tokens: int
    achievable_prefix_tokens: int
    _rows: list[PackedRow]
    _shared: IntArray
    _borders: list[int]

    @property
    def num_slices(self) -> int:
        return len(self._borders) - 1

    def __iter__(self) -> Iterator[Slice]:
        return map(self.slice, range(self.num_slices))

    def slice(self, index: int) -> Slice:
        start, end = self._borders[index], self._borders[index + 1]
        return Slice(
            shard=self.shard.name,
            etag=self.shard.etag,
            index=index,
            num_slices=self.num_slices,
            rows=[row.to_planned(int(shared)) for row, shared in zip(self._rows[start:end], self._shared[start:end])],
            plan_id=self.plan_id,
            achievable_prefix_tokens=int(self._shared[start:end].sum()),
        )


def plan_shard(job: Job, shard: Shard, tokenizer: Any) -> ShardPlan:
    """Render, tokenise, fold, order and cut one shard. ShardError if the file cannot be read.

    job: resolved, so that prompts which are too long are found here. tokenizer: a transformers tokenizer.
    """
    rows = [pack_row(job, shard, index, rendered) for index, rendered in enumerate(render_rows(job, shard, tokenizer))]
    num_rows = len(rows)
    rows, shared = order_rows(rows)
    computed = np.array([len(row.token_ids) for row in rows], np.int64) - shared
    borders = cut_at_borders(computed, shared, job.plan.slice_tokens, job.plan.max_rows_per_slice)
    return ShardPlan(
        shard=shard,
        plan_id=_identify_plan(shard, rows, borders),
        num_rows=num_rows,
        num_error_rows=sum(row.error is not None for row in rows),
        num_duplicate_rows=num_rows - len(rows),
        prompt_tokens=sum(len(row.token_ids) for row in rows),
        achievable_prefix_tokens=int(shared.sum()),
        _rows=rows,
        _shared=shared,
        _borders=borders,
    )


def order_rows(rows: Sequence[PackedRow]) -> tuple[list[PackedRow], IntArray]:
    """Fold duplicates and sort by token ids; returns the rows to compute, and their `shared_prefix_lengths`."""
    kept = fold_duplicates(rows)
    kept.sort(key=lambda row: (row.order, row.row_index))
    return kept, shared_prefix_lengths([row.token_ids for row in kept])


@dataclass(slots=True)
class PackedRow:
    """A row while it is planned; `order` sorts as the token ids do, and bytes compare much faster than lists."""

    row_index: int
    token_ids: IntArray
    order: bytes
    overrides: str | None
    seed: int
    fold_key: Hashable | None
    error: RowError | None
    duplicates: list[int] = field(default_factory=list)

    def to_planned(self, shared_prefix_tokens: int) -> PlannedRow:
        return PlannedRow(
            self.row_index,
            self.token_ids.tolist(),
            self.overrides,
            self.seed,
            self.error,
            self.duplicates,
            shared_prefix_tokens=shared_prefix_tokens,
        )


def fold_duplicates(rows: Sequence[PackedRow]) -> list[PackedRow]:
    """Keep the first of all rows that are bound to get the same answer, and hang the others on it."""
    kept: list[PackedRow] = []
    first: dict[Hashable, PackedRow] = {}
    for row in rows:
        if row.fold_key is None:
            kept.append(row)
            continue
        original = first.setdefault((row.order, row.fold_key), row)
        if original is row:
            kept.append(row)
        else:
            original.duplicates.append(row.row_index)
    return kept


def shared_prefix_lengths(rows: Sequence[IntArray]) -> IntArray:
    """How many first tokens each row has in common with the row before. Never all of them: an engine has to
    compute a prompt's last token to answer it."""
    shared = np.zeros(len(rows), np.int32)
    for i in range(1, len(rows)):
        length = min(len(rows[i - 1]), len(rows[i]) - 1)
        if length > 0:
            differs = rows[i - 1][:length] != rows[i][:length]
            first = int(differs.argmax())
            shared[i] = first if differs[first] else length
    return shared


def cut_at_borders(computed: NDArray[np.int64], shared: IntArray, target_tokens: int, max_rows: int) -> list[int]:
    """Where slices begin, and the end of the last.

    A slice takes rows until about `target_tokens` have to be computed, or `max_rows`; within a quarter around that
    it ends before the row that shares least with its forerunner, of equals the last.
    """
    num_rows = len(computed)
    borders = [0]
    total = np.concatenate([[0], np.cumsum(computed)])
    while (start := borders[-1]) < num_rows:
        low = _fill(total, start, target_tokens * (1 - _BORDER_SEARCH), int(max_rows * (1 - _BORDER_SEARCH)))
        high = _fill(total, start, target_tokens * (1 + _BORDER_SEARCH), max_rows)
        if high == num_rows:
            borders.append(num_rows)
            break
        candidates = shared[low : high + 1][::-1]
        borders.append(high - int(candidates.argmin()))
    return borders


def _fill(total: NDArray[np.int64], start: int, tokens: float, max_rows: int) -> int:
    """The end of a slice from `start` with at most so many tokens and rows, and at least one row."""
    end = int(np.searchsorted(total, total[start] + tokens, side="right")) - 1
    return max(start + 1, min(end, start + max_rows))


def render_rows(job: Job, shard: Shard, tokenizer: Any) -> Iterator[RenderedRow]:
    """A shard's rows in its order, a batch of them in memory at a time. ShardError if the file cannot be read."""
    renderer = Renderer(job, tokenizer)
    for batch in read_batches(shard, renderer.columns):
        num_rows = max(1, len(batch) * _RENDER_BATCH_BYTES // max(1, batch.nbytes))
        for start in range(0, len(batch), num_rows):
            yield from renderer.render(batch.slice(start, num_rows))


def read_batches(shard: Shard, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """A shard's rows in its order, at most 1,024 at a time. ShardError if the file cannot be read to its end."""
    num_rows = 0
    with open_shard(shard) as file:
        # One row group after the other: of those that are asked for at once, all bytes are held until the last is read.
        batches = chain.from_iterable(
            file.iter_batches(_RENDER_BATCH_ROWS, row_groups=[group], columns=columns)
            for group in range(file.num_row_groups)
        )
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # damaged pages are Arrow's errors, a lost connection is the store's own
                raise ShardError(f"{public_uri(shard.uri)} cannot be read beyond row {num_rows}: {error}") from error
            if batch is None:
                return
            num_rows += len(batch)
            yield batch


def pack_row(job: Job, shard: Shard, index: int, rendered: RenderedRow) -> PackedRow:
    """A rendered row with its seed, and what it can be folded and sorted by; `index` counts the shard's rows."""
    token_ids = np.asarray(rendered.token_ids, np.int32)
    own_seed = rendered.overrides is not None and "seed" in json.loads(rendered.overrides)
    if own_seed:
        seed = rendered.sampling.seed
    elif rendered.id is not None:
        seed = derive_seed(job.sampling.seed, rendered.id)
    else:
        seed = derive_seed(job.sampling.seed, shard.name, index)
    return PackedRow(
        row_index=index,
        token_ids=token_ids,
        order=token_ids.astype(">u4").tobytes(),
        overrides=rendered.overrides,
        seed=seed,
        fold_key=None if rendered.error or rendered.has_more_prompts else _fold_key(rendered.sampling, own_seed),
        error=rendered.error,
    )


def _fold_key(sampling: SamplingParams, own_seed: bool) -> Hashable | None:
    """What besides the tokens decides an answer; None if every row's noise is its own."""
    if sampling.is_greedy:
        return sampling.model_copy(update={"seed": 0})
    return sampling if own_seed else None


def _identify_plan(shard: Shard, rows: Sequence[PackedRow], borders: Sequence[int]) -> str:
    digest = hashlib.blake2b(f"{shard.name}\x1f{shard.etag}\x1f{list(borders)}".encode(), digest_size=8)
    for row in rows:
        digest.update(repr((row.row_index, row.duplicates, row.overrides, row.seed, row.error)).encode())
        digest.update(row.order)
    return digest.hexdigest()
