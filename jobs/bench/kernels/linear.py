"""int4_linear at the shapes that bars are on, beside torch, gemlite and torchao where these can be imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.bench.kernels.case import Case, Prepared, fill
from kernels import backend
from kernels.backend import prepare_linear
from kernels.compare import compare
from kernels.int4_linear import Int4Linear, QuantizedWeight, dequantize
from kernels.silu_mul import silu_mul_cpu, silu_mul_reference, silu_mul_triton

SHAPES = ((4096, 14336), (8192, 8192))
ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048)
CPU_SHAPE = (1024, 1024)
CPU_ROWS = (1, 16, 64, 256)
SMALL_SHAPE = (130, 384)
SMALL_ROWS = (1, 16, 20, 40, 70)
HEAD = (128256, 4096)
GATE_UP = (28672, 4096)


def cases(place: str, device: torch.device) -> Iterator[Case]:
    dtype = torch.float16 if place == "interpreter" else torch.bfloat16

    def case(shape: tuple[int, int], num_rows: int, bits: int = 4, group_size: int = 128, zeros: bool = False) -> Case:
        kind = f"int{bits} g{group_size}{' zeros' if zeros else ''}"
        name = f"{kind} {shape[0]}x{shape[1]} M={num_rows}"
        return Case("linear", name, lambda: prepare(place, device, dtype, shape, num_rows, bits, group_size, zeros))

    def gated_case(shape: tuple[int, int], num_rows: int) -> Case:
        name = f"gated int4 g128 {shape[0]}x{shape[1]} M={num_rows}"
        return Case("linear", name, lambda: prepare_gated(place, device, dtype, shape, num_rows))

    if place == "interpreter":
        for bits, group_size, zeros in ((4, 128, False), (4, 32, True), (8, 64, True)):
            yield from (case(SMALL_SHAPE, rows, bits, group_size, zeros) for rows in SMALL_ROWS)
        yield from (gated_case(SMALL_SHAPE, rows) for rows in (1, 70))
        return
    if place == "cpu":
        yield from (case(CPU_SHAPE, rows) for rows in CPU_ROWS)
        yield case(CPU_SHAPE, 16, zeros=True)
        yield gated_case(CPU_SHAPE, 16)
        return
    for shape in SHAPES:
        yield from (case(shape, rows) for rows in ROWS)
    yield from (gated_case(GATE_UP, rows) for rows in (1, 16, 64, 256, 2048))
    for group_size, zeros in ((128, True), (64, False), (32, False), (32, True)):
        yield from (case(SHAPES[1], rows, 4, group_size, zeros) for rows in (16, 32, 64, 256))
    for bits in (4, 8):
        yield from (case(HEAD, rows, bits) for rows in (1, 16, 64))
    for shape in ((896, 896), (4864, 896), (151936, 896), (1536, 8960), (11008, 4096), (13824, 5120), (8192, 28672)):
        yield case(shape, 16)


def random_weight(
    shape: tuple[int, int], bits: int, group_size: int, zeros: bool, device: torch.device
) -> QuantizedWeight:
    """Every value as likely; scales as of a trained layer with weights of about 0.02."""
    num_out, num_in = shape
    generator = torch.Generator(device=device).manual_seed(num_out + num_in)
    top = 1 << bits
    q_NK = torch.randint(top, shape, generator=generator, device=device, dtype=torch.uint8)
    groups = (num_out, num_in // group_size)
    scale_NG = (torch.rand(groups, generator=generator, device=device) + 0.5) * (0.1 / top)
    zero_NG = torch.randint(top, groups, generator=generator, device=device, dtype=torch.uint8) if zeros else None
    return QuantizedWeight(q_NK, scale_NG, group_size, zero_NG, bits)


def prepare(
    place: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    num_rows: int,
    bits: int,
    group_size: int,
    zeros: bool,
) -> Prepared:
    num_out, num_in = shape
    weight = random_weight(shape, bits, group_size, zeros, device)
    x_MK = fill((num_rows, num_in), dtype, device, num_rows)
    dense_NK = dequantize(weight, dtype)
    layer = (
        Int4Linear(weight, None, dtype=dtype, device=device)
        if place == "interpreter"
        else prepare_linear(weight, None, dtype=dtype, device=device)
    )

    # float64 of a slice of a large weight; every column tile and split is in it.
    step = max(1, num_out // 8192)
    chosen = torch.arange(0, num_out, step, device=device)
    reference_MN = x_MK.double() @ dequantize(_rows_of(weight, chosen)).double().t()

    def check() -> Any:
        # A CPU may run int4 in torch's kernel, which rounds scales to bfloat16 as well.
        torch_MN = F.linear(x_MK, dense_NK[chosen])
        return compare(layer(x_MK)[:, chosen], torch_MN, reference_MN)

    name = str(dtype).removeprefix("torch.")
    baselines: dict[str, Callable[[], Any]] = {f"torch {name}": lambda: F.linear(x_MK, dense_NK)}
    if place == "cpu":
        x32_MK, dense32_NK = x_MK.float(), dense_NK.float()
        baselines["torch float32"] = lambda: F.linear(x32_MK, dense32_NK)
    if place == "cuda" and bits == 4 and not zeros:
        baselines |= other_libraries(weight, dense_NK, x_MK)
    scale_bytes = 4 * num_out * num_in // group_size
    return Prepared(
        lambda: layer(x_MK),
        check,
        num_bytes=num_out * num_in * bits // 8 + scale_bytes + num_rows * (num_in + num_out) * dtype.itemsize,
        num_flops=2 * num_rows * num_out * num_in,
        baselines=baselines,
        facts={"computes": layer.describe()},
    )


def prepare_gated(
    place: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, int], num_rows: int
) -> Prepared:
    """gate-up with its activation, beside the layer without and silu_mul after it."""
    weight = random_weight(shape, 4, 128, False, device)
    x_MK = fill((num_rows, shape[1]), dtype, device, num_rows)
    silu_mul = silu_mul_triton if place == "interpreter" else backend.silu_mul

    def layer(gated: bool) -> backend.Linear:
        if place == "interpreter":
            return Int4Linear(weight, None, dtype=dtype, device=device, gated=gated)
        return prepare_linear(weight, None, dtype=dtype, device=device, gated=gated)

    plain, gated = layer(False), layer(True)
    reference = silu_mul_reference(F.linear(x_MK.double(), dequantize(weight).double()))
    in_torch = silu_mul_cpu(F.linear(x_MK, dequantize(weight, dtype)))
    return Prepared(
        lambda: gated(x_MK),
        lambda: compare(gated(x_MK), in_torch, reference),
        num_bytes=shape[0] * shape[1] // 2 + shape[0] * shape[1] // 32 + num_rows * (shape[1] + shape[0] // 2) * 2,
        num_flops=2 * num_rows * shape[0] * shape[1],
        baselines={"in two launches": lambda: silu_mul(plain(x_MK))},
        facts={"computes": gated.describe()},
    )


def _rows_of(weight: QuantizedWeight, rows: Tensor) -> QuantizedWeight:
    zero_NG = None if weight.zero_NG is None else weight.zero_NG[rows]
    return QuantizedWeight(weight.q_NK[rows], weight.scale_NG[rows], weight.group_size, zero_NG, weight.bits)


def other_libraries(weight: QuantizedWeight, dense_NK: Tensor, x_MK: Tensor) -> dict[str, Callable[[], Any]]:
    """Those that can be imported here; one that is there but does not take the weight shows as failed."""
    found: dict[str, Callable[[], Any]] = {}
    for name, build in (("gemlite", gemlite_product), ("torchao", torchao_product)):
        try:
            found[name] = build(weight, dense_NK, x_MK)
        except ImportError:
            continue
        except Exception as error:  # somebody else's code: shown as failed
            found[name] = _failing(error)
    return found


def _failing(error: Exception) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    return fail


def gemlite_product(weight: QuantizedWeight, dense_NK: Tensor, x_MK: Tensor) -> Callable[[], Any]:
    from gemlite.helper import A16W4_HQQ_INT  # type: ignore[import-not-found]

    scale_NG = weight.scale_NG.to(x_MK.dtype)
    zero_NG = torch.full_like(scale_NG, 8)
    layer = A16W4_HQQ_INT(device=str(x_MK.device), dtype=x_MK.dtype).from_weights(weight.q_NK, scale_NG, zero_NG)
    _must_agree("gemlite", layer(x_MK), F.linear(x_MK, dense_NK))
    return lambda: layer(x_MK)


def torchao_product(weight: QuantizedWeight, dense_NK: Tensor, x_MK: Tensor) -> Callable[[], Any]:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_  # type: ignore[import-not-found]

    num_out, num_in = weight.shape
    layer = torch.nn.Linear(num_in, num_out, bias=False, dtype=x_MK.dtype, device=x_MK.device)
    layer.weight.data.copy_(dense_NK)
    quantize_(layer, Int4WeightOnlyConfig(group_size=weight.group_size))
    with torch.no_grad():
        _must_agree("torchao", layer(x_MK), F.linear(x_MK, dense_NK), 0.2)  # it rounds the weight anew

    def run() -> Tensor:
        with torch.no_grad():
            return layer(x_MK)

    return run


def _must_agree(name: str, result: Tensor, expected: Tensor, limit: float = 0.05) -> None:
    """A baseline that computes something else is none."""
    off = float((result.float() - expected.float()).norm() / expected.float().norm())
    if not off <= limit:
        raise ValueError(f"{name} is off by {off:.3f} of the result's norm")
