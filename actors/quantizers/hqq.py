"""Half-quadratic quantisation (Badri and Shaji 2023, mobiusml.github.io/hqq_blog). Needs no calibration.

Minimises |W - W_q|_p^p, p < 1: the heavy tail of the errors counts less than with squares, so a few outliers do not
stretch the grid. Half-quadratic splitting: an auxiliary E takes the sparse part of the error by shrinking
(E = shrink_p(W - W_q)), and the grid is then fitted to W - E by least squares. Two things differ from the source. The
format holds integer zero points and 16-bit scales, so the scale is fitted too, and once more after zeros are rounded.
Errors are measured in steps of the grid, so that beta means the same for weights of any size.

Shape letters as in `grid`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actors.quantizers.grid import (
    Grid,
    GridWeight,
    as_groups,
    fit_range,
    grid_weight,
    round_to_grid,
    row_blocks,
    storable_scale,
)

NORM = 0.7
BETA, BETA_GROWTH = 20.0, 1.01
NUM_ITERATIONS = 20


def quantize_hqq(weight_NK: Tensor, grid: Grid) -> GridWeight:
    """Round a weight with scales and zero points from the half-quadratic solver."""
    parts = []
    for rows in row_blocks(*weight_NK.shape):
        groups = as_groups(weight_NK[rows].float(), grid)
        scale, zero = _best_fit(groups, grid)
        parts.append((round_to_grid(groups, scale, zero, grid.max_q), scale, zero))
    q, scale, zero = (torch.cat(tensors) for tensors in zip(*parts))
    return grid_weight(q.view(weight_NK.shape), scale, zero, grid)


def _best_fit(weight_Xg: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The solver's end, or the full range for groups in which that is better."""
    full_scale, full_zero = fit_range(weight_Xg, grid)
    scale, zero = _solve(weight_Xg, full_scale, full_zero, grid)
    is_better = _error(weight_Xg, scale, zero, full_scale, grid) < _error(
        weight_Xg, full_scale, full_zero, full_scale, grid
    )
    return torch.where(is_better, scale, full_scale), torch.where(is_better, zero, full_zero)


def _solve(weight_Xg: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    beta = BETA
    for _ in range(NUM_ITERATIONS):
        q_Xg = round_to_grid(weight_Xg, scale, zero, grid.max_q)
        target_Xg = _without_outliers(weight_Xg, q_Xg, scale, zero, beta)
        if grid.symmetric:
            scale = _fit_scale(target_Xg, q_Xg - grid.middle, scale)
        else:
            scale, zero = _fit_line(target_Xg, q_Xg, scale, zero)
        beta *= BETA_GROWTH
    zero = zero.round().clamp(0, grid.max_q)
    q_Xg = round_to_grid(weight_Xg, scale, zero, grid.max_q)
    target_Xg = _without_outliers(weight_Xg, q_Xg, scale, zero, beta)
    scale = _fit_scale(target_Xg, q_Xg - zero.unsqueeze(-1), scale)
    return storable_scale(scale, grid.scale_dtype), zero


def _without_outliers(weight_Xg: Tensor, q_Xg: Tensor, scale: Tensor, zero: Tensor, beta: float) -> Tensor:
    """W - E with E the proximal step of |.|_p^p at the present error, in steps of the grid."""
    steps = weight_Xg / scale.unsqueeze(-1) - (q_Xg - zero.unsqueeze(-1))
    size = steps.abs()
    shrunk = steps.sign() * (size - size.clamp(min=1e-4).pow(NORM - 1) / beta).clamp(min=0)
    return weight_Xg - shrunk * scale.unsqueeze(-1)


def _fit_scale(target_Xg: Tensor, level_Xg: Tensor, scale: Tensor) -> Tensor:
    """Least squares of target = scale * level; keeps a scale where there is nothing to fit."""
    fitted = (target_Xg * level_Xg).sum(-1) / level_Xg.square().sum(-1)
    return torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, scale)


def _fit_line(target_Xg: Tensor, q_Xg: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of target = scale * (q - zero), zero a real number."""
    mean_q, mean_target = q_Xg.mean(-1), target_Xg.mean(-1)
    centred = q_Xg - mean_q.unsqueeze(-1)
    fitted = (centred * target_Xg).sum(-1) / centred.square().sum(-1)
    fitted = torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, scale)
    return fitted, torch.where(fitted > 0, mean_q - mean_target / fitted, zero)


def _error(weight_Xg: Tensor, scale: Tensor, zero: Tensor, full_scale: Tensor, grid: Grid) -> Tensor:
    """sum |w - w_q|^p in steps of the full range's grid: one unit for all candidates of a group."""
    q_Xg = round_to_grid(weight_Xg, scale, zero, grid.max_q)
    error = (q_Xg - zero.unsqueeze(-1)) * scale.unsqueeze(-1) - weight_Xg
    return (error / full_scale.unsqueeze(-1)).abs_().pow_(NORM).sum(-1)
