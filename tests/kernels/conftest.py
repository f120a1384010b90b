"""Runs the Triton kernels where they can run: on the GPU, and in Triton's interpreter on a machine without one.

The interpreter is chosen when `triton` is imported, by an environment variable, and another test's imports may have
come first (transformers imports Triton). So Triton is imported afresh here, with the variable set only meanwhile: child
processes do not inherit it, and the kernels, which import Triton at their first launch, get this one.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GUARD = 64


def import_interpreted_triton() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        if not name.startswith("triton._C"):  # a C extension cannot be loaded twice
            del sys.modules[name]
    previous = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton
        import triton.language
        import triton.runtime.interpreter
    finally:
        if previous is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = previous
    triton.knobs.propagate_env = False  # or the next line would set the variable again
    triton.knobs.runtime.interpret = True
    teach_interpreter_bf16(triton.runtime.interpreter, triton.language)


def teach_interpreter_bf16(interpreter, tl) -> None:
    """Triton 3.9's interpreter keeps bf16 as uint16: its dot multiplies the bit patterns, and its casts truncate.

    Casts are mended to round to nearest even and dots to multiply the values. Other bf16 arithmetic stays wrong; the
    kernels do none of it, as they compute in float32.
    """
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def is_bf16(x) -> bool:
        return x.scalar == tl.bfloat16

    def widen(x):
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if is_bf16(x.dtype) else x

    def narrow(x):
        bits = np.ascontiguousarray(x.data.astype(np.float32)).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return handle(np.where(np.isnan(x.data), np.uint16(0x7FC0), rounded), tl.bfloat16)

    def mended_cast(self, source, target):
        if is_bf16(source.dtype) == is_bf16(target):
            return cast(self, source, target)
        return narrow(source) if is_bf16(target) else cast(self, widen(source), target)

    builder.cast_impl = mended_cast
    builder.create_fp_to_fp = lambda self, source, target, rounding_mode: mended_cast(self, source, target)
    builder.create_dot = lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest)


if HAS_TRITON and DEVICE.type == "cpu":
    import_interpreted_triton()


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
