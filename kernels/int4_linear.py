"""A linear layer on int4 weights. Called through kernels.backend.prepare_linear.

    y[m, n] = bias[n] + sum_k x[m, k] * scale[n, k // g] * (q[n, k] - zero[n, k // g])

Shape letters: M rows of x, N output features, K input features, G = K / g groups of g = 32, 64 or 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """An int4 weight of shape [N, K] in plain form, one nibble a byte: w = scale * (q - zero).

    q_NK: uint8, 0 to 15. scale_NG: float32. zero_NG: uint8, 0 to 15, or None where it is 8 throughout.
    """

    q_NK: Tensor
    scale_NG: Tensor
    group_size: int
    zero_NG: Tensor | None = None

    def __post_init__(self) -> None:
        if self.q_NK.ndim != 2 or self.q_NK.dtype != torch.uint8:
            raise ValueError(f"int4 weight: q is {self.q_NK.dtype} {tuple(self.q_NK.shape)}; it must be uint8 [N, K]")
        num_rows, num_columns = self.q_NK.shape
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"int4 weight: group_size is {self.group_size}; it must be one of {GROUP_SIZES}")
        if num_columns == 0 or num_columns % self.group_size:
            raise ValueError(f"int4 weight: K={num_columns} is not a multiple of group_size={self.group_size}")
        expected = (num_rows, num_columns // self.group_size)
        if self.scale_NG.dtype != torch.float32 or self.scale_NG.shape != expected:
            raise ValueError(
                f"int4 weight: scale is {self.scale_NG.dtype} {tuple(self.scale_NG.shape)}; "
                f"it must be float32 {expected}"
            )
        if self.zero_NG is not None and (self.zero_NG.dtype != torch.uint8 or self.zero_NG.shape != expected):
            raise ValueError(
                f"int4 weight: zero is {self.zero_NG.dtype} {tuple(self.zero_NG.shape)}; it must be uint8 {expected}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.q_NK.shape[0], self.q_NK.shape[1]


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The weight as float32 [N, K]."""
    num_rows, num_columns = weight.shape
    q = weight.q_NK.view(num_rows, -1, weight.group_size).float()
    zero = 8.0 if weight.zero_NG is None else weight.zero_NG.float().unsqueeze(-1)
    return ((q - zero) * weight.scale_NG.unsqueeze(-1)).view(num_rows, num_columns)
