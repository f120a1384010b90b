"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): round column by column, the rest of the row makes up for each error.

Minimises |(W - W_q) X|^2 with H = X X^T of the calibration inputs. After a column is rounded, its error goes to the
columns not yet rounded along a row of the Cholesky factor of H^-1 (section 3.3, steps 1 to 3; blocks of 128 columns).
Columns are taken by falling diag(H) (the reference's act-order) with all scales found beforehand ("static groups"), so
that the stored columns keep their order and no g_idx is needed; or from left to right, with a group's scales found
when it is reached. Ranges are searched for the least squared error, columns weighted by diag(H).

Shape letters: N outputs, K inputs, G groups, g weights of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actors.quantizers.grid import Grid, GridWeight, as_groups, grid_weight, round_to_grid, search_range

BLOCK_COLUMNS = 128
DAMPING = 0.01
"""Part of the mean diagonal that is added to H's (the paper's 1 %); ten times more until the factorisation succeeds."""


def inverse_factor(hessian_KK: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped H^-1. ValueError when H holds NaN or infinity."""
    if not torch.isfinite(hessian_KK).all():
        raise ValueError("the calibration inputs of this layer hold NaN or infinity")
    damping = DAMPING
    mean = hessian_KK.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    while True:
        damped = hessian_KK.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping *= 10


def quantize_gptq(weight_NK: Tensor, hessian_KK: Tensor, grid: Grid, act_order: bool = True) -> GridWeight:
    """Round a weight against the second moment of its inputs."""
    num_out, num_in = weight_NK.shape
    group_size = grid.group_size or num_in
    importance_K = hessian_KK.diagonal()
    order_K = importance_K.argsort(descending=True) if act_order else torch.arange(num_in, device=weight_NK.device)
    weight_NK = weight_NK.float().clone()
    importance_1Gg = as_groups(importance_K.unsqueeze(0), grid)
    if act_order:
        scale_NG, zero_NG = search_range(as_groups(weight_NK, grid), grid, importance_1Gg)
    else:
        shape = (num_out, num_in // group_size)
        scale_NG, zero_NG = weight_NK.new_empty(shape), weight_NK.new_empty(shape)
    factor_KK = inverse_factor(hessian_KK[order_K][:, order_K])
    weight_NK = weight_NK[:, order_K]
    q_NK = torch.empty_like(weight_NK)
    group_of_K = order_K // group_size
    for start in range(0, num_in, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, num_in)
        errors_NB = weight_NK.new_empty(num_out, end - start)
        for k in range(start, end):
            group = int(group_of_K[k])
            if not act_order and k % group_size == 0:
                now = weight_NK[:, k : k + group_size]
                if k + group_size > end:  # a group beyond this block has not yet had the block's errors
                    now = now.clone()
                    now[:, end - k :] -= errors_NB[:, : k - start] @ factor_KK[start:k, end : k + group_size]
                scale_NG[:, group], zero_NG[:, group] = search_range(now, grid, importance_1Gg[:, group])
            scale_N, zero_N = scale_NG[:, group], zero_NG[:, group]
            column_N = weight_NK[:, k]
            q_N = round_to_grid(column_N.unsqueeze(-1), scale_N, zero_N, grid.max_q).squeeze(-1)
            q_NK[:, k] = q_N
            error_N = (column_N - (q_N - zero_N) * scale_N) / factor_KK[k, k]
            weight_NK[:, k:end] -= error_N.unsqueeze(1) * factor_KK[k, k:end]
            errors_NB[:, k - start] = error_N
        weight_NK[:, end:] -= errors_NB @ factor_KK[start:end, end:]
    q_in_place = torch.empty_like(q_NK)
    q_in_place[:, order_K] = q_NK
    return grid_weight(q_in_place, scale_NG, zero_NG, grid)
