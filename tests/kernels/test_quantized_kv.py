"""int8 pages: what is written, that they behave as pages do, and both devices' attention over them against float64."""

import math

import pytest
import torch

import kernels.paged_attention as triton_file
import kernels.quantized_kv as file
from kernels import attention_plan, backend
from kernels.attention_batch import AttentionBatch, PrefixGroup, new_kv_pages
from kernels.compare import compare
from kernels.cpu_attention import paged_attention_cpu
from kernels.paged_attention import paged_attention_reference, paged_attention_triton
from kernels.quantized_kv import (
    QuantizedPages,
    new_quantized_pages,
    quantize,
    write_quantized_kv_cpu,
    write_quantized_kv_triton,
)

CPU = torch.device("cpu")
PAGE = 16


def make_kv(num_tokens, heads=2, head_dim=24, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(num_tokens, 3 * heads, head_dim, generator=generator)
    fused *= torch.logspace(-3, 3, num_tokens)[:, None, None]  # every token of another size
    fused = fused.to(dtype)
    return fused[:, :heads], fused[:, heads : 2 * heads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_is_off_by_at_most_half_a_127th_of_its_heads_largest(dtype):
    k, _ = make_kv(50, dtype=dtype)
    q, scale = quantize(k)
    largest = k.float().abs().amax(-1, keepdim=True)
    error = (q.float() * scale.unsqueeze(-1) - k.float()).abs()
    assert q.dtype == torch.int8 and scale.shape == (50, 2)
    assert bool((error <= largest / 254 * 1.001).all())
    assert int(q.abs().max()) == 127


def test_zeros_and_the_tiniest_numbers_become_zeros():
    q, scale = quantize(torch.tensor([[[0.0, 0.0]], [[1e-38, -1e-38]]]))
    assert bool((q == 0).all())
    assert bool(((q * scale.unsqueeze(-1)) == 0).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_head_that_is_not_finite_stays_seen(bad, device):
    k, v = make_kv(3, dtype=torch.float32)
    k = k.clone()
    k[1, 0, 3] = bad
    for write, place in ((write_quantized_kv_cpu, CPU), (write_quantized_kv_triton, device)):
        pages = new_quantized_pages(1, 2, PAGE, 24, place)
        write(k.to(place), v.to(place), *pages, torch.arange(3, device=place))
        dense = pages[0].dequantize()[0]
        assert bool(dense[0, 1].isnan().all())
        assert bool(dense[1].isfinite().all()) and bool(dense[0, [0, 2]].isfinite().all())


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 8), (5, 64), (3, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_writes_the_same_pages_as_torch(heads, head_dim, dtype, device):
    k, v = make_kv(13, heads, head_dim, dtype)
    slots = torch.randperm(5 * PAGE, generator=torch.Generator().manual_seed(1))[:13]
    wanted = new_quantized_pages(5, heads, PAGE, head_dim, CPU)
    write_quantized_kv_cpu(k, v, *wanted, slots)
    for layout in (CPU, torch.device("meta")):
        pages = tuple(
            QuantizedPages(
                torch.empty_strided(x.shape, x.values_PKSD.stride(), dtype=torch.int8, device=device).zero_(),
                torch.empty_strided(x.scales_PKS.shape, x.scales_PKS.stride(), device=device).zero_(),
            )
            for x in new_quantized_pages(5, heads, PAGE, head_dim, layout)
        )
        write_quantized_kv_triton(k.to(device), v.to(device), *pages, slots.to(device))
        for page, want in zip(pages, wanted):
            # Dividing in another order may move a number that is halfway: by one step, in few places.
            steps = (page.values_PKSD.cpu().int() - want.values_PKSD.int()).abs()
            assert int(steps.max()) <= 1 and float(steps.float().mean()) < 1e-2
            torch.testing.assert_close(page.scales_PKS.cpu(), want.scales_PKS, rtol=1e-6, atol=0.0)


def test_pages_do_not_depend_on_how_a_prompt_was_cut():
    k, v = make_kv(40)
    slots = torch.arange(40)
    whole, cut = new_quantized_pages(3, 2, PAGE, 24, CPU), new_quantized_pages(3, 2, PAGE, 24, CPU)
    write_quantized_kv_cpu(k, v, *whole, slots)
    for part in slots.split(7):
        write_quantized_kv_cpu(k[part], v[part], *cut, part)
    for one, other in zip(whole, cut):
        assert torch.equal(one.values_PKSD, other.values_PKSD)
        assert torch.equal(one.scales_PKS, other.scales_PKS)


def test_pages_are_copied_and_cleared_as_tensors_are():
    k, v = make_kv(2 * PAGE)
    pages, _ = both = new_quantized_pages(4, 2, PAGE, 24, CPU)
    write_quantized_kv_cpu(k, v, *both, torch.arange(2 * PAGE))
    before = pages.dequantize()
    pages[3, :, :5] = pages[1, :, :5]
    after = pages.dequantize()
    assert torch.equal(after[3, :, :5], before[1, :, :5])
    assert not after[3, :, 5:].any() and torch.equal(after[:3], before[:3])
    pages[[0, 3]] = 0
    assert not pages.dequantize()[[0, 3]].any()
    assert not pages.scales_PKS[[0, 3]].any()
    assert torch.equal(pages.dequantize()[1], before[1])
    with pytest.raises(ValueError, match="not to Tensor"):
        pages[0] = before[0]


# (query tokens, context) of each request; (first request, requests, shared pages) of a group
STEPS = {
    "decode": (((1, 1), (1, 17), (1, 40)), ()),
    "chunks and drafts": (((33, 33), (5, 40), (20, 75)), ()),
    "a group beside others": (((1, 9), (1, 40), (3, 35), (1, 37), (20, 20)), ((1, 3, 2),)),
}


def make_step(name, device, dtype, layout, head_dim=32, window=None):
    lengths, shared = STEPS[name]
    generator = torch.Generator().manual_seed(2)
    num_pages = sum(-(-context // PAGE) for _, context in lengths)
    order = torch.randperm(num_pages + 1, generator=generator).tolist()
    groups = [PrefixGroup(first, count, [order.pop() for _ in range(pages)]) for first, count, pages in shared]
    tables = []
    for request, (_, context) in enumerate(lengths):
        of_group = [g for g in groups if g.first_request <= request < g.first_request + g.num_requests]
        own = list(of_group[0].page_ids) if of_group else []
        tables.append([*own, *(order.pop() for _ in range(-(-context // PAGE) - len(own)))])
    pages = new_quantized_pages(num_pages + 1, 2, PAGE, head_dim, layout)
    slots = torch.arange((num_pages + 1) * PAGE)
    k, v = (torch.randn(len(slots), 2, head_dim, generator=generator) for _ in range(2))
    if layout.type == "cpu":
        write_quantized_kv_cpu(k, v, *pages, slots)
    else:
        write_quantized_kv_triton(k.to(device), v.to(device), *pages, slots.to(device))
    num_tokens = sum(queries for queries, _ in lengths)
    q = torch.randn(num_tokens, 4, head_dim, generator=generator).to(device, dtype)
    batch = AttentionBatch([n for n, _ in lengths], [n for _, n in lengths], tables, PAGE, groups)
    return q, *pages, batch, head_dim**-0.5, window


def assert_in_budget(result, q, k_pages, v_pages, batch, scale, window, rounded):
    exact = (k_pages.dequantize(), v_pages.dequantize())
    dense = [x.to(q.dtype) for x in exact]
    reference = paged_attention_reference(q, *(dense if rounded else exact), batch, scale, window)
    in_dtype = paged_attention_reference(q, *dense, batch, scale, window, dtype=q.dtype)
    report = compare(result.flatten(1), in_dtype.flatten(1), reference.flatten(1))
    assert report.holds, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("name", STEPS)
def test_triton_attends_to_what_the_bytes_stand_for(name, window, dtype, device, monkeypatch, guarded):
    monkeypatch.setattr(attention_plan, "SMALL_SPLIT", 32)
    monkeypatch.setattr(attention_plan, "LARGE_SPLIT", 64)
    monkeypatch.setattr(triton_file, "KEYS_PER_TILE", 16)
    step = make_step(name, device, dtype, device, window=window)
    assert_in_budget(paged_attention_triton(*step), *step, rounded=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("max_pages", [1, 5, 1000])
@pytest.mark.parametrize("name", STEPS)
def test_a_cpu_attends_to_what_the_bytes_stand_for(name, max_pages, window, dtype, monkeypatch):
    monkeypatch.setattr(file, "DENSE_BYTES", max_pages * 2 * PAGE * 32 * dtype.itemsize)
    step = make_step(name, CPU, dtype, CPU, window=window)
    assert_in_budget(backend.paged_attention(*step), *step, rounded=True)
    pieces = step[3].cache["converted_pages"]
    assert len(pieces) == {1: len(step[3].query_lens), 1000: 1}.get(max_pages, len(pieces))


def test_pages_in_bfloat16_serve_float32_activations(device, monkeypatch):
    q, k_pages, v_pages, batch, scale, window = make_step("a group beside others", CPU, torch.float32, CPU)
    pages = [
        x.dequantize().transpose(0, 1).contiguous().transpose(0, 1).bfloat16().to(device) for x in (k_pages, v_pages)
    ]
    wanted = paged_attention_cpu(q, *(x.cpu().float() for x in pages), batch, scale, window)
    batch.cache.clear()
    torch.testing.assert_close(backend.paged_attention(q, *(x.cpu() for x in pages), batch, scale), wanted)
    batch.cache.clear()
    torch.testing.assert_close(paged_attention_triton(q.to(device), *pages, batch, scale).cpu(), wanted)
    k = torch.randn(2, 2, 32)
    written = new_kv_pages(1, 2, PAGE, 32, torch.bfloat16, CPU)
    backend.write_kv(k, k, *written, torch.tensor([3, 4]))
    assert torch.equal(written[0][0, :, 3:5].transpose(0, 1), k.bfloat16())


def test_what_does_not_belong_together_is_refused(device):
    k, v = make_kv(3)
    k_pages, v_pages = new_quantized_pages(2, 2, PAGE, 24, CPU)
    with pytest.raises(ValueError, match="slots are"):
        write_quantized_kv_cpu(k, v, k_pages, v_pages, torch.arange(2))
    with pytest.raises(ValueError, match=r"must be \[pages, 2, slots, 24\]"):
        write_quantized_kv_cpu(k, v, *new_quantized_pages(2, 1, PAGE, 24, CPU), torch.arange(3))
    with pytest.raises(ValueError, match="one shape"):
        write_quantized_kv_cpu(k, v[:2], k_pages, v_pages, torch.arange(3))
    with pytest.raises(ValueError, match="float16"):
        batch = AttentionBatch([1], [3], [[0]], PAGE)
        half = [torch.zeros(2, 2, PAGE, 24, dtype=torch.float16, device=device) for _ in range(2)]
        paged_attention_triton(torch.zeros(1, 2, 24, device=device), *half, batch, 1.0)
