"""The int4 linear layer against float64: odd shapes, all group sizes, zero points, splits of K, batch invariance."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import kernels.int4_linear as file
from kernels.compare import compare
from kernels.int4_linear import (
    Int4Linear,
    QuantizedWeight,
    choose_splits,
    dequantize,
    int4_linear_reference,
    pack_four_planes,
)

pytestmark = pytest.mark.usefixtures("guarded")


@dataclass(frozen=True)
class Case:
    num_rows: int
    num_columns: int = 64
    depth: int = 256
    group_size: int = 128
    zeros: bool = False
    bias: bool = False
    splits: int = 1
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "one row": Case(1),
    "three rows, g64": Case(3, group_size=64),
    "16 rows, g32": Case(16, group_size=32),
    "float16": Case(5, group_size=64, zeros=True, dtype=torch.float16),
    "zero points": Case(5, zeros=True),
    "zero points, g32, bias": Case(5, group_size=32, zeros=True, bias=True),
    "bias": Case(2, bias=True),
    "N below a tile": Case(2, num_columns=7),
    "N not a multiple of a tile": Case(2, num_columns=130, bias=True, zeros=True),
    "K below a block": Case(2, depth=32, group_size=32),
    "K not a multiple of a block": Case(3, depth=352, group_size=32, zeros=True),
    "K of three groups of 64": Case(3, depth=192, group_size=64),
    "two splits": Case(3, depth=512, splits=2, bias=True),
    "splits of unequal length": Case(17, depth=416, group_size=32, splits=3, zeros=True),
    "17 rows": Case(17, num_columns=70),
    "33 rows": Case(33, group_size=64),
    "70 rows in two row tiles": Case(70, num_columns=66, splits=2, bias=True),
}


def make_weight(case, generator, device):
    q = torch.randint(0, 16, (case.num_columns, case.depth), generator=generator, dtype=torch.uint8)
    groups = (case.num_columns, case.depth // case.group_size)
    scale = torch.rand(groups, generator=generator) * 0.01 + 0.001
    zero = torch.randint(0, 16, groups, generator=generator, dtype=torch.uint8).to(device) if case.zeros else None
    bias = torch.randn(case.num_columns, generator=generator).to(device, case.dtype) if case.bias else None
    return QuantizedWeight(q.to(device), scale.to(device), case.group_size, zero), bias


def make_layer(case, device, monkeypatch, seed=0):
    monkeypatch.setattr(file, "choose_splits", lambda num_rows, depth: case.splits)
    generator = torch.Generator().manual_seed(seed)
    weight, bias = make_weight(case, generator, device)
    wide = torch.randn(case.num_rows, case.depth + 8, generator=generator).to(device, case.dtype)
    return Int4Linear(weight, bias, dtype=case.dtype, device=device), wide[:, : case.depth], weight, bias


def torch_in_dtype(x, weight, bias):
    return F.linear(x, dequantize(weight).to(x.dtype), bias)


@pytest.mark.parametrize("name", CASES)
def test_int4_linear_is_as_exact_as_torch_on_the_dequantised_weight(name, device, monkeypatch):
    layer, x, weight, bias = make_layer(CASES[name], device, monkeypatch)
    for _ in range(2):  # twice, as the counter of arrivals must be ready again
        report = compare(layer(x), torch_in_dtype(x, weight, bias), int4_linear_reference(x, weight, bias))
        assert report.holds, report


@pytest.mark.parametrize("name", ["zero points, g32, bias", "K not a multiple of a block", "float16"])
def test_the_expanded_weight_is_the_dequantised_one(name, device, monkeypatch):
    case = CASES[name]
    layer, _, weight, _ = make_layer(case, device, monkeypatch)
    report = compare(layer.expand(), dequantize(weight).to(case.dtype), dequantize(weight).double())
    assert report.holds, report


def test_many_rows_are_multiplied_by_the_expanded_weight(device, monkeypatch):
    case = Case(40, group_size=64, bias=True)
    layer, x, weight, bias = make_layer(case, device, monkeypatch)
    monkeypatch.setattr(file, "DENSE_ROWS", 39)
    monkeypatch.setattr(layer, "_multiply", None)
    report = compare(layer(x), torch_in_dtype(x, weight, bias), int4_linear_reference(x, weight, bias))
    assert report.holds, report


def test_a_rows_result_is_the_same_bits_for_any_number_of_rows_up_to_16(device, monkeypatch):
    case = Case(16, num_columns=64, depth=384, group_size=64, splits=3, zeros=True)
    layer, x, _, _ = make_layer(case, device, monkeypatch)
    together = layer(x)
    for num_rows in range(1, 16):
        first = 16 - num_rows
        assert torch.equal(layer(x[first:]), together[first:])


@pytest.mark.parametrize("shape", [(1, 32), (64, 4096), (4096, 4096), (6144, 4096), (128256, 4096), (4096, 14336)])
def test_splits_depend_on_the_weights_shape_and_leave_none_empty(shape):
    num_splits, num_blocks = choose_splits(*shape), -(-shape[1] // file.BLOCK_K)
    per_split = -(-num_blocks // num_splits)
    assert (num_splits - 1) * per_split < num_blocks


def test_packing_puts_weight_i_times_32_plus_j_into_nibble_i_of_word_j():
    q = torch.randint(0, 16, (64, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = pack_four_planes(q)
    assert words.dtype == torch.int16
    assert words.shape == (64, 64)
    for n, k in ((0, 0), (3, 31), (5, 32), (63, 127), (7, 128), (9, 255)):
        block, within = divmod(k, 128)
        plane, j = divmod(within, 32)
        assert int(words[n, block * 32 + j]) >> (4 * plane) & 15 == int(q[n, k])


def quantized(q_shape=(4, 64), groups=(4, 2), group_size=32, dtype=torch.uint8, zero=None):
    return QuantizedWeight(torch.zeros(q_shape, dtype=dtype), torch.ones(groups), group_size, zero)


BAD_WEIGHTS = {
    "group_size is 48": {"group_size": 48},
    "K=96 is not a multiple of group_size=64": {"q_shape": (4, 96), "group_size": 64},
    "q is torch.int8": {"dtype": torch.int8},
    r"it must be float32 \(4, 2\)": {"groups": (2, 4)},
    r"it must be uint8 \(4, 2\)": {"zero": torch.zeros(4, 2)},
}


@pytest.mark.parametrize("message", BAD_WEIGHTS)
def test_an_ill_formed_weight_is_refused(message):
    with pytest.raises(ValueError, match=message):
        quantized(**BAD_WEIGHTS[message])


def test_inputs_that_do_not_fit_are_refused(device):
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        Int4Linear(quantized(), None, dtype=torch.float32, device=device)
    eight = QuantizedWeight(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2), 32, bits=8)
    with pytest.raises(ValueError, match="the weight has 8 bits; it must have 4"):
        Int4Linear(eight, None, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="bits is 5"):
        QuantizedWeight(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2), 32, bits=5)
    with pytest.raises(ValueError, match="bias is"):
        Int4Linear(quantized(), torch.zeros(5), dtype=torch.float16, device=device)
    layer = Int4Linear(quantized(), None, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match=r"must be \[rows, 64\]"):
        layer(torch.zeros(2, 65, dtype=torch.float16, device=device))
    with pytest.raises(ValueError, match=r"must be torch\.float16"):
        layer(torch.zeros(2, 64, device=device))


def test_a_layer_says_how_it_computes(device):
    layer = Int4Linear(quantized(), None, dtype=torch.float16, device=device)
    assert layer.describe().startswith("int4 g32 symmetric, Triton in four planes, K in 1 splits")
