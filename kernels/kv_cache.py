"""Writing a step's keys and values into their pages. Called through kernels.backend.

    pages[slot // S, :, slot % S] = k[t]

Kwon et al. 2023 (PagedAttention). Shape letters as in kernels/attention_batch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.on_demand import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl


@triton_kernel
def _write_kv_kernel(
    k,
    v,
    k_pages,
    v_pages,
    slots,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    k_stride_page,
    k_stride_page_head,
    v_stride_page,
    v_stride_page_head,
    page_size,
    num_heads,
    head_dim,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token and HEADS heads. Reads and writes each key and value once."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    inside = (head < num_heads) & (column < head_dim)
    page, offset = slot // page_size, slot % page_size
    in_page = offset * head_dim + column
    key = tl.load(k + token * k_stride_token + head * k_stride_head + column, mask=inside)
    at_k = k_pages + page * k_stride_page + head * k_stride_page_head + in_page
    tl.store(at_k, key.to(k_pages.dtype.element_ty), mask=inside)
    value = tl.load(v + token * v_stride_token + head * v_stride_head + column, mask=inside)
    at_v = v_pages + page * v_stride_page + head * v_stride_page_head + in_page
    tl.store(at_v, value.to(v_pages.dtype.element_ty), mask=inside)


def write_kv_triton(k_TKD: Tensor, v_TKD: Tensor, k_pages_PKSD: Tensor, v_pages_PKSD: Tensor, slots_T: Tensor) -> None:
    """Write in place; a slot of -1 writes nothing. Any head dimension, number of heads and page size.

    See check_write_kv for the strides.
    """
    check_write_kv(k_TKD, v_TKD, k_pages_PKSD, v_pages_PKSD, slots_T)
    num_tokens, num_heads, head_dim = k_TKD.shape
    if not num_tokens:
        return
    block = 1 << (head_dim - 1).bit_length()
    heads = max(1, min(1 << (num_heads - 1).bit_length(), 1024 // block))
    _write_kv_kernel[(num_tokens, -(-num_heads // heads))](
        k_TKD,
        v_TKD,
        k_pages_PKSD,
        v_pages_PKSD,
        slots_T,
        k_TKD.stride(0),
        k_TKD.stride(1),
        v_TKD.stride(0),
        v_TKD.stride(1),
        k_pages_PKSD.stride(0),
        k_pages_PKSD.stride(1),
        v_pages_PKSD.stride(0),
        v_pages_PKSD.stride(1),
        k_pages_PKSD.shape[2],
        num_heads,
        head_dim,
        HEADS=heads,
        BLOCK=block,
        num_warps=4,
    )


def check_kv_shapes(
    k_TKD: Tensor, v_TKD: Tensor, k_shape: Sequence[int], v_shape: Sequence[int], slots_T: Tensor
) -> None:
    """Refuse keys, values, pages [P, K, S, D] and slots whose shapes do not fit, whatever the pages hold. Slots are not
    read: they must be distinct and in [0, P * S)."""
    num_tokens, num_kv_heads, head_dim = k_TKD.shape
    if v_TKD.shape != k_TKD.shape or k_TKD.stride(2) != 1 or v_TKD.stride(2) != 1:
        raise ValueError(
            f"write_kv: k is {tuple(k_TKD.shape)} and v {tuple(v_TKD.shape)}; "
            "they must have one shape and a contiguous head dimension"
        )
    if slots_T.shape != (num_tokens,) or slots_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"write_kv: slots are {slots_T.dtype} {tuple(slots_T.shape)}; they must be int64 [{num_tokens}]"
        )
    if k_shape != v_shape or k_shape[1] != num_kv_heads or k_shape[3] != head_dim:
        raise ValueError(
            f"write_kv: pages are {tuple(k_shape)} and {tuple(v_shape)}; "
            f"they must be [pages, {num_kv_heads}, slots, {head_dim}]"
        )


def check_write_kv(k_TKD: Tensor, v_TKD: Tensor, k_pages: Tensor, v_pages: Tensor, slots_T: Tensor) -> None:
    """Refuse what does not belong together."""
    check_kv_shapes(k_TKD, v_TKD, k_pages.shape, v_pages.shape, slots_T)
    head_dim = k_TKD.shape[2]
    for name, pages in (("k", k_pages), ("v", v_pages)):
        if pages.stride(3) != 1 or pages.stride(2) != head_dim:
            raise ValueError(
                f"write_kv: {name} pages have strides {pages.stride()}; a page's slots must be contiguous per head"
            )
        if pages.dtype not in (k_TKD.dtype, torch.bfloat16) or v_TKD.dtype != k_TKD.dtype:
            raise ValueError(
                f"write_kv: {name} pages are {pages.dtype}, k {k_TKD.dtype} and v {v_TKD.dtype}; "
                "pages must be of the dtype of both, or bfloat16"
            )
    devices = {x.device for x in (k_TKD, v_TKD, k_pages, v_pages, slots_T)}
    if len(devices) > 1:
        raise ValueError(f"write_kv: inputs are on {sorted(map(str, devices))}; they must be on one device")


def write_kv_cpu(k_TKD: Tensor, v_TKD: Tensor, k_pages: Tensor, v_pages: Tensor, slots_T: Tensor) -> None:
    """Write in place, in torch; also the reference, as nothing is computed."""
    check_write_kv(k_TKD, v_TKD, k_pages, v_pages, slots_T)
    for x_TKD, pages_PKSD in ((k_TKD, k_pages), (v_TKD, v_pages)):
        num_pages, num_kv_heads, page_size, head_dim = pages_PKSD.shape
        if pages_PKSD.stride(0) == page_size * pages_PKSD.stride(2):  # new_kv_pages' layout: a page follows a page
            slots_KCD = pages_PKSD.transpose(0, 1).view(num_kv_heads, num_pages * page_size, head_dim)
            slots_KCD.index_copy_(1, slots_T, x_TKD.transpose(0, 1).to(slots_KCD.dtype))
        else:
            pages_PKSD[slots_T // page_size, :, slots_T % page_size] = x_TKD.to(pages_PKSD.dtype)
