"""RMS norm, rotary embedding, SiLU product and KV writes: the CPU and the Triton versions against float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.attention_batch import new_kv_pages
from kernels.compare import compare
from kernels.kv_cache import write_kv_cpu, write_kv_triton
from kernels.rms_norm import (
    add_rms_norm_cpu,
    add_rms_norm_triton,
    embed_rms_norm_cpu,
    embed_rms_norm_triton,
    rms_norm_cpu,
    rms_norm_reference,
)
from kernels.rope import rope_cpu, rope_reference
from kernels.silu_mul import silu_mul_cpu, silu_mul_reference, silu_mul_triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = [pytest.mark.usefixtures("guarded"), pytest.mark.parametrize("dtype", DTYPES, ids=str)]


@pytest.fixture(params=["cpu", "triton"])
def version(request):
    """A function that picks the CPU's version or the kernel, and where its tensors go."""
    if request.param == "cpu":
        return lambda cpu, triton: (cpu, torch.device("cpu"))
    device = request.getfixturevalue("device")
    return lambda cpu, triton: (triton, device)


def randn(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def rms_norm_as_a_sum(x, weight, eps):
    """The kernel, which always adds, on a residual of zeros."""
    return add_rms_norm_triton(x, torch.zeros_like(x), weight, eps)


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (5, 100), (33, 7), (1, 4100)], ids=str)
def test_rms_norm_is_as_exact_as_torch(shape, dtype, version):
    rms_norm, device = version(rms_norm_cpu, rms_norm_as_a_sum)
    x, weight = randn(*shape, dtype=dtype, device=device), randn(shape[-1], dtype=dtype, device=device, seed=1)
    in_torch = F.rms_norm(x, shape[-1:], weight, 1e-5)
    report = compare(rms_norm(x, weight, 1e-5), in_torch, rms_norm_reference(x, weight, 1e-5))
    assert report.holds, report


def test_rms_norm_rounds_where_transformers_does(dtype, version):
    rms_norm, device = version(rms_norm_cpu, rms_norm_as_a_sum)
    x, weight = randn(40, 96, dtype=dtype, device=device), randn(96, dtype=dtype, device=device, seed=1)
    x64 = x.double()
    normed = (x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
    expected = normed * weight
    # The float64 norm may round the other way in a few places of a thousand, never in many.
    assert (rms_norm(x, weight, 1e-6) == expected).double().mean() > (0.995 if dtype != torch.float32 else 0.5)


def test_rms_norm_takes_heads_of_a_fused_projection(dtype):
    fused, weight = randn(5, 6, 12, dtype=dtype, device="cpu"), randn(12, dtype=dtype, device="cpu", seed=1)
    heads = fused[:, 1:4]
    in_torch = F.rms_norm(heads, (12,), weight, 1e-5)
    report = compare(rms_norm_cpu(heads, weight, 1e-5), in_torch, rms_norm_reference(heads, weight, 1e-5))
    assert report.holds, report


@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (9, 3)], ids=str)
def test_add_rms_norm_updates_the_residual_and_norms_the_sum(shape, dtype, version, new_between_guards):
    add_rms_norm, device = version(add_rms_norm_cpu, add_rms_norm_triton)
    x, weight = randn(*shape, dtype=dtype, device=device), randn(shape[-1], dtype=dtype, device=device, seed=1)
    before = randn(*shape, dtype=dtype, device=device, seed=2)
    residual = new_between_guards(shape, dtype, device).copy_(before)
    y = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, before + x)
    report = compare(y, rms_norm_cpu(residual, weight, 1e-5), rms_norm_reference(residual, weight, 1e-5))
    assert report.holds, report


@pytest.mark.parametrize("shape", [(1, 64), (5, 100), (9, 3), (2, 1100)], ids=str)
def test_embed_rms_norm_looks_rows_up_and_norms_them(shape, dtype, version):
    embed_rms_norm, device = version(embed_rms_norm_cpu, embed_rms_norm_triton)
    num_tokens, width = shape
    embedding = randn(11, width + 3, dtype=dtype, device=device)[:, :width]
    weight = randn(width, dtype=dtype, device=device, seed=1)
    token_ids = torch.tensor([10, 0, 7, 7, 3, 9, 1, 2, 8], device=device)[:num_tokens]
    residual, y = embed_rms_norm(token_ids, embedding, weight, 1e-5)
    assert torch.equal(residual, embedding[token_ids])
    rms_norm, _ = version(rms_norm_cpu, rms_norm_as_a_sum)
    assert torch.equal(y, rms_norm(residual, weight, 1e-5))
    report = compare(y, rms_norm_cpu(residual, weight, 1e-5), rms_norm_reference(residual, weight, 1e-5))
    assert report.holds, report
    assert all(x.shape == (0, width) for x in embed_rms_norm(token_ids[:0], embedding, weight, 1e-5))


def test_a_token_id_out_of_the_vocabulary_reads_nothing_and_is_seen(dtype, device):
    embedding, weight = randn(4, 6, dtype=dtype, device=device), randn(6, dtype=dtype, device=device)
    token_ids = torch.tensor([3, -1, 4, 1 << 40, 0], device=device)
    for x in embed_rms_norm_triton(token_ids, embedding, weight, 1e-5):
        assert x.isnan().all(-1).tolist() == [False, True, True, True, False]
        assert x[[0, 4]].isfinite().all()
    if device.type == "cpu":
        with pytest.raises(IndexError):
            embed_rms_norm_cpu(token_ids, embedding, weight, 1e-5)


ROPE_SHAPES = {  # tokens, query heads, key heads, head dimension, half of the rotary dimension
    "all of the head": (5, 4, 2, 16, 8),
    "odd half": (3, 3, 1, 10, 5),
    "a part of the head": (4, 2, 2, 16, 3),
    "head dimension 80": (2, 5, 5, 80, 40),
    "many heads": (2, 33, 1, 128, 64),
}


def rotate_in_torch(x, positions, cos, sin):
    """Each operation on its own, in float32."""
    half = cos.shape[1]
    c, s = cos[positions][:, None], sin[positions][:, None]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    return torch.cat((a * c - b * s, b * c + a * s, x[..., 2 * half :].float()), -1).to(x.dtype)


@pytest.mark.parametrize("name", ROPE_SHAPES)
def test_rope_rotates_in_place_as_exactly_as_torch(name, dtype):
    num_tokens, num_heads, num_kv_heads, head_dim, half = ROPE_SHAPES[name]
    fused = randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, device="cpu")
    angles = torch.outer(torch.arange(50.0), 100 ** -(torch.arange(half) / half))
    positions = torch.tensor([49, 0, 7, 7, 30])[:num_tokens]
    arguments = (positions, angles.cos(), angles.sin())
    rotated = fused.clone()
    q, k = rotated[:, :num_heads], rotated[:, num_heads : num_heads + num_kv_heads]
    rope_cpu(q, k, *arguments)
    assert torch.equal(rotated[:, num_heads + num_kv_heads :], fused[:, num_heads + num_kv_heads :])
    assert torch.equal(rotated[..., 2 * half :], fused[..., 2 * half :])
    for first, stop in ((0, num_heads), (num_heads, num_heads + num_kv_heads)):
        heads = fused[:, first:stop]
        reference = rope_reference(heads, *arguments)
        report = compare(rotated[:, first:stop], rotate_in_torch(heads, *arguments), reference)
        assert report.holds, report


@pytest.mark.parametrize("shape", [(1, 2), (3, 128), (5, 46), (2, 2100)], ids=str)
def test_silu_mul_is_as_exact_as_torch(shape, dtype, version):
    silu_mul, device = version(silu_mul_cpu, silu_mul_triton)
    wide = randn(shape[0], shape[1] + 6, dtype=dtype, device=device) * 4
    gate_up = wide[:, : shape[1]]
    gate, up = gate_up.chunk(2, -1)
    report = compare(silu_mul(gate_up), F.silu(gate) * up, silu_mul_reference(gate_up))
    assert report.holds, report


@pytest.mark.parametrize("heads, head_dim, page_size", [(2, 16, 4), (3, 10, 5), (1, 80, 1), (20, 64, 3)])
@pytest.mark.parametrize("layout", ["cpu", "gpu"])
def test_write_kv_writes_each_slot_and_nothing_else(heads, head_dim, page_size, layout, dtype, version):
    write_kv, device = version(write_kv_cpu, write_kv_triton)
    strides = new_kv_pages(9, heads, page_size, head_dim, dtype, torch.device("cpu" if layout == "cpu" else "meta"))
    k_pages, v_pages = (
        torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).fill_(math.nan) for x in strides
    )
    fused = randn(4, 2 * heads, head_dim, dtype=dtype, device=device)
    slots = torch.tensor([9 * page_size - 1, 0, 3 * page_size, 5 * page_size], device=device)
    write_kv(fused[:, :heads], fused[:, heads:], k_pages, v_pages, slots)
    for pages, written in ((k_pages, fused[:, :heads]), (v_pages, fused[:, heads:])):
        by_slot = pages.transpose(1, 2).flatten(0, 1)
        assert torch.equal(by_slot[slots], written)
        assert by_slot.isnan().any(-1).any(-1).sum() == 9 * page_size - len(slots)
