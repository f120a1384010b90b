"""Keys and values in fp8: bytes, scales and attention over them, against the exact numbers and float64.

In Triton's interpreter conversions to and from e4m3 are torch's (tests/support/interpreted_triton.py); that those of a
GPU's instructions are the same shows only on one.
"""

import math

import pytest
import torch

import kernels.paged_attention as triton_file
from kernels import attention_plan, backend
from kernels.attention_batch import AttentionBatch, PrefixGroup
from kernels.compare import compare
from kernels.draft_tree import tree_mask
from kernels.fp8_kv import (
    FP8,
    LARGEST,
    check_fp8_device,
    new_fp8_pages,
    norm_rope_write_fp8_triton,
    quantize_fp8,
    write_fp8_kv_cpu,
    write_fp8_kv_triton,
)
from kernels.paged_attention import paged_attention_reference, paged_attention_triton
from kernels.quantized_kv import QuantizedPages, clear_slots, copy_slots, new_quantized_pages

CPU = torch.device("cpu")
PAGE = 16


def make_kv(num_tokens, heads=2, head_dim=24, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(num_tokens, 3 * heads, head_dim, generator=generator)
    fused *= torch.logspace(-3, 3, num_tokens)[:, None, None]  # every token of another size
    fused = fused.to(dtype)
    return fused[:, :heads], fused[:, heads : 2 * heads]


def new_pages(num_pages, heads, head_dim, device, layout=CPU):
    """Pages on any device, in the memory layout that they have on `layout`'s kind of device."""
    return [
        QuantizedPages(
            torch.empty_strided(x.values.shape, x.values.stride(), dtype=torch.uint8, device=device).zero_().view(FP8),
            torch.empty_strided(x.scales_PKS.shape, x.scales_PKS.stride(), device=device).zero_(),
        )
        for x in new_fp8_pages(num_pages, heads, PAGE, head_dim, layout)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_is_off_by_at_most_a_sixteenth_of_it(dtype):
    k, _ = make_kv(50, dtype=dtype)
    q, scale = quantize_fp8(k)
    assert q.dtype == FP8 and scale.shape == (50, 2)
    error = (q.float() * scale.unsqueeze(-1) - k.float()).abs()
    allowed = torch.maximum(k.float().abs() / 16, scale.unsqueeze(-1) / 1024)
    assert bool((error <= allowed * 1.001).all())
    assert float(q.float().abs().amax(-1).min()) == LARGEST


def test_zeros_and_the_tiniest_numbers_become_zeros():
    q, scale = quantize_fp8(torch.tensor([[[0.0, 0.0]], [[1e-38, -1e-38]]]))
    assert not (q.float() * scale.unsqueeze(-1)).any()


@pytest.mark.parametrize("layout", [CPU, torch.device("meta")], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 8), (5, 64), (3, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_writes_the_same_bytes_as_torch(heads, head_dim, dtype, layout, device):
    k, v = make_kv(13, heads, head_dim, dtype)
    slots = torch.randperm(5 * PAGE, generator=torch.Generator().manual_seed(1))[:13]
    wanted = new_fp8_pages(5, heads, PAGE, head_dim, CPU)
    write_fp8_kv_cpu(k, v, *wanted, slots)
    pages = new_pages(5, heads, head_dim, device, layout)
    backward = slots.to(device).clone()
    write_fp8_kv_triton(k.to(device), v.to(device), *pages, backward)
    write_fp8_kv_triton(k.to(device) + 1, v.to(device), *pages, torch.full_like(backward, -1))  # nothing
    for page, want in zip(pages, wanted):
        # Dividing in another order may move a number that is halfway: to the next one, in few places.
        found, expected = (x.values.cpu().view(torch.uint8).int() for x in (page, want))
        assert int((found - expected).abs().max()) <= 1 and float((found != expected).float().mean()) < 1e-2
        torch.testing.assert_close(page.scales_PKS.cpu(), want.scales_PKS, rtol=1e-6, atol=0.0)


def test_the_fused_way_writes_what_the_cpu_does(device):
    generator = torch.Generator().manual_seed(3)
    qkv, norms = torch.randn(5, 8, 24, generator=generator), torch.randn(2, 24, generator=generator)
    cos, sin = torch.randn(2, 9, 12, generator=generator)
    positions, slots = torch.tensor([3, 0, 8, 5, 5]), torch.tensor([7, 30, 2, 9, 16])
    wanted, found = new_pages(2, 2, 24, CPU), new_pages(2, 2, 24, device)
    wanted_q = backend.norm_rope_write_kv(qkv.clone(), (norms[0], norms[1]), 1e-5, positions, cos, sin, *wanted, slots)
    moved = [x.to(device) for x in (positions, cos, sin)]
    on_device = norms.to(device)
    q = norm_rope_write_fp8_triton(qkv.to(device), (on_device[0], on_device[1]), 1e-5, *moved, *found, slots.to(device))
    torch.testing.assert_close(q.cpu(), wanted_q, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="one is fp8 and one is not"):
        norm_rope_write_fp8_triton(qkv, None, 1e-5, positions, cos, sin, found[0], qkv, slots)
    for page, want in zip(found, wanted):
        assert page.scales_PKS.count_nonzero() == 2 * 5
        # Where rounding before moved a number that is halfway, it is off by a step.
        torch.testing.assert_close(page.dequantize().cpu(), want.dequantize(), atol=1e-3, rtol=0.13)
        assert float((page.values.cpu().float() != want.values.float()).float().mean()) < 1e-2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_head_that_is_not_finite_stays_seen(bad, device):
    k, v = make_kv(3)
    k = k.clone()
    k[1, 0, 3] = bad
    for write, place in ((write_fp8_kv_cpu, CPU), (write_fp8_kv_triton, device)):
        pages = new_pages(1, 2, 24, place)
        write(k.to(place), v.to(place), *pages, torch.arange(3, device=place))
        dense = pages[0].dequantize()[0].cpu()
        assert bool(dense[0, 1].isnan().all())
        assert bool(dense[1].isfinite().all()) and bool(dense[0, [0, 2]].isfinite().all())


def test_pages_are_copied_and_cleared_as_others_are():
    k, v = make_kv(2 * PAGE)
    pages, _ = both = new_fp8_pages(3, 2, PAGE, 24, CPU)
    backend.write_kv(k, v, *both, torch.arange(2 * PAGE))
    before = pages.dequantize()
    copy_slots(pages, 1, 2, 5)
    clear_slots(pages, 0)
    after = pages.dequantize()
    assert torch.equal(after[2, :, :5], before[1, :, :5]) and torch.equal(after[1], before[1])
    assert not after[2, :, 5:].any() and not after[0].any()


LENGTHS, SHARED = ((1, 9), (1, 40), (3, 35), (1, 37), (20, 20)), (1, 3, 2)
PARENTS = [-1, 0, 0]


def make_step(device, dtype, head_dim=32, window=None, tree=False):
    """A group, drafts in a tree or not, a chunk; pages hold tokens of many sizes, and NaN where no token is."""
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(15, generator=generator).tolist()
    group = PrefixGroup(*SHARED[:2], [order.pop() for _ in range(SHARED[2])])
    tables = []
    for request, (_, context) in enumerate(LENGTHS):
        own = list(group.page_ids) if 0 <= request - SHARED[0] < SHARED[1] else []
        tables.append([*own, *(order.pop() for _ in range(-(-context // PAGE) - len(own)))])
    pages = new_fp8_pages(15, 2, PAGE, head_dim, CPU)
    k, v = (torch.randn(15 * PAGE, 2, head_dim, generator=generator) for _ in range(2))
    v *= torch.logspace(-3, 1, 15 * PAGE)[:, None, None]
    write_fp8_kv_cpu(k, v, *pages, torch.arange(15 * PAGE))
    pages = [QuantizedPages(x.values.to(device), x.scales_PKS.to(device)) for x in pages]
    q = torch.randn(sum(n for n, _ in LENGTHS), 4, head_dim, generator=generator).to(device, dtype)
    trees = {2: tree_mask(PARENTS)} if tree else {}
    batch = AttentionBatch([n for n, _ in LENGTHS], [n for _, n in LENGTHS], tables, PAGE, [group], trees)
    return q, *pages, batch, head_dim**-0.5, window


def assert_in_budget(result, step, sinks, rounded):
    q, k_pages, v_pages, *others = step
    exact = (k_pages.dequantize(), v_pages.dequantize())
    dense = [x.to(q.dtype) for x in exact]
    reference = paged_attention_reference(q, *(dense if rounded else exact), *others, sinks_N=sinks)
    in_dtype = paged_attention_reference(q, *dense, *others, dtype=q.dtype, sinks_N=sinks)
    report = compare(result.flatten(1), in_dtype.flatten(1), reference.flatten(1))
    assert report.holds, report


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("window", "tree", "head_dim"), [(None, False, 32), (20, True, 20)])
def test_triton_attends_to_what_the_bytes_stand_for(window, tree, head_dim, dtype, device, monkeypatch, guarded):
    monkeypatch.setattr(attention_plan, "SMALL_SPLIT", 32)
    monkeypatch.setattr(attention_plan, "LARGE_SPLIT", 64)
    monkeypatch.setattr(triton_file, "KEYS_PER_TILE", 16)
    step = make_step(device, dtype, head_dim, window, tree)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device=device) if tree else None
    assert_in_budget(paged_attention_triton(*step, sinks_N=sinks), step, sinks, rounded=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_cpu_attends_to_what_the_bytes_stand_for(deterministic, dtype):
    step = make_step(CPU, dtype, tree=True)
    result = backend.paged_attention(*step, deterministic)
    assert_in_budget(result, step, None, rounded=True)


def test_pages_of_two_kinds_are_refused(device):
    q, k_pages, _, *others = make_step(device, torch.float32)
    _, v_pages = new_quantized_pages(15, 2, PAGE, 32, device, in_pairs=True)
    with pytest.raises(ValueError, match="float8_e4m3fn, v pages"):
        paged_attention_triton(q, k_pages, v_pages, *others)


def test_a_gpu_without_e4m3_is_refused_with_what_it_can(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, is_refused in {(8, 0): True, (8, 6): True, (8, 9): False, (9, 0): False, (10, 0): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if is_refused:
            with pytest.raises(ValueError, match=r"A100 has compute capability 8\.\d and e4m3 needs 8.9; use int8"):
                check_fp8_device(cuda)
        else:
            check_fp8_device(cuda)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="AMD"):
        check_fp8_device(cuda)
    check_fp8_device(CPU)
