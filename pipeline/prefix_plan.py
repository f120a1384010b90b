"""A shard's plan: its rows folded, ordered by prefix and cut into slices.

Depth-first order of the prefix tree is the order of the token ids: a cache that holds one path then computes every
shared prefix once. Same input, same slices. Knows no Ray; called by the read tasks in `pipeline.graph`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pyarrow as pa

from actors.requests import Request, RowError, SamplingParams

_ROWS_SCHEMA = pa.schema(
    [
        ("row_index", pa.int64()),
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("sampling_overrides", pa.string()),
        ("seed", pa.int64()),
        ("error", pa.struct([("kind", pa.string()), ("message", pa.string())])),
        ("duplicates", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One row ready for an engine, or its error. `row_index` counts the shard's rows from 0; `duplicates` are the
    rows that get the same answer without being computed."""

    row_index: int
    prompt_token_ids: list[int]
    sampling_overrides: str | None
    seed: int
    error: RowError | None = None
    duplicates: list[int] = field(default_factory=list)

    def sampling(self, base: SamplingParams) -> SamplingParams:
        """The job's sampling parameters with the row's own laid over them (they were checked when planned)."""
        if self.sampling_overrides is None:
            return base
        return SamplingParams.model_validate({**base.model_dump(), **json.loads(self.sampling_overrides)})


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive rows of a shard's plan; each input row is in exactly one slice, as a row or as a duplicate.

    plan_id: digest of the shard's version and of all its slices' rows; equal exactly where slice `index` of two
        plans means the same rows, so names of slice objects carry it.
    achievable_prefix_tokens: prompt tokens of these rows that are also the beginning of the row before in the
        plan, and so need not be computed by an engine that keeps one path.
    """

    shard: str
    etag: str
    index: int
    num_slices: int
    rows: list[PlannedRow]
    plan_id: str = ""
    achievable_prefix_tokens: int = 0

    @property
    def row_indices(self) -> list[int]:
        """All input rows that this slice answers, duplicates included, ascending."""
        return sorted(index for row in self.rows for index in (row.row_index, *row.duplicates))

    def requests(self, sampling: SamplingParams) -> list[Request]:
        """The engine's requests, one per row without an error, in plan order; their id is the row index."""
        return [
            Request(str(row.row_index), row.prompt_token_ids, row.sampling(sampling), row.seed)
            for row in self.rows
            if row.error is None
        ]

    def to_bytes(self) -> bytes:
        """One Arrow IPC stream, the slice's own fields in the schema's metadata."""
        head = {
            "shard": self.shard,
            "etag": self.etag,
            "index": self.index,
            "num_slices": self.num_slices,
            "plan_id": self.plan_id,
            "achievable_prefix_tokens": self.achievable_prefix_tokens,
        }
        rows = self.rows
        columns = [
            pa.array([row.row_index for row in rows], pa.int64()),
            pa.array([row.prompt_token_ids for row in rows], pa.list_(pa.int32())),
            pa.array([row.sampling_overrides for row in rows], pa.string()),
            pa.array([row.seed for row in rows], pa.int64()),
            pa.array(
                [row.error and {"kind": row.error.kind, "message": row.error.message} for row in rows],
                _ROWS_SCHEMA.field("error").type,
            ),
            pa.array([row.duplicates for row in rows], _ROWS_SCHEMA.field("duplicates").type),
        ]
        schema = _ROWS_SCHEMA.with_metadata({"slice": json.dumps(head)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        return sink.getvalue().to_pybytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Slice:
        with pa.ipc.open_stream(data) as reader:
            head = json.loads(reader.schema.metadata[b"slice"])
            table = reader.read_all()
        rows = [
            PlannedRow(
                row_index=row["row_index"],
                prompt_token_ids=row["prompt_token_ids"],
                sampling_overrides=row["sampling_overrides"],
                seed=row["seed"],
                error=row["error"] and RowError(**row["error"]),
                duplicates=row["duplicates"],
            )
            for row in table.to_pylist()
        ]
        return cls(rows=rows, **head)
