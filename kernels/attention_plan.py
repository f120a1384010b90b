"""Cuts the attention of a step into parts for the Triton kernels, in numpy and once per step.

A part lets consecutive query tokens, with the G query heads of a key/value head side by side as rows, attend to one
range of one page table:

- a request with at most 16 rows (decode, a few draft tokens) gets one part per SMALL_SPLIT tokens of its context;
- a longer chunk gets one part per tile of its query tokens, over the whole context, as its tiles fill the device;
- a prefix group attends its shared pages once, in one part per tile of all its query tokens and LARGE_SPLIT tokens;
  its requests have parts of their own for what follows. Groups may be nested.

All sizes are fixed, and no tile is chosen by the rest of the batch: a row's result depends on its own query tokens and
context, and on which groups it is in, but not on how many rows are beside it.

A plan becomes tensors of its own for one step (`plan_attention`), or is written into memory that stays where it is
(`PlanBuffers`), which is how a captured CUDA graph sees a new step. Knows no keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention_batch import AttentionBatch
from kernels.draft_tree import TREE_FIELDS, check_trees, depths, pack_tree

SMALL_ROWS = 16
LARGE_ROWS = 64
SMALL_SPLIT = 512
LARGE_SPLIT = 2048

Ints = NDArray[np.int64]

FIELDS = 6
"""Of a part: first token, number of tokens, where its page table starts, first and last + 1 token of its range, and
its first row of the partial results (-1: straight to the output)."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """A step's parts as int32 tensors on the device.

    small_parts and large_parts: [X, 6]. The partial results of merged_tokens[i] are merged_slots[starts[i]:starts[i +
    1]], of num_slots. Parts without tokens and tokens below 0 are padding.
    """

    small_parts: Tensor
    large_parts: Tensor
    positions_T: Tensor
    page_ids: Tensor
    num_slots: int
    merged_tokens: Tensor
    merged_slot_starts: Tensor
    merged_slots: Tensor
    trees_T3: Tensor | None = None
    """What each token sees of its step's keys where some request's drafts are a tree: see draft_tree.TREE_FIELDS."""


@dataclass(frozen=True, slots=True)
class PlanArrays:
    """What an AttentionPlan holds, still on the host."""

    small_parts: Ints
    large_parts: Ints
    positions_T: Ints
    page_ids: Ints
    num_slots: int
    merged_tokens: Ints
    merged_slot_starts: Ints
    merged_slots: Ints
    trees_T3: Ints | None

    def arrays(self) -> tuple[Ints, ...]:
        """All of them, in the order of AttentionPlan's tensors."""
        merged = self.merged_tokens, self.merged_slot_starts, self.merged_slots
        trees = () if self.trees_T3 is None else (self.trees_T3,)
        return self.small_parts, self.large_parts, self.positions_T, self.page_ids, *merged, *trees


@dataclass(frozen=True, slots=True)
class _Parts:
    """Query tokens [first, first + num) against tokens [start, stop) of the page table at `table`; all of one size."""

    first: Ints
    num: Ints
    table: Ints
    start: Ints
    stop: Ints

    def take(self, which: NDArray) -> _Parts:
        return _Parts(self.first[which], self.num[which], self.table[which], self.start[which], self.stop[which])


def plan_attention(
    batch: AttentionBatch, heads_per_kv: int, window: int | None, device: torch.device, deterministic: bool = False
) -> AttentionPlan:
    """Cut a step into parts and bring them to the device in one copy."""
    arrays = lay_out_plan(batch, heads_per_kv, window, deterministic)
    parts = arrays.arrays()
    flat = torch.from_numpy(np.concatenate([part.ravel() for part in parts]).astype(np.int32))
    if device.type == "cuda":
        flat = flat.pin_memory()
    tensors = flat.to(device, non_blocking=True).split([part.size for part in parts])
    small, large, positions, pages, tokens, starts, slots, *trees = tensors
    return AttentionPlan(
        small_parts=small.view(-1, FIELDS),
        large_parts=large.view(-1, FIELDS),
        positions_T=positions,
        page_ids=pages,
        num_slots=arrays.num_slots,
        merged_tokens=tokens,
        merged_slot_starts=starts,
        merged_slots=slots,
        trees_T3=trees[0].view(-1, TREE_FIELDS) if trees else None,
    )


@dataclass(frozen=True, slots=True)
class PlanRoom:
    """How large a step's plan may be: query tokens, parts, rows of partial results, entries of page tables.

    There is none for trees of drafts."""

    num_tokens: int
    num_small: int
    num_large: int
    num_slots: int
    num_page_ids: int

    def holds(self, arrays: PlanArrays) -> bool:
        return (
            len(arrays.positions_T) <= self.num_tokens
            and len(arrays.small_parts) <= self.num_small
            and len(arrays.large_parts) <= self.num_large
            and arrays.num_slots <= self.num_slots
            and len(arrays.page_ids) <= self.num_page_ids
            and arrays.trees_T3 is None
        )


class PlanBuffers:
    """Memory for the plans of many steps, one after the other, that stays where it is: captured graphs read it.

    room: of the largest plan. Graphs of smaller ones see the first part of each array.
    """

    def __init__(self, room: PlanRoom, device: torch.device) -> None:
        sizes = [
            room.num_small * FIELDS,
            room.num_large * FIELDS,
            room.num_tokens,
            room.num_tokens,
            room.num_tokens + 1,
            room.num_slots,
            room.num_page_ids,
        ]
        self._hosts = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda").split(sizes)
        self._devices = torch.zeros(sum(sizes), dtype=torch.int32, device=device).split(sizes)

    def plan(self, room: PlanRoom) -> AttentionPlan:
        """The plan that a graph captures which has this room."""
        small, large, positions, tokens, starts, slots, pages = self._devices
        return AttentionPlan(
            small_parts=small.view(-1, FIELDS)[: room.num_small],
            large_parts=large.view(-1, FIELDS)[: room.num_large],
            positions_T=positions[: room.num_tokens],
            page_ids=pages,
            num_slots=room.num_slots,
            merged_tokens=tokens[: room.num_tokens],
            merged_slot_starts=starts[: room.num_tokens + 1],
            merged_slots=slots,
        )

    def load(self, arrays: PlanArrays, room: PlanRoom) -> None:
        """Write a plan for which there is room; what was read from here before must have been computed."""
        # Each array, the size that a graph reads of it, and what stands behind its end. Nothing reads behind the last.
        fills = (
            (arrays.small_parts, room.num_small * FIELDS, 0),
            (arrays.large_parts, room.num_large * FIELDS, 0),
            (arrays.positions_T, room.num_tokens, 0),
            (arrays.merged_tokens, room.num_tokens, -1),
            (arrays.merged_slot_starts, room.num_tokens + 1, 0),
            (arrays.merged_slots, arrays.merged_slots.size, 0),
            (arrays.page_ids, arrays.page_ids.size, 0),
        )
        for (array, size, blank), host, device in zip(fills, self._hosts, self._devices):
            values = host.numpy()
            values[: array.size] = array.ravel()
            values[array.size : size] = blank
            device[:size].copy_(host[:size], non_blocking=True)


def lay_out_plan(
    batch: AttentionBatch, heads_per_kv: int, window: int | None, deterministic: bool = False
) -> PlanArrays:
    """Cut a step into parts; deterministic: each query token as if it were decoded, outside of any group."""
    num_requests = len(batch.query_lens)
    queries, contexts = np.array(batch.query_lens, np.int64), np.array(batch.context_lens, np.int64)
    groups = [] if deterministic else batch.groups
    page_ids, tables = _lay_out_tables([*batch.page_ids, *(group.page_ids for group in groups)])
    first_tokens = np.concatenate(([0], np.cumsum(queries)))
    order_T = ranges(contexts - queries, queries)  # of the tokens' slots
    positions_T, trees_T3 = _lay_out_trees(batch, order_T, first_tokens, window)

    starts = np.zeros(num_requests, np.int64)
    large: list[_Parts] = []
    for i, group in enumerate(groups):
        end = group.first_request + group.num_requests
        first_key, last_key = (
            group.first_page * batch.page_size,
            (group.first_page + len(group.page_ids)) * batch.page_size,
        )
        starts[group.first_request : end] = np.maximum(starts[group.first_request : end], last_key)
        # The group's table begins at its first page, and a part's range counts tokens of the request.
        table = tables[num_requests + i] - group.first_page
        tiles = _tile(first_tokens[[group.first_request]], first_tokens[[end]], heads_per_kv)
        same = np.ones(len(tiles[0]), np.int64)
        large.append(_split(_Parts(*tiles, table * same, first_key * same, last_key * same), LARGE_SPLIT))

    if deterministic:
        owner = np.repeat(np.arange(num_requests), queries)
        tokens = np.arange(len(order_T))
        whole = _Parts(tokens, np.ones_like(tokens), tables[owner], np.zeros_like(tokens), order_T + 1)
        small = _split(whole, SMALL_SPLIT)
    else:
        requests = _Parts(first_tokens[:-1], queries, tables[:num_requests], starts, contexts)
        is_small = queries * heads_per_kv <= SMALL_ROWS
        small = _split(requests.take(is_small), SMALL_SPLIT)
        if not is_small.all():
            chunks = np.flatnonzero(~is_small)
            first, num = _tile(first_tokens[chunks], first_tokens[chunks + 1], heads_per_kv)
            owner = np.searchsorted(first_tokens, first, side="right") - 1
            large.append(_Parts(first, num, tables[owner], starts[owner], order_T[first + num - 1] + 1))
    all_large = _concatenate(large)
    if window is not None:
        small, all_large = (_seen(parts, positions_T, window) for parts in (small, all_large))
    return _number_slots(small, all_large, positions_T, page_ids, trees_T3)


def _lay_out_trees(
    batch: AttentionBatch, order_T: Ints, first_tokens: Ints, window: int | None
) -> tuple[Ints, Ints | None]:
    """The tokens' positions, and their rows of the masks if there are trees; those of other requests are causal."""
    if not batch.trees:
        return order_T, None
    check_trees(batch.trees, batch.query_lens)
    positions_T, trees_T3 = order_T.copy(), np.zeros((len(order_T), TREE_FIELDS), np.int64)
    trees_T3[:, 0] = order_T + 1
    for request, mask in batch.trees.items():
        first, stop = first_tokens[request : request + 2]
        positions_T[first:stop] = order_T[first] + depths(mask)
        trees_T3[first:stop] = pack_tree(mask, window, order_T[first])
    return positions_T, trees_T3


def _lay_out_tables(tables: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """All page tables in one array, and where each starts."""
    arrays = [np.asarray(table, np.int64) for table in tables]
    sizes = np.array([len(array) for array in arrays], np.int64)
    return np.concatenate([*arrays, np.zeros(0, np.int64)]), np.cumsum(sizes) - sizes


def ranges(starts: Ints, counts: Ints) -> Ints:
    """starts[0], starts[0] + 1, ... (counts[0] of them), starts[1], ..."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts - starts, counts)


def _tile(first: Ints, stop: Ints, heads_per_kv: int) -> tuple[Ints, Ints]:
    """Cut ranges of tokens into tiles of at most LARGE_ROWS rows: first token and number of tokens of each."""
    step = LARGE_ROWS // heads_per_kv
    counts = -(-(stop - first) // step)
    begin = np.repeat(first, counts) + step * ranges(np.zeros_like(first), counts)
    return begin, np.minimum(step, np.repeat(stop, counts) - begin)


def _split(parts: _Parts, size: int) -> _Parts:
    """Cut each part's range at multiples of `size`."""
    lowest = parts.start // size
    counts = np.where(parts.stop > parts.start, (parts.stop - 1) // size + 1 - lowest, 0)
    which = np.repeat(np.arange(len(counts)), counts)
    begin = ranges(lowest, counts) * size
    cut = parts.take(which)
    return _Parts(cut.first, cut.num, cut.table, np.maximum(cut.start, begin), np.minimum(cut.stop, begin + size))


def _seen(parts: _Parts, positions_T: Ints, window: int) -> _Parts:
    """Those parts of whose range at least one token sees something."""
    if not len(parts.first):
        return parts
    tokens = ranges(parts.first, parts.num)
    earliest = np.minimum.reduceat(positions_T[tokens], np.cumsum(parts.num) - parts.num)
    return parts.take(parts.stop > earliest - window + 1)


def _concatenate(parts: list[_Parts]) -> _Parts:
    if not parts:
        none = np.zeros(0, np.int64)
        return _Parts(none, none, none, none, none)
    return _Parts(*(np.concatenate([getattr(p, name) for p in parts]) for name in _Parts.__slots__))


def _number_slots(small: _Parts, large: _Parts, positions_T: Ints, page_ids: Ints, trees_T3: Ints | None) -> PlanArrays:
    """Give partial results their places: a token that is in several parts has one in each of them."""
    parts = _concatenate([small, large])
    owner = np.repeat(np.arange(len(parts.first)), parts.num)
    tokens = ranges(parts.first, parts.num)
    is_shared = np.bincount(tokens, minlength=len(positions_T))[tokens] > 1
    has_slots = np.zeros(len(parts.first), bool)
    has_slots[owner[is_shared]] = True
    sizes = np.where(has_slots, parts.num, 0)
    first_slot = np.cumsum(sizes) - sizes
    slot_of = np.where(has_slots, first_slot, -1)

    in_slots = has_slots[owner]
    merging = tokens[in_slots]
    slots = ranges(first_slot[has_slots], parts.num[has_slots])
    order = np.argsort(merging, kind="stable")  # within a token the order of the parts, so that sums are always alike
    counts = np.bincount(merging, minlength=len(positions_T))
    merged = np.flatnonzero(counts)
    rows = np.stack((parts.first, parts.num, parts.table, parts.start, parts.stop, slot_of), axis=1)
    return PlanArrays(
        small_parts=rows[: len(small.first)],
        large_parts=rows[len(small.first) :],
        positions_T=positions_T,
        page_ids=page_ids,
        num_slots=int(sizes.sum()),
        merged_tokens=merged,
        merged_slot_starts=np.concatenate(([0], np.cumsum(counts[merged]))),
        merged_slots=slots[order],
        trees_T3=trees_T3,
    )
