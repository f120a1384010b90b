"""Runs the Triton kernels where they can run: on the GPU, and in Triton's interpreter on a machine without one.

The interpreter is chosen when `triton` is imported, by an environment variable, and another test's imports may have
come first (transformers imports Triton). So Triton is imported afresh here, with the variable set only meanwhile: child
processes do not inherit it, and the kernels, which import Triton at their first launch, get this one.
"""

import importlib.util
import os
import sys

import numpy as np
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    teach_interpreter_e4m3(triton.runtime.interpreter, triton.language)


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


def teach_interpreter_e4m3(interpreter, tl) -> None:
    """Triton 3.9's interpreter truncates what it casts to float8e4nv; torch rounds it to nearest even, as GPUs do."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast = builder.cast_impl

    def mended_cast(self, source, target):
        if source.dtype.scalar == target.scalar or tl.float8e4nv not in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        if target.scalar == tl.float8e4nv:
            numbers = torch.from_numpy(np.array(cast(self, source, tl.float32).data))
            return handle(numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), tl.float8e4nv)
        numbers = torch.from_numpy(np.array(source.data)).view(torch.float8_e4m3fn).float().numpy()
        return cast(self, handle(numbers, tl.float32), target)

    builder.cast_impl = mended_cast
    builder.create_fp_to_fp = lambda self, source, target, rounding_mode: mended_cast(self, source, target)


if HAS_TRITON and DEVICE.type == "cpu":
    import_interpreted_triton()
