"""Linear layers on a CPU: packed int4 for a few tokens, one dense form for many, chosen by a short measurement.

Which form is fastest depends on the CPU far more than on the model: with AMX a bf16 product is ten times faster than
without, and torch's int4 product beats a dense one only for a few rows. So each shape is timed once at load and the
choice is part of `describe()`. Knows no model; called through `kernels.backend.prepare_linear`.

Shape letters: T tokens, N outputs, K inputs, G groups of weights that share a scale.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from kernels.int4_linear import QuantizedWeight

MEASURED_TOKENS = (1, 4, 16, 32)
"""Numbers of tokens at which the int4 product is timed against the dense one."""

DENSE_TOKENS = 64
"""Number of tokens at which the dense forms are timed against each other."""

SINGLE_TOKENS = 16
"""Up to so many tokens each number is a shape of its own."""

PACKED_ROWS = 256
"""Rows packed at a time, since torch wants them as int32; a multiple of the 64 that its packed form keeps together."""

Product = Callable[[Tensor, Tensor | None], Tensor]


class CpuLinear:
    """y = x W^T + b over x [T, K]. Holds a dense form of W, a packed int4 form, or both."""

    def __init__(
        self,
        bias: Tensor | None,
        dense: Product | None,
        int4: Product | None,
        int4_max_tokens: int,
        description: str,
    ):
        self._bias = bias
        self._dense = dense
        self._int4 = int4
        self._int4_max_tokens = int4_max_tokens
        self._description = description

    def __call__(self, x_TK: Tensor) -> Tensor:
        if self._int4 is not None and (self._dense is None or x_TK.shape[0] <= self._int4_max_tokens):
            return self._int4(x_TK, self._bias)
        assert self._dense is not None
        return self._dense(x_TK, self._bias)

    def describe(self) -> str:
        """Which forms this layer multiplies with, in words for the run's summary."""
        return self._description


@dataclass(frozen=True)
class CpuLinearChoice:
    """`form` is "packed" (oneDNN's own layout), "plain" or "upcast" (float32 copy of a 16-bit weight);
    int4 is used up to `int4_max_tokens` tokens (0: never)."""

    form: str
    int4_max_tokens: int


def prepare_cpu_linear(
    weight: Tensor | QuantizedWeight, bias: Tensor | None, *, dtype: torch.dtype, compute: str = "auto"
) -> CpuLinear:
    """Turn a weight [N, K] into the form in which this CPU multiplies it fastest.

    compute: "int4" multiplies packed int4 only (least memory), "dense" a copy in `dtype` only (exact for float32),
    "auto" takes int4 for few tokens where it was measured to be faster. The int4 product rounds activations to
    bfloat16, since torch has no other fast one.
    """
    if bias is not None:
        bias = bias.to(dtype)
    if isinstance(weight, Tensor):
        # The other forms are copies, beside a weight which may live on as the embedding.
        fewest_bytes = compute == "int4"
        form = "plain" if fewest_bytes else _choose_form(*weight.shape, dtype, torch.get_num_threads())
        return CpuLinear(bias, _bucketed_product(weight.to(dtype), form), None, 0, f"{form} {dtype_name(dtype)}")

    from kernels.int4_linear import dequantize

    num_out, num_in = weight.q_NK.shape
    group = weight.group_size
    if weight.bits != 4:
        # torch has no product for 3 bits, and for 8 bits none with scales per group.
        form = _choose_form(num_out, num_in, dtype, torch.get_num_threads())
        dense = _bucketed_product(dequantize(weight, dtype), form)
        return CpuLinear(bias, dense, None, 0, f"{form} {dtype_name(dtype)} copy of int{weight.bits}")
    if compute == "int4":
        check_int4_fits(num_out, num_in, group)
        return CpuLinear(bias, None, int4_product(weight), 0, f"int4 g{group}")
    if compute == "dense" or not _int4_is_possible(num_out, num_in, group):
        choice = CpuLinearChoice(_choose_form(num_out, num_in, dtype, torch.get_num_threads()), 0)
    else:
        choice = _choose(num_out, num_in, group, dtype, torch.get_num_threads())
        if num_out * num_in * dtype.itemsize > available_memory_bytes() // 4:
            return CpuLinear(bias, None, int4_product(weight), 0, f"int4 g{group} (too little memory for a dense copy)")
    dense = _bucketed_product(dequantize(weight, dtype), choice.form)
    if choice.int4_max_tokens == 0:
        return CpuLinear(bias, dense, None, 0, f"{choice.form} {dtype_name(dtype)} copy of int4")
    text = f"int4 g{group} up to {choice.int4_max_tokens} tokens, {choice.form} {dtype_name(dtype)} copy above"
    return CpuLinear(bias, dense, int4_product(weight), choice.int4_max_tokens, text)


def fastest_cpu_dtype() -> torch.dtype:
    """bfloat16 where the CPU has instructions for it (AMX or AVX512-BF16: 2 to 8 times float32's rate), else float32.

    Not measured, unlike the rest: the dtype shows in the answers, and a run that is continued on the same kind of
    machine shall not depend on how busy that was at the start.
    """
    has_instructions = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_instructions else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The name without "torch.", as settings and summaries write it."""
    return str(dtype).removeprefix("torch.")


def available_memory_bytes() -> int:
    """Memory which this process could still take, as the kernel estimates it."""
    try:
        with open("/proc/meminfo") as lines:  # noqa: PTH123
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_int4_fits(num_out: int, num_in: int, group: int) -> None:
    """ValueError for a weight that torch's int4 product does not take."""
    if not _int4_is_possible(num_out, num_in, group):
        raise ValueError(
            f"a weight [{num_out}, {num_in}] in groups of {group} does not fit torch's int4 product, taking outputs "
            "in multiples of 16 and groups of 32, 64, 128 or 256; set engine.linear_compute to dense or auto"
        )


def _int4_is_possible(num_out: int, num_in: int, group: int) -> bool:
    return num_out % 16 == 0 and group in (32, 64, 128, 256) and num_in % group == 0


def int4_product(weight: QuantizedWeight) -> Product:
    """torch's product with packed int4."""
    packed = torch.empty(weight.q_NK.shape[0], weight.q_NK.shape[1] // 2, dtype=torch.uint8)
    for start in range(0, len(packed), PACKED_ROWS):
        rows = slice(start, start + PACKED_ROWS)
        packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.q_NK[rows].int(), 1)
    zero_NG = 8.0 if weight.zero_NG is None else weight.zero_NG.float()
    scale_NG = weight.scale_NG.float()
    # The operator computes (q - 8) * scale + zero, with [G, N, (scale, zero)] in bfloat16.
    scales_GN2 = torch.stack([scale_NG, (8.0 - zero_NG) * scale_NG], dim=-1).transpose(0, 1).contiguous().bfloat16()
    group = weight.group_size

    def product(x_TK: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TK.bfloat16(), packed, group, scales_GN2).to(x_TK.dtype)
        return y if bias is None else y.add_(bias)

    return product


def _bucketed_product(weight_NK: Tensor, form: str) -> Product:
    """`dense_product`, called with few different numbers of tokens where each new one costs."""
    product = dense_product(weight_NK, form)
    if form == "upcast" or (form == "plain" and weight_NK.dtype == torch.float32):
        return product  # MKL's: nothing is prepared per shape

    def multiply(x_TK: Tensor, bias: Tensor | None) -> Tensor:
        num_tokens = x_TK.shape[0]
        num_missing = _bucket(num_tokens) - num_tokens
        if not num_missing:
            return product(x_TK, bias)
        return product(F.pad(x_TK, (0, 0, 0, num_missing)), bias)[:num_tokens]

    return multiply


def _bucket(num_tokens: int) -> int:
    """The number of tokens that a product is padded to, at most an eighth more from 128 on.

    oneDNN prepares a product for each number of tokens: 0.5 to 1.3 ms where the product itself takes 0.05 to 0.3, and
    it keeps 1024 of all layers' shapes. Up to 4096 tokens there are 63 such numbers.
    """
    if num_tokens <= SINGLE_TOKENS:
        return num_tokens
    step = max(16, 1 << max(0, (num_tokens - 1).bit_length() - 4))
    return -(-num_tokens // step) * step


def dense_product(weight_NK: Tensor, form: str) -> Product:
    """A product with a weight in the form "plain", "packed" or "upcast"."""
    if form == "plain":
        return lambda x, bias: F.linear(x, weight_NK, bias)
    if form == "upcast":
        weight_NK = weight_NK.float()
        return lambda x, bias: F.linear(x.float(), weight_NK, None if bias is None else bias.float()).to(x.dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), DENSE_TOKENS)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x, bias: multiply(x, packed, bias, "none", [], "")


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a layout of its own for this dtype here: for 16 bits it asks for instructions of the CPU."""
    if not (hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and torch.backends.mkldnn.is_available()):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


@functools.lru_cache(maxsize=256)
def _choose_form(num_out: int, num_in: int, dtype: torch.dtype, num_threads: int) -> str:
    # Sizes are capped: which form wins does not change above, but the time to measure it does.
    weight_NK = torch.randn(min(num_out, 4096), min(num_in, 4096)).to(dtype)
    x_TK = torch.randn(DENSE_TOKENS, weight_NK.shape[1]).to(dtype)
    forms = ["plain"]
    if _packs(dtype):
        forms.append("packed")
    if dtype != torch.float32:
        forms.append("upcast")
    seconds = {form: _seconds_per_call(dense_product(weight_NK, form), x_TK) for form in forms}
    best = min(forms, key=lambda form: seconds[form])
    # A float32 copy doubles the memory, so it has to win clearly.
    if best == "upcast" and seconds["upcast"] * 1.5 > min(seconds[f] for f in forms if f != "upcast"):
        best = min((f for f in forms if f != "upcast"), key=lambda form: seconds[form])
    return best


@functools.lru_cache(maxsize=256)
def _choose(num_out: int, num_in: int, group: int, dtype: torch.dtype, num_threads: int) -> CpuLinearChoice:
    from kernels.int4_linear import QuantizedWeight, dequantize

    form = _choose_form(num_out, num_in, dtype, num_threads)
    rows, columns = min(num_out, 4096), min(num_in, 4096 // group * group)
    weight = QuantizedWeight(
        q_NK=torch.randint(0, 16, (rows, columns), dtype=torch.uint8),
        scale_NG=torch.full((rows, columns // group), 0.01),
        group_size=group,
    )
    dense, int4 = dense_product(dequantize(weight, dtype), form), int4_product(weight)
    int4_max_tokens = 0
    for num_tokens in MEASURED_TOKENS:
        x_TK = torch.randn(num_tokens, columns).to(dtype)
        if _seconds_per_call(int4, x_TK) > 0.9 * _seconds_per_call(dense, x_TK):
            break
        int4_max_tokens = num_tokens
    return CpuLinearChoice(form, int4_max_tokens)


def _seconds_per_call(product: Product, x_TK: Tensor) -> float:
    """Best of five after one to warm up: the least disturbed run says most about the hardware."""
    product(x_TK, None)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(x_TK, None)
        best = min(best, time.perf_counter() - start)
    return best
