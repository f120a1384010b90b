"""RMS norm, with the residual sum or the embedding's lookup before it. Called through kernels.backend.

    y = w * round(x / sqrt(mean(x^2) + eps))

Zhang and Sennrich 2019, with the rounding of transformers' LlamaRMSNorm: x is normalised in float32 and rounded to its
own dtype before the weight multiplies it. A row's result does not depend on the other rows.

Shape letters: T tokens, H the normalised dimension, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.on_demand import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

MAX_WIDTH = 65536
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton_kernel
def _add_rms_norm_kernel(
    x,
    residual,
    weight,
    y,
    num_rows,
    x_stride,
    residual_stride,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows per program. Moves x, the weight and y once, the residual twice."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < num_rows) & (column[None, :] < width)
    row = row.to(tl.int64)[:, None]
    values = tl.load(x + row * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    at = residual + row * residual_stride + column[None, :]
    values += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    rounded = values.to(residual.dtype.element_ty)
    tl.store(at, rounded, mask=inside)
    out = _normed(rounded.to(tl.float32), weight, column, width, eps, y.dtype.element_ty)
    tl.store(y + row * width + column[None, :], out, mask=inside)


@triton_kernel
def _normed(values, weight, column, width, eps, dtype: tl.constexpr):
    """Of float32 rows, zero beyond their width, in dtype."""
    inverse = 1.0 / tl.sqrt_rn(tl.sum(values * values, axis=1) / width + eps)
    normed = (values * inverse[:, None]).to(dtype).to(tl.float32)
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    return (normed * scale[None, :]).to(dtype)


@triton_kernel
def _embed_rms_norm_kernel(
    token_ids,
    embedding,
    weight,
    residual,
    y,
    num_rows,
    vocab_size,
    embedding_stride,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS tokens per program. Reads their rows of the embedding and the weight once, writes residual and y once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < num_rows) & (column[None, :] < width)
    token_id = tl.load(token_ids + row, mask=row < num_rows, other=0).to(tl.int64)
    is_known = (token_id >= 0) & (token_id < vocab_size)
    at = embedding + token_id[:, None] * embedding_stride + column[None, :]
    found = tl.load(at, mask=inside & is_known[:, None], other=0.0)
    values = tl.where(inside & (is_known[:, None] == 0), float("nan"), found.to(tl.float32))
    at_out = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(residual + at_out, values.to(residual.dtype.element_ty), mask=inside)
    tl.store(y + at_out, _normed(values, weight, column, width, eps, y.dtype.element_ty), mask=inside)


def add_rms_norm_triton(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Add x to the residual in place and return the norm of the sum. Rows may have any stride; up to 65536 columns."""
    check_rms_norm(x_TH, weight_H)
    check_residual(x_TH, residual_TH)
    if x_TH.stride(-1) != 1:
        x_TH = x_TH.contiguous()
    y_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    num_tokens, width = x_TH.shape
    if num_tokens:
        block, rows, num_warps = _tile(width)
        _add_rms_norm_kernel[(-(-num_tokens // rows),)](
            x_TH,
            residual_TH,
            weight_H,
            y_TH,
            num_tokens,
            x_TH.stride(0),
            residual_TH.stride(0),
            width,
            eps,
            ROWS=rows,
            BLOCK=block,
            num_warps=num_warps,
        )
    return y_TH


def embed_rms_norm_triton(
    token_ids_T: Tensor, embedding_VH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The embedding's rows of the tokens, and their norm, both new [T, H]. The rows may have any stride.

    A token id that is none of the vocabulary gives NaN.
    """
    check_embed_rms_norm(token_ids_T, embedding_VH, weight_H)
    num_tokens, width = len(token_ids_T), embedding_VH.shape[1]
    residual_TH = torch.empty((num_tokens, width), dtype=embedding_VH.dtype, device=embedding_VH.device)
    y_TH = torch.empty((num_tokens, width), dtype=embedding_VH.dtype, device=embedding_VH.device)
    if num_tokens:
        block, rows, num_warps = _tile(width)
        _embed_rms_norm_kernel[(-(-num_tokens // rows),)](
            token_ids_T.contiguous(),
            embedding_VH,
            weight_H,
            residual_TH,
            y_TH,
            num_tokens,
            len(embedding_VH),
            embedding_VH.stride(0),
            width,
            eps,
            ROWS=rows,
            BLOCK=block,
            num_warps=num_warps,
        )
    return residual_TH, y_TH


def _tile(width: int) -> tuple[int, int, int]:
    """Columns, rows and warps of a program."""
    block = 1 << (width - 1).bit_length()
    return block, max(1, 1024 // block), min(max(block // 512, 4), 32)


def check_rms_norm(x: Tensor, weight: Tensor) -> None:
    """Refuse what no version of the norm handles."""
    if x.dtype not in DTYPES:
        raise ValueError(f"rms_norm: x is {x.dtype}; it must be float32, float16 or bfloat16")
    if weight.dtype != x.dtype:
        raise ValueError(f"rms_norm: weight is {weight.dtype} and x is {x.dtype}; cast the weight at load")
    if weight.device != x.device:
        raise ValueError(f"rms_norm: weight is on {weight.device} and x on {x.device}; move one of them")
    if weight.ndim != 1 or x.ndim < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"rms_norm: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}; it must be [last dim]"
        )
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"rms_norm: last dimension is {x.shape[-1]}; it must be 1 to {MAX_WIDTH}")


def check_residual(x_TH: Tensor, residual_TH: Tensor) -> None:
    """Refuse a residual that is not x's twin."""
    alike = residual_TH.shape == x_TH.shape and residual_TH.dtype == x_TH.dtype
    if not alike or residual_TH.device != x_TH.device or x_TH.ndim != 2:
        raise ValueError(
            f"add_rms_norm: residual is {residual_TH.dtype} {tuple(residual_TH.shape)} on {residual_TH.device} "
            f"and x {x_TH.dtype} {tuple(x_TH.shape)} on {x_TH.device}; both must be alike and [tokens, hidden]"
        )
    if residual_TH.stride(1) != 1:
        raise ValueError(f"add_rms_norm: residual has strides {residual_TH.stride()}; its last dim must be contiguous")


def check_embed_rms_norm(token_ids_T: Tensor, embedding_VH: Tensor, weight_H: Tensor) -> None:
    """Refuse what does not belong together. Token ids are not read."""
    check_rms_norm(embedding_VH, weight_H)
    if embedding_VH.ndim != 2 or embedding_VH.stride(1) != 1:
        raise ValueError(
            f"embed_rms_norm: the embedding is {tuple(embedding_VH.shape)} of strides {embedding_VH.stride()}; "
            "it must be [vocabulary, hidden] with contiguous rows"
        )
    if token_ids_T.ndim != 1 or token_ids_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"embed_rms_norm: token ids are {token_ids_T.dtype} {tuple(token_ids_T.shape)}; they must be int64 [tokens]"
        )
    if token_ids_T.device != embedding_VH.device:
        raise ValueError(
            f"embed_rms_norm: token ids are on {token_ids_T.device} and the embedding on {embedding_VH.device}"
        )


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm over the last dimension, in torch."""
    check_rms_norm(x, weight)
    x32 = x.float()
    inverse = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x32 * inverse).to(x.dtype).mul_(weight)


def add_rms_norm_cpu(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Add x to the residual in place and return the norm of the sum, in torch."""
    check_residual(x_TH, residual_TH)
    residual_TH += x_TH
    return rms_norm_cpu(residual_TH, weight_H, eps)


def embed_rms_norm_cpu(
    token_ids_T: Tensor, embedding_VH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The embedding's rows of the tokens, and their norm, in torch; IndexError for an id out of the vocabulary."""
    check_embed_rms_norm(token_ids_T, embedding_VH, weight_H)
    residual_TH = F.embedding(token_ids_T, embedding_VH)
    return residual_TH, rms_norm_cpu(residual_TH, weight_H, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm in float64, without rounding."""
    x64 = x.double()
    return x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + eps) * weight.double()
