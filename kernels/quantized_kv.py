"""Keys and values in int8: how pages hold them, how they are written, and how a CPU attends to them.

    q[t, k, d] = floor(x / s + 1/2),    s[t, k] = max_d |x[t, k, d]| / 127

One scale per token and head, so a token's bytes depend on nothing but itself: pages are the same however a prompt was
cut into steps. An error is at most s / 2.

A GPU's pages hold q + 128 in pairs, two bytes of a 16-bit unit, as its attention wants them at one place
(kernels.int8_attention): of keys, dimensions d and d + D/2 of a slot; of values, slots s and s + S/2 of a dimension.
Within a head of a page, slot s and dimension d have byte

    of keys   s D + 2 (d mod D/2) + d div D/2,        of values   2 (D (s mod S/2) + d) + s div S/2

A CPU's pages hold q itself by slot and dimension: it reads a step's pages into dense ones of the activations' dtype, a
bounded number of bytes at a time, which is vector instructions on bytes that lie in order and would be single ones on
pairs. What is here in torch takes pages of either kind.

Shape letters as in kernels/attention_batch.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.attention_batch import AttentionBatch, PrefixGroup, new_kv_pages
from kernels.kv_cache import check_kv_shapes
from kernels.on_demand import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

SMALLEST = 1e-30
"""Heads whose largest value is below become zeros: 127 / max would overflow."""

SCALE_BYTES = 4
"""Per token and head, for keys and for values."""

DENSE_BYTES = 128 << 20
"""A CPU reads about this much of keys, and as much of values, into dense pages at once; one request always fits."""


class QuantizedPages:
    """Pages of keys or of values: a byte for each of [P, K, S, D] and a float32 scale for each of [P, K, S].

    pairs: of what a 16-bit unit of `values` holds two. Pages and heads may have any strides, a head's page has none.

    - None: `values` are q, int8 [P, K, S, D], or e4m3 (kernels.fp8_kv);
    - "dims": int16 [P, K, S, D/2], which are keys;
    - "slots": int16 [P, K, S/2, D], which are values.
    """

    def __init__(self, values: Tensor, scales_PKS: Tensor, pairs: str | None = None) -> None:
        self.values, self.scales_PKS, self.pairs = values, scales_PKS, pairs
        page_bytes = values.shape[2] * values.shape[3] * values.itemsize
        self.shape = torch.Size((*scales_PKS.shape, page_bytes // scales_PKS.shape[2]))

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """int8 or float8_e4m3fn."""
        return torch.int8 if self.pairs is not None else self.values.dtype

    def by_plane(self) -> Tensor:
        """The paired bytes as a view whose elements come in the order of slots and dimensions: uint8 [P, K, S, 2, D/2]
        of keys, [P, K, 2, S/2, D] of values."""
        pairs = self.values.view(torch.uint8).unflatten(3, (self.values.shape[3], 2))
        return pairs.movedim(4, 3 if self.pairs == "dims" else 2)

    def read(self, chosen: Tensor) -> Tensor:
        """The numbers that some pages stand for, float32 [pages, K, S, D], laid out as a CPU's pages are."""
        # index_select wants the pages in front of nothing but heads, where a CPU's have them.
        if self.pairs is None:
            q_KPSD = self.values.transpose(0, 1).index_select(1, chosen).float()
        else:
            q_KPSD = self.by_plane().transpose(0, 1).index_select(1, chosen).float().flatten(2).sub_(128)
        scales_KPS = self.scales_PKS.transpose(0, 1).index_select(1, chosen)
        return q_KPSD.view(*scales_KPS.shape, -1).mul_(scales_KPS.unsqueeze(-1)).transpose(0, 1)

    def dequantize(self) -> Tensor:
        """The numbers that all pages stand for, float32 [P, K, S, D]."""
        return self.read(torch.arange(self.shape[0], device=self.device))

    def write(self, q_TKD: Tensor, scales_TK: Tensor, slots_T: Tensor) -> None:
        """Put numbers of the pages' dtype and their scales into slots, in place."""
        num_pages, num_kv_heads, page_size, head_dim = self.shape
        page, slot = slots_T // page_size, slots_T % page_size
        if self.pairs is not None:
            bytes_TKD = (q_TKD.int() + 128).to(torch.uint8)
            if self.pairs == "dims":
                self.by_plane()[page, :, slot] = bytes_TKD.unflatten(2, (2, head_dim // 2))
            else:
                self.by_plane()[page, :, slot // (page_size // 2), slot % (page_size // 2)] = bytes_TKD
            self.scales_PKS[page, :, slot] = scales_TK
            return
        # As bytes, since index_copy_ does not know e4m3.
        values_KCD = self.values.view(torch.int8).transpose(0, 1).view(num_kv_heads, num_pages * page_size, head_dim)
        scales_KC = self.scales_PKS.transpose(0, 1).view(num_kv_heads, num_pages * page_size)
        values_KCD.index_copy_(1, slots_T, q_TKD.view(torch.int8).transpose(0, 1))
        scales_KC.index_copy_(1, slots_T, scales_TK.transpose(0, 1))

    def copy_slots(self, source: int, target: int, num_slots: int) -> None:
        """Copy the first slots of a page to another page."""
        self.scales_PKS[target, :, :num_slots] = self.scales_PKS[source, :, :num_slots]
        if self.pairs != "slots":
            self.values[target, :, :num_slots] = self.values[source, :, :num_slots]
            return
        by_plane, half = self.by_plane(), self.shape[2] // 2
        for plane, num in enumerate((min(num_slots, half), num_slots - half)):
            if num > 0:
                by_plane[target, :, plane, :num] = by_plane[source, :, plane, :num]

    def clear_slots(self, pages: int | list[int], first: int = 0) -> None:
        """Let slots from `first` on stand for zeros. Bytes stay, as any is a number; only a scale may be none."""
        self.scales_PKS[pages, :, first:] = 0.0


Pages = Tensor | QuantizedPages


def copy_slots(pages: Pages, source: int, target: int, num_slots: int) -> None:
    """Copy the first slots of page `source` to page `target`, in all heads."""
    if isinstance(pages, QuantizedPages):
        pages.copy_slots(source, target, num_slots)
    else:
        pages[target, :, :num_slots] = pages[source, :, :num_slots]


def clear_slots(pages: Pages, chosen: int | list[int], first: int = 0) -> None:
    """Zero the slots from `first` on of a page or of several, in all heads."""
    if isinstance(pages, QuantizedPages):
        pages.clear_slots(chosen, first)
    else:
        pages[chosen, :, first:] = 0


def new_quantized_pages(
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    device: torch.device,
    in_pairs: bool | None = None,
) -> tuple[QuantizedPages, QuantizedPages]:
    """Allocate key and value pages of one layer that stand for zeros, laid out as `new_kv_pages` does on this device.

    in_pairs: whether bytes lie in 16-bit units; None: as the device's attention reads them. ValueError where they must
    and an odd number of slots or dimensions has no pairs.
    """
    if in_pairs is None:
        in_pairs = device.type == "cuda"
    if not in_pairs:
        return new_plain_pages(num_pages, num_kv_heads, page_size, head_dim, torch.int8, device)
    for name, value in (("page_size", page_size), ("the head dimension", head_dim)):
        if value % 2:
            raise ValueError(f"int8 pages: {name} is {value}; on a GPU it must be even, as two bytes share a unit")
    k_scales_PKS, v_scales_PKS = _new_scales(num_pages, num_kv_heads, page_size, device)
    units, _ = new_kv_pages(num_pages, num_kv_heads, page_size, head_dim // 2, torch.int16, device)
    other, _ = new_kv_pages(num_pages, num_kv_heads, page_size // 2, head_dim, torch.int16, device)
    return QuantizedPages(units, k_scales_PKS, "dims"), QuantizedPages(other, v_scales_PKS, "slots")


def new_plain_pages(
    num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[QuantizedPages, QuantizedPages]:
    """`new_quantized_pages` whose bytes, int8 or e4m3, lie by slot and dimension."""
    k, v = new_kv_pages(num_pages, num_kv_heads, page_size, head_dim, dtype, device)
    k_scales_PKS, v_scales_PKS = _new_scales(num_pages, num_kv_heads, page_size, device)
    return QuantizedPages(k, k_scales_PKS), QuantizedPages(v, v_scales_PKS)


def _new_scales(num_pages: int, num_kv_heads: int, page_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    k_PKS1, v_PKS1 = new_kv_pages(num_pages, num_kv_heads, page_size, 1, torch.float32, device)
    return k_PKS1.squeeze(-1), v_PKS1.squeeze(-1)


def quantize(x_TKD: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [T, K, D] and float32 scales [T, K]. Where a head is not finite its scale is not, so that it stays seen."""
    x_TKD = x_TKD.float()
    largest_TK = x_TKD.abs().amax(-1)
    factor_TK = torch.where(largest_TK > SMALLEST, 127.0 / largest_TK, 0.0)
    q_TKD = (x_TKD * factor_TK.unsqueeze(-1) + 0.5).floor_().nan_to_num_(0.0).to(torch.int8)
    # x * 0 is 0, or NaN where x is infinite or NaN.
    return q_TKD, largest_TK / 127.0 + (x_TKD * 0.0).sum(-1)


def write_quantized_kv_cpu(
    k_TKD: Tensor, v_TKD: Tensor, k_pages: QuantizedPages, v_pages: QuantizedPages, slots_T: Tensor
) -> None:
    """Quantise and write in place, in torch. Pages as new_quantized_pages lays them out on a CPU."""
    check_kv_shapes(k_TKD, v_TKD, k_pages.shape, v_pages.shape, slots_T)
    for x_TKD, pages in ((k_TKD, k_pages), (v_TKD, v_pages)):
        pages.write(*quantize(x_TKD), slots_T)


@triton_kernel
def quantizer(largest, spoilt, smallest):
    """What multiplies a head's numbers, and its scale: from the largest |x| and the sum of its x * 0.

    `smallest` is SMALLEST. Where a head is not finite its scale is NaN, so that it stays seen.
    """
    factor = tl.where(largest > smallest, 127.0 / tl.maximum(largest, smallest), 0.0)
    return factor, largest / 127.0 + spoilt


@triton_kernel
def to_bytes(numbers, factor):
    """uint8: q + 128 of float32 numbers; of what is not finite 128 rather than undefined."""
    rounded = tl.floor(numbers * factor + 0.5)
    rounded = tl.where(rounded == rounded, rounded, 0.0)
    return (rounded + 128.0).to(tl.uint8)


@triton_kernel
def key_byte(slot, dimension, head_dim):
    """Where in a head's page a key's byte lies; slot: in its page."""
    half = head_dim // 2
    return slot * head_dim + 2 * (dimension % half) + dimension // half


@triton_kernel
def value_byte(slot, dimension, head_dim, page_size):
    """Where in a head's page a value's byte lies; slot: in its page."""
    half = page_size // 2
    return 2 * (slot % half * head_dim + dimension) + slot // half


@triton_kernel
def _write_quantized_kernel(
    x,
    values,
    scales,
    slots,
    x_stride_token,
    x_stride_head,
    values_stride_page,
    values_stride_head,
    scales_stride_page,
    scales_stride_head,
    page_size,
    num_heads,
    head_dim,
    smallest,
    IS_KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token and HEADS heads. Reads each key (or value) once, writes its byte and its head's scale.

    values: uint8, and their strides in bytes.
    """
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    head_inside = head < num_heads
    inside = head_inside[:, None] & (column < head_dim)[None, :]
    page, in_page = slot // page_size, (slot % page_size).to(tl.int32)
    at_x = x + token * x_stride_token + head[:, None] * x_stride_head + column[None, :]
    numbers = tl.load(at_x, mask=inside, other=0.0).to(tl.float32)
    factor, scale = quantizer(tl.max(tl.abs(numbers), axis=1), tl.sum(numbers * 0.0, axis=1), smallest)
    byte = key_byte(in_page, column, head_dim) if IS_KEYS else value_byte(in_page, column, head_dim, page_size)
    at_head = values + page * values_stride_page + head[:, None] * values_stride_head
    tl.store(at_head + byte[None, :], to_bytes(numbers, factor[:, None]), mask=inside)
    tl.store(scales + page * scales_stride_page + head * scales_stride_head + in_page, scale, mask=head_inside)


def write_quantized_kv_triton(
    k_TKD: Tensor, v_TKD: Tensor, k_pages: QuantizedPages, v_pages: QuantizedPages, slots_T: Tensor
) -> None:
    """Quantise and write in place; a slot of -1 writes nothing. Any even head dimension and page size, any number of
    heads and strides of pages and heads; pages hold pairs."""
    check_kv_shapes(k_TKD, v_TKD, k_pages.shape, v_pages.shape, slots_T)
    check_pairs(k_pages, v_pages)
    num_tokens, num_heads, head_dim = k_TKD.shape
    if not num_tokens:
        return
    block = 1 << (head_dim - 1).bit_length()
    heads = max(1, min(1 << (num_heads - 1).bit_length(), 1024 // block))
    for x_TKD, pages in ((k_TKD, k_pages), (v_TKD, v_pages)):
        page_bytes = pages.values.view(torch.uint8)
        _write_quantized_kernel[(num_tokens, -(-num_heads // heads))](
            x_TKD,
            page_bytes,
            pages.scales_PKS,
            slots_T,
            x_TKD.stride(0),
            x_TKD.stride(1),
            page_bytes.stride(0),
            page_bytes.stride(1),
            pages.scales_PKS.stride(0),
            pages.scales_PKS.stride(1),
            pages.shape[2],
            num_heads,
            head_dim,
            SMALLEST,
            IS_KEYS=pages.pairs == "dims",
            HEADS=heads,
            BLOCK=block,
            num_warps=4,
        )


def check_pairs(k_pages: QuantizedPages, v_pages: QuantizedPages) -> None:
    """Refuse pages that Triton's kernels cannot read: a CPU's."""
    for name, pages, wanted in (("k", k_pages, "dims"), ("v", v_pages, "slots")):
        if pages.pairs != wanted:
            raise ValueError(
                f"int8 pages: {name} pages hold pairs of {pages.pairs}; Triton's kernels read pairs of {wanted}"
            )


Attend = Callable[[Tensor, Tensor, Tensor, AttentionBatch, float, int | None, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive requests of a step: their rows of queries, the pages they read, and a batch of just these."""

    start: int
    stop: int
    pages: Tensor
    batch: AttentionBatch


def attend_converted(
    attend: Attend,
    q_TND: Tensor,
    k_pages: Pages,
    v_pages: Pages,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """`attend` on a CPU, over pages that are not of q's dtype: reads those of the step into dense ones first."""
    page_bytes = k_pages.shape[1] * k_pages.shape[2] * k_pages.shape[3] * q_TND.dtype.itemsize
    pieces = batch.cache.get("converted_pages")
    if pieces is None:
        pieces = batch.cache["converted_pages"] = _cut(batch, max(1, DENSE_BYTES // page_bytes))
    outputs = [
        attend(
            q_TND[piece.start : piece.stop],
            _read_pages(k_pages, piece.pages, q_TND.dtype),
            _read_pages(v_pages, piece.pages, q_TND.dtype),
            piece.batch,
            scale,
            window,
            sinks_N,
        )
        for piece in pieces
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _read_pages(pages: Pages, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """Some pages as a dense tensor [P, K, S, D] in a CPU's layout."""
    if isinstance(pages, Tensor):
        return pages.transpose(0, 1).index_select(1, chosen).to(dtype).transpose(0, 1)
    return pages.read(chosen).to(dtype)


def _cut(batch: AttentionBatch, max_pages: int) -> list[_Piece]:
    """Cut a step between requests so that each piece reads at most `max_pages` pages, if one request does not alone."""
    borders, pages = [0], set[int]()
    for request, page_ids in enumerate(batch.page_ids):
        more = pages.union(int(page) for page in page_ids)
        if len(more) > max_pages and request > borders[-1]:
            borders.append(request)
            more = {int(page) for page in page_ids}
        pages = more
    borders.append(len(batch.page_ids))
    pieces, row = [], 0
    for first, stop in pairwise(borders):
        piece = _cut_out(batch, first, stop, row)
        pieces.append(piece)
        row = piece.stop
    return pieces


def _cut_out(batch: AttentionBatch, first: int, stop: int, start_row: int) -> _Piece:
    chosen = sorted({int(page) for page_ids in batch.page_ids[first:stop] for page in page_ids})
    place = {page: i for i, page in enumerate(chosen)}
    groups = []
    for group in batch.groups:
        group_first = max(group.first_request, first)
        num_requests = min(group.first_request + group.num_requests, stop) - group_first
        if num_requests > 1:
            page_ids = [place[int(page)] for page in group.page_ids]
            groups.append(PrefixGroup(group_first - first, num_requests, page_ids, group.first_page))
    part = AttentionBatch(
        query_lens=batch.query_lens[first:stop],
        context_lens=batch.context_lens[first:stop],
        page_ids=[[place[int(page)] for page in page_ids] for page_ids in batch.page_ids[first:stop]],
        page_size=batch.page_size,
        groups=groups,
        trees={request - first: mask for request, mask in batch.trees.items() if first <= request < stop},
    )
    return _Piece(start_row, start_row + part.num_tokens, torch.tensor(chosen), part)
