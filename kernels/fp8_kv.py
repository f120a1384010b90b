"""Keys and values in fp8: what their pages hold and how they are written.

    q[t, k, d] = e4m3(x / s),    s[t, k] = max_d |x[t, k, d]| / 448

e4m3 (OCP 8-bit floating point, 1.0) has 4 bits of exponent and 3 of mantissa, 448 is its largest number; rounded to
nearest even. One scale per token and head, as int8 has (kernels.quantized_kv), so a token's bytes depend on nothing but
itself. A number is off by at most x / 16, or by s / 1024 where that is more: small ones are more exact than in int8,
large ones less.

Bytes lie by slot and dimension. The attention kernel (kernels.paged_attention) converts them with the GPU's own
instruction, which compute capability 8.9 brought; earlier GPUs are refused. That gives float16, in which it multiplies
for bfloat16 queries too: values beyond 114000 then overflow to infinity. A CPU reads them into dense pages.

Shape letters as in kernels/attention_batch.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.kv_cache import check_kv_shapes
from kernels.on_demand import triton_kernel
from kernels.qkv import Norms, norm_rope_write_kv_triton
from kernels.quantized_kv import SMALLEST, Pages, QuantizedPages, new_plain_pages

if TYPE_CHECKING:
    import triton.language as tl

FP8 = torch.float8_e4m3fn
LARGEST = 448.0


def check_fp8_device(device: torch.device) -> None:
    """ValueError where a device has no instructions for e4m3."""
    if device.type != "cuda":
        return
    if torch.version.hip is not None:
        raise ValueError("fp8 pages: AMD GPUs have another e4m3, which is not supported; use int8, bf16 or auto")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise ValueError(
            f"fp8 pages: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor} and e4m3 needs "
            "8.9; use int8, which takes as few bytes, or bf16 or auto"
        )


def new_fp8_pages(
    num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, device: torch.device
) -> tuple[QuantizedPages, QuantizedPages]:
    """Allocate zeroed key and value pages of one layer, laid out as `new_kv_pages` does on this device."""
    check_fp8_device(device)
    return new_plain_pages(num_pages, num_kv_heads, page_size, head_dim, FP8, device)


def quantize_fp8(x_TKD: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [T, K, D] and float32 scales [T, K]. Where a head is not finite its scale is not, so that it stays seen."""
    x_TKD = x_TKD.float()
    largest_TK = x_TKD.abs().amax(-1)
    factor_TK = torch.where(largest_TK > SMALLEST, LARGEST / largest_TK, 0.0)
    q_TKD = (x_TKD * factor_TK.unsqueeze(-1)).nan_to_num_(0.0).clamp_(-LARGEST, LARGEST).to(FP8)
    # x * 0 is 0, or NaN where x is infinite or NaN.
    return q_TKD, largest_TK / LARGEST + (x_TKD * 0.0).sum(-1)


def write_fp8_kv_cpu(
    k_TKD: Tensor, v_TKD: Tensor, k_pages: QuantizedPages, v_pages: QuantizedPages, slots_T: Tensor
) -> None:
    """Quantise and write in place, in torch. Pages as new_fp8_pages lays them out on a CPU."""
    check_kv_shapes(k_TKD, v_TKD, k_pages.shape, v_pages.shape, slots_T)
    for x_TKD, pages in ((k_TKD, k_pages), (v_TKD, v_pages)):
        pages.write(*quantize_fp8(x_TKD), slots_T)


@triton_kernel
def _write_fp8_kernel(
    x,
    values,
    scales,
    slots,
    x_stride_token,
    x_stride_head,
    values_stride_page,
    values_stride_head,
    scales_stride_page,
    scales_stride_head,
    page_size,
    num_heads,
    head_dim,
    smallest,
    LARGEST: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token and HEADS heads. Reads each key (or value) once, writes its byte and its head's scale."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    head_inside = head < num_heads
    inside = head_inside[:, None] & (column < head_dim)[None, :]
    page, in_page = slot // page_size, slot % page_size
    at_x = x + token * x_stride_token + head[:, None] * x_stride_head + column[None, :]
    numbers = tl.load(at_x, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(numbers), axis=1)
    factor = tl.where(largest > smallest, LARGEST / tl.maximum(largest, smallest), 0.0)
    scaled = numbers * factor[:, None]
    # A head that is not finite shall be seen: its scale becomes NaN, and its bytes 0.
    scaled = tl.where(scaled == scaled, tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST), 0.0)
    scale = largest / LARGEST + tl.sum(numbers * 0.0, axis=1)
    at_values = values + page * values_stride_page + head[:, None] * values_stride_head + in_page * head_dim
    tl.store(at_values + column[None, :], scaled.to(values.dtype.element_ty), mask=inside)
    tl.store(scales + page * scales_stride_page + head * scales_stride_head + in_page, scale, mask=head_inside)


def write_fp8_kv_triton(
    k_TKD: Tensor, v_TKD: Tensor, k_pages: QuantizedPages, v_pages: QuantizedPages, slots_T: Tensor
) -> None:
    """Quantise and write in place; a slot of -1 writes nothing. Any head dimension, page size, number of heads and
    strides of pages and heads."""
    check_kv_shapes(k_TKD, v_TKD, k_pages.shape, v_pages.shape, slots_T)
    num_tokens, num_heads, head_dim = k_TKD.shape
    if not num_tokens:
        return
    block = 1 << (head_dim - 1).bit_length()
    heads = max(1, min(1 << (num_heads - 1).bit_length(), 1024 // block))
    for x_TKD, pages in ((k_TKD, k_pages), (v_TKD, v_pages)):
        _write_fp8_kernel[(num_tokens, -(-num_heads // heads))](
            x_TKD,
            pages.values,
            pages.scales_PKS,
            slots_T,
            x_TKD.stride(0),
            x_TKD.stride(1),
            pages.values.stride(0),
            pages.values.stride(1),
            pages.scales_PKS.stride(0),
            pages.scales_PKS.stride(1),
            pages.shape[2],
            num_heads,
            head_dim,
            SMALLEST,
            LARGEST=LARGEST,
            HEADS=heads,
            BLOCK=block,
            num_warps=4,
        )


def norm_rope_write_fp8_triton(
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
    """`norm_rope_write_kv_triton` into a dense page for each token, and from there into fp8 pages: three launches."""
    if not isinstance(k_pages, QuantizedPages) or not isinstance(v_pages, QuantizedPages) or v_pages.dtype != FP8:
        raise ValueError("norm_rope_write_kv: of k and v pages one is fp8 and one is not")
    num_tokens, head_dim = len(qkv_TMD), qkv_TMD.shape[2]
    shape = (num_tokens, k_pages.shape[1], 1, head_dim)
    k_TK1D, v_TK1D = (torch.empty(shape, dtype=qkv_TMD.dtype, device=qkv_TMD.device) for _ in range(2))
    places_T = torch.arange(num_tokens, device=qkv_TMD.device)
    q_TND = norm_rope_write_kv_triton(qkv_TMD, norms, eps, positions_T, cos_LR, sin_LR, k_TK1D, v_TK1D, places_T)
    write_fp8_kv_triton(k_TK1D.squeeze(2), v_TK1D.squeeze(2), k_pages, v_pages, slots_T)
    return q_TND
