"""The only chooser: each operation runs its Triton kernel on CUDA tensors and its CPU version on CPU tensors.

The floor above calls the functions of this file and no other kernel file's. Neither choice is a fallback: a device
that is neither of the two is refused. CUDA tensors must be on the current device. Triton, and the CPU's linear and
attention, are imported when first needed.

Shape letters as in kernels/attention_batch.py; F twice the feed-forward width, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.fp8_kv
import kernels.kv_cache
import kernels.qkv
import kernels.quantized_kv
import kernels.rms_norm
import kernels.rope
import kernels.sampling
import kernels.silu_mul
from kernels.attention_batch import AttentionBatch
from kernels.int4_linear import QuantizedWeight
from kernels.qkv import Norms
from kernels.quantized_kv import Pages, QuantizedPages
from kernels.sampling import SampleResult, SamplingBatch

CONVERTED = (torch.int8, kernels.fp8_kv.FP8, torch.bfloat16)
"""Of pages that a CPU converts to the activations' dtype."""


class Linear(Protocol):
    """A prepared linear layer: x [T, K] to y [T, N] in x's dtype."""

    def __call__(self, x_TK: Tensor, /) -> Tensor: ...

    def describe(self) -> str:
        """How the layer computes, for the run's summary."""
        ...


def is_cuda(operation: str, x: Tensor | torch.device) -> bool:
    """Whether the Triton version is meant; a device without a version is an error."""
    device = x.device if isinstance(x, Tensor) else x
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{operation}: no version for device {device}; use cpu or cuda")
    return device.type == "cuda"


def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Add x to the residual in place and return the RMS norm of the sum."""
    version = kernels.rms_norm
    add_norm = version.add_rms_norm_triton if is_cuda("add_rms_norm", x_TH) else version.add_rms_norm_cpu
    return add_norm(x_TH, residual_TH, weight_H, eps)


def embed_rms_norm(token_ids_T: Tensor, embedding_VH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The embedding's rows of the tokens, and their RMS norm; both new, [T, H]."""
    version = kernels.rms_norm
    embed_norm = (
        version.embed_rms_norm_triton if is_cuda("embed_rms_norm", embedding_VH) else version.embed_rms_norm_cpu
    )
    return embed_norm(token_ids_T, embedding_VH, weight_H, eps)


def silu_mul(gate_up_TF: Tensor, deterministic: bool = False) -> Tensor:
    """silu(first half) * second half, [T, F / 2]. deterministic: a row's bits do not depend on the others."""
    version = kernels.silu_mul
    if is_cuda("silu_mul", gate_up_TF):
        return version.silu_mul_triton(gate_up_TF)
    return (version.silu_mul_fixed_order_cpu if deterministic else version.silu_mul_cpu)(gate_up_TF)


def write_kv(k_TKD: Tensor, v_TKD: Tensor, k_pages_PKSD: Pages, v_pages_PKSD: Pages, slots_T: Tensor) -> None:
    """Write keys and values into slots of the pages, in place; slot = page * S + offset.

    Quantised pages, and bfloat16 ones, take keys and values of any dtype.
    """
    if isinstance(k_pages_PKSD, QuantizedPages) and isinstance(v_pages_PKSD, QuantizedPages):
        if k_pages_PKSD.dtype == kernels.fp8_kv.FP8:
            fp8 = kernels.fp8_kv
            write_fp8 = fp8.write_fp8_kv_triton if is_cuda("write_kv", k_TKD) else fp8.write_fp8_kv_cpu
            write_fp8(k_TKD, v_TKD, k_pages_PKSD, v_pages_PKSD, slots_T)
            return
        quantized = kernels.quantized_kv
        write_quantized = (
            quantized.write_quantized_kv_triton if is_cuda("write_kv", k_TKD) else quantized.write_quantized_kv_cpu
        )
        write_quantized(k_TKD, v_TKD, k_pages_PKSD, v_pages_PKSD, slots_T)
        return
    assert isinstance(k_pages_PKSD, Tensor) and isinstance(v_pages_PKSD, Tensor)
    version = kernels.kv_cache
    write = version.write_kv_triton if is_cuda("write_kv", k_TKD) else version.write_kv_cpu
    write(k_TKD, v_TKD, k_pages_PKSD, v_pages_PKSD, slots_T)


def norm_rope_write_kv(
    qkv_TMD: Tensor,
    norms: Norms | None,
    eps: float,
    positions_T: Tensor,
    cos_LR: Tensor,
    sin_LR: Tensor,
    k_pages: Pages,
    v_pages: Pages,
    slots_T: Tensor,
    cache: dict[Any, Any] | None = None,
) -> Tensor:
    """Norm (where a model does) and rotate the queries and keys of a fused projection, write keys and values into slots
    of the pages, and return the queries [T, N, D].

    qkv_TMD: N heads of queries, K of keys and K of values; overwritten, and the result may be a view of it. Of queries
    and keys the first 2R dimensions are rotated; the tables are float32, indexed by position. cache: of the step
    (`AttentionBatch.cache`), for what all layers look up alike; it must not outlive the positions.
    """
    if is_cuda("norm_rope_write_kv", qkv_TMD):
        is_fp8 = k_pages.dtype == kernels.fp8_kv.FP8
        write = kernels.fp8_kv.norm_rope_write_fp8_triton if is_fp8 else kernels.qkv.norm_rope_write_kv_triton
        return write(qkv_TMD, norms, eps, positions_T, cos_LR, sin_LR, k_pages, v_pages, slots_T)
    q_TND, k_TKD, v_TKD = kernels.qkv.split_heads(qkv_TMD, k_pages.shape[1])
    if norms is not None:
        norm = kernels.rms_norm.rms_norm_cpu
        q_TND, k_TKD = norm(q_TND, norms[0], eps), norm(k_TKD, norms[1], eps)
    kernels.rope.rope_cpu(q_TND, k_TKD, positions_T, cos_LR, sin_LR, cache)
    write_kv(k_TKD, v_TKD, k_pages, v_pages, slots_T)
    return q_TND


def check_fixed_order_attention(head_dim: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError where this device cannot give `paged_attention(..., deterministic=True)`."""
    if not is_cuda("check_fixed_order_attention", device):
        from kernels.fixed_order_attention import agreeing_row_tiles

        agreeing_row_tiles(head_dim, page_size, dtype, torch.get_num_threads())


def paged_attention(
    q_TND: Tensor,
    k_pages_PKSD: Pages,
    v_pages_PKSD: Pages,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    deterministic: bool = False,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Attention of each request's query tokens over its pages, [T, N, D]: causal, but for `batch.trees`.

    window: how many of the most recent tokens a query sees, itself included; None is all. deterministic: a token's
    bits depend on the token and its context alone, and on the page size; prefix groups are ignored. sinks_N: float32
    [N], a learned logit of each query head that joins the softmax's sum and has no value, as in gpt-oss (vLLM's name
    too); None is none.
    """
    if is_cuda("paged_attention", q_TND):
        from kernels.paged_attention import paged_attention_triton

        return paged_attention_triton(q_TND, k_pages_PKSD, v_pages_PKSD, batch, scale, window, deterministic, sinks_N)
    if deterministic:
        from kernels.fixed_order_attention import fixed_order_attention_cpu as attend
    else:
        from kernels.cpu_attention import paged_attention_cpu as attend

    if k_pages_PKSD.dtype != q_TND.dtype and k_pages_PKSD.dtype in CONVERTED:
        convert = kernels.quantized_kv.attend_converted
        return convert(attend, q_TND, k_pages_PKSD, v_pages_PKSD, batch, scale, window, sinks_N)
    assert isinstance(k_pages_PKSD, Tensor) and isinstance(v_pages_PKSD, Tensor)
    return attend(q_TND, k_pages_PKSD, v_pages_PKSD, batch, scale, window, sinks_N)


def prepare_linear(
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    compute: str = "auto",
    deterministic: bool = False,
    gated: bool = False,
) -> Linear:
    """Bring a weight [N, K] and bias [N] into the form in which this device multiplies fastest.

    dtype is that of the activations. compute names one of the CPU's ways; on CUDA it must be "auto". deterministic: a
    row's bits depend on the row and the weight alone; ValueError where this device cannot. gated: the weight is that of
    a gate and below it of an up projection, and the result silu_mul's of the product, [T, N / 2].
    """
    is_on_cuda = is_cuda("prepare_linear", device)
    if is_on_cuda and compute != "auto":
        raise ValueError(f"prepare_linear: compute={compute!r} is for a CPU; on {device} it must be 'auto'")
    if is_on_cuda and isinstance(weight, QuantizedWeight):
        from kernels.int4_linear import Int4Linear

        return Int4Linear(weight, bias, dtype=dtype, device=device, deterministic=deterministic, gated=gated)
    if gated:
        linear = prepare_linear(weight, bias, dtype=dtype, device=device, compute=compute, deterministic=deterministic)
        return Gated(linear, deterministic)
    if deterministic:
        from kernels.fixed_order_linear import prepare_fixed_order_linear

        return prepare_fixed_order_linear(weight, bias, dtype=dtype, device=device, compute=compute)
    if not is_on_cuda:
        from kernels.cpu_linear import prepare_cpu_linear

        return prepare_cpu_linear(weight, bias, dtype=dtype, compute=compute)
    assert isinstance(weight, Tensor)
    return DenseLinear(weight, bias, dtype, device)


class DenseLinear:
    """torch's own matrix product on an unquantised weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
        self.weight_NK = weight.to(device=device, dtype=dtype).contiguous()
        self.bias_N = None if bias is None else bias.to(device=device, dtype=dtype)

    def __call__(self, x_TK: Tensor) -> Tensor:
        return F.linear(x_TK, self.weight_NK, self.bias_N)

    def describe(self) -> str:
        return f"{str(self.weight_NK.dtype).removeprefix('torch.')} torch matmul"


class Gated:
    """A gate and an up projection in one linear layer, and silu_mul after it."""

    def __init__(self, linear: Linear, deterministic: bool) -> None:
        self.linear, self.deterministic = linear, deterministic

    def __call__(self, x_TK: Tensor) -> Tensor:
        return silu_mul(self.linear(x_TK), self.deterministic)

    def describe(self) -> str:
        return self.linear.describe()


def sample(logits_BV: Tensor, batch: SamplingBatch) -> SampleResult:
    """Choose one token per row of float32 logits, with keyed noise."""
    version = kernels.sampling
    return (version.sample_triton if is_cuda("sample", logits_BV) else version.sample_cpu)(logits_BV, batch)
