"""From a step's fused projection to what attention reads: norms, rotation, and the new keys' and values' pages.

    q, k = rope(norm(q)), rope(norm(k));    pages[slot // S, :, slot % S] = k, v

In one launch, which reads the projection once. The norm is left out where a model has none. Results are rounded where
kernels.rms_norm, kernels.rope and kernels.kv_cache, one after the other, round them.

Shape letters as in kernels/attention_batch.py; M = N + 2K heads of the projection, L positions of the tables, R their
width. Called through kernels.backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kernels.kv_cache import check_write_kv
from kernels.on_demand import triton_kernel
from kernels.rms_norm import check_rms_norm, rms_norm_reference
from kernels.rope import check_rope, rope_reference

if TYPE_CHECKING:
    import triton.language as tl

Norms = tuple[Tensor, Tensor]
"""The weights [D] of a model's norms of queries and of keys."""


@triton_kernel
def _norm_rope_write_kernel(
    qkv,
    q_norm,
    k_norm,
    positions,
    cos,
    sin,
    k_pages,
    v_pages,
    slots,
    stride_token,
    stride_head,
    table_stride,
    k_stride_page,
    k_stride_head,
    v_stride_page,
    v_stride_head,
    page_size,
    num_q_heads,
    num_kv_heads,
    head_dim,
    half,
    eps,
    HAS_NORM: tl.constexpr,
    NUM_Q_BLOCKS: tl.constexpr,
    NUM_KV_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """One program per token and HEADS heads of q, of k or of v. Reads each once, writes q in place, k and v to pages.

    HALF and REST: powers of two that R and D - 2R fit into; REST is 0 where R = D / 2.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    low = tl.arange(0, HALF)[None, :]
    if block < NUM_Q_BLOCKS:
        head = block * HEADS + tl.arange(0, HEADS)[:, None]
        at = qkv + token * stride_token + head * stride_head
        at_table = tl.load(positions + token) * table_stride + low
        inside = head < num_q_heads
        a, b, inverse = _load_rotated(
            at, q_norm, cos + at_table, sin + at_table, inside, head_dim, half, eps, HAS_NORM, BLOCK, HALF
        )
        if REST and HAS_NORM:
            rest = _load_rest(at, q_norm, inverse, inside, head_dim, half, HAS_NORM, REST)
        if HAS_NORM:
            # The norm read all of a head with other threads than those that now write.
            tl.debug_barrier()
        tl.store(at + low, a, mask=inside & (low < half))
        tl.store(at + half + low, b, mask=inside & (low < half))
        if REST and HAS_NORM:
            last = 2 * half + tl.arange(0, REST)[None, :]
            tl.store(at + last, rest, mask=inside & (last < head_dim))
    elif block < NUM_Q_BLOCKS + NUM_KV_BLOCKS:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            head = (block - NUM_Q_BLOCKS) * HEADS + tl.arange(0, HEADS)[:, None]
            at = qkv + token * stride_token + (num_q_heads + head) * stride_head
            at_table = tl.load(positions + token) * table_stride + low
            inside = head < num_kv_heads
            a, b, inverse = _load_rotated(
                at, k_norm, cos + at_table, sin + at_table, inside, head_dim, half, eps, HAS_NORM, BLOCK, HALF
            )
            at_page = k_pages + (slot // page_size) * k_stride_page + head.to(tl.int64) * k_stride_head
            at_page += slot % page_size * head_dim
            tl.store(at_page + low, a.to(k_pages.dtype.element_ty), mask=inside & (low < half))
            tl.store(at_page + half + low, b.to(k_pages.dtype.element_ty), mask=inside & (low < half))
            if REST:
                last = 2 * half + tl.arange(0, REST)[None, :]
                rest = _load_rest(at, k_norm, inverse, inside, head_dim, half, HAS_NORM, REST)
                tl.store(at_page + last, rest.to(k_pages.dtype.element_ty), mask=inside & (last < head_dim))
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            head = (block - NUM_Q_BLOCKS - NUM_KV_BLOCKS) * HEADS + tl.arange(0, HEADS)[:, None]
            column = tl.arange(0, BLOCK)[None, :]
            inside = (head < num_kv_heads) & (column < head_dim)
            at = qkv + token * stride_token + (num_q_heads + num_kv_heads + head) * stride_head
            value = tl.load(at + column, mask=inside, other=0.0)
            at_page = v_pages + (slot // page_size) * v_stride_page + head.to(tl.int64) * v_stride_head
            at_page += slot % page_size * head_dim
            tl.store(at_page + column, value.to(v_pages.dtype.element_ty), mask=inside)


@triton_kernel
def _load_rotated(
    at,
    weight,
    at_cos,
    at_sin,
    inside,
    head_dim,
    half,
    eps,
    HAS_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
):
    """The rotated halves [heads, HALF] of the heads at `at`, in their dtype, and what each head's norm multiplies."""
    low = tl.arange(0, HALF)[None, :]
    low_inside = low < half
    a = tl.load(at + low, mask=inside & low_inside, other=0.0).to(tl.float32)
    b = tl.load(at + half + low, mask=inside & low_inside, other=0.0).to(tl.float32)
    c = tl.load(at_cos, mask=low_inside, other=0.0)
    s = tl.load(at_sin, mask=low_inside, other=0.0)
    dtype: tl.constexpr = at.dtype.element_ty
    inverse = 1.0
    if HAS_NORM:
        column = tl.arange(0, BLOCK)[None, :]
        numbers = tl.load(at + column, mask=inside & (column < head_dim), other=0.0).to(tl.float32)
        inverse = (1.0 / tl.sqrt_rn(tl.sum(numbers * numbers, axis=1) / head_dim + eps))[:, None]
        a = _normed(a, inverse, weight + low, low_inside, dtype)
        b = _normed(b, inverse, weight + half + low, low_inside, dtype)
    return (a * c - b * s).to(dtype), (b * c + a * s).to(dtype), inverse


@triton_kernel
def _load_rest(at, weight, inverse, inside, head_dim, half, HAS_NORM: tl.constexpr, REST: tl.constexpr):
    """What of the heads is not rotated, [heads, REST]."""
    column = 2 * half + tl.arange(0, REST)[None, :]
    rest = tl.load(at + column, mask=inside & (column < head_dim), other=0.0)
    if HAS_NORM:
        dtype: tl.constexpr = at.dtype.element_ty
        rest = _normed(rest.to(tl.float32), inverse, weight + column, column < head_dim, dtype).to(dtype)
    return rest


@triton_kernel
def _normed(numbers, inverse, at_weight, inside, dtype: tl.constexpr):
    """Rounded to dtype before the weight multiplies and after, as in kernels.rms_norm; float32."""
    scale = tl.load(at_weight, mask=inside, other=0.0).to(tl.float32)
    return ((numbers * inverse).to(dtype).to(tl.float32) * scale).to(dtype).to(tl.float32)


def norm_rope_write_kv_triton(
    qkv_TMD: Tensor,
    norms: Norms | None,
    eps: float,
    positions_T: Tensor,
    cos_LR: Tensor,
    sin_LR: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """Norm and rotate q in place and return it, [T, N, D]; norm and rotate k and write k and v to slots of the pages.

    What is left in the places of k and v is undefined. A slot of -1 writes nothing. Any D, R up to D / 2, number of
    heads and page size; tokens and heads may have any stride.
    """
    q_TND, k_TKD, v_TKD = split_heads(qkv_TMD, k_pages.shape[1])
    check_rope(q_TND, k_TKD, positions_T, cos_LR, sin_LR)
    check_write_kv(k_TKD, v_TKD, k_pages, v_pages, slots_T)
    q_norm, k_norm = norms or (qkv_TMD, qkv_TMD)
    for weight in norms or ():
        check_rms_norm(q_TND, weight)
    num_tokens, num_q_heads, head_dim = q_TND.shape
    num_kv_heads, half = k_TKD.shape[1], cos_LR.shape[1]
    if not num_tokens:
        return q_TND
    block = _power_of_two(head_dim)
    heads = max(1, min(_power_of_two(max(num_q_heads, num_kv_heads)), 1024 // block))
    num_q_blocks, num_kv_blocks = -(-num_q_heads // heads), -(-num_kv_heads // heads)
    _norm_rope_write_kernel[(num_tokens, num_q_blocks + 2 * num_kv_blocks)](
        qkv_TMD,
        q_norm,
        k_norm,
        positions_T,
        cos_LR,
        sin_LR,
        k_pages,
        v_pages,
        slots_T,
        qkv_TMD.stride(0),
        qkv_TMD.stride(1),
        cos_LR.stride(0),
        k_pages.stride(0),
        k_pages.stride(1),
        v_pages.stride(0),
        v_pages.stride(1),
        k_pages.shape[2],
        num_q_heads,
        num_kv_heads,
        head_dim,
        half,
        eps,
        HAS_NORM=norms is not None,
        NUM_Q_BLOCKS=num_q_blocks,
        NUM_KV_BLOCKS=num_kv_blocks,
        HEADS=heads,
        BLOCK=block,
        HALF=_power_of_two(half),
        REST=_power_of_two(head_dim - 2 * half) if head_dim > 2 * half else 0,
        num_warps=4,
    )
    return q_TND


def _power_of_two(number: int) -> int:
    """The smallest that is at least `number`."""
    return 1 << (number - 1).bit_length()


def split_heads(qkv_TMD: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the queries [T, N, D], keys and values [T, K, D] of a fused projection; ValueError if it is none."""
    if qkv_TMD.ndim != 3 or qkv_TMD.shape[1] <= 2 * num_kv_heads:
        raise ValueError(
            f"norm_rope_write_kv: qkv is {tuple(qkv_TMD.shape)}; it must be [tokens, heads of q and "
            f"{num_kv_heads} each of k and v, head dimension]"
        )
    num_q_heads = qkv_TMD.shape[1] - 2 * num_kv_heads
    return qkv_TMD[:, :num_q_heads], qkv_TMD[:, num_q_heads:-num_kv_heads], qkv_TMD[:, -num_kv_heads:]


def norm_rope_reference(
    qkv_TMD: Tensor, num_kv_heads: int, norms: Norms | None, eps: float, positions_T: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as they come out, in float64 and not rounded."""
    q_TND, k_TKD, v_TKD = split_heads(qkv_TMD.double(), num_kv_heads)
    if norms is not None:
        q_TND, k_TKD = rms_norm_reference(q_TND, norms[0], eps), rms_norm_reference(k_TKD, norms[1], eps)
    return rope_reference(q_TND, positions_T, cos, sin), rope_reference(k_TKD, positions_T, cos, sin), v_TKD
