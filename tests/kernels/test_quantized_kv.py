"""int8 pages: what is written, that they behave as pages do, and both devices' attention over them against float64."""

import math

import pytest
import torch

import kernels.int8_attention as triton_file
import kernels.quantized_kv as file
from kernels import attention_plan, backend
from kernels.attention_batch import AttentionBatch, PrefixGroup, new_kv_pages
from kernels.compare import compare
from kernels.cpu_attention import paged_attention_cpu
from kernels.draft_tree import tree_mask
from kernels.paged_attention import paged_attention_reference, paged_attention_triton
from kernels.quantized_kv import (
    QuantizedPages,
    clear_slots,
    copy_slots,
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
        pages = new_quantized_pages(1, 2, PAGE, 24, place, in_pairs=write is write_quantized_kv_triton)
        write(k.to(place), v.to(place), *pages, torch.arange(3, device=place))
        dense = pages[0].dequantize()[0].cpu()
        assert bool(dense[0, 1].isnan().all())
        assert bool(dense[1].isfinite().all()) and bool(dense[0, [0, 2]].isfinite().all())


def new_pairs(num_pages, heads, head_dim, device, layout, new=None, page_size=PAGE):
    """Pages in units of two bytes on any device, in the memory layout that pages have on `layout`'s kind of device."""
    both = []
    for pages in new_quantized_pages(num_pages, heads, page_size, head_dim, layout, in_pairs=True):
        memory = []
        for x in (pages.values, pages.scales_PKS):
            order = sorted(range(x.ndim), key=lambda i: -x.stride(i))
            shape = [x.shape[i] for i in order]
            flat = torch.empty(shape, dtype=x.dtype, device=device) if new is None else new(shape, x.dtype, device)
            memory.append(flat.zero_().permute(*(order.index(i) for i in range(x.ndim))))
        both.append(QuantizedPages(*memory, pages.pairs))
    return both


LAYOUTS = (CPU, torch.device("meta"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 8), (5, 64), (3, 80), (2, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_writes_the_same_pages_as_torch(heads, head_dim, dtype, layout, device, new_between_guards):
    k, v = make_kv(13, heads, head_dim, dtype)
    slots = torch.randperm(5 * PAGE, generator=torch.Generator().manual_seed(1))[:13]
    wanted = new_quantized_pages(5, heads, PAGE, head_dim, CPU)
    write_quantized_kv_cpu(k, v, *wanted, slots)
    pages = new_pairs(5, heads, head_dim, device, layout, new_between_guards)
    write_quantized_kv_triton(k.to(device), v.to(device), *pages, slots.to(device))
    for page, want in zip(pages, wanted):
        # Dividing in another order may move a number that is halfway: by one step, in few places.
        steps = (page.dequantize().cpu() - want.dequantize()).abs() / want.scales_PKS.clamp(min=1e-30).unsqueeze(-1)
        assert float(steps.max()) < 1.01 and float((steps > 0.01).float().mean()) < 1e-2
        torch.testing.assert_close(page.scales_PKS.cpu(), want.scales_PKS, rtol=1e-6, atol=0.0)


def test_a_slot_of_minus_one_writes_nothing(device):
    k, v = (x.to(device) for x in make_kv(2))
    pages = new_pairs(2, 2, 24, device, torch.device("meta"))
    write_quantized_kv_triton(k, v, *pages, torch.tensor([-1, PAGE + 3], device=device))
    for page in pages:
        assert not page.by_plane()[0].any() and not page.scales_PKS[0].any()
        assert page.scales_PKS[1].count_nonzero() == 2


@pytest.mark.parametrize("page_size", [2, 6, 16])
def test_a_unit_pairs_dimensions_of_keys_and_slots_of_values(page_size, device):
    k, v = make_kv(2 * page_size, head_dim=6)
    slots = torch.arange(2 * page_size)
    in_torch = new_quantized_pages(2, 2, page_size, 6, CPU, in_pairs=True)
    write_quantized_kv_cpu(k, v, *in_torch, slots)
    by_triton = new_pairs(2, 2, 6, device, torch.device("meta"), page_size=page_size)
    write_quantized_kv_triton(k.to(device), v.to(device), *by_triton, slots.to(device))
    for k_pages, v_pages in (in_torch, by_triton):
        for slot in range(2 * page_size):
            page, at = divmod(slot, page_size)
            units = k_pages.values[page, :, at].cpu().int() & 0xFFFF
            assert torch.equal((units & 255) - 128, quantize(k[slot][None])[0][0, :, :3].int())
            assert torch.equal((units >> 8) - 128, quantize(k[slot][None])[0][0, :, 3:].int())
            units = v_pages.values[page, :, at % (page_size // 2)].cpu().int() & 0xFFFF
            byte = units & 255 if at < page_size // 2 else units >> 8
            assert torch.equal(byte - 128, quantize(v[slot][None])[0][0].int())


@pytest.mark.parametrize("in_pairs", [False, True])
def test_pages_do_not_depend_on_how_a_prompt_was_cut(in_pairs):
    k, v = make_kv(40)
    slots = torch.arange(40)
    whole, cut = (new_quantized_pages(3, 2, PAGE, 24, CPU, in_pairs) for _ in range(2))
    write_quantized_kv_cpu(k, v, *whole, slots)
    for part in slots.split(7):
        write_quantized_kv_cpu(k[part], v[part], *cut, part)
    for one, other in zip(whole, cut):
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.scales_PKS, other.scales_PKS)


def test_triton_writes_the_same_bytes_however_a_prompt_was_cut(device):
    k, v = (x.to(device) for x in make_kv(40))
    slots = torch.arange(40, device=device)
    whole, cut = (new_pairs(3, 2, 24, device, torch.device("meta")) for _ in range(2))
    write_quantized_kv_triton(k, v, *whole, slots)
    for part in slots.split(7):
        write_quantized_kv_triton(k[part], v[part], *cut, part)
    for one, other in zip(whole, cut):
        assert torch.equal(one.values, other.values) and bool(one.values.any())
        assert torch.equal(one.scales_PKS, other.scales_PKS)


def test_one_operation_takes_the_bias_from_a_byte_exactly():
    """What the kernel's inline assembly relies on, which does not run here."""
    byte = torch.arange(256, dtype=torch.int16)
    q = byte.double() - 128
    by_fma = byte.view(torch.bfloat16).double() * 2.0**127 - 2.0
    assert torch.equal(by_fma * 64, q)
    assert torch.equal(by_fma.bfloat16().double(), by_fma)
    half = (byte | 0x6400).view(torch.float16) + torch.tensor(0xE480 - 0x10000, dtype=torch.int16).view(torch.float16)
    assert half.dtype == torch.float16 and torch.equal(half.double(), q)
    cut = ((byte.float() - 128).view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(cut.double(), q)


@pytest.mark.parametrize("in_pairs", [False, True])
@pytest.mark.parametrize("num_slots", [0, 1, 5, 8, 9, 15, 16])
def test_slots_are_copied_and_cleared_as_those_of_tensors_are(num_slots, in_pairs):
    k, v = make_kv(4 * PAGE)
    both = new_quantized_pages(4, 2, PAGE, 24, CPU, in_pairs)
    write_quantized_kv_cpu(k, v, *both, torch.arange(4 * PAGE))
    for pages in both:
        dense, bits = pages.dequantize(), pages.values.clone()
        for x in (pages, dense):
            copy_slots(x, 1, 3, num_slots)
        assert torch.equal(pages.dequantize(), dense)
        assert torch.equal(pages.values[:3], bits[:3])
        pages.scales_PKS[3, 1, num_slots:] = math.nan  # of what was not finite
        for x in (pages, dense):
            clear_slots(x, 3, num_slots)
            clear_slots(x, [0, 2])
        assert torch.equal(pages.dequantize(), dense)
        assert not dense[[0, 2]].any() and bool(dense[1].any())


@pytest.mark.parametrize(("page_size", "head_dim", "message"), [(5, 8, "page_size is 5"), (4, 9, "dimension is 9")])
def test_odd_numbers_have_no_pairs(page_size, head_dim, message, device):
    with pytest.raises(ValueError, match=f"{message}; on a GPU it must be even"):
        new_quantized_pages(2, 2, page_size, head_dim, torch.device("meta"), in_pairs=True)
    pages = new_quantized_pages(2, 2, page_size, head_dim, CPU)
    k, v = make_kv(3, head_dim=head_dim)
    write_quantized_kv_cpu(k, v, *pages, torch.arange(3))
    with pytest.raises(ValueError, match="k pages hold pairs of None"):
        write_quantized_kv_triton(k.to(device), v.to(device), *pages, torch.arange(3, device=device))


# (query tokens, context) of each request; (first request, requests, shared pages) of a group
STEPS = {
    "decode": (((1, 1), (1, 17), (1, 40)), ()),
    "chunks and drafts": (((33, 33), (5, 40), (20, 75)), ()),
    "a group beside others": (((1, 9), (1, 40), (3, 35), (1, 37), (20, 20)), ((1, 3, 2),)),
}


def make_step(name, layout, dtype=torch.float32, head_dim=32, window=None, page_size=PAGE, heads=(4, 2), device=CPU):
    """layout: of a CPU's pages, or pairs in memory as on that kind of device."""
    lengths, shared = STEPS[name]
    generator = torch.Generator().manual_seed(2)
    num_pages = sum(-(-context // page_size) for _, context in lengths)
    order = torch.randperm(num_pages + 1, generator=generator).tolist()
    groups = [PrefixGroup(first, count, [order.pop() for _ in range(pages)]) for first, count, pages in shared]
    tables = []
    for request, (_, context) in enumerate(lengths):
        of_group = [g for g in groups if g.first_request <= request < g.first_request + g.num_requests]
        own = list(of_group[0].page_ids) if of_group else []
        tables.append([*own, *(order.pop() for _ in range(-(-context // page_size) - len(own)))])
    slots = torch.arange((num_pages + 1) * page_size)
    k, v = (torch.randn(len(slots), heads[1], head_dim, generator=generator) for _ in range(2))
    if layout is None:
        pages = new_quantized_pages(num_pages + 1, heads[1], page_size, head_dim, CPU)
        write_quantized_kv_cpu(k, v, *pages, slots)
    else:
        pages = new_pairs(num_pages + 1, heads[1], head_dim, device, layout, page_size=page_size)
        write_quantized_kv_cpu(k.to(device), v.to(device), *pages, slots.to(device))
    num_tokens = sum(queries for queries, _ in lengths)
    q = torch.randn(num_tokens, heads[0], head_dim, generator=generator).to(device, dtype)
    batch = AttentionBatch([n for n, _ in lengths], [n for _, n in lengths], tables, page_size, groups)
    return q, *pages, batch, head_dim**-0.5, window


def spoil_unread(step):
    """Make the scales of slots that no request has filled no numbers: they must not be read into a result."""
    _, k_pages, v_pages, batch, *_ = step
    for x in (k_pages, v_pages):
        filled = torch.zeros_like(x.scales_PKS, dtype=torch.bool)
        for table, context in zip(batch.page_ids, batch.context_lens):
            for i, page in enumerate(table):
                filled[page, :, : max(0, context - i * batch.page_size)] = True
        x.scales_PKS[~filled] = math.nan
    return step


def assert_in_budget(result, q, k_pages, v_pages, batch, scale, window, rounded, sinks=None):
    exact = (k_pages.dequantize(), v_pages.dequantize())
    dense = [x.to(q.dtype) for x in exact]
    reference = paged_attention_reference(q, *(dense if rounded else exact), batch, scale, window, sinks_N=sinks)
    in_dtype = paged_attention_reference(q, *dense, batch, scale, window, q.dtype, sinks)
    report = compare(result.flatten(1), in_dtype.flatten(1), reference.flatten(1))
    assert report.holds, report


@pytest.fixture
def small_splits(monkeypatch):
    monkeypatch.setattr(attention_plan, "SMALL_SPLIT", 32)
    monkeypatch.setattr(attention_plan, "LARGE_SPLIT", 64)
    monkeypatch.setattr(triton_file, "KEYS_PER_TILE", 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("name", STEPS)
def test_triton_attends_to_what_the_bytes_stand_for(name, window, dtype, device, small_splits, guarded):
    step = spoil_unread(make_step(name, torch.device("meta"), dtype, window=window, device=device))
    assert_in_budget(paged_attention_triton(*step), *step, rounded=False)


SHAPES = {
    "pages of two": {"page_size": 2},
    "pages that are no power of two": {"page_size": 6},
    "pages across which a part begins": {"page_size": 20, "window": 20},
    "a page is a tile": {"page_size": 32},
    "pages larger than a tile": {"page_size": 64},
    "pages larger than a tile behind a window": {"page_size": 64, "window": 7},
    "head dimension 8": {"head_dim": 8},
    "head dimension 10": {"head_dim": 10},
    "head dimension 80": {"head_dim": 80},
    "head dimension 256": {"head_dim": 256, "heads": (2, 1)},
    "three query heads on one": {"heads": (6, 2)},
    "memory as a CPU's": {"layout": CPU},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("name", ["decode", "a group beside others"])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_attends_to_pages_of_any_shape(shape, name, device, small_splits, guarded):
    settings = {"layout": torch.device("meta"), "device": device, **SHAPES[shape]}
    if name == "a group beside others" and settings.get("page_size", PAGE) > PAGE:
        name = "chunks and drafts"  # a group's pages are full
    step = spoil_unread(make_step(name, **settings))
    assert_in_budget(paged_attention_triton(*step), *step, rounded=False)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("with_trees", [False, True])
def test_triton_knows_trees_of_drafts_and_sinks(with_trees, window, has_sinks, device, small_splits, guarded):
    step = make_step("a group beside others", torch.device("meta"), torch.bfloat16, window=window, device=device)
    spoil_unread(step)
    if with_trees:
        step[3].trees.update({2: tree_mask([-1, 0, 0]), 4: tree_mask([-1, 0, 0, 1, 1, 2, -1, 6, *range(11), 7])})
    sinks = torch.tensor([0.0, 2.0, -3.0, math.log(9.0)], device=device) if has_sinks else None
    assert_in_budget(paged_attention_triton(*step, sinks_N=sinks), *step, rounded=False, sinks=sinks)


def test_triton_attends_at_the_sizes_used_in_earnest(device, guarded, monkeypatch):
    monkeypatch.setitem(STEPS, "long", (((1, 600), (70, 150)), ()))
    for page_size in (16, 64):
        step = make_step("long", torch.device("meta"), torch.bfloat16, 64, page_size=page_size, device=device)
        spoil_unread(step)
        assert_in_budget(paged_attention_triton(*step), *step, rounded=False)


@pytest.mark.parametrize("in_pairs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("max_pages", [1, 5, 1000])
@pytest.mark.parametrize("name", STEPS)
def test_a_cpu_attends_to_what_the_bytes_stand_for(name, max_pages, window, dtype, in_pairs, monkeypatch):
    monkeypatch.setattr(file, "DENSE_BYTES", max_pages * 2 * PAGE * 32 * dtype.itemsize)
    step = make_step(name, CPU if in_pairs else None, dtype, window=window)
    assert_in_budget(backend.paged_attention(*step), *step, rounded=True)
    pieces = step[3].cache["converted_pages"]
    assert len(pieces) == {1: len(step[3].query_lens), 1000: 1}.get(max_pages, len(pieces))


def test_pages_in_bfloat16_serve_float32_activations(device, monkeypatch):
    q, k_pages, v_pages, batch, scale, window = make_step("a group beside others", None)
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
