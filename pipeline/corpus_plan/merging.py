"""One range of keys, from all shards, becomes slices of the corpus plan.

Third step of a corpus plan: rows with the same answer are folded across shards, the others ordered by their tokens and
cut into slices. Holds the range's prompts in memory, each once, and nothing else of the corpus. Knows no Ray.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.corpus_plan.key_ranges import KeyRange, RunPart
from pipeline.corpus_plan.manifest import PlannedSlice, PlanTotals, SliceTable
from pipeline.corpus_plan.sorted_runs import ROW_TYPE, TOKEN_BYTES, read_groups, stream_bytes
from pipeline.prefix_plan import ROW_BITS, ROWS_SCHEMA, IntArray, cut_at_borders, shared_prefix_lengths
from pipeline.shards import ShardError
from pipeline.storage import Storage, public_uri

PART_BYTES = 32 * 2**20
"""Slices are written in objects of about this size, which a worker holds before it writes them."""

_READ_THREADS = 8
_ROWS_SCHEMA = pa.schema(list(ROW_TYPE))
_UNLIMITED = np.iinfo(np.int32).max

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RangePlan:
    """The slices of a range, as if nothing came before it. first_order, last_order: its first and last prompt, as
    bytes; None if it has no rows. digest: of all its slices' rows."""

    index: int
    slices: SliceTable
    totals: PlanTotals
    first_order: bytes | None
    last_order: bytes | None
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows by prompt and then key. orders: the distinct prompts. prompt: of each row, a number of these. key: of each
    row, its shard's number and its place there. table: of each row, the rest (ROW_TYPE)."""

    orders: list[bytes]
    prompt: Ints
    key: Ints
    table: pa.Table

    def take(self, places: Ints) -> _Rows:
        return _Rows(self.orders, self.prompt[places], self.key[places], self.table.take(pa.array(places, pa.int64())))


@dataclass(frozen=True, slots=True)
class _Folded:
    """Rows to compute, and the keys of all rows folded onto these: of row i those from offsets[i] to offsets[i + 1]."""

    rows: _Rows
    duplicates: Ints
    offsets: Ints
    num_within_shards: int


def merge_range(storage: Storage, folder: str, settings: dict[str, int], range_: KeyRange) -> RangePlan:
    """Read a range's rows, fold, order and cut them, and write its slices to `<folder>/slices/`.

    settings: of `plan_settings`. ShardError if a sorted run is damaged or gone. The same range gives the same slices.
    """
    folded = _fold(_read_range(storage, range_))
    rows = folded.rows
    lengths = np.array([len(order) // TOKEN_BYTES for order in rows.orders], np.int64)[rows.prompt]
    shared = _shared_with_row_before(rows, lengths)
    borders = cut_at_borders(lengths - shared, shared, settings["slice_tokens"], settings["max_rows_per_slice"])
    writer = _SliceWriter(storage, f"{folder}/slices/{range_.index:05d}", folded, lengths, shared)
    for start, end in pairwise(borders):
        writer.add(start, end)
    totals = PlanTotals(
        num_rows=len(rows.key) + len(folded.duplicates),
        num_error_rows=len(rows.key) - rows.table["error"].null_count,
        num_duplicates_within=folded.num_within_shards,
        num_duplicates_across=len(folded.duplicates) - folded.num_within_shards,
        prompt_tokens=int(lengths.sum()),
        achievable_prefix_tokens=int(shared.sum()),
    )
    first, last = (rows.orders[0], rows.orders[-1]) if rows.orders else (None, None)
    return RangePlan(range_.index, writer.finish(), totals, first, last, writer.digest)


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Piece:
    """A group's prompts that are in the range, how many rows each has, and these rows."""

    shard: int
    orders: list[bytes]
    counts: Ints
    rows: pa.Table


def _read_range(storage: Storage, range_: KeyRange) -> _Rows:
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        parts = pool.map(lambda part: _read_part(storage, part, range_.low, range_.high), range_.parts)
        pieces = [piece for part in parts for piece in part]
    orders = [order for piece in pieces for order in piece.orders]
    places = sorted(range(len(orders)), key=orders.__getitem__)
    number = np.empty(len(orders), np.int64)
    distinct: list[bytes] = []
    for place in places:
        if not distinct or orders[place] != distinct[-1]:
            distinct.append(orders[place])
        number[place] = len(distinct) - 1
    nothing = np.empty(0, np.int64)
    prompt = np.repeat(number, np.concatenate([nothing, *(piece.counts for piece in pieces)]))
    key = np.concatenate(
        [nothing, *(piece.rows["row_index"].to_numpy() + (piece.shard << ROW_BITS) for piece in pieces)]
    )
    table = pa.concat_tables([_ROWS_SCHEMA.empty_table(), *(piece.rows for piece in pieces)]).combine_chunks()
    return _Rows(distinct, prompt, key, table).take(np.lexsort([key, prompt]))


def _read_part(storage: Storage, part: RunPart, low: bytes | None, high: bytes | None) -> list[_Piece]:
    pieces = []
    try:
        for table in read_groups(storage, part.path, part.start, part.end):
            orders = cast(list[bytes], table["order"].to_pylist())
            start = bisect_left(orders, low) if low is not None else 0
            end = bisect_left(orders, high) if high is not None else len(orders)
            lists = table["rows"].slice(start, end - start)
            structs = pc.list_flatten(lists)
            columns = [pc.struct_field(structs, name) for name in _ROWS_SCHEMA.names]
            rows = pa.table(columns, schema=_ROWS_SCHEMA)
            pieces.append(_Piece(part.shard, orders[start:end], pc.list_value_length(lists).to_numpy(), rows))
    except (pa.ArrowException, OSError, ValueError) as error:
        storage.remove(part.path)  # its shard is then sorted again
        raise ShardError(
            f"the sorted rows {public_uri(storage.uri_of(part.path))} cannot be read ({error}) "
            "and were removed; run the same command again"
        ) from error
    return pieces


# --- folding and ordering -----------------------------------------------------------------------------------------


def _fold(rows: _Rows) -> _Folded:
    """Keep the first of all rows with the same tokens and fold key, and hang the others on it."""
    num_rows = len(rows.key)
    places = np.arange(num_rows)
    original = places.copy()
    folds = rows.table["fold"]
    foldable = np.flatnonzero(folds.is_valid().to_numpy())
    if len(foldable):
        known = folds.unique().drop_null()
        code = pc.index_in(folds.drop_null(), known).to_numpy()
        _, firsts, member = np.unique(rows.prompt[foldable] * len(known) + code, return_index=True, return_inverse=True)
        original[foldable] = foldable[firsts[member]]
    kept = np.flatnonzero(original == places)
    dropped = np.flatnonzero(original != places)
    dropped = dropped[np.argsort(original[dropped], kind="stable")]
    counts = np.bincount(np.searchsorted(kept, original[dropped]), minlength=len(kept))
    shard = rows.key >> ROW_BITS
    num_shards = int(shard.max()) + 1 if num_rows else 1
    num_kept_by_shard = len(np.unique(original * num_shards + shard))
    return _Folded(
        rows=rows.take(kept),
        duplicates=rows.key[dropped],
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        num_within_shards=num_rows - num_kept_by_shard,
    )


def _shared_with_row_before(rows: _Rows, lengths: Ints) -> IntArray:
    """As `shared_prefix_lengths` of all rows; each distinct prompt is compared once."""
    by_prompt = shared_prefix_lengths([np.frombuffer(order, ">u4") for order in rows.orders])
    is_first = np.diff(rows.prompt, prepend=-1) > 0
    return np.where(is_first, by_prompt[rows.prompt], np.maximum(lengths - 1, 0)).astype(np.int32)


# --- writing ------------------------------------------------------------------------------------------------------


class _SliceWriter:
    """Writes a range's slices, each an IPC stream of ROWS_SCHEMA, many to an object."""

    def __init__(self, storage: Storage, prefix: str, folded: _Folded, lengths: Ints, shared: IntArray) -> None:
        self._storage = storage
        self._prefix = prefix
        self._folded = folded
        self._lengths = lengths
        self._shared = shared
        self._data = bytearray()
        self._slices: list[PlannedSlice] = []
        self._num_parts = 0
        self._hash = hashlib.blake2b(digest_size=16)

    @property
    def digest(self) -> bytes:
        return self._hash.digest()

    def add(self, start: int, end: int) -> None:
        """Write the rows from `start` to `end` as the next slice."""
        rows, offsets = self._folded.rows, self._folded.offsets
        key = rows.key[start:end]
        duplicates = self._folded.duplicates[offsets[start] : offsets[end]]
        shards = np.unique(np.concatenate([key, duplicates]) >> ROW_BITS)
        tokens = np.concatenate([np.frombuffer(rows.orders[i], ">u4") for i in rows.prompt[start:end]]).astype(np.int32)
        lengths, shared = self._lengths[start:end], self._shared[start:end]
        table = rows.table.slice(start, end - start).combine_chunks()
        folds = offsets[start : end + 1] - offsets[start]
        self._note((key, lengths, tokens, folds, duplicates), table)
        columns = [
            pa.array(key & ((1 << ROW_BITS) - 1), pa.int64()),
            pa.array(np.searchsorted(shards, key >> ROW_BITS), pa.int32()),
            _lists(np.concatenate([[0], np.cumsum(lengths)]), pa.array(tokens, pa.int32())),
            pa.array(shared, pa.int32()),
            _only_chunk(table["sampling_overrides"]),
            _only_chunk(table["seed"]),
            _only_chunk(table["error"]),
            _lists(folds, pa.array(_renumber(duplicates, shards), pa.int64())),
        ]
        data = stream_bytes(pa.record_batch(columns, schema=ROWS_SCHEMA))
        first = 1 if start == 0 else 0
        self._slices.append(
            PlannedSlice(
                index=len(self._slices),
                path=f"{self._prefix}-{self._num_parts:05d}.arrows",
                offset=len(self._data),
                num_bytes=len(data),
                num_rows=end - start,
                prompt_tokens=int(lengths.sum()),
                computed_tokens=int((lengths - shared).sum()),
                shared_with_previous=int(shared[0]),
                # Of the range's first slice only what its rows have in common with each other is known as yet.
                shared_within=int(shared[first:].min(initial=_UNLIMITED)),
                shards=shards.astype(np.int32),
            )
        )
        self._data += data
        if len(self._data) >= PART_BYTES:
            self._flush()

    def finish(self) -> SliceTable:
        if self._data:
            self._flush()
        return SliceTable.of(self._slices)

    def _flush(self) -> None:
        self._storage.write_whole(f"{self._prefix}-{self._num_parts:05d}.arrows", bytes(self._data))
        self._data = bytearray()
        self._num_parts += 1

    def _note(self, numbers: Sequence[np.ndarray], table: pa.Table) -> None:
        for column in (*numbers, table["seed"].to_numpy()):
            self._hash.update(np.ascontiguousarray(column, "<i8").tobytes())
        for name in ("sampling_overrides", "error"):
            if table[name].null_count < table.num_rows:
                self._hash.update(repr(table[name].to_pylist()).encode())
        self._hash.update(b"\x1e")


def _lists(offsets: Ints, values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _only_chunk(column: pa.ChunkedArray) -> pa.Array:
    (chunk,) = column.chunks
    return chunk


def _renumber(keys: Ints, shards: Ints) -> Ints:
    """Keys in the corpus as keys in a slice that answers these shards."""
    return np.searchsorted(shards, keys >> ROW_BITS) << ROW_BITS | keys & ((1 << ROW_BITS) - 1)
