"""int4 weights made by rounding to nearest, and joining weights of any kind. Used by `decoder` to build layers.

Knows no files: tensors go in, `QuantizedWeight` comes out.

Shape letters: N outputs, K inputs, G groups of weights of a row that share a scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.int4_linear import QuantizedWeight

GROUP_SIZES = (128, 64, 32)

CLIP_RATIOS = (1.0, 0.95, 0.9, 0.875, 0.85, 0.8)
"""Candidates for the scale, as parts of max|w| / 7. The best of them per group has 20 to 25 % less squared error than
the first alone (Gaussian weights, groups of 32 to 128). 0.875 maps max|w| to -8, so that weights which lie on such a
grid already come back exactly."""

MAX_ROUNDED_VALUES = 1 << 22
"""Weights rounded at a time: bounds the temporaries to about 100 MB."""


def quantize_to_nearest(weight_NK: Tensor, group_size: int) -> QuantizedWeight:
    """Round a floating-point weight to symmetric int4; K must be a multiple of group_size.

    Each group takes the scale of CLIP_RATIOS with the least squared error, the first on ties. Scales are numbers of
    bfloat16 (kept as float32), which every packed form and file format holds exactly. ValueError for NaN or infinity.
    """
    num_rows, num_columns = weight_NK.shape
    num_groups = num_columns // group_size
    q_NK = torch.empty(num_rows, num_columns, dtype=torch.uint8, device=weight_NK.device)
    scale_NG = torch.empty(num_rows, num_groups, dtype=torch.float32, device=weight_NK.device)
    num_rows_at_once = max(1, MAX_ROUNDED_VALUES // num_columns)
    for start in range(0, num_rows, num_rows_at_once):
        rows = slice(start, start + num_rows_at_once)
        groups = weight_NK[rows].float().reshape(-1, group_size)
        q, scale = _round_groups(groups)
        q_NK[rows] = q.view(-1, num_columns)
        scale_NG[rows] = scale.view(-1, num_groups)
    return QuantizedWeight(q_NK=q_NK, scale_NG=scale_NG, group_size=group_size)


def _round_groups(weight_Xg: Tensor) -> tuple[Tensor, Tensor]:
    largest_X = weight_Xg.abs().amax(dim=1)
    if not torch.isfinite(largest_X).all():
        raise ValueError("the weight holds NaN or infinity and cannot be rounded to int4")
    best_error_X = torch.full_like(largest_X, torch.inf)
    best_scale_X = _scale_of(largest_X, CLIP_RATIOS[0])
    for ratio in CLIP_RATIOS:
        scale_X = _scale_of(largest_X, ratio)
        rounded = weight_Xg.div(scale_X[:, None]).round_().clamp_(-8, 7).mul_(scale_X[:, None])
        error_X = rounded.sub_(weight_Xg).square_().sum(dim=1)
        is_better_X = error_X < best_error_X
        best_error_X = torch.where(is_better_X, error_X, best_error_X)
        best_scale_X = torch.where(is_better_X, scale_X, best_scale_X)
    q = weight_Xg.div(best_scale_X[:, None]).round_().clamp_(-8, 7).add_(8)
    return q.to(torch.uint8), best_scale_X


def _scale_of(largest_X: Tensor, ratio: float) -> Tensor:
    scale_X = (largest_X * (ratio / 7)).bfloat16().float()
    return scale_X.masked_fill_(scale_X == 0, 1.0)


def fitting_group_size(num_in: int, largest: int) -> int | None:
    """The largest supported group size up to `largest` that divides num_in; None when none does."""
    return next((size for size in GROUP_SIZES if size <= largest and num_in % size == 0), None)


def concatenate(weights: Sequence[Tensor | QuantizedWeight]) -> Tensor | QuantizedWeight | None:
    """Stack weights [N_i, K] on N; None when they are not alike (16-bit beside int4, other bits or groups)."""
    if all(isinstance(weight, Tensor) for weight in weights):
        return torch.cat(list(weights))  # type: ignore[arg-type]
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    kinds = {(weight.bits, weight.group_size) for weight in quantized}
    if len(quantized) != len(weights) or len(kinds) != 1:
        return None
    is_symmetric = all(weight.zero_NG is None for weight in quantized)
    return QuantizedWeight(
        q_NK=torch.cat([weight.q_NK for weight in quantized]),
        scale_NG=torch.cat([weight.scale_NG for weight in quantized]),
        group_size=quantized[0].group_size,
        zero_NG=None if is_symmetric else torch.cat([_zeros_of(weight) for weight in quantized]),
        bits=quantized[0].bits,
    )


def _zeros_of(weight: QuantizedWeight) -> Tensor:
    if weight.zero_NG is not None:
        return weight.zero_NG
    return torch.full_like(weight.scale_NG, 1 << (weight.bits - 1), dtype=torch.uint8)
