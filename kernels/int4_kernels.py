"""The Triton kernels of int4_linear: a product with 4- or 8-bit weights in planes, and the weight as a dense one.

kernels/int4_planes.py says what planes are. Shape letters as in kernels/int4_linear.py. Called by that file alone.
"""

# A tuple that a loop extends has another type at each turn; Triton unrolls the loops.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.int4_planes import plane_zeros, planes_of, scaled
from kernels.on_demand import triton_kernel
from kernels.silu_mul import silu_times

if TYPE_CHECKING:
    import triton.language as tl


@triton_kernel
def int4_linear_kernel(
    x,
    words,
    scale,
    bias,
    y,
    partial,
    arrivals,
    num_rows,
    num_columns,
    padded_columns,
    depth,
    x_stride,
    words_stride,
    num_blocks,
    blocks_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWAPPED: tl.constexpr,
    ROUNDED: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per COLUMNS rows of the weight, split of K, and ROWS rows; the last split sums all in order.

    GATED: rows 2j and 2j + 1 of the weight are row j of a gate and of an up projection, and y is silu(gate) * up, half
    as wide, of both rounded to y's dtype; bias is in the order of gate, up.

    SWAPPED: the weight is the left operand, which wgmma takes from registers, and the rows of x are the right one's
    columns. ROUNDED: scaled weights are rounded to x's dtype, as a dense copy's are; else the scale multiplies the
    float32 sum of a group, at COLUMNS * ROWS multiplications per group.

    Moves b N K / 8 bytes of words and 4 N G of scales once per row tile, and x once per column tile. M, N odd or not;
    K a multiple of the group, RAGGED where it is none of DEPTH.
    """
    NUM_PLANES: tl.constexpr = 16 // BITS
    PLANE: tl.constexpr = DEPTH // NUM_PLANES
    dtype: tl.constexpr = x.dtype.element_ty
    split = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, PLANE)
    row_inside = row[:, None] < num_rows

    first = split * blocks_per_split
    if SWAPPED:
        at_words = words + column[:, None].to(tl.int64) * words_stride + (first * PLANE + lane)[None, :]
        acc = tl.zeros((COLUMNS, ROWS), tl.float32)
    else:
        at_words = words + column[None, :].to(tl.int64) * words_stride + (first * PLANE + lane)[:, None]
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    at_x = x + row[:, None].to(tl.int64) * x_stride + (first * DEPTH + lane)[None, :]
    at_scale = scale + first.to(tl.int64) * (DEPTH // GROUP) * padded_columns + column
    k = (first * DEPTH + lane)[None, :]
    for _ in tl.range(first, tl.minimum(first + blocks_per_split, num_blocks), num_stages=STAGES):
        packed = tl.load(at_words)
        scales = ()
        zeros = ()
        for i in tl.static_range(NUM_PLANES):
            if i * PLANE % GROUP == 0:
                group_scale = tl.load(at_scale + (i * PLANE // GROUP) * padded_columns)
            zero = plane_zeros(group_scale, BITS, HAS_ZERO, ASM, dtype)
            zero = zero[:, None] if SWAPPED else zero[None, :]
            zeros = zeros + (tl.broadcast_to(zero, packed.shape),)  # noqa: RUF005
            scales = scales + (group_scale[:, None] if SWAPPED else group_scale[None, :],)  # noqa: RUF005
        planes = planes_of(packed, zeros, BITS, HAS_ZERO, ASM, dtype)
        product = tl.zeros(acc.shape, tl.float32)
        for i in tl.static_range(NUM_PLANES):
            inside = row_inside & (k + i * PLANE < depth) if RAGGED else row_inside
            x_tile = tl.load(at_x + i * PLANE, mask=inside, other=0.0)
            if ROUNDED:
                weights = scaled(planes[i], scales[i], ASM, dtype)
                acc = tl.dot(weights, tl.trans(x_tile), acc) if SWAPPED else tl.dot(x_tile, weights, acc)
            else:
                if SWAPPED:
                    product = tl.dot(planes[i], tl.trans(x_tile), product)
                else:
                    product = tl.dot(x_tile, planes[i], product)
                if (i + 1) * PLANE % GROUP == 0:
                    acc += product * scales[i]
                    product = tl.zeros(acc.shape, tl.float32)
        at_words += PLANE
        at_x += DEPTH
        at_scale += (DEPTH // GROUP) * padded_columns
        k += DEPTH
    if SWAPPED:
        acc = tl.trans(acc)

    is_last = True
    if SPLITS > 1:
        at_partial = partial + row[:, None].to(tl.int64) * padded_columns + column[None, :]
        split_stride = num_rows.to(tl.int64) * padded_columns
        tl.store(at_partial + split * split_stride, acc, mask=row_inside)
        # Every thread's partial sums must be written before this program is counted.
        tl.debug_barrier()
        tile = arrivals + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        is_last = tl.atomic_add(tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if is_last:
            tl.store(tile, 0)  # ready for the next launch
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            for i in range(SPLITS):
                acc += tl.load(at_partial + i * split_stride, mask=row_inside, other=0.0, cache_modifier=".cg")
    if is_last:
        _finish(acc, bias, y, row, num_rows, num_columns, HAS_BIAS, GATED, ROWS, COLUMNS)


@triton_kernel
def _finish(
    acc,
    bias,
    y,
    row,
    num_rows,
    num_columns,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add the bias to float32 sums [ROWS, COLUMNS], round them, activate them if gated, and store them."""
    dtype: tl.constexpr = y.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if HAS_BIAS:
        at_bias = bias + _ungated(column, num_columns, GATED)
        acc += tl.load(at_bias, mask=column < num_columns, other=0.0).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(acc, (ROWS, COLUMNS // 2, 2)))
        result = silu_times(gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32), dtype)
        width = num_columns // 2
        out = tl.program_id(0) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    else:
        result = acc.to(dtype)
        width = num_columns
        out = column
    at_y = y + row[:, None].to(tl.int64) * width + out[None, :]
    tl.store(at_y, result, mask=(row[:, None] < num_rows) & (out[None, :] < width))


@triton_kernel
def _ungated(column, num_columns, GATED: tl.constexpr):
    """Where a column of interleaved gate and up columns stands when those of the gate come first."""
    if GATED:
        column = column % 2 * (num_columns // 2) + column // 2
    return column


@triton_kernel
def expand_kernel(
    words,
    scale,
    weight,
    num_columns,
    padded_columns,
    depth,
    words_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    GATED: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program per COLUMNS rows of the weight [N, K] and DEPTH of its columns. GATED: the gate's rows come first.

    Reads b N K / 8 bytes, writes 2 N K.
    """
    PLANE: tl.constexpr = DEPTH * BITS // 16
    block = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, PLANE)
    packed = tl.load(words + column[:, None].to(tl.int64) * words_stride + (block * PLANE + lane)[None, :])
    for i in tl.static_range(16 // BITS):
        group = block.to(tl.int64) * (DEPTH // GROUP) + i * PLANE // GROUP
        group_scale = tl.load(scale + group * padded_columns + column)
        zero = plane_zeros(group_scale, BITS, HAS_ZERO, False, tl.float16)
        field = (packed >> (BITS * i)) & ((1 << BITS) - 1)
        value = (field - zero[:, None]).to(tl.float32) * group_scale[:, None]
        k = block * DEPTH + i * PLANE + lane
        inside = (column[:, None] < num_columns) & (k[None, :] < depth)
        at = weight + _ungated(column, num_columns, GATED)[:, None].to(tl.int64) * depth + k[None, :]
        tl.store(at, value.to(weight.dtype.element_ty), mask=inside)
