"""Words of packed weights, in registers, to tiles of 16-bit numbers that multiply. Called by kernels/int4_kernels.py.

In each block of DEPTH weights of a row, the b-bit field i of 16-bit word j is weight i * PLANE + j, PLANE = DEPTH * b /
16. A tile of words loads as an ordinary 16-bit operand and becomes, in registers, 16 / b exact tiles of q - zero that
multiply as many slices of x: no shuffles. (One mask and one magic number that give two 16-bit floats are from Kim et
al. 2022, arXiv:2211.10017.)

Where weights have zero points, a scale is a float32 whose lowest b bits are its group's zero point: a load less, no
memory more, and the scale changed by less than 2**-19 of itself (2**-15 for 8 bits), under the rounding of 16-bit
activations. The zero point goes into the constant that is subtracted anyway, so that it costs a few instructions per
column and group and none per weight of 4 bits; sums of x over its groups, which would take it away, are not needed.
"""

# A tuple that a loop extends has another type at each turn; Triton unrolls the loops.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.on_demand import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl


@triton_kernel
def plane_zeros(scale, BITS: tl.constexpr, HAS_ZERO: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr):
    """int16, one per scale: the zero point, or with inline PTX the bits of the 16-bit float that `planes_of` adds."""
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
def planes_of(words, zeros, BITS: tl.constexpr, HAS_ZERO: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr):
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
def scaled(plane, scale, ASM: tl.constexpr, dtype: tl.constexpr):
    """q - zero times its scale, both in `dtype`; the product is rounded once."""
    if ASM:
        return plane * scale.to(dtype)
    # The interpreter multiplies bfloat16 wrongly; the float32 product of two 16-bit floats is exact.
    return (plane.to(tl.float32) * scale.to(dtype).to(tl.float32)).to(dtype)
