"""Fixtures of the kernels' tests: where they run, and memory that shows what a kernel did wrong."""

from collections.abc import Callable, Iterator

import pytest
import torch
from interpreted_triton import DEVICE, HAS_TRITON

GUARD = 64


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels run in this session."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed here (it is on Linux)")
    return DEVICE


@pytest.fixture
def new_between_guards() -> Iterator[Callable[..., torch.Tensor]]:
    """`new(shape, dtype, device)`: memory full of NaN (integers: -1) between guards, which are checked at the end."""
    buffers = []

    def new(shape, dtype, device) -> torch.Tensor:
        shape = torch.Size(shape)
        blank = float("nan") if dtype.is_floating_point else -1
        buffers.append(torch.full((shape.numel() + 2 * GUARD,), blank, dtype=dtype, device=device))
        return buffers[-1][GUARD:-GUARD].view(shape)

    yield new
    for buffer in buffers:
        guards = torch.cat((buffer[:GUARD], buffer[-GUARD:]))
        untouched = guards.isnan() if guards.dtype.is_floating_point else guards == -1
        assert bool(untouched.all()), "a kernel wrote outside of its output"


@pytest.fixture
def guarded(monkeypatch, new_between_guards) -> None:
    """Every `torch.empty` of a launcher comes full of NaN and between guards."""
    plain_empty = torch.empty

    def guarded_empty(*shape, dtype=torch.float32, device=None, **others):
        if others:  # torch's own calls, in its decompositions
            return plain_empty(*shape, dtype=dtype, device=device, **others)
        return new_between_guards(shape if isinstance(shape[0], int) else shape[0], dtype, device)

    monkeypatch.setattr(torch, "empty", guarded_empty)
