"""Norm, rotation and KV write in one kernel: the bits of the separate ones, near to float64, nothing else written."""

import math

import pytest
import torch

from kernels import backend
from kernels.attention_batch import new_kv_pages
from kernels.compare import compare
from kernels.kv_cache import write_kv_triton
from kernels.qkv import norm_rope_reference, norm_rope_write_kv_triton, split_heads
from kernels.quantized_kv import QuantizedPages, write_quantized_kv_triton
from kernels.rms_norm import add_rms_norm_triton, rms_norm_cpu
from kernels.rope import rope_cpu

EPS = 1e-5
PAGE_SIZE, NUM_PAGES = 5, 4
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

SHAPES = {  # query heads, key heads, head dimension, half of the rotary dimension
    "all of the head": (4, 2, 16, 8),
    "one key head": (7, 1, 16, 8),
    "as many key heads": (3, 3, 8, 4),
    "odd head dimension": (2, 1, 11, 5),
    "odd half": (3, 1, 10, 5),
    "a part of the head": (4, 2, 16, 3),
    "half of the head": (2, 2, 32, 8),
    "head dimension 80": (5, 5, 80, 40),
    "many heads": (33, 1, 128, 64),
    "more key heads than in a program": (20, 10, 128, 64),
}


def make_inputs(shape, dtype, device, num_tokens=4):
    """The projection as a view with odd strides, norms of q and k, positions, tables, and slots, one of them -1."""
    num_heads, num_kv_heads, head_dim, half = shape
    generator = torch.Generator().manual_seed(head_dim)
    num_all = num_heads + 2 * num_kv_heads
    wide = torch.randn(num_tokens, num_all + 1, head_dim + 3, generator=generator).to(device, dtype)
    norms = tuple(torch.randn(head_dim, generator=generator).to(device, dtype) for _ in range(2))
    angles = torch.outer(torch.arange(50.0), 100 ** -(torch.arange(half) / half)).to(device)
    positions = torch.tensor([49, 0, 7, 30], device=device)[:num_tokens]
    slots = torch.tensor([PAGE_SIZE * NUM_PAGES - 1, -1, 0, 7], device=device)[:num_tokens]
    return wide[:, :num_all, :head_dim], norms, positions, (angles.cos(), angles.sin()), slots


def rms_norm_alone(x, weight):
    """kernels.rms_norm's kernel on rows of their own, with nothing to add."""
    rows = x.reshape(-1, x.shape[-1])
    return add_rms_norm_triton(rows, torch.zeros_like(rows), weight, EPS).view(x.shape)


def rope_alone(x, positions, cos, sin):
    """The rotation in torch, each operation rounded on its own and the result once more."""
    half = cos.shape[1]
    c, s = cos[positions][:, None], sin[positions][:, None]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    return torch.cat((a * c - b * s, b * c + a * s, x[..., 2 * half :].float()), -1).to(x.dtype)


def new_pages(new, num_kv_heads, head_dim, dtype, device, layout="gpu"):
    """Pages full of NaN, between guards."""
    if layout == "gpu":
        return [new((NUM_PAGES, num_kv_heads, PAGE_SIZE, head_dim), dtype, device) for _ in range(2)]
    return [new((num_kv_heads, NUM_PAGES, PAGE_SIZE, head_dim), dtype, device).transpose(0, 1) for _ in range(2)]


def by_slot(pages):
    return pages.transpose(1, 2).flatten(0, 1)


def same_bits(a, b):
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("name", SHAPES)
def test_it_gives_the_bits_of_the_separate_kernels(name, has_norm, dtype, device, new_between_guards):
    shape = SHAPES[name]
    num_kv_heads, head_dim = shape[1:3]
    qkv, norms, positions, tables, slots = make_inputs(shape, dtype, device)
    q, k, v = split_heads(qkv.clone(), num_kv_heads)
    if has_norm:
        q, k = rms_norm_alone(q, norms[0]), rms_norm_alone(k, norms[1])
    q, k = (rope_alone(x, positions, *tables) for x in (q, k))
    expected = new_pages(new_between_guards, num_kv_heads, head_dim, dtype, device)
    write_kv_triton(k, v, *expected, slots)

    pages = new_pages(new_between_guards, num_kv_heads, head_dim, dtype, device)
    new = new_between_guards(qkv.shape, dtype, device).copy_(qkv)
    got = norm_rope_write_kv_triton(new, norms if has_norm else None, EPS, positions, *tables, *pages, slots)
    assert got.data_ptr() == new.data_ptr() and got.shape == q.shape
    if device.type == "cpu":
        assert torch.equal(got, q)
        assert same_bits(pages[0], expected[0])
    else:  # sums in another order, and products fused with them
        torch.testing.assert_close(got, q, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(pages[0], expected[0], rtol=2e-2, atol=2e-2, equal_nan=True)
    assert same_bits(pages[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["odd head dimension", "a part of the head", "many heads"])
def test_it_is_as_exact_as_one_operation_after_the_other(name, layout, dtype, device, new_between_guards):
    shape = SHAPES[name]
    num_kv_heads, head_dim = shape[1:3]
    qkv, norms, positions, tables, slots = make_inputs(shape, dtype, device)
    q64, k64, v64 = norm_rope_reference(qkv, num_kv_heads, norms, EPS, positions, *tables)

    kept = slots >= 0
    on_cpu = [x.cpu() for x in (qkv[kept], positions[kept], *tables, slots[kept])]
    cpu_pages = new_kv_pages(NUM_PAGES, num_kv_heads, PAGE_SIZE, head_dim, dtype, torch.device("cpu"))
    cpu_norms = (norms[0].cpu(), norms[1].cpu())
    in_torch = backend.norm_rope_write_kv(on_cpu[0].clone(), cpu_norms, EPS, *on_cpu[1:4], *cpu_pages, on_cpu[4])

    wide = new_between_guards((len(qkv), qkv.shape[1] + 2, head_dim + 1), dtype, device)
    view = wide[:, 1:-1, 1:].copy_(qkv)
    pages = new_pages(new_between_guards, num_kv_heads, head_dim, dtype, device, layout)
    got = norm_rope_write_kv_triton(view, norms, EPS, positions, *tables, *pages, slots)
    assert wide[:, [0, -1]].isnan().all() and wide[..., 0].isnan().all()
    written = by_slot(pages[0])[slots[kept]]
    for result, torch_result, reference in (
        (got[kept], in_torch, q64[kept]),
        (written, by_slot(cpu_pages[0])[on_cpu[4]], k64[kept]),
    ):
        report = compare(result, torch_result.to(device), reference)
        assert report.holds, report
    assert torch.equal(by_slot(pages[1])[slots[kept]], v64[kept].to(dtype))
    for x in pages:
        assert by_slot(x).isnan().all(-1).all(-1).sum() == NUM_PAGES * PAGE_SIZE - int(kept.sum())


def test_a_step_of_padding_alone_writes_no_page(device, new_between_guards):
    shape = SHAPES["all of the head"]
    qkv, norms, positions, tables, slots = make_inputs(shape, torch.float16, device)
    pages = new_pages(new_between_guards, 2, 16, torch.float16, device)
    norm_rope_write_kv_triton(qkv, norms, EPS, positions, *tables, *pages, torch.full_like(slots, -1))
    assert all(x.isnan().all() for x in pages)
    nothing = [x[:0] for x in (qkv, positions, slots)]
    assert norm_rope_write_kv_triton(nothing[0], norms, EPS, nothing[1], *tables, *pages, nothing[2]).shape == (
        0,
        4,
        16,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bfloat16_pages_take_rounded_keys_and_values_of_any_dtype(dtype, device, new_between_guards):
    shape = SHAPES["a part of the head"]
    qkv, norms, positions, tables, slots = make_inputs(shape, dtype, device)
    pages = new_pages(new_between_guards, 2, 16, torch.bfloat16, device)
    of_dtype = new_pages(new_between_guards, 2, 16, dtype, device)
    arguments = (norms, EPS, positions, *tables)
    norm_rope_write_kv_triton(qkv.clone(), *arguments, *pages, slots)
    norm_rope_write_kv_triton(qkv.clone(), *arguments, *of_dtype, slots)
    for rounded, full in zip(pages, of_dtype):
        assert same_bits(rounded, full.bfloat16())


QUANTIZED = ["all of the head", "one key head", "half of the head", "a part of the head", "odd half", "many heads"]


def new_int8_pages(new, num_kv_heads, head_dim, device):
    """Pages of 4 slots: bytes of 255 and scales of NaN, between guards."""
    shapes = {"dims": (NUM_PAGES, num_kv_heads, 4, head_dim // 2), "slots": (NUM_PAGES, num_kv_heads, 2, head_dim)}
    return [
        QuantizedPages(new(shape, torch.int16, device), new((NUM_PAGES, num_kv_heads, 4), torch.float32, device), pairs)
        for pairs, shape in shapes.items()
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "normed"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of what is not finite
@pytest.mark.parametrize("name", QUANTIZED)
def test_to_int8_pages_it_gives_the_bytes_of_the_separate_kernels(name, has_norm, dtype, device, new_between_guards):
    shape = SHAPES[name]
    num_kv_heads, head_dim = shape[1:3]
    qkv, norms, positions, tables, _ = make_inputs(shape, dtype, device)
    qkv[0, -1] = 0.0  # a head of zeros
    qkv[2, -1, 0] = math.inf  # and one that is not finite
    qkv[2, shape[0], -1] = math.nan
    slots = torch.tensor([4 * NUM_PAGES - 1, -1, 0, 6], device=device)
    q, k, v = split_heads(qkv.clone(), num_kv_heads)
    if has_norm:
        q, k = rms_norm_alone(q, norms[0]), rms_norm_alone(k, norms[1])
    q, k = (rope_alone(x, positions, *tables) for x in (q, k))
    expected = new_int8_pages(new_between_guards, num_kv_heads, head_dim, device)
    write_quantized_kv_triton(k, v, *expected, slots)

    pages = new_int8_pages(new_between_guards, num_kv_heads, head_dim, device)
    new = new_between_guards(qkv.shape, dtype, device).copy_(qkv)
    got = norm_rope_write_kv_triton(new, norms if has_norm else None, EPS, positions, *tables, *pages, slots)
    if device.type == "cpu":
        assert torch.equal(got, q)
        for one, other in zip(pages, expected):
            assert torch.equal(one.values, other.values) and same_bits(one.scales_PKS, other.scales_PKS)
    for one, at_inf in zip(pages, (0, -1)):
        scales = one.scales_PKS.transpose(1, 2).flatten(0, 1)
        untouched = [slot for slot in range(4 * NUM_PAGES) if slot not in slots.tolist()]
        assert scales[untouched].isnan().all() and scales[[15, 6]].isfinite().all() and scales[0, at_inf].isnan()
        bytes_PKSD = one.by_plane().reshape(NUM_PAGES, num_kv_heads, 4, head_dim)
        assert (bytes_PKSD.transpose(1, 2).flatten(0, 1)[untouched] == 255).all()


def refused(**changes):
    arguments = {
        "qkv_TMD": torch.zeros(2, 8, 16),
        "norms": None,
        "eps": EPS,
        "positions_T": torch.arange(2),
        "cos_LR": torch.zeros(9, 8),
        "sin_LR": torch.zeros(9, 8),
        "k_pages": torch.zeros(3, 2, 4, 16),
        "v_pages": torch.zeros(3, 2, 4, 16),
        "slots_T": torch.arange(2),
    }
    return {**arguments, **changes}


REFUSED = {
    "heads of q and 2 each of k and v": {"qkv_TMD": torch.zeros(2, 4, 16)},
    "tables are 9 wide": {"cos_LR": torch.zeros(9, 9), "sin_LR": torch.zeros(9, 9)},
    r"weight \(8,\) does not fit": {"norms": (torch.ones(8), torch.ones(8))},
    r"slots are torch.int64 \(3,\)": {"slots_T": torch.arange(3)},
    r"k pages are torch.float16": {"k_pages": torch.zeros(3, 2, 4, 16).half()},
    "must be contiguous": {"qkv_TMD": torch.zeros(2, 16, 8).transpose(1, 2)},
}


@pytest.mark.parametrize("version", [backend.norm_rope_write_kv, norm_rope_write_kv_triton], ids=["chooser", "triton"])
@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_with_its_value(message, version):
    with pytest.raises(ValueError, match=message):
        version(**refused(**REFUSED[message]))


def test_dense_keys_beside_quantised_values_are_refused():
    quantised = QuantizedPages(torch.zeros(3, 2, 4, 16, dtype=torch.int8), torch.ones(3, 2, 4))
    with pytest.raises(ValueError, match="one is quantised and one is not"):
        norm_rope_write_kv_triton(**refused(v_pages=quantised))
    with pytest.raises(ValueError, match="k pages hold pairs of None"):
        norm_rope_write_kv_triton(**refused(k_pages=quantised, v_pages=quantised))


def test_a_cpu_computes_it_as_the_operations_one_after_the_other():
    shape = SHAPES["a part of the head"]
    for has_norm in (False, True):
        qkv, norms, positions, tables, _ = make_inputs(shape, torch.float32, torch.device("cpu"))
        slots = torch.tensor([19, 3, 0, 7])
        new = [new_kv_pages(NUM_PAGES, 2, PAGE_SIZE, 16, torch.float32, torch.device("cpu")) for _ in range(2)]
        q, k, v = split_heads(qkv.clone(), 2)
        if has_norm:
            q, k = rms_norm_cpu(q, norms[0], EPS), rms_norm_cpu(k, norms[1], EPS)
        rope_cpu(q, k, positions, *tables)
        backend.write_kv(k, v, *new[0], slots)
        used = norms if has_norm else None
        cache = {}
        got = backend.norm_rope_write_kv(qkv.clone(), used, EPS, positions, *tables, *new[1], slots, cache)
        assert torch.equal(got, q) and "rope_cpu" in cache
        assert all(torch.equal(a, b) for a, b in zip(*new)) and math.isclose(
            float(got.abs().max()), float(q.abs().max())
        )
