"""Keys and values in int8: how pages hold them, how they are written, and how a CPU attends to them.

    q[t, k, d] = floor(x / s + 1/2),    s[t, k] = max_d |x[t, k, d]| / 127

One scale per token and head, so a token's bytes depend on nothing but itself: pages are the same however a prompt was
cut into steps. An error is at most s / 2. The Triton attention kernel reads such pages itself (kernels.paged_attention:
the scale of a key multiplies its score, that of a value its weight). A CPU reads a step's pages into dense ones of the
activations' dtype and attends to these, a bounded number of bytes at a time.

Shape letters as in kernels/attention_batch.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

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
    """Pages of keys or of values: int8 [P, K, S, D] and a float32 scale for each of [P, K, S].

    Indexing by page, head and slot gives, or replaces, values and scales together, as it does for a tensor of pages.
    """

    def __init__(self, values_PKSD: Tensor, scales_PKS: Tensor) -> None:
        self.values_PKSD, self.scales_PKS = values_PKSD, scales_PKS

    @property
    def shape(self) -> torch.Size:
        return self.values_PKSD.shape

    @property
    def device(self) -> torch.device:
        return self.values_PKSD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values_PKSD.dtype

    def __getitem__(self, index: Any) -> Any:
        return QuantizedPages(self.values_PKSD[index], self.scales_PKS[index])

    def __setitem__(self, index: Any, new: Any) -> None:
        """`new` is other pages, or 0."""
        if isinstance(new, QuantizedPages):
            self.values_PKSD[index], self.scales_PKS[index] = new.values_PKSD, new.scales_PKS
        elif isinstance(new, int) and new == 0:
            self.values_PKSD[index], self.scales_PKS[index] = 0, 0.0
        else:
            raise ValueError(
                f"quantised pages can be set to other quantised pages or to 0, not to {type(new).__name__}"
            )

    def dequantize(self) -> Tensor:
        """The numbers that the pages stand for, float32 [P, K, S, D]."""
        return self.values_PKSD.float() * self.scales_PKS.unsqueeze(-1)


Pages = Tensor | QuantizedPages


def new_quantized_pages(
    num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, device: torch.device
) -> tuple[QuantizedPages, QuantizedPages]:
    """Allocate zeroed key and value pages of one layer, laid out as `new_kv_pages` does on this device."""
    values = new_kv_pages(num_pages, num_kv_heads, page_size, head_dim, torch.int8, device)
    scales = new_kv_pages(num_pages, num_kv_heads, page_size, 1, torch.float32, device)
    k_pages, v_pages = (QuantizedPages(x_PKSD, s_PKS1.squeeze(-1)) for x_PKSD, s_PKS1 in zip(values, scales))
    return k_pages, v_pages


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
        num_pages, num_kv_heads, page_size, head_dim = pages.shape
        q_TKD, scale_TK = quantize(x_TKD)
        values_KCD = pages.values_PKSD.transpose(0, 1).view(num_kv_heads, num_pages * page_size, head_dim)
        scales_KC = pages.scales_PKS.transpose(0, 1).view(num_kv_heads, num_pages * page_size)
        values_KCD.index_copy_(1, slots_T, q_TKD.transpose(0, 1))
        scales_KC.index_copy_(1, slots_T, scale_TK.transpose(0, 1))


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
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token and HEADS heads. Reads each key (or value) once, writes its byte and its head's scale."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    head_inside = head < num_heads
    inside = head_inside[:, None] & (column < head_dim)[None, :]
    page, offset = slot // page_size, slot % page_size
    at_x = x + token * x_stride_token + head[:, None] * x_stride_head + column[None, :]
    numbers = tl.load(at_x, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(numbers), axis=1)
    factor = tl.where(largest > smallest, 127.0 / tl.maximum(largest, smallest), 0.0)
    rounded = tl.floor(numbers * factor[:, None] + 0.5)
    # A head that is not finite shall be seen: its scale becomes NaN, and its bytes 0 rather than undefined.
    scale = largest / 127.0 + tl.sum(numbers * 0.0, axis=1)
    rounded = tl.where(rounded == rounded, rounded, 0.0)
    at_values = values + page * values_stride_page + head[:, None] * values_stride_head + offset * head_dim
    tl.store(at_values + column[None, :], rounded.to(tl.int8), mask=inside)
    tl.store(scales + page * scales_stride_page + head * scales_stride_head + offset, scale, mask=head_inside)


def write_quantized_kv_triton(
    k_TKD: Tensor, v_TKD: Tensor, k_pages: QuantizedPages, v_pages: QuantizedPages, slots_T: Tensor
) -> None:
    """Quantise and write in place; a slot of -1 writes nothing. Any head dimension, number of heads, page size and
    strides of pages and heads."""
    check_kv_shapes(k_TKD, v_TKD, k_pages.shape, v_pages.shape, slots_T)
    num_tokens, num_heads, head_dim = k_TKD.shape
    if not num_tokens:
        return
    block = 1 << (head_dim - 1).bit_length()
    heads = max(1, min(1 << (num_heads - 1).bit_length(), 1024 // block))
    for x_TKD, pages in ((k_TKD, k_pages), (v_TKD, v_pages)):
        _write_quantized_kernel[(num_tokens, -(-num_heads // heads))](
            x_TKD,
            pages.values_PKSD,
            pages.scales_PKS,
            slots_T,
            x_TKD.stride(0),
            x_TKD.stride(1),
            pages.values_PKSD.stride(0),
            pages.values_PKSD.stride(1),
            pages.scales_PKS.stride(0),
            pages.scales_PKS.stride(1),
            pages.shape[2],
            num_heads,
            head_dim,
            SMALLEST,
            HEADS=heads,
            BLOCK=block,
            num_warps=4,
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
    values_KPSD = pages.values_PKSD.transpose(0, 1).index_select(1, chosen).float()
    scales_KPS = pages.scales_PKS.transpose(0, 1).index_select(1, chosen)
    return values_KPSD.mul_(scales_KPS.unsqueeze(-1)).to(dtype).transpose(0, 1)


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
