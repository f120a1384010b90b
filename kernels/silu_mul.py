"""The gated activation of a SwiGLU feed-forward. Called through kernels.backend.

    y = round(g / (1 + exp(-g))) * u

Shazeer 2020; g and u are the halves of the fused gate-and-up output. silu is rounded to the dtype before the product,
as transformers does it.

Shape letters: T tokens of a step, F twice the width of the feed-forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.on_demand import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 1024


@triton_kernel
def _silu_mul_kernel(gate_up, y, stride_token, width, BLOCK: tl.constexpr):
    """One program per token and BLOCK columns. Reads F and writes F / 2 elements a token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = gate_up + token * stride_token + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * width + column, silu_times(gate, up, y.dtype.element_ty), mask=inside)


@triton_kernel
def silu_times(gate, up, dtype: tl.constexpr):
    """silu(gate) * up of float32 values that are dtype's, in dtype; also int4_linear's epilogue."""
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (activated * up).to(dtype)


def silu_mul_triton(gate_up_TF: Tensor) -> Tensor:
    """silu(first half) * second half, [T, F / 2]. F / 2 may be odd; rows may have any stride."""
    check_silu_mul(gate_up_TF)
    if gate_up_TF.stride(1) != 1:
        gate_up_TF = gate_up_TF.contiguous()
    num_tokens, width = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    y = torch.empty((num_tokens, width), dtype=gate_up_TF.dtype, device=gate_up_TF.device)
    if num_tokens:
        grid = (num_tokens, -(-width // BLOCK))
        _silu_mul_kernel[grid](gate_up_TF, y, gate_up_TF.stride(0), width, BLOCK=BLOCK, num_warps=4)
    return y


def check_silu_mul(gate_up_TF: Tensor) -> None:
    """Refuse what no version handles."""
    if gate_up_TF.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"silu_mul: input is {gate_up_TF.dtype}; it must be float32, float16 or bfloat16")
    if gate_up_TF.ndim != 2 or gate_up_TF.shape[1] < 2 or gate_up_TF.shape[1] % 2:
        raise ValueError(f"silu_mul: input is {tuple(gate_up_TF.shape)}; it must be [tokens, an even number]")


def silu_mul_cpu(gate_up_TF: Tensor) -> Tensor:
    """silu(first half) * second half, in torch."""
    check_silu_mul(gate_up_TF)
    gate, up = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def silu_mul_fixed_order_cpu(gate_up_TF: Tensor) -> Tensor:
    """The same, whose bits do not depend on where an element stands: torch's silu computes the last few elements of a
    thread's share, where they fill no vector, with another exponential than the others (float32: an ulp)."""
    check_silu_mul(gate_up_TF)
    gate, up = gate_up_TF.chunk(2, dim=-1)
    gate32 = gate.float()
    return (gate32 / gate32.neg().exp_().add_(1.0)).to(gate.dtype).mul_(up)


def silu_mul_reference(gate_up_TF: Tensor) -> Tensor:
    """The same in float64."""
    gate, up = gate_up_TF.double().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
