"""Slice objects of a corpus plan: answers to rows of several shards in one Parquet file, sorted by shard.

`_slices/_corpus/<slice>.parquet`. Its row groups hold whole shards, so that a merge reads only those with rows of its
shards; the slice's times are split among the shards, so that what shards sum to is what workers did. Knows no Ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actors.cost_model import split_exactly
from actors.requests import SamplingParams
from pipeline.corpus.slice_objects import SliceObjects
from pipeline.drafts import DraftCounts, DrafterCount
from pipeline.parquet import METADATA_KEY, ParquetBuffer
from pipeline.prefix_plan import ROW_BITS, Slice
from pipeline.shards import ShardError
from pipeline.slices import FOOTER_THREADS, SliceName, SliceTimes, slice_schema, times_of
from pipeline.storage import FileInfo, Storage

MIN_GROUP_ROWS = 64
"""A row group takes shards until it has so many rows: one of a single row would be a hundred times its size."""

_SECONDS = ("load_s", "idle_s", "lost_s", "prefill_s", "decode_s", "write_s")
_COUNTS = ("evicted_prefix_tokens", "border_prefix_tokens", "short_prefix_tokens")
_FEMTOSECONDS = 10**15


def publish_shared_slice(
    output: Storage, slice_: Slice, name: SliceName, table: pa.Table, times: SliceTimes, summary: Mapping[str, Any]
) -> FileInfo:
    """Write a slice of a corpus plan, whole or not at all. table: `slice_table` of its rows."""
    answers = _by_shard(table)
    shard_N = answers["shard"].to_numpy()
    starts = np.searchsorted(shard_N, np.arange(len(slice_.shards) + 1))
    assert (np.diff(starts) > 0).all() and starts[-1] == len(shard_N), "a shard of the slice has no rows in it"
    groups = _group_shards(np.diff(starts).tolist())
    seconds_N = np.where(answers["row_index"].is_valid().to_numpy(), answers["device_seconds"].to_numpy(), 0.0)
    achievable = np.zeros(len(slice_.shards), np.int64)
    np.add.at(
        achievable,
        [row.shard_index for row in slice_.rows],
        [row.shared_prefix_tokens for row in slice_.rows],
    )
    own_rows = np.bincount([row.shard_index for row in slice_.rows], minlength=len(slice_.shards))
    shards = {
        "names": list(slice_.shards),
        "groups": groups,
        "device_seconds": [float(seconds_N[start:end].sum()) for start, end in pairwise(starts)],
        "own_rows": own_rows.tolist(),
        "achievable_prefix_tokens": achievable.tolist(),
    }
    buffer = ParquetBuffer({"summary": summary, "shards": shards, **asdict(times)})
    buffer.start(answers.schema)
    for group in range(groups[-1] + 1):
        first, end = np.searchsorted(groups, [group, group + 1])
        buffer.write(answers.slice(starts[first], starts[end] - starts[first]))
    return output.write_whole(name.path(slice_.shard), buffer.finish())


@dataclass(frozen=True, slots=True)
class Kept:
    """What a slice of an earlier plan is still good for: the shards whose rows it answers. lost: those that changed or
    went before they had results, and those that then shared out what they had cost; in the order in which it happened.
    """

    shards: frozenset[str]
    lost: list[tuple[list[str], list[str]]]


def read_shared_slices(
    sampling: SamplingParams,
    output: Storage,
    slice_paths: Sequence[str],
    shards: Sequence[str],
    kept: Mapping[str, Kept] = MappingProxyType({}),
    objects: SliceObjects | None = None,
) -> dict[str, tuple[pa.Table, list[SliceTimes]]]:
    """For each of these shards: the answers to its rows in all these slices as one table, and its share of their times.

    kept: of slices of earlier plans, by path; what a device did for lost shards is lost time of the others. objects:
    opens the slices, where their sizes are known. Opens each once, whatever the number of shards: a footer, and the row
    groups in which one of them has rows. ShardError if a slice is damaged, which is then removed.
    """
    wanted, objects = frozenset(shards), objects or SliceObjects(output, {})

    def read_one(path: str) -> dict[str, tuple[pa.Table, SliceTimes]]:
        with _removed_if_damaged(output, path), objects.open(path) as source:
            return _read_one(sampling, source, wanted, kept.get(path))

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        parts = list(pool.map(read_one, slice_paths))
    empty = slice_schema(sampling).empty_table()
    read: dict[str, tuple[pa.Table, list[SliceTimes]]] = {}
    for shard in shards:
        own = [part[shard] for part in parts if shard in part]
        read[shard] = pa.concat_tables([empty, *(table for table, _ in own)]).combine_chunks(), [t for _, t in own]
    return read


def split_times(times: SliceTimes, weights: Sequence[float], achievable: Sequence[int]) -> list[SliceTimes]:
    """A slice's seconds, lost tokens and drafts, split in proportion to `weights` of which one is above 0; the parts
    sum to the whole. What is no amount (when, where, how often tried, the price) is the same for all."""
    seconds: dict[str, Any] = {name: _split_float(getattr(times, name), weights) for name in _SECONDS}
    drafts = _split_drafts(times.drafts, weights)
    counts: dict[str, list[int]] = {name: split_exactly(getattr(times, name), weights) for name in _COUNTS}
    return [
        replace(
            times,
            achievable_prefix_tokens=achievable[i],
            drafts=drafts[i],
            **{name: parts[i] for name, parts in {**seconds, **counts}.items()},
        )
        for i in range(len(weights))
    ]


def _bequeath(
    names: Sequence[str], weights: Sequence[float], seconds: Sequence[float], kept: Kept | None
) -> tuple[list[float], dict[int, float]]:
    """The shards' weights once those that are lost weigh nothing, and what heirs have of the device time of lost rows,
    by their numbers."""
    weights, number = [float(weight) for weight in weights], {name: number for number, name in enumerate(names)}
    lost_s: dict[int, float] = {}
    for gone, heirs in kept.lost if kept is not None else ():
        moved = sum(weights[number[name]] for name in gone)
        moved_s = sum(seconds[number[name]] + lost_s.pop(number[name], 0.0) for name in gone)
        for name in gone:
            weights[number[name]] = 0.0
        total = sum(weights[number[name]] for name in heirs)
        for name in heirs:
            heir = number[name]
            share = weights[heir] / total if total else 1 / len(heirs)
            lost_s[heir] = lost_s.get(heir, 0.0) + moved_s * share
            weights[heir] += moved * share
    return weights, lost_s


def answered_rows(output: Storage, slice_paths: Sequence[str], shard: str) -> NDArray[np.int64]:
    """The rows of a shard that these slices, in each of which it has some, answer, folded ones included; in any order.
    ShardError as `read_shared_slices`."""

    def read(path: str) -> NDArray[np.int64]:
        with _removed_if_damaged(output, path), output.open_input(path) as source:
            file = pq.ParquetFile(source, pre_buffer=True)
            shards = json.loads((file.metadata.metadata or {})[METADATA_KEY])["shards"]
            number = shards["names"].index(shard)
            table = file.read_row_group(shards["groups"][number], ["row_index", "duplicates", "shard"])
            table = table.filter(pc.field("shard") == number)
            own, folded = table["row_index"].drop_null(), pc.list_flatten(table["duplicates"])
            return np.concatenate([own.to_numpy(), folded.to_numpy()])

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return np.concatenate([np.empty(0, np.int64), *pool.map(read, slice_paths)])


@contextmanager
def _removed_if_damaged(output: Storage, path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        output.remove(path)
        raise ShardError(
            f"the slice {path} cannot be read ({error}) and was removed; run the same command again to compute it"
        ) from error


def _split_float(total: float, weights: Sequence[float]) -> list[float]:
    sign = -1 if total < 0 else 1
    parts = split_exactly(round(abs(total) * _FEMTOSECONDS), weights)
    return [sign * part / _FEMTOSECONDS for part in parts]


def _split_drafts(drafts: DraftCounts, weights: Sequence[float]) -> list[DraftCounts]:
    verify = split_exactly(drafts.num_verify_steps, weights)
    failures = split_exactly(drafts.num_failures, weights)
    saved = _split_float(drafts.saved_s, weights)
    drafted = [split_exactly(drafter.drafted_tokens, weights) for drafter in drafts.drafters]
    accepted = [split_exactly(drafter.accepted_tokens, weights) for drafter in drafts.drafters]
    return [
        DraftCounts(
            verify[i],
            failures[i],
            saved[i],
            [DrafterCount(d.drafter, drafted[k][i], accepted[k][i]) for k, d in enumerate(drafts.drafters)],
        )
        for i in range(len(weights))
    ]


def _by_shard(table: pa.Table) -> pa.Table:
    """One row per answer and shard that it is for, by shard and row; `shard` numbers the slice's shards, `row_index`
    and `duplicates` count the shard's rows.

    `row_index` is null where the answer was computed for a row of another shard.
    """
    own = table["row_index"].to_numpy()
    num_folded = pc.list_value_length(table["duplicates"]).to_numpy()
    folded = pc.list_flatten(table["duplicates"]).to_numpy()
    keys = np.concatenate([own, folded])
    answer = np.concatenate([np.arange(len(own)), np.repeat(np.arange(len(own)), num_folded)])
    is_own = np.arange(len(keys)) < len(own)
    shard = keys >> ROW_BITS
    order = np.lexsort([keys, ~is_own, answer, shard])
    keys, answer, is_own, shard = keys[order], answer[order], is_own[order], shard[order]
    firsts = np.flatnonzero(np.diff(shard * len(own) + answer, prepend=-1))
    rows = keys & ((1 << ROW_BITS) - 1)
    row_index = pa.array(np.ma.masked_array(rows[firsts], ~is_own[firsts]), pa.int64())
    group = np.repeat(np.arange(len(firsts)), np.diff(np.append(firsts, len(keys))))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(group[~is_own], minlength=len(firsts)))])
    duplicates = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(rows[~is_own], pa.int64()))
    taken = table.take(pa.array(answer[firsts], pa.int64()))
    taken = taken.set_column(0, table.schema.field("row_index"), row_index)
    taken = taken.set_column(1, table.schema.field("duplicates"), duplicates)
    taken = taken.append_column("shard", pa.array(shard[firsts], pa.int32()))
    return taken.take(pa.array(np.lexsort([rows[firsts], shard[firsts]]), pa.int64()))


def _group_shards(num_rows: Sequence[int]) -> list[int]:
    """The row group of each shard, given how many rows it has in the slice."""
    groups, group, filled = [], 0, 0
    for number in num_rows:
        if filled >= MIN_GROUP_ROWS:
            group, filled = group + 1, 0
        groups.append(group)
        filled += int(number)
    return groups


def _read_one(
    sampling: SamplingParams, source: BinaryIO, wanted: frozenset[str], kept: Kept | None = None
) -> dict[str, tuple[pa.Table, SliceTimes]]:
    schema = slice_schema(sampling)
    file = pq.ParquetFile(source, pre_buffer=True)
    own = json.loads((file.metadata.metadata or {})[METADATA_KEY])
    shards = own["shards"]
    if kept is not None:
        wanted &= kept.shards
    numbers = [number for number, name in enumerate(shards["names"]) if name in wanted]
    if not numbers:
        return {}
    table = file.read_row_groups(sorted({shards["groups"][number] for number in numbers}))
    shard_N = table["shard"].to_numpy()
    table = table.select(schema.names).cast(schema)
    # A slice of nothing but error rows has taken no time on the device: what it took besides is split by rows.
    seconds, own_rows = shards["device_seconds"], shards["own_rows"]
    weights, lost_s = _bequeath(shards["names"], seconds if sum(seconds) > 0 else own_rows, seconds, kept)
    times = split_times(times_of(own), weights, shards["achievable_prefix_tokens"])
    for number, more in lost_s.items():
        times[number].lost_s += more
    bounds = [np.searchsorted(shard_N, [number, number + 1]) for number in numbers]
    # Copied: a part of a table keeps all of it in memory, with the rows of all the shards that nobody asked for.
    copied = table.take(pa.array(np.concatenate([np.arange(*pair) for pair in bounds]), pa.int64()))
    found, start = {}, 0
    for number, (first, end) in zip(numbers, bounds):
        found[shards["names"][number]] = copied.slice(start, end - first), times[number]
        start += int(end - first)
    return found
