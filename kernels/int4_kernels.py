"""The Triton kernels of int4_linear: a product with 4- or 8-bit weights in planes, and the weight as a dense one.

In each block of DEPTH weights of a row, the b-bit field i of 16-bit word j is weight i * PLANE + j, PLANE = DEPTH * b /
16. A tile of words loads as an ordinary 16-bit operand and becomes, in registers, 16 / b exact tiles of q - zero that
multiply as many slices of x: no shuffles. (One mask and one magic number that give two 16-bit floats are from Kim et
al. 2022, arXiv:2211.10017.)

Where weights have zero points, a scale is a float32 whose lowest b bits are its group's zero point: a load less, no
memory more, and the scale changed by less than 2**-19 of itself (2**-15 for 8 bits), under the rounding of 16-bit
activations. The zero point goes into the constant that is subtracted anyway, so that it costs a few instructions per
column and group and none per weight of 4 bits.

Shape letters as in kernels/int4_linear.py. Called by that file alone.
"""

# A tuple that a loop extends has another type at each turn; Triton unrolls the loops.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.on_demand import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl


@triton_kernel
def _plane_zeros(scale, BITS: tl.constexpr, HAS_ZERO: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr):
    """int16, one per scale: the zero point, or with inline PTX the bits of the 16-bit float that `_planes` adds."""
    if HAS_ZERO:
        zero = scale.to(tl.int32, bitcast=True) & ((1 << BITS) - 1)
    else:
        zero = tl.full(scale.shape, 1 << (BITS - 1), tl.int32)
    if ASM:
        if dtype == tl.float16:
            zero = zero | 0xE400  # -(1024 + zero)
        elif BITS == 4:
            zero = zero | 0xC300  # -(128 + zero)
        else:
            zero = (128 - zero).to(tl.float32).to(tl.bfloat16).to(tl.int16, bitcast=True)
    return zero.to(tl.int16)


@triton_kernel
def _planes(words, zeros, BITS: tl.constexpr, HAS_ZERO: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr):
    """int16 words to 16 / BITS tiles of q - zero, exact in float16 and bfloat16; zeros: of each, of words' shape.

    A field becomes the low bits of the significand of 128 (bfloat16) or 1024 (float16), and one addition takes that and
    the zero point away: two instructions and a shift for two weights. bfloat16's significand holds seven bits of a
    byte; the eighth turns the -256 that is added into -128, from which it differs in that same bit.
    """
    if not ASM:
        planes = ()
        for i in tl.static_range(16 // BITS):
            field = (words >> (BITS * i)) & ((1 << BITS) - 1)
            planes = planes + ((field - zeros[i]).to(tl.float32).to(dtype),)  # noqa: RUF005
    elif BITS == 4 and dtype == tl.bfloat16:
        planes = tl.inline_asm_elementwise(
            """{
            .reg .b32 w1, w2, w3, one;
            mov.b32 one, 0x3F803F80;
            shr.u32 w1, $4, 4;
            shr.u32 w2, $4, 8;
            shr.u32 w3, $4, 12;
            lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, w1, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $2, w2, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $3, w3, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, $0, one, $5;
            fma.rn.bf16x2 $1, $1, one, $6;
            fma.rn.bf16x2 $2, $2, one, $7;
            fma.rn.bf16x2 $3, $3, one, $8;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [words, zeros[0], zeros[1], zeros[2], zeros[3]],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif BITS == 4:
        planes = tl.inline_asm_elementwise(
            """{
            .reg .b32 w1, w2, w3;
            shr.u32 w1, $4, 4;
            shr.u32 w2, $4, 8;
            shr.u32 w3, $4, 12;
            lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $1, w1, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $2, w2, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $3, w3, 0x000F000F, 0x64006400, 0xEA;
            add.rn.f16x2 $0, $0, $5;
            add.rn.f16x2 $1, $1, $6;
            add.rn.f16x2 $2, $2, $7;
            add.rn.f16x2 $3, $3, $8;
            }""",
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [words, zeros[0], zeros[1], zeros[2], zeros[3]],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif dtype == tl.bfloat16:
        planes = tl.inline_asm_elementwise(
            """{
            .reg .b32 w1, high, one;
            mov.b32 one, 0x3F803F80;
            shr.u32 w1, $2, 8;
            lop3.b32 high, $2, 0x00800080, 0xC380C380, 0x6A;
            lop3.b32 $0, $2, 0x007F007F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, $0, one, high;
            lop3.b32 high, w1, 0x00800080, 0xC380C380, 0x6A;
            lop3.b32 $1, w1, 0x007F007F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $1, $1, one, high;
            }""",
            "=&r,=&r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
        if HAS_ZERO:
            low = planes[0] + zeros[0].to(tl.bfloat16, bitcast=True)
            high = planes[1] + zeros[1].to(tl.bfloat16, bitcast=True)
            planes = (low, high)
    else:
        planes = tl.inline_asm_elementwise(
            """{
            prmt.b32 $0, $2, 0x64646464, 0x4240;
            prmt.b32 $1, $2, 0x64646464, 0x4341;
            add.rn.f16x2 $0, $0, $3;
            add.rn.f16x2 $1, $1, $4;
            }""",
            "=&r,=&r,r,r,r",
            [words, zeros[0], zeros[1]],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return planes


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
    """One program per COLUMNS outputs, split of K, and ROWS rows; the last split to arrive sums all in their order.

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
            zero = _plane_zeros(group_scale, BITS, HAS_ZERO, ASM, dtype)
            zero = zero[:, None] if SWAPPED else zero[None, :]
            zeros = zeros + (tl.broadcast_to(zero, packed.shape),)  # noqa: RUF005
            scales = scales + (group_scale[:, None] if SWAPPED else group_scale[None, :],)  # noqa: RUF005
        planes = _planes(packed, zeros, BITS, HAS_ZERO, ASM, dtype)
        product = tl.zeros(acc.shape, tl.float32)
        for i in tl.static_range(NUM_PLANES):
            inside = row_inside & (k + i * PLANE < depth) if RAGGED else row_inside
            x_tile = tl.load(at_x + i * PLANE, mask=inside, other=0.0)
            if ROUNDED:
                weights = _scaled(planes[i], scales[i], ASM, dtype)
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
        column_inside = column < num_columns
        if HAS_BIAS:
            acc += tl.load(bias + column, mask=column_inside, other=0.0).to(tl.float32)[None, :]
        at_y = y + row[:, None].to(tl.int64) * num_columns + column[None, :]
        tl.store(at_y, acc.to(dtype), mask=row_inside & column_inside[None, :])


@triton_kernel
def _scaled(plane, scale, ASM: tl.constexpr, dtype: tl.constexpr):
    """q - zero times its scale, both in `dtype`; the product is rounded once."""
    if ASM:
        return plane * scale.to(dtype)
    # The interpreter multiplies bfloat16 wrongly; the float32 product of two 16-bit floats is exact.
    return (plane.to(tl.float32) * scale.to(dtype).to(tl.float32)).to(dtype)


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
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program per COLUMNS rows of the weight [N, K] and DEPTH of its columns.

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
        zero = _plane_zeros(group_scale, BITS, HAS_ZERO, False, tl.float16)
        field = (packed >> (BITS * i)) & ((1 << BITS) - 1)
        value = (field - zero[:, None]).to(tl.float32) * group_scale[:, None]
        k = block * DEPTH + i * PLANE + lane
        inside = (column[:, None] < num_columns) & (k[None, :] < depth)
        at = weight + column[:, None].to(tl.int64) * depth + k[None, :]
        tl.store(at, value.to(weight.dtype.element_ty), mask=inside)
