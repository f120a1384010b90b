"""From a step's fused projection to what attention reads: norms, rotation, and the new keys' and values' pages.

    q, k = rope(norm(q)), rope(norm(k));    pages[slot // S, :, slot % S] = k, v

In one launch, which reads the projection once. The norm is left out where a model has none. Results are rounded, and
quantised, where kernels.rms_norm, kernels.rope and kernels.kv_cache or kernels.quantized_kv one after the other do it.

Shape letters as in kernels/attention_batch.py; M = N + 2K heads of the projection, L positions of the tables, R their
width. Called through kernels.backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

import kernels.qkv_kernels as kernels_of_qkv
from kernels.kv_cache import check_kv_shapes, check_write_kv
from kernels.quantized_kv import SMALLEST, Pages, QuantizedPages, check_pairs
from kernels.rms_norm import check_rms_norm, rms_norm_reference
from kernels.rope import check_rope, rope_reference

Norms = tuple[Tensor, Tensor]
"""The weights [D] of a model's norms of queries and of keys."""


def norm_rope_write_kv_triton(
    qkv_TMD: Tensor,
    norms: Norms | None,
    eps: float,
    positions_T: Tensor,
    cos_LR: Tensor,
    sin_LR: Tensor,
    k_pages: Pages,
    v_pages: Pages,
    slots_T: Tensor,
) -> Tensor:
    """Norm and rotate q in place and return it, [T, N, D]; norm and rotate k and write k and v to slots of the pages.

    What is left in the places of k and v is undefined. A slot of -1 writes nothing. Any D, R up to D / 2, number of
    heads and page size; tokens and heads may have any stride. Pages of any strides, dense or of int8 in pairs.
    """
    q_TND, k_TKD, v_TKD = split_heads(qkv_TMD, k_pages.shape[1])
    check_rope(q_TND, k_TKD, positions_T, cos_LR, sin_LR)
    k_scales, v_scales = check_pages(k_TKD, v_TKD, k_pages, v_pages, slots_T) or (cos_LR, cos_LR)
    k_memory, v_memory = page_memory(k_pages), page_memory(v_pages)
    q_norm, k_norm = norms or (qkv_TMD, qkv_TMD)
    for weight in norms or ():
        check_rms_norm(q_TND, weight)
    num_tokens, num_q_heads, head_dim = q_TND.shape
    num_kv_heads, half = k_TKD.shape[1], cos_LR.shape[1]
    if not num_tokens:
        return q_TND
    block = _power_of_two(head_dim)
    heads = max(1, min(_power_of_two(max(num_q_heads, num_kv_heads)), 1024 // block))
    num_q_blocks, num_kv_blocks = -(-num_q_heads // heads), -(-num_kv_heads // heads)
    kernels_of_qkv.norm_rope_write_kernel[(num_tokens, num_q_blocks + 2 * num_kv_blocks)](
        qkv_TMD,
        q_norm,
        k_norm,
        positions_T,
        cos_LR,
        sin_LR,
        k_memory,
        v_memory,
        k_scales,
        v_scales,
        slots_T,
        qkv_TMD.stride(0),
        qkv_TMD.stride(1),
        cos_LR.stride(0),
        k_memory.stride(0),
        k_memory.stride(1),
        v_memory.stride(0),
        v_memory.stride(1),
        k_scales.stride(0),
        k_scales.stride(1),
        k_pages.shape[2],
        num_q_heads,
        num_kv_heads,
        head_dim,
        half,
        eps,
        SMALLEST,
        HAS_NORM=norms is not None,
        QUANTIZED=isinstance(k_pages, QuantizedPages),
        NUM_Q_BLOCKS=num_q_blocks,
        NUM_KV_BLOCKS=num_kv_blocks,
        HEADS=heads,
        BLOCK=block,
        HALF=_power_of_two(half),
        REST=_power_of_two(head_dim - 2 * half) if head_dim > 2 * half else 0,
        num_warps=4,
    )
    return q_TND


def check_pages(
    k_TKD: Tensor, v_TKD: Tensor, k_pages: Pages, v_pages: Pages, slots_T: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Refuse what does not belong together; the scales of pages that have some."""
    if isinstance(k_pages, Tensor) and isinstance(v_pages, Tensor):
        check_write_kv(k_TKD, v_TKD, k_pages, v_pages, slots_T)
        return None
    if isinstance(k_pages, Tensor) or isinstance(v_pages, Tensor):
        raise ValueError("norm_rope_write_kv: of k and v pages one is quantised and one is not")
    check_kv_shapes(k_TKD, v_TKD, k_pages.shape, v_pages.shape, slots_T)
    check_pairs(k_pages, v_pages)
    scales = k_pages.scales_PKS, v_pages.scales_PKS
    strides = [scale_PKS.stride() for scale_PKS in scales]
    if strides[0] != strides[1] or strides[0][2] != 1:
        raise ValueError(f"norm_rope_write_kv: scales have strides {strides}; they must be the same, the last one 1")
    devices = {x.device for x in (k_TKD, k_pages.values, v_pages.values, *scales, slots_T)}
    if len(devices) > 1:
        raise ValueError(f"norm_rope_write_kv: inputs are on {sorted(map(str, devices))}; they must be on one device")
    return scales


def page_memory(pages: Pages) -> Tensor:
    """What a kernel writes to, as numbers or as bytes."""
    return pages if isinstance(pages, Tensor) else pages.values.view(torch.uint8)


def _power_of_two(number: int) -> int:
    """The smallest that is at least `number`."""
    return 1 << (number - 1).bit_length()


def split_heads(qkv_TMD: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the queries [T, N, D], keys and values [T, K, D] of a fused projection; ValueError if it is none."""
    if qkv_TMD.ndim != 3 or qkv_TMD.shape[1] <= 2 * num_kv_heads:
        raise ValueError(
            f"norm_rope_write_kv: qkv is {tuple(qkv_TMD.shape)}; it must be [tokens, heads of q and "
            f"{num_kv_heads} each of k and v, head dimension]"
        )
    num_q_heads = qkv_TMD.shape[1] - 2 * num_kv_heads
    return qkv_TMD[:, :num_q_heads], qkv_TMD[:, num_q_heads:-num_kv_heads], qkv_TMD[:, -num_kv_heads:]


def norm_rope_reference(
    qkv_TMD: Tensor, num_kv_heads: int, norms: Norms | None, eps: float, positions_T: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as they come out, in float64 and not rounded."""
    q_TND, k_TKD, v_TKD = split_heads(qkv_TMD.double(), num_kv_heads)
    if norms is not None:
        q_TND, k_TKD = rms_norm_reference(q_TND, norms[0], eps), rms_norm_reference(k_TKD, norms[1], eps)
    return rope_reference(q_TND, positions_T, cos, sin), rope_reference(k_TKD, positions_T, cos, sin), v_TKD
