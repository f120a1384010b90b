"""The Triton kernel of kernels/qkv.py, which says what it computes. Called by that file alone.

Shape letters as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.on_demand import triton_kernel
from kernels.quantized_kv import key_byte, quantizer, to_bytes, value_byte

if TYPE_CHECKING:
    import triton.language as tl


@triton_kernel
def norm_rope_write_kernel(
    qkv,
    q_norm,
    k_norm,
    positions,
    cos,
    sin,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    slots,
    stride_token,
    stride_head,
    table_stride,
    k_stride_page,
    k_stride_head,
    v_stride_page,
    v_stride_head,
    scale_stride_page,
    scale_stride_head,
    page_size,
    num_q_heads,
    num_kv_heads,
    head_dim,
    half,
    eps,
    smallest,
    HAS_NORM: tl.constexpr,
    QUANTIZED: tl.constexpr,
    NUM_Q_BLOCKS: tl.constexpr,
    NUM_KV_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """One program per token and HEADS heads of q, of k or of v. Reads each once, writes q in place, k and v to pages.

    HALF and REST: powers of two that R and D - 2R fit into; REST is 0 where R = D / 2. QUANTIZED: pages are uint8 and
    strided in bytes.
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
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            page, in_page = slot // page_size, (slot % page_size).to(tl.int32)
            head = (block - NUM_Q_BLOCKS) % NUM_KV_BLOCKS * HEADS + tl.arange(0, HEADS)[:, None]
            inside = head < num_kv_heads
            at = qkv + token * stride_token + (num_q_heads + head) * stride_head
            head = head.to(tl.int64)
            at_scale = page * scale_stride_page + head * scale_stride_head + in_page
            if block < NUM_Q_BLOCKS + NUM_KV_BLOCKS:
                factor = 1.0  # of dense pages
                at_table = tl.load(positions + token) * table_stride + low
                a, b, inverse = _load_rotated(
                    at, k_norm, cos + at_table, sin + at_table, inside, head_dim, half, eps, HAS_NORM, BLOCK, HALF
                )
                if REST:
                    rest = _load_rest(at, k_norm, inverse, inside, head_dim, half, HAS_NORM, REST)
                if QUANTIZED:
                    largest, spoilt = _extent(a)
                    largest_b, spoilt_b = _extent(b)
                    largest, spoilt = tl.maximum(largest, largest_b), spoilt + spoilt_b
                    if REST:
                        largest_rest, spoilt_rest = _extent(rest)
                        largest, spoilt = tl.maximum(largest, largest_rest), spoilt + spoilt_rest
                    factor, scale = quantizer(largest, spoilt, smallest)
                    tl.store(k_scales + at_scale, scale, mask=inside)
                at_page = k_pages + page * k_stride_page + head * k_stride_head
                low_inside = inside & (low < half)
                _write_keys(at_page, in_page, low, a, factor, low_inside, head_dim, QUANTIZED)
                _write_keys(at_page, in_page, half + low, b, factor, low_inside, head_dim, QUANTIZED)
                if REST:
                    last = 2 * half + tl.arange(0, REST)[None, :]
                    _write_keys(at_page, in_page, last, rest, factor, inside & (last < head_dim), head_dim, QUANTIZED)
            else:
                column = tl.arange(0, BLOCK)[None, :]
                column_inside = inside & (column < head_dim)
                value = tl.load(at + num_kv_heads * stride_head + column, mask=column_inside, other=0.0)
                at_page = v_pages + page * v_stride_page + head * v_stride_head
                if QUANTIZED:
                    largest, spoilt = _extent(value)
                    factor, scale = quantizer(largest, spoilt, smallest)
                    tl.store(v_scales + at_scale, scale, mask=inside)
                    at_byte = at_page + value_byte(in_page, column, head_dim, page_size)
                    tl.store(at_byte, to_bytes(value.to(tl.float32), factor), mask=column_inside)
                else:
                    at_value = at_page + in_page * head_dim + column
                    tl.store(at_value, value.to(v_pages.dtype.element_ty), mask=column_inside)


@triton_kernel
def _extent(numbers):
    """Of each head's numbers [heads, columns]: the largest |x|, and the sum of x * 0; both [heads, 1]."""
    numbers = numbers.to(tl.float32)
    return tl.max(tl.abs(numbers), axis=1)[:, None], tl.sum(numbers * 0.0, axis=1)[:, None]


@triton_kernel
def _write_keys(at_page, in_page, column, numbers, factor, inside, head_dim, QUANTIZED: tl.constexpr):
    """Some columns of keys of one slot into the page of each head that starts at `at_page`."""
    if QUANTIZED:
        at_byte = at_page + key_byte(in_page, column, head_dim)
        tl.store(at_byte, to_bytes(numbers.to(tl.float32), factor), mask=inside)
    else:
        tl.store(at_page + in_page * head_dim + column, numbers.to(at_page.dtype.element_ty), mask=inside)


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
