"""What attention over pages refuses: shapes, dtypes, devices and lengths that do not belong together."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention_batch import AttentionBatch
from kernels.quantized_kv import Pages, QuantizedPages


def check_attention(
    q_TND: Tensor, k_pages: Pages, v_pages: Pages, batch: AttentionBatch, scale: float, window: int | None
) -> None:
    """Refuse what does not belong together. Page ids are not read: they must be in [0, P)."""
    num_tokens, num_heads, head_dim = q_TND.shape
    if len(k_pages.shape) != 4 or k_pages.shape != v_pages.shape or k_pages.shape[3] != head_dim:
        raise ValueError(
            f"paged_attention: pages are {tuple(k_pages.shape)} and {tuple(v_pages.shape)}; "
            f"they must be [pages, heads, slots, {head_dim}]"
        )
    num_kv_heads, page_size = k_pages.shape[1], k_pages.shape[2]
    if num_heads % num_kv_heads or not 1 <= num_heads // num_kv_heads <= 16:
        raise ValueError(
            f"paged_attention: {num_heads} query heads on {num_kv_heads} key/value heads; 1 to 16 may share one"
        )
    if not 8 <= head_dim <= 256:
        raise ValueError(f"paged_attention: head dimension is {head_dim}; it must be 8 to 256")
    if q_TND.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"paged_attention: q is {q_TND.dtype}; it must be float32, float16 or bfloat16")
    for name, pages in (("k pages", k_pages), ("v pages", v_pages)):
        x = pages.values if isinstance(pages, QuantizedPages) else pages
        fits = isinstance(pages, QuantizedPages) or x.dtype in (q_TND.dtype, torch.bfloat16)
        if not fits or x.device != q_TND.device:
            raise ValueError(
                f"paged_attention: {name} are {x.dtype} on {x.device}, q is {q_TND.dtype} on {q_TND.device}"
            )
        if x.stride(3) != 1 or x.stride(2) != x.shape[3]:
            raise ValueError(
                f"paged_attention: {name} have strides {x.stride()}; a page's slots must be contiguous per head"
            )
    if k_pages.dtype != v_pages.dtype:
        raise ValueError(f"paged_attention: k pages are {k_pages.dtype}, v pages {v_pages.dtype}; they must be alike")
    if q_TND.stride(2) != 1:
        raise ValueError(f"paged_attention: q has strides {q_TND.stride()}; the head dimension must be contiguous")
    if not scale > 0:
        raise ValueError(f"paged_attention: scale is {scale}; it must be above 0")
    if window is not None and window < 1:
        raise ValueError(f"paged_attention: window is {window}; it must be at least 1, or None")
    check_batch(batch, num_tokens, page_size)


def check_batch(batch: AttentionBatch, num_tokens: int, page_size: int) -> None:
    """Refuse lengths and tables that contradict each other."""
    if batch.page_size != page_size:
        raise ValueError(f"paged_attention: the batch says page_size={batch.page_size}, the pages {page_size}")
    if batch.num_tokens != num_tokens:
        raise ValueError(f"paged_attention: query_lens sum to {batch.num_tokens}, q has {num_tokens} tokens")
    if not len(batch.query_lens) == len(batch.context_lens) == len(batch.page_ids):
        raise ValueError(
            f"paged_attention: {len(batch.query_lens)} query_lens, {len(batch.context_lens)} context_lens and "
            f"{len(batch.page_ids)} page tables; there must be one of each per request"
        )
    for request, (num_queries, num_context) in enumerate(zip(batch.query_lens, batch.context_lens)):
        room = len(batch.page_ids[request]) * page_size
        if not 1 <= num_queries <= num_context <= room:
            raise ValueError(
                f"paged_attention: request {request} has {num_queries} query tokens, {num_context} tokens of "
                f"context and pages for {room}; it must be 1 <= queries <= context <= room"
            )


def check_sinks(sinks_N: Tensor | None, q_TND: Tensor) -> None:
    """Refuse sinks that are not one float32 per query head, on q's device."""
    if sinks_N is None:
        return
    if sinks_N.shape != q_TND.shape[1:2] or sinks_N.dtype != torch.float32 or sinks_N.device != q_TND.device:
        raise ValueError(
            f"paged_attention: sinks are {sinks_N.dtype} {tuple(sinks_N.shape)} on {sinks_N.device}; they must be "
            f"float32 [{q_TND.shape[1]}] on {q_TND.device}, one per query head"
        )
    if not sinks_N.is_contiguous():
        raise ValueError(f"paged_attention: sinks have strides {sinks_N.stride()}; they must be contiguous")
