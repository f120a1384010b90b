"""Rounding to nearest, each group's full range on the grid: the baseline of all methods. Needs no calibration."""

from __future__ import annotations

from torch import Tensor

from actors.quantizers.grid import Grid, GridWeight, as_groups, fit_range, grid_weight, round_to_grid


def quantize_rtn(weight_NK: Tensor, grid: Grid) -> GridWeight:
    """Round a weight; no search, no data."""
    groups = as_groups(weight_NK.float(), grid)
    scale_NG, zero_NG = fit_range(groups, grid)
    q = round_to_grid(groups, scale_NG, zero_NG, grid.max_q)
    return grid_weight(q.view(weight_NK.shape), scale_NG, zero_NG, grid)
