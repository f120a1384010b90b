"""The grid of numbers that a quantised weight can take, and finding the grid of each group of weights.

w = scale * (q - zero), 0 <= q < 2^bits: the arithmetic of compressed-tensors' pack-quantized format. Knows no layers;
all methods of this package end here.

Shape letters: N outputs, K inputs, G groups of a row, X groups of all rows, g weights of a group, S candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SHRINKS = tuple(1.0 - 0.02 * i for i in range(26))
"""Candidates for the range of a group, as parts of its full one."""

MAX_VALUES_AT_ONCE = 1 << 22
"""Weights searched at a time: bounds the temporaries to about 100 MB."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How weights are rounded. group_size None: a row shares one scale; symmetric: zero is 2^(bits - 1) throughout.

    scale_dtype is what the file holds: scales are rounded to it before weights are rounded to them.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    scale_dtype: torch.dtype = torch.bfloat16

    @property
    def max_q(self) -> int:
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        return 2 ** (self.bits - 1)

    def bytes_of(self, num_out: int, num_in: int) -> int:
        """Bytes of a packed weight with its scales and zero points."""
        num_groups = num_in // (self.group_size or num_in)
        words = num_out * -(-num_in * self.bits // 32)
        zeros = 0 if self.symmetric else -(-num_out * self.bits // 32) * num_groups
        return 4 * (words + zeros) + num_out * num_groups * self.scale_dtype.itemsize


@dataclass(frozen=True, slots=True)
class GridWeight:
    """A rounded weight: q_NK uint8, scale_NG float32 (numbers of scale_dtype), zero_NG uint8 or None (symmetric)."""

    q_NK: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None
    grid: Grid

    def to_float(self) -> Tensor:
        """The weight as float32 [N, K]."""
        num_out, num_in = self.q_NK.shape
        zero = self.grid.middle if self.zero_NG is None else self.zero_NG.float().unsqueeze(-1)
        groups = self.q_NK.view(num_out, self.scale_NG.shape[1], -1).float()
        return ((groups - zero) * self.scale_NG.unsqueeze(-1)).view(num_out, num_in)


def round_to_grid(weight_Xg: Tensor, scale_X: Tensor, zero_X: Tensor, max_q: int) -> Tensor:
    """The nearest q, as floats."""
    return weight_Xg.div(scale_X.unsqueeze(-1)).add_(zero_X.unsqueeze(-1)).round_().clamp_(0, max_q)


def storable_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as the file will hold them, as float32; where a group is all zeros the scale is 1."""
    stored = scale.to(dtype).float()
    return stored.masked_fill_(stored < torch.finfo(dtype).tiny, 1.0)


def fit_range(weight_Xg: Tensor, grid: Grid, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero (both float32 [X]) that make the grid cover `shrink` of each group's range, zero included.

    Symmetric: -max|w| .. max|w| lies on -(2^(bits-1) - 1) .. 2^(bits-1) - 1.
    """
    if grid.symmetric:
        largest_X = weight_Xg.abs().amax(-1)
        scale_X = storable_scale(largest_X * (shrink / (grid.middle - 1)), grid.scale_dtype)
        return scale_X, torch.full_like(scale_X, grid.middle)
    low_X, high_X = weight_Xg.amin(-1).clamp(max=0), weight_Xg.amax(-1).clamp(min=0)
    scale_X = storable_scale((high_X - low_X) * (shrink / grid.max_q), grid.scale_dtype)
    return scale_X, (-low_X * shrink / scale_X).round_().clamp_(0, grid.max_q)


def search_range(weight_Xg: Tensor, grid: Grid, importance_Xg: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Like `fit_range`, with the shrink of SHRINKS that has the least squared error, weighted by `importance_Xg`."""
    scale_X, zero_X = fit_range(weight_Xg, grid)
    least_X = torch.full_like(scale_X, torch.inf)
    for shrink in SHRINKS:
        some_scale_X, some_zero_X = fit_range(weight_Xg, grid, shrink)
        error_Xg = round_to_grid(weight_Xg, some_scale_X, some_zero_X, grid.max_q)
        error_Xg.sub_(some_zero_X.unsqueeze(-1)).mul_(some_scale_X.unsqueeze(-1)).sub_(weight_Xg).square_()
        if importance_Xg is not None:
            error_Xg.mul_(importance_Xg)
        error_X = error_Xg.sum(-1)
        is_better_X = error_X < least_X
        least_X = torch.where(is_better_X, error_X, least_X)
        scale_X = torch.where(is_better_X, some_scale_X, scale_X)
        zero_X = torch.where(is_better_X, some_zero_X, zero_X)
    return scale_X, zero_X


def as_groups(weight_NK: Tensor, grid: Grid) -> Tensor:
    """A view [N, G, g]."""
    num_out, num_in = weight_NK.shape
    return weight_NK.view(num_out, -1, grid.group_size or num_in)


def row_blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices over rows of at most MAX_VALUES_AT_ONCE weights each."""
    step = max(1, MAX_VALUES_AT_ONCE // num_columns)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def round_searched(weight_NK: Tensor, grid: Grid, importance_K: Tensor | None = None) -> GridWeight:
    """Round to nearest with the range of each group searched; importance_K [K] weights the squared errors."""
    num_out, num_in = weight_NK.shape
    importance_1Gg = None if importance_K is None else as_groups(importance_K.float().unsqueeze(0), grid)
    parts = []
    for rows in row_blocks(num_out, num_in):
        groups = as_groups(weight_NK[rows].float(), grid)
        scale, zero = search_range(groups, grid, importance_1Gg)
        parts.append((round_to_grid(groups, scale, zero, grid.max_q), scale, zero))
    q, scale, zero = (torch.cat(tensors) for tensors in zip(*parts))
    return grid_weight(q.view(num_out, num_in), scale, zero, grid)


def grid_weight(q_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor, grid: Grid) -> GridWeight:
    """Pack the floats of a finished rounding into the types of a GridWeight."""
    zero = None if grid.symmetric else zero_NG.to(torch.uint8)
    return GridWeight(q_NK.to(torch.uint8), scale_NG, zero, grid)
