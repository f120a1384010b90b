"""A linear layer on int4 (or int8) weights. Called through kernels.backend.prepare_linear.

    y[m, n] = bias[n] + sum_k x[m, k] * scale[n, k // g] * (q[n, k] - zero[n, k // g])

On CUDA a weight is repacked once into planes (int4_planes.py says how), and multiplied by one of three ways, by the
number of rows: for few, tiles with x as the left operand; for more, with the weight as the left operand; for many, the
weight is expanded and multiplied by torch, as arithmetic then binds and not memory. Up to how many rows, and with which
tiles, stands in tuned.json per architecture.

Shape letters: M rows of x, N output features, K input features, G = K / g groups of g = 32, 64 or 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.int4_kernels as kernels_of_planes
from kernels.silu_mul import silu_mul_triton
from kernels.tuned import LinearTile, architecture_of, linear_tiles

GROUP_SIZES = (32, 64, 128)
BITS = (3, 4, 8)
"""What a QuantizedWeight may have; the kernels here take PLANE_BITS."""
EXPANDED_VALUES = 1 << 22
"""Weights made float32 at a time by `dequantize`."""
PLANE_BITS = (4, 8)
BLOCK_N = 128
"""N is padded to a multiple of it, which all tiles divide."""
MAX_SPLITS = 16
FEWEST_BLOCKS = 4
"""Of K in a split, so that filling the pipeline does not outweigh it."""


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


def block_depth(bits: int, group_size: int) -> int:
    """Weights of a row in one block of words; a plane of it lies within a group."""
    return min(128, group_size * 16 // bits)


def pack_planes(q_NK: Tensor, bits: int, depth: int) -> Tensor:
    """Values uint8 [N, K] as int16 [N', K' * bits / 16], N' and K' rounded up to tiles; the padding holds zeros."""
    num_rows, num_columns = q_NK.shape
    padding = (0, -num_columns % depth, 0, -num_rows % BLOCK_N)
    num_planes = 16 // bits
    planes = F.pad(q_NK, padding).view(num_rows + padding[3], -1, num_planes, depth // num_planes)
    words = planes[:, :, 0].to(torch.int32)
    for i in range(1, num_planes):
        words |= planes[:, :, i].to(torch.int32) << (bits * i)
    return words.to(torch.int16).flatten(1)


def pack_scales(scale_NG: Tensor, zero_NG: Tensor | None, bits: int) -> Tensor:
    """float32 scales, with zero points in their lowest bits where there are any."""
    if zero_NG is None:
        return scale_NG
    if int(zero_NG.max()) >= 1 << bits:
        raise ValueError(
            f"int4_linear: a zero point is {int(zero_NG.max())}; of {bits} bits it must be below {1 << bits}"
        )
    cleared = (scale_NG.view(torch.int32) + (1 << (bits - 1))) & -(1 << bits)
    return (cleared | zero_NG.to(torch.int32)).view(torch.float32)


def interleave_halves(x_N: Tensor) -> Tensor:
    """Rows 0, N/2, 1, N/2 + 1 ... of [N, ...]: each of a gate beside its twin of the up projection."""
    return x_N.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def choose_splits(num_columns: int, num_blocks: int, tile: LinearTile) -> int:
    """Into how many parts K is cut; of the weight's shape alone, so that a result does not depend on the batch."""
    wanted = max(1, min(tile.programs // -(-num_columns // tile.columns), num_blocks // FEWEST_BLOCKS, MAX_SPLITS))
    return -(-num_blocks // -(-num_blocks // wanted))  # none is empty


class Int4Linear:
    """A linear layer whose 4- or 8-bit weight lies on a GPU in planes.

    float16 and bfloat16; any M and N, K a multiple of the group size; compute capability 8.0 and up. Up to 16 rows, a
    row's result is the same bits whatever rows are beside it; with `deterministic` for any number of rows, as all go
    through the tile of 64 rows and the weight is never expanded. Calls must be on one stream: they share a counter.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        deterministic: bool = False,
        gated: bool = False,
        tiles: tuple[LinearTile, ...] | None = None,
    ) -> None:
        """gated: the result is silu_mul's of the product, [M, N / 2], the same bits, and mostly in the same launch.
        tiles: instead of tuned.json's, by rising max_rows."""
        if weight.bits not in PLANE_BITS:
            raise ValueError(
                f"int4_linear: the weight has {weight.bits} bits; it must have one of {PLANE_BITS}, or be dequantised"
            )
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"int4_linear: dtype is {dtype}; on {device} it must be float16 or bfloat16")
        if bias is not None and bias.shape != (weight.shape[0],):
            raise ValueError(f"int4_linear: bias is {tuple(bias.shape)}; it must be [{weight.shape[0]}]")
        if gated and weight.shape[0] % 2:
            raise ValueError(f"int4_linear: a gate and an up projection have {weight.shape[0]} rows; it must be even")
        self.num_columns, self.depth = weight.shape
        self.bits, self.group_size, self.dtype = weight.bits, weight.group_size, dtype
        self.has_zero = weight.zero_NG is not None
        self.block_depth = block_depth(weight.bits, weight.group_size)
        self.is_gated = gated
        q_NK, scale_NG = weight.q_NK.to(device), weight.scale_NG.to(device)
        zero_NG = None if weight.zero_NG is None else weight.zero_NG.to(device)
        if gated:
            q_NK, scale_NG = interleave_halves(q_NK), interleave_halves(scale_NG)
            zero_NG = None if zero_NG is None else interleave_halves(zero_NG)
        self.words = pack_planes(q_NK, weight.bits, self.block_depth)
        self.scale_GN = self._pad_groups(pack_scales(scale_NG, zero_NG, weight.bits))
        self.bias_N = None if bias is None else bias.to(device=device, dtype=dtype)
        self.tiles = tiles or linear_tiles(architecture_of(device), weight.bits, weight.group_size)
        self.is_deterministic = deterministic
        if deterministic:
            self.tiles = tuple(tile for tile in self.tiles if tile.max_rows == tile.rows == 64)
        num_tiles = max(-(-tile.max_rows // tile.rows) * -(-len(self.words) // tile.columns) for tile in self.tiles)
        self.arrivals = torch.zeros(num_tiles, dtype=torch.int32, device=device)

    @property
    def num_blocks(self) -> int:
        return self.words.shape[1] * 16 // self.bits // self.block_depth

    def _pad_groups(self, values_NG: Tensor) -> Tensor:
        """[N, G] as [G', N'], the padding zero."""
        num_groups = self.num_blocks * self.block_depth // self.group_size
        padding = (0, num_groups - values_NG.shape[1], 0, len(self.words) - len(values_NG))
        return F.pad(values_NG, padding).t().contiguous()

    def __call__(self, x_MK: Tensor) -> Tensor:
        self._check(x_MK)
        tile = next((tile for tile in self.tiles if len(x_MK) <= tile.max_rows), None)
        if tile is not None:
            return self._multiply(x_MK, tile)
        if self.is_deterministic:
            tile = self.tiles[-1]
            return torch.cat([self._multiply(rows_MK, tile) for rows_MK in x_MK.split(tile.max_rows)])
        y_MN = F.linear(x_MK, self.expand(), self.bias_N)
        return silu_mul_triton(y_MN) if self.is_gated else y_MN

    def _check(self, x_MK: Tensor) -> None:
        if x_MK.ndim != 2 or x_MK.shape[1] != self.depth:
            raise ValueError(f"int4_linear: x is {tuple(x_MK.shape)}; it must be [rows, {self.depth}]")
        if x_MK.dtype != self.dtype or x_MK.device != self.words.device:
            raise ValueError(
                f"int4_linear: x is {x_MK.dtype} on {x_MK.device}; it must be {self.dtype} on {self.words.device}"
            )

    def _multiply(self, x_MK: Tensor, tile: LinearTile) -> Tensor:
        num_rows = len(x_MK)
        if x_MK.stride(1) != 1:
            x_MK = x_MK.contiguous()
        width = self.num_columns // 2 if self.is_gated else self.num_columns
        y_MN = torch.empty((num_rows, width), dtype=self.dtype, device=x_MK.device)
        if not num_rows:
            return y_MN
        padded_columns, num_blocks = len(self.words), self.num_blocks
        num_splits = choose_splits(self.num_columns, num_blocks, tile)
        partial = self.scale_GN  # not read without splits
        if num_splits > 1:
            shape = (num_splits, num_rows, padded_columns)
            partial = torch.empty(shape, dtype=torch.float32, device=x_MK.device)
        grid = (-(-self.num_columns // tile.columns), num_splits, -(-num_rows // tile.rows))
        limit = {} if tile.registers is None else {"maxnreg": tile.registers}
        kernels_of_planes.int4_linear_kernel[grid](
            x_MK,
            self.words,
            self.scale_GN,
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
            -(-num_blocks // num_splits),
            BITS=self.bits,
            GROUP=self.group_size,
            HAS_ZERO=self.has_zero,
            HAS_BIAS=self.bias_N is not None,
            GATED=self.is_gated,
            RAGGED=self.depth % self.block_depth != 0,
            SPLITS=num_splits,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=self.block_depth,
            SWAPPED=tile.swapped,
            ROUNDED=tile.rounded,
            ASM=x_MK.is_cuda and torch.version.hip is None,
            STAGES=tile.stages,
            num_warps=tile.warps,
            enable_fp_fusion=True,
            **limit,
        )
        return y_MN

    def expand(self) -> Tensor:
        """The weight as [N, K] in the layer's dtype."""
        weight_NK = torch.empty((self.num_columns, self.depth), dtype=self.dtype, device=self.words.device)
        columns = BLOCK_N // 2
        grid = (-(-self.num_columns // columns), self.num_blocks)
        kernels_of_planes.expand_kernel[grid](
            self.words,
            self.scale_GN,
            weight_NK,
            self.num_columns,
            len(self.words),
            self.depth,
            self.words.stride(0),
            BITS=self.bits,
            GROUP=self.group_size,
            HAS_ZERO=self.has_zero,
            GATED=self.is_gated,
            COLUMNS=columns,
            DEPTH=self.block_depth,
            num_warps=4,
            enable_fp_fusion=True,
        )
        return weight_NK

    def describe(self) -> str:
        zeros = "with zero points" if self.has_zero else "symmetric"
        above = f"expanded to {str(self.dtype).removeprefix('torch.')} above {self.tiles[-1].max_rows} rows"
        if self.is_deterministic:
            above = f"in fixed tiles of {self.tiles[-1].rows} rows"
        num_splits = choose_splits(self.num_columns, self.num_blocks, self.tiles[0])
        silu = ", silu in the epilogue" if self.is_gated else ""
        return f"int{self.bits} g{self.group_size} {zeros}, Triton in planes, K in {num_splits} splits{silu}; {above}"


def int4_linear_reference(x_MK: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The layer in float64."""
    return F.linear(x_MK.double(), dequantize(weight).double(), None if bias is None else bias.double())
