"""A linear layer on int4 weights. Called through kernels.backend.prepare_linear.

    y[m, n] = bias[n] + sum_k x[m, k] * scale[n, k // g] * (q[n, k] - zero[n, k // g])

On CUDA a weight is repacked once into four planes: int16 [N, K / 4], where in each block of BLOCK_K = 128 weights of a
row, nibble i of word j is weight i * 32 + j. A tile of words loads as an ordinary 16-bit operand and becomes, in
registers, four exact tiles of q - 8 which multiply four slices of x; no shuffles. (The idea of interleaving so that
one mask and one magic number give two 16-bit floats is from Kim et al. 2022, arXiv:2211.10017.) The scale multiplies
the float32 sum of a group, and a zero point costs one product of it with the group's sum of x.

Shape letters: M rows of x, N output features, K input features, G = K / g groups of g = 32, 64 or 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.on_demand import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

GROUP_SIZES = (32, 64, 128)
BITS = (3, 4, 8)
"""What a QuantizedWeight may have; the kernel here takes 4."""
EXPANDED_VALUES = 1 << 22
"""Weights made float32 at a time by `dequantize`."""
BLOCK_K = 128
BLOCK_N = 64
ROW_TILES = (16, 32, 64)
"""Rows of a tile: the first that holds all rows, so that up to 16 rows take one path."""
DENSE_ROWS = 256
"""Above so many rows the weight is expanded and multiplied by torch: arithmetic then binds, not memory. (An estimate
from roofs, 47 rows for int4 and 184 for 16 bit on an H200; not yet measured.)"""
PROGRAMS_WANTED = 264
"""Splits of K are added until there are so many tiles: two per multiprocessor of an H100 or H200."""
MAX_SPLITS = 16


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight of shape [N, K] in 3, 4 or 8 bits, in plain form, one value a byte: w = scale * (q - zero).

    q_NK: uint8, 0 to 2**bits - 1 (not checked). scale_NG: float32. zero_NG: uint8 in the same range, or None where it
    is 2**(bits - 1) throughout.
    """

    q_NK: Tensor
    scale_NG: Tensor
    group_size: int
    zero_NG: Tensor | None = None
    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"quantised weight: bits is {self.bits}; it must be one of {BITS}")
        kind = f"int{self.bits} weight"
        if self.q_NK.ndim != 2 or self.q_NK.dtype != torch.uint8:
            raise ValueError(f"{kind}: q is {self.q_NK.dtype} {tuple(self.q_NK.shape)}; it must be uint8 [N, K]")
        num_rows, num_columns = self.q_NK.shape
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"{kind}: group_size is {self.group_size}; it must be one of {GROUP_SIZES}")
        if num_columns == 0 or num_columns % self.group_size:
            raise ValueError(f"{kind}: K={num_columns} is not a multiple of group_size={self.group_size}")
        expected = (num_rows, num_columns // self.group_size)
        if self.scale_NG.dtype != torch.float32 or self.scale_NG.shape != expected:
            raise ValueError(
                f"{kind}: scale is {self.scale_NG.dtype} {tuple(self.scale_NG.shape)}; it must be float32 {expected}"
            )
        if self.zero_NG is not None and (self.zero_NG.dtype != torch.uint8 or self.zero_NG.shape != expected):
            raise ValueError(
                f"{kind}: zero is {self.zero_NG.dtype} {tuple(self.zero_NG.shape)}; it must be uint8 {expected}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.q_NK.shape[0], self.q_NK.shape[1]


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K], computed in float32 and rounded once to `dtype`."""
    return dequantize_groups(weight.q_NK, weight.scale_NG, weight.zero_NG, weight.bits, dtype)


def dequantize_groups(q_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """`dequantize` for any size of group, K / G; a few rows at a time, to hold little more than the result."""
    num_rows, num_columns = q_NK.shape
    dense_NK = torch.empty(num_rows, num_columns, dtype=dtype, device=q_NK.device)
    num_rows_at_once = max(1, EXPANDED_VALUES // num_columns)
    for start in range(0, num_rows, num_rows_at_once):
        rows = slice(start, start + num_rows_at_once)
        values = q_NK[rows].view(-1, scale_NG.shape[1], num_columns // scale_NG.shape[1]).float()
        values -= 1 << (bits - 1) if zero_NG is None else zero_NG[rows].float().unsqueeze(-1)
        values *= scale_NG[rows].unsqueeze(-1)
        dense_NK[rows] = values.view(-1, num_columns)
    return dense_NK


@triton_kernel
def _four_planes(words, dtype: tl.constexpr, ASM: tl.constexpr):
    """int16 words to four tiles of q - 8, exact in float16 and bfloat16.

    With inline PTX two weights take one lop3 (a nibble becomes the low mantissa bits of 128 or 1024) and one add.
    """
    if ASM and dtype == tl.bfloat16:
        planes = tl.inline_asm_elementwise(
            """{
            .reg .b32 w1, w2, w3, one, bias;
            mov.b32 one, 0x3F803F80;
            mov.b32 bias, 0xC308C308;
            shr.u32 w1, $4, 4;
            shr.u32 w2, $4, 8;
            shr.u32 w3, $4, 12;
            lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, w1, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $2, w2, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $3, w3, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, $0, one, bias;
            fma.rn.bf16x2 $1, $1, one, bias;
            fma.rn.bf16x2 $2, $2, one, bias;
            fma.rn.bf16x2 $3, $3, one, bias;
            }""",
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif ASM:
        planes = tl.inline_asm_elementwise(
            """{
            .reg .b32 w1, w2, w3, bias;
            mov.b32 bias, 0xE408E408;
            shr.u32 w1, $4, 4;
            shr.u32 w2, $4, 8;
            shr.u32 w3, $4, 12;
            lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $1, w1, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $2, w2, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $3, w3, 0x000F000F, 0x64006400, 0xEA;
            add.rn.f16x2 $0, $0, bias;
            add.rn.f16x2 $1, $1, bias;
            add.rn.f16x2 $2, $2, bias;
            add.rn.f16x2 $3, $3, bias;
            }""",
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        planes = (
            ((words & 15) - 8).to(tl.float32).to(dtype),
            (((words >> 4) & 15) - 8).to(tl.float32).to(dtype),
            (((words >> 8) & 15) - 8).to(tl.float32).to(dtype),
            (((words >> 12) & 15) - 8).to(tl.float32).to(dtype),
        )
    return planes


@triton_kernel
def _int4_linear_kernel(
    x,
    words,
    scale,
    zero_scale,
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
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per COLUMNS outputs, split of K, and ROWS rows; the last split to arrive sums all in their order.

    Moves N K / 2 bytes of words and 4 N G of scales (twice that with zero points) once per row tile, and x once per
    column tile.
    """
    PLANE: tl.constexpr = DEPTH // 4
    dtype: tl.constexpr = x.dtype.element_ty
    split = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, PLANE)
    row_inside = row[:, None] < num_rows

    first = split * blocks_per_split
    at_words = words + column[None, :].to(tl.int64) * words_stride + (first * PLANE + lane)[:, None]
    at_x = x + row[:, None].to(tl.int64) * x_stride + (first * DEPTH + lane)[None, :]
    at_scale = first * (DEPTH // GROUP) * padded_columns + column
    k = (first * DEPTH + lane)[None, :]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in tl.range(first, tl.minimum(first + blocks_per_split, num_blocks), num_stages=STAGES):
        planes = _four_planes(tl.load(at_words), dtype, ASM)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        x_sum = tl.zeros((ROWS, PLANE), tl.float32)
        for i in tl.static_range(4):
            inside = row_inside & (k + i * PLANE < depth) if RAGGED else row_inside
            x_tile = tl.load(at_x + i * PLANE, mask=inside, other=0.0)
            product = tl.dot(x_tile, planes[i], product)
            if HAS_ZERO:
                x_sum += x_tile.to(tl.float32)
            if (i + 1) * PLANE % GROUP == 0:
                at_group = at_scale + (i * PLANE // GROUP) * padded_columns
                acc += product * tl.load(scale + at_group)[None, :]
                product = tl.zeros((ROWS, COLUMNS), tl.float32)
                if HAS_ZERO:
                    acc -= tl.sum(x_sum, axis=1)[:, None] * tl.load(zero_scale + at_group)[None, :]
                    x_sum = tl.zeros((ROWS, PLANE), tl.float32)
        at_words += PLANE
        at_x += DEPTH
        at_scale += (DEPTH // GROUP) * padded_columns
        k += DEPTH

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
def _expand_kernel(
    words,
    scale,
    zero_scale,
    weight,
    num_columns,
    padded_columns,
    depth,
    words_stride,
    GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program per COLUMNS rows of the weight [N, K] and DEPTH of its columns. Reads N K / 2 bytes, writes 2 N K."""
    PLANE: tl.constexpr = DEPTH // 4
    block = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, PLANE)
    packed = tl.load(words + column[:, None].to(tl.int64) * words_stride + (block * PLANE + lane)[None, :])
    for i in tl.static_range(4):
        at_scale = (block * (DEPTH // GROUP) + i * PLANE // GROUP) * padded_columns + column
        value = (((packed >> (4 * i)) & 15) - 8).to(tl.float32) * tl.load(scale + at_scale)[:, None]
        if HAS_ZERO:
            value -= tl.load(zero_scale + at_scale)[:, None]
        k = block * DEPTH + i * PLANE + lane
        inside = (column[:, None] < num_columns) & (k[None, :] < depth)
        at = weight + column[:, None].to(tl.int64) * depth + k[None, :]
        tl.store(at, value.to(weight.dtype.element_ty), mask=inside)


def pack_four_planes(q_NK: Tensor) -> Tensor:
    """Nibbles uint8 [N, K] as int16 [N', K' / 4], N' and K' rounded up to tiles; the padding holds 8, which is zero."""
    num_rows, depth = q_NK.shape
    padding = (0, -depth % BLOCK_K, 0, -num_rows % BLOCK_N)
    planes = F.pad(q_NK, padding, value=8).view(num_rows + padding[3], -1, 4, BLOCK_K // 4).to(torch.int32)
    words = planes[:, :, 0] | planes[:, :, 1] << 4 | planes[:, :, 2] << 8 | planes[:, :, 3] << 12
    return words.to(torch.int16).flatten(1)


def choose_splits(num_rows: int, depth: int) -> int:
    """Into how many parts K is cut; of the weight's shape alone, so that a result does not depend on the batch."""
    num_tiles, num_blocks = -(-num_rows // BLOCK_N), -(-depth // BLOCK_K)
    return max(1, min(PROGRAMS_WANTED // num_tiles, num_blocks // 4, MAX_SPLITS))


class Int4Linear:
    """A linear layer whose int4 weight lies on a GPU in four planes.

    float16 and bfloat16; any M and N, K a multiple of the group size; compute capability 8.0 and up. Up to 16 rows, a
    row's result is the same bits whatever rows are beside it; with `deterministic` for any number of rows, as all go
    through tiles of 64 and the weight is never expanded. Calls must be on one stream: they share a counter.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        deterministic: bool = False,
    ) -> None:
        if weight.bits != 4:
            raise ValueError(f"int4_linear: the weight has {weight.bits} bits; it must have 4, or be dequantised first")
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"int4_linear: dtype is {dtype}; on {device} it must be float16 or bfloat16")
        if bias is not None and bias.shape != (weight.shape[0],):
            raise ValueError(f"int4_linear: bias is {tuple(bias.shape)}; it must be [{weight.shape[0]}]")
        self.num_columns, self.depth = weight.shape
        self.group_size, self.dtype = weight.group_size, dtype
        self.row_tiles = ROW_TILES[-1:] if deterministic else ROW_TILES
        self.words = pack_four_planes(weight.q_NK.to(device))
        scale_NG = weight.scale_NG.to(device)
        self.scale_GN = self._pad_groups(scale_NG)
        self.zero_scale_GN = None
        if weight.zero_NG is not None:
            self.zero_scale_GN = self._pad_groups(scale_NG * (weight.zero_NG.to(device).float() - 8))
        self.bias_N = None if bias is None else bias.to(device=device, dtype=dtype)
        self.num_splits = choose_splits(*weight.shape)
        num_row_tiles = -(-DENSE_ROWS // ROW_TILES[-1])
        self.arrivals = torch.zeros(num_row_tiles * len(self.words) // BLOCK_N, dtype=torch.int32, device=device)

    def _pad_groups(self, values_NG: Tensor) -> Tensor:
        """[N, G] as [G', N'], the padding zero."""
        num_groups = self.words.shape[1] * 4 // self.group_size
        padding = (0, num_groups - values_NG.shape[1], 0, len(self.words) - len(values_NG))
        return F.pad(values_NG, padding).t().contiguous()

    def __call__(self, x_MK: Tensor) -> Tensor:
        self._check(x_MK)
        if len(x_MK) <= DENSE_ROWS:
            return self._multiply(x_MK)
        if len(self.row_tiles) == 1:
            return torch.cat([self._multiply(rows_MK) for rows_MK in x_MK.split(DENSE_ROWS)])
        return F.linear(x_MK, self.expand(), self.bias_N)

    def _check(self, x_MK: Tensor) -> None:
        if x_MK.ndim != 2 or x_MK.shape[1] != self.depth:
            raise ValueError(f"int4_linear: x is {tuple(x_MK.shape)}; it must be [rows, {self.depth}]")
        if x_MK.dtype != self.dtype or x_MK.device != self.words.device:
            raise ValueError(
                f"int4_linear: x is {x_MK.dtype} on {x_MK.device}; it must be {self.dtype} on {self.words.device}"
            )

    def _multiply(self, x_MK: Tensor) -> Tensor:
        num_rows = len(x_MK)
        if x_MK.stride(1) != 1:
            x_MK = x_MK.contiguous()
        y_MN = torch.empty((num_rows, self.num_columns), dtype=self.dtype, device=x_MK.device)
        if not num_rows:
            return y_MN
        padded_columns = len(self.words)
        num_blocks = self.words.shape[1] * 4 // BLOCK_K
        partial = self.scale_GN  # not read without splits
        if self.num_splits > 1:
            shape = (self.num_splits, num_rows, padded_columns)
            partial = torch.empty(shape, dtype=torch.float32, device=x_MK.device)
        rows = next((tile for tile in self.row_tiles if num_rows <= tile), ROW_TILES[-1])
        grid = (padded_columns // BLOCK_N, self.num_splits, -(-num_rows // rows))
        _int4_linear_kernel[grid](
            x_MK,
            self.words,
            self.scale_GN,
            self.scale_GN if self.zero_scale_GN is None else self.zero_scale_GN,
            self.scale_GN if self.bias_N is None else self.bias_N,
            y_MN,
            partial,
            self.arrivals,
            num_rows,
            self.num_columns,
            padded_columns,
            self.depth,
            x_MK.stride(0),
            self.words.stride(0),
            num_blocks,
            -(-num_blocks // self.num_splits),
            GROUP=self.group_size,
            HAS_ZERO=self.zero_scale_GN is not None,
            HAS_BIAS=self.bias_N is not None,
            RAGGED=self.depth % BLOCK_K != 0,
            SPLITS=self.num_splits,
            ROWS=rows,
            COLUMNS=BLOCK_N,
            DEPTH=BLOCK_K,
            ASM=x_MK.is_cuda and torch.version.hip is None,
            STAGES=4 if rows == ROW_TILES[0] else 3,
            # With 4 warps, ptxas stays at 128 registers for 32 rows and scales for each 32 weights, and spills.
            num_warps=8 if rows == 32 and self.group_size == 32 else 4,
        )
        return y_MN

    def expand(self) -> Tensor:
        """The weight as [N, K] in the layer's dtype."""
        weight_NK = torch.empty((self.num_columns, self.depth), dtype=self.dtype, device=self.words.device)
        grid = (len(self.words) // BLOCK_N, self.words.shape[1] * 4 // BLOCK_K)
        _expand_kernel[grid](
            self.words,
            self.scale_GN,
            self.scale_GN if self.zero_scale_GN is None else self.zero_scale_GN,
            weight_NK,
            self.num_columns,
            len(self.words),
            self.depth,
            self.words.stride(0),
            GROUP=self.group_size,
            HAS_ZERO=self.zero_scale_GN is not None,
            COLUMNS=BLOCK_N,
            DEPTH=BLOCK_K,
            num_warps=4,
        )
        return weight_NK

    def describe(self) -> str:
        zeros = "symmetric" if self.zero_scale_GN is None else "with zero points"
        above = f"expanded to {str(self.dtype).removeprefix('torch.')} above {DENSE_ROWS} rows"
        if len(self.row_tiles) == 1:
            above = f"in fixed tiles of {self.row_tiles[0]} rows"
        return f"int4 g{self.group_size} {zeros}, Triton in four planes, K in {self.num_splits} splits; {above}"


def int4_linear_reference(x_MK: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The layer in float64."""
    return F.linear(x_MK.double(), dequantize(weight).double(), None if bias is None else bias.double())
