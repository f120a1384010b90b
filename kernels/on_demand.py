"""Triton on demand: kernels are declared with their file and compiled, Triton imported, at the first launch.

A machine without a GPU then neither needs Triton nor pays for its import. A kernel file names `tl` under
`TYPE_CHECKING` only; the first launch of one of its kernels binds the real module.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any


class KernelOnDemand:
    """Stands for a Triton kernel until its first launch or until `jit_function` is asked for."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.jit_function()[grid]

    def jit_function(self) -> Any:
        """Make every kernel that the declaring file names a `triton.jit` function, and return this one.

        Device functions that it imports are made so in their own files.
        """
        import triton
        import triton.language as tl

        namespace = self.function.__globals__
        namespace["tl"] = tl
        for name, value in list(namespace.items()):
            if isinstance(value, KernelOnDemand):
                is_own = value.function.__globals__ is namespace
                namespace[name] = triton.jit(value.function) if is_own else value.jit_function()
        return namespace[self.function.__name__]


def triton_kernel(function: Any) -> Any:
    """Decorator: declare a Triton kernel, or a device function for kernels of this and other files."""
    return KernelOnDemand(function)
