"""Paged attention: decode, verification of draft tokens, and a group of requests on a shared prefix, beside SDPA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.bench.kernels.case import Case, Prepared, fill
from kernels.attention_batch import AttentionBatch, PrefixGroup, new_kv_pages
from kernels.backend import paged_attention, write_kv
from kernels.compare import compare
from kernels.paged_attention import paged_attention_reference
from kernels.quantized_kv import Pages, QuantizedPages, new_quantized_pages

CHECKED_REQUESTS = 4
"""From the start and as many from the end: in float64 all of them would take minutes."""
CHUNK_PAGES = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """num_shared: tokens that all requests have in common, in shared pages; grouped: whether the kernel is told."""

    num_requests: int
    num_context: int
    num_queries: int = 1
    kv: str = "bf16"
    num_shared: int = 0
    grouped: bool = False
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def name(self) -> str:
        what = "decode" if self.num_queries == 1 else f"verify {self.num_queries}"
        shared = f" shared={self.num_shared}" if self.num_shared else ""
        grouped = " grouped" if self.grouped else ""
        return f"{what} {self.kv} B={self.num_requests} context={self.num_context}{shared}{grouped}"


DECODES = tuple(Shape(batch, context) for batch in (64, 256) for context in (1024, 8192))
GPU_SHAPES = tuple(
    replace(shape, page_size=64)  # the engine's, and a tile of keys
    for shape in (
        *DECODES,
        *(Shape(s.num_requests, s.num_context, kv="int8") for s in DECODES),
        *(Shape(s.num_requests, s.num_context, 4, kv) for s in DECODES[:3] for kv in ("bf16", "int8")),
        *(Shape(128, 4096 + 128, num_shared=4096, grouped=grouped) for grouped in (False, True)),
    )
)
CPU_SHAPES = tuple(
    Shape(8, 512 + 64 * (queries > 1), queries, kv, shared, shared > 0, 8, 2, 64)
    for queries, kv, shared in ((1, "bf16", 0), (1, "int8", 0), (4, "bf16", 0), (1, "bf16", 256))
)
SMALL_SHAPES = tuple(
    Shape(3, context, queries, kv, shared, shared > 0, 4, 2, dim)
    for context, queries, kv, shared, dim in (
        (70, 1, "16-bit", 0, 64),
        (67, 4, "16-bit", 0, 80),
        (70, 1, "int8", 0, 64),
        (90, 2, "int8", 0, 128),
        (80, 1, "16-bit", 48, 64),
    )
)


def cases(place: str, device: torch.device) -> Iterator[Case]:
    shapes = {"cuda": GPU_SHAPES, "cpu": CPU_SHAPES, "interpreter": SMALL_SHAPES}[place]
    for shape in shapes:
        yield Case("attention", shape.name, lambda shape=shape: prepare(shape, place, device))  # type: ignore[misc]


def new_batch(shape: Shape, num_pages_shared: int, num_pages_own: int) -> AttentionBatch:
    """The shared pages come first; every request has its own behind them, in an order that is not the memory's."""
    shared = list(range(num_pages_shared))
    num_own = shape.num_requests * num_pages_own
    order = torch.randperm(num_own, generator=torch.Generator().manual_seed(5)).add(num_pages_shared).tolist()
    tables: list[Sequence[int]] = [
        shared + order[i * num_pages_own : (i + 1) * num_pages_own] for i in range(shape.num_requests)
    ]
    return AttentionBatch(
        query_lens=[shape.num_queries] * shape.num_requests,
        context_lens=[shape.num_context] * shape.num_requests,
        page_ids=tables,
        page_size=shape.page_size,
        groups=[PrefixGroup(0, shape.num_requests, shared)] if shape.grouped else [],
    )


def prepare(shape: Shape, place: str, device: torch.device) -> Prepared:
    dtype = torch.float16 if place == "interpreter" else torch.bfloat16
    num_pages_shared = shape.num_shared // shape.page_size
    num_pages_own = -(-shape.num_context // shape.page_size) - num_pages_shared
    batch = new_batch(shape, num_pages_shared, num_pages_own)
    num_pages = num_pages_shared + shape.num_requests * num_pages_own
    k_pages, v_pages = fill_pages(shape, num_pages, dtype, place, device)
    num_tokens = shape.num_requests * shape.num_queries
    q_TND = fill((num_tokens, shape.num_heads, shape.head_dim), dtype, device, 3)
    scale = shape.head_dim**-0.5
    attend = _attend(place)

    def run() -> Tensor:
        return attend(q_TND, k_pages, v_pages, batch, scale)

    def check() -> Any:
        chosen = sorted({*range(min(CHECKED_REQUESTS, shape.num_requests))} | {*range(shape.num_requests)[-4:]})
        rows = [r * shape.num_queries + i for r in chosen for i in range(shape.num_queries)]
        part = AttentionBatch(
            [shape.num_queries] * len(chosen),
            [shape.num_context] * len(chosen),
            [batch.page_ids[r] for r in chosen],
            shape.page_size,
        )
        k, v = _dense(k_pages, dtype), _dense(v_pages, dtype)
        exact_TND = paged_attention_reference(q_TND[rows], _exact(k_pages), _exact(v_pages), part, scale)
        torch_TND = paged_attention_reference(q_TND[rows], k, v, part, scale, dtype=dtype)
        return compare(run()[rows], torch_TND, exact_TND)

    distinct = shape.num_shared + shape.num_requests * (shape.num_context - shape.num_shared)
    read = distinct if shape.grouped else shape.num_requests * shape.num_context
    bytes_per_token = shape.head_dim + 4 if shape.kv == "int8" else shape.head_dim * dtype.itemsize
    return Prepared(
        run,
        check,
        num_bytes=2 * shape.num_kv_heads * read * bytes_per_token + 2 * q_TND.numel() * dtype.itemsize,
        num_flops=4 * num_tokens * shape.num_context * shape.num_heads * shape.head_dim,
        baselines=sdpa(shape, q_TND, place),
    )


def _attend(place: str) -> Callable[..., Tensor]:
    if place != "interpreter":
        return paged_attention
    from kernels.paged_attention import paged_attention_triton

    return paged_attention_triton


def fill_pages(
    shape: Shape, num_pages: int, dtype: torch.dtype, place: str, device: torch.device
) -> tuple[Pages, Pages]:
    """Random keys and values, quantised as the engine does where the shape says int8; a few pages at a time."""
    sizes = (num_pages, shape.num_kv_heads, shape.page_size, shape.head_dim)
    pages: tuple[Pages, Pages]
    if shape.kv == "int8":
        pages = new_quantized_pages(*sizes, device, in_pairs=place != "cpu")
    else:
        k, v = new_kv_pages(*sizes, dtype, device)
        # The interpreter's memory is a CPU's, but the kernel's layout is the GPU's.
        pages = (k.contiguous(), v.contiguous()) if place == "interpreter" else (k, v)
    for first in range(0, num_pages, CHUNK_PAGES):
        last = min(first + CHUNK_PAGES, num_pages)
        tokens = (last - first) * shape.page_size
        k_TKD, v_TKD = (fill((tokens, shape.num_kv_heads, shape.head_dim), dtype, device, s + first) for s in (1, 2))
        slots_T = torch.arange(first * shape.page_size, last * shape.page_size, device=device)
        write_kv(k_TKD, v_TKD, pages[0], pages[1], slots_T)
    return pages


def _dense(pages: Pages, dtype: torch.dtype) -> Tensor:
    return pages.dequantize().to(dtype) if isinstance(pages, QuantizedPages) else pages


def _exact(pages: Pages) -> Tensor:
    return pages.dequantize() if isinstance(pages, QuantizedPages) else pages


def sdpa(shape: Shape, q_TND: Tensor, place: str) -> dict[str, Callable[[], Any]]:
    """torch's attention on keys and values that lie dense per request already, which a paged cache does not give."""
    if place == "interpreter" or shape.num_shared:
        return {}
    sizes = (shape.num_requests, shape.num_kv_heads, shape.num_context, shape.head_dim)
    k, v = (fill(sizes, q_TND.dtype, q_TND.device, seed) for seed in (1, 2))
    q = q_TND.view(shape.num_requests, shape.num_queries, shape.num_heads, shape.head_dim).transpose(1, 2)
    mask = None
    if shape.num_queries > 1:
        key = torch.arange(shape.num_context, device=q.device)
        mask = key <= torch.arange(shape.num_context - shape.num_queries, shape.num_context, device=q.device)[:, None]
    return {"torch SDPA": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)}
