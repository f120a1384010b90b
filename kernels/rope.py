"""Rotary position embedding on a CPU, in place on queries and keys; on a GPU it is a part of kernels/qkv.py's kernel.

    (a, b) -> (a cos - b sin, b cos + a sin)

Su et al. 2021, in GPT-NeoX's halves: a = x[:R], b = x[R:2R]; x[2R:] stays as it is (partial rotary). The tables are
indexed by position, so a model's scaling (linear, dynamic, YaRN, Llama 3, LongRoPE) is wholly in them.

Called by kernels.backend. Shape letters as in kernels/attention_batch.py; L positions of the tables, R their width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_rope(q_TND: Tensor, k_TKD: Tensor, positions_T: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> None:
    """Refuse what does not belong together. Positions are not read: they must lie in [0, L)."""
    num_tokens, _, head_dim = q_TND.shape
    if k_TKD.shape[0] != num_tokens or k_TKD.shape[2] != head_dim or k_TKD.dtype != q_TND.dtype:
        raise ValueError(
            f"rope: q is {q_TND.dtype} {tuple(q_TND.shape)} and k {k_TKD.dtype} {tuple(k_TKD.shape)}; "
            "tokens, head dimension and dtype must be the same"
        )
    if q_TND.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"rope: q is {q_TND.dtype}; it must be float32, float16 or bfloat16")
    if q_TND.stride(2) != 1 or k_TKD.stride(2) != 1:
        raise ValueError("rope: the head dimension of q and k must be contiguous, as they are written in place")
    if positions_T.shape != (num_tokens,) or positions_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"rope: positions are {positions_T.dtype} {tuple(positions_T.shape)}; they must be int64 [{num_tokens}]"
        )
    tables_alike = cos_LR.shape == sin_LR.shape and cos_LR.stride() == sin_LR.stride()
    if cos_LR.dtype != torch.float32 or sin_LR.dtype != torch.float32 or not tables_alike:
        raise ValueError(
            f"rope: tables are {cos_LR.dtype} {tuple(cos_LR.shape)} and {sin_LR.dtype} {tuple(sin_LR.shape)}; "
            "both must be float32 [positions, rotary_dim / 2] of the same strides"
        )
    if not 1 <= cos_LR.shape[1] <= head_dim // 2:
        raise ValueError(
            f"rope: tables are {cos_LR.shape[1]} wide; a head dimension of {head_dim} allows 1 to {head_dim // 2}"
        )
    devices = {x.device for x in (q_TND, k_TKD, positions_T, cos_LR, sin_LR)}
    if len(devices) > 1:
        raise ValueError(f"rope: inputs are on {sorted(map(str, devices))}; they must be on one device")


def rope_cpu(
    q_TND: Tensor,
    k_TKD: Tensor,
    positions_T: Tensor,
    cos_LR: Tensor,
    sin_LR: Tensor,
    cache: dict[Any, Any] | None = None,
) -> None:
    """Rotate q and k in place, in torch. `cache` keeps the tables' rows for the next layer of the same step."""
    check_rope(q_TND, k_TKD, positions_T, cos_LR, sin_LR)
    rows = None if cache is None else cache.get("rope_cpu")
    if rows is None:
        cos_TR, sin_TR = cos_LR[positions_T], sin_LR[positions_T]
        rows = cos_TR[:, None, None], torch.stack((-sin_TR, sin_TR), 1)[:, None]
        if cache is not None:
            cache["rope_cpu"] = rows
    cos_T11R, sin_T12R = rows
    half = cos_LR.shape[1]
    for x in _side_by_side(q_TND, k_TKD):
        x_TN2R = x[..., : 2 * half].unflatten(-1, (2, half))
        x32_TN2R = x_TN2R.float()
        x_TN2R.copy_((x32_TN2R * cos_T11R).addcmul_(x32_TN2R.flip(2), sin_T12R))


def _side_by_side(q_TND: Tensor, k_TKD: Tensor) -> tuple[Tensor, ...]:
    """q and k as one tensor where they are neighbours in a fused projection: half as many operations."""
    num_heads, head_dim = q_TND.shape[1:]
    is_fused = (
        q_TND.untyped_storage().data_ptr() == k_TKD.untyped_storage().data_ptr()
        and q_TND.stride() == k_TKD.stride()
        and k_TKD.storage_offset() == q_TND.storage_offset() + num_heads * q_TND.stride(1)
    )
    if not is_fused:
        return q_TND, k_TKD
    return (q_TND.as_strided((len(q_TND), num_heads + k_TKD.shape[1], head_dim), q_TND.stride()),)


def rope_reference(x_THD: Tensor, positions_T: Tensor, cos_LR: Tensor, sin_LR: Tensor) -> Tensor:
    """q or k rotated, as a new float64 tensor."""
    half = cos_LR.shape[1]
    cos, sin = cos_LR.double()[positions_T].unsqueeze(1), sin_LR.double()[positions_T].unsqueeze(1)
    y_THD = x_THD.double().clone()
    a, b = y_THD[..., :half].clone(), y_THD[..., half : 2 * half].clone()
    y_THD[..., :half] = a * cos - b * sin
    y_THD[..., half : 2 * half] = b * cos + a * sin
    return y_THD
