"""The error budget of a kernel, for tests and benchmarks: at most twice the error of torch in the same dtype.

Errors are taken against a float64 reference, per column (the last dimension), and the worst column counts: a tile of
zeros or a wrong head hides in a mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """The worst column of a result, and what it may be off by."""

    error: float
    budget: float
    column: int

    @property
    def holds(self) -> bool:
        return self.error <= self.budget

    def __str__(self) -> str:
        return f"worst column {self.column} is off by {self.error:.3g}; the budget is {self.budget:.3g}"


def column_errors(result: Tensor, reference: Tensor) -> Tensor:
    """The largest error of each column, float64; infinite where the result is not finite."""
    error = (result.double() - reference.double()).abs().reshape(-1, reference.shape[-1])
    return error.nan_to_num(nan=float("inf"), posinf=float("inf")).amax(0)


def compare(result: Tensor, torch_result: Tensor, reference: Tensor) -> ErrorReport:
    """Judge a result by the float64 reference and by torch's result in the same dtype.

    torch's error counts as at least half a unit in the last place of the largest value, which is what rounding the
    exact result to the dtype costs.
    """
    if result.shape != reference.shape or torch_result.dtype != result.dtype:
        raise ValueError(
            f"compare: result is {result.dtype} {tuple(result.shape)}, torch's {torch_result.dtype} "
            f"{tuple(torch_result.shape)}, the reference {tuple(reference.shape)}; shapes and dtypes must agree"
        )
    errors = column_errors(result, reference)
    column = int(errors.argmax())
    rounding = torch.finfo(result.dtype).eps / 2 * float(reference.abs().max())
    budget = FACTOR * max(float(column_errors(torch_result, reference).max()), rounding)
    return ErrorReport(error=float(errors[column]), budget=budget, column=column)
