"""The packed linear layer against float64: odd shapes, every tile, bits, group sizes, zero points, splits of K."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels.int4_linear as file
import kernels.int4_planes as planes_file
from kernels.compare import compare
from kernels.int4_linear import (
    Int4Linear,
    QuantizedWeight,
    block_depth,
    choose_splits,
    dequantize,
    int4_linear_reference,
    pack_planes,
    pack_scales,
)
from kernels.silu_mul import silu_mul_cpu, silu_mul_reference, silu_mul_triton
from kernels.tuned import ARCHITECTURES, LinearTile, linear_tiles, load_table

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
    bits: int = 4


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
    "70 rows, weights on the left": Case(70, num_columns=66, splits=2, bias=True),
    "70 rows, g32, zero points": Case(70, num_columns=66, depth=160, group_size=32, zeros=True),
    "130 rows in two row tiles": Case(130, num_columns=66, group_size=64, splits=2, bias=True),
    "40 rows, weights on the left": Case(40, num_columns=130, depth=384, zeros=True, splits=2),
    "40 rows, g32, float16": Case(40, group_size=32, zeros=True, dtype=torch.float16),
    "K of 896": Case(2, depth=896, zeros=True, splits=3),
    "8 bits": Case(3, bits=8, bias=True),
    "8 bits, g64, zero points, float16": Case(3, group_size=64, zeros=True, bits=8, dtype=torch.float16),
    "8 bits, g32, K not a multiple of a block": Case(17, depth=160, group_size=32, zeros=True, bits=8, splits=2),
    "8 bits, 40 rows": Case(40, num_columns=130, zeros=True, bits=8),
    "8 bits, 70 rows": Case(70, group_size=32, bits=8),
}


def make_weight(case, generator, device):
    top = 1 << case.bits
    q = torch.randint(0, top, (case.num_columns, case.depth), generator=generator, dtype=torch.uint8)
    groups = (case.num_columns, case.depth // case.group_size)
    scale = torch.rand(groups, generator=generator) * 0.01 + 0.001
    zero = torch.randint(0, top, groups, generator=generator, dtype=torch.uint8).to(device) if case.zeros else None
    bias = torch.randn(case.num_columns, generator=generator).to(device, case.dtype) if case.bias else None
    return QuantizedWeight(q.to(device), scale.to(device), case.group_size, zero, case.bits), bias


def make_layer(case, device, monkeypatch, seed=0):
    monkeypatch.setattr(file, "choose_splits", lambda num_columns, num_blocks, tile: case.splits)
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
        assert not layer.arrivals.any()


ROUNDED = {
    "g32, zero points": Case(5, num_columns=66, depth=160, group_size=32, zeros=True),
    "float16": Case(20, group_size=64, zeros=True, dtype=torch.float16),
    "8 bits": Case(5, bits=8, zeros=True),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", ROUNDED)
def test_with_rounded_weights_it_is_as_exact_as_torch(name, swapped, device, monkeypatch):
    layer, x, weight, bias = make_layer(ROUNDED[name], device, monkeypatch)
    tile = LinearTile(64, 32, 64, 4, 2, 264, swapped=swapped, rounded=True)
    report = compare(layer._multiply(x, tile), torch_in_dtype(x, weight, bias), int4_linear_reference(x, weight, bias))
    assert report.holds, report


@pytest.mark.parametrize("name", ["zero points, g32, bias", "K not a multiple of a block", "float16", "8 bits"])
def test_the_expanded_weight_is_the_dequantised_one(name, device, monkeypatch):
    case = CASES[name]
    layer, _, weight, _ = make_layer(case, device, monkeypatch)
    report = compare(layer.expand(), dequantize(weight).to(case.dtype), dequantize(weight).double())
    assert report.holds, report


GATED = {
    "one row, N below a tile": Case(1, num_columns=14),
    "odd width, zero points, bias": Case(5, num_columns=130, zeros=True, bias=True),
    "g32, K not a multiple of a block, splits": Case(
        17, num_columns=66, depth=416, group_size=32, zeros=True, splits=3
    ),
    "float16, two splits, bias": Case(3, depth=512, splits=2, bias=True, dtype=torch.float16),
    "weights on the left, splits": Case(40, num_columns=134, depth=512, zeros=True, splits=2, bias=True),
    "in two row tiles": Case(130, num_columns=66, group_size=64, splits=2),
    "8 bits": Case(20, num_columns=70, bits=8, zeros=True, bias=True),
}


@pytest.mark.parametrize("name", GATED)
def test_gated_it_gives_the_bits_of_silu_mul_on_the_product(name, device, monkeypatch):
    case = GATED[name]
    layer, x, weight, bias = make_layer(case, device, monkeypatch)
    gated = Int4Linear(weight, bias, dtype=case.dtype, device=device, gated=True)
    expected = silu_mul_triton(layer(x))
    for _ in range(2):  # twice, as the counter of arrivals must be ready again
        got = gated(x)
        assert got.shape == (case.num_rows, case.num_columns // 2) and not got.isnan().any()
        assert torch.equal(got, expected)
    assert torch.equal(gated.expand(), layer.expand())
    monkeypatch.setattr(gated, "tiles", ())  # as for many rows
    assert torch.equal(gated(x), silu_mul_triton(F.linear(x, layer.expand(), bias)))


@pytest.mark.parametrize("num_rows", [1, 16, 70])
def test_gated_it_is_as_exact_as_torch(num_rows, device, monkeypatch):
    case = Case(num_rows, num_columns=70, zeros=True, bias=True)
    _, x, weight, bias = make_layer(case, device, monkeypatch)
    layer = Int4Linear(weight, bias, dtype=case.dtype, device=device, gated=True)
    in_torch = silu_mul_cpu(torch_in_dtype(x, weight, bias))
    report = compare(layer(x), in_torch, silu_mul_reference(int4_linear_reference(x, weight, bias)))
    assert report.holds, report


def test_gated_and_in_fixed_order_rows_take_one_tile(device):
    torch.manual_seed(0)
    weight = QuantizedWeight(torch.randint(0, 16, (72, 256), dtype=torch.uint8), torch.rand(72, 8) * 0.1, 32)
    layer = Int4Linear(weight, None, dtype=torch.float16, device=device, deterministic=True, gated=True)
    x = torch.randn(130, 256).to(device=device, dtype=torch.float16)
    whole = layer(x)
    for rows in ([17, 3], list(range(20, 125))):
        assert torch.equal(layer(x[rows]), whole[rows])


def test_many_rows_are_multiplied_by_the_expanded_weight(device, monkeypatch):
    case = Case(40, group_size=64, bias=True)
    layer, x, weight, bias = make_layer(case, device, monkeypatch)
    layer.tiles = tuple(tile for tile in layer.tiles if tile.max_rows < 40)
    monkeypatch.setattr(layer, "_multiply", None, raising=False)
    report = compare(layer(x), torch_in_dtype(x, weight, bias), int4_linear_reference(x, weight, bias))
    assert report.holds, report


def test_a_rows_result_is_the_same_bits_for_any_number_of_rows_up_to_16(device, monkeypatch):
    case = Case(16, num_columns=64, depth=384, group_size=64, splits=3, zeros=True)
    layer, x, _, _ = make_layer(case, device, monkeypatch)
    together = layer(x)
    for num_rows in range(1, 16):
        first = 16 - num_rows
        assert torch.equal(layer(x[first:]), together[first:])


SHAPES = [(1, 32), (896, 896), (1536, 8960), (4864, 896), (13824, 5120), (5120, 13824), (11008, 4096), (4096, 14336)]
SHAPES += [(8192, 28672), (28672, 8192), (128256, 4096), (151936, 896), (152064, 3584)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_splits_depend_on_the_weights_shape_and_leave_none_empty(architecture, bits):
    for (num_columns, depth), group_size in itertools.product(SHAPES, (32, 64, 128)):
        num_blocks = -(-depth // block_depth(bits, group_size))
        for tile in linear_tiles(architecture, bits, group_size):
            num_splits = choose_splits(num_columns, num_blocks, tile)
            assert 1 <= num_splits <= file.MAX_SPLITS
            assert (num_splits - 1) * -(-num_blocks // num_splits) < num_blocks


def test_each_architecture_has_tiles_for_all_weights_and_one_for_fixed_order():
    assert set(load_table()["int4_linear"]) == {*ARCHITECTURES.values(), "gfx942"}
    for architecture, bits, group_size in itertools.product(load_table()["int4_linear"], (4, 8), (32, 64, 128)):
        tiles = linear_tiles(architecture, bits, group_size)
        limits = [tile.max_rows for tile in tiles]
        assert limits[:3] == [16, 32, 64]
        assert len(set(limits)) == len(limits)
        assert tiles[2].rows == 64
        assert all(file.BLOCK_N % tile.columns == 0 for tile in tiles)


@pytest.mark.parametrize(("bits", "depth"), [(4, 128), (8, 128), (8, 64)])
def test_a_plane_holds_consecutive_weights(bits, depth):
    q = torch.randint(0, 1 << bits, (64, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = pack_planes(q, bits, depth)
    assert words.dtype == torch.int16
    assert words.shape == (file.BLOCK_N, 256 * bits // 16)
    plane = depth * bits // 16
    for n, k in ((0, 0), (3, 31), (5, 32), (63, 127), (7, 128), (9, 255)):
        block, within = divmod(k, depth)
        i, j = divmod(within, plane)
        assert int(words[n, block * plane + j]) >> (bits * i) & ((1 << bits) - 1) == int(q[n, k])


@pytest.mark.parametrize(("bits", "change"), [(4, 2**-19), (8, 2**-15)])
def test_a_zero_point_in_a_scale_changes_it_by_little(bits, change):
    scale = torch.logspace(-6, 2, 1000).view(10, 100)
    zero = torch.arange(1000).remainder(1 << bits).to(torch.uint8).view(10, 100)
    packed = pack_scales(scale, zero, bits)
    assert torch.equal(packed.view(torch.int32) & ((1 << bits) - 1), zero.int())
    assert float(((packed.double() - scale.double()) / scale.double()).abs().max()) <= 2 * change
    assert pack_scales(scale, None, bits) is scale
    with pytest.raises(ValueError, match=f"a zero point is {1 << bits}" if bits == 4 else "a zero point is 256"):
        pack_scales(scale, zero.int() + 1, bits)


def run_ptx(code, operands):
    """Run the few PTX instructions that unpack words, on int64 arrays of 32-bit registers; $0, $1 ... are operands."""
    registers = dict(operands)

    def value(name):
        return int(name, 16) if name.startswith("0x") else registers[name]

    def halves(x):
        return [(x >> shift & 0xFFFF).to(torch.int32).to(torch.int16) for shift in (0, 16)]

    for line in (part.strip() for part in code.replace("{", ";").replace("}", ";").split(";")):
        if not line or line.startswith("."):
            continue
        operation, arguments = line.split(None, 1)
        target, *names = (name.strip() for name in arguments.split(","))
        if operation == "mov.b32":
            registers[target] = torch.tensor(value(names[0]))
        elif operation == "shr.u32":
            registers[target] = value(names[0]) >> int(names[1])
        elif operation == "lop3.b32":
            a, b, c = (torch.as_tensor(value(name)) for name in names[:3])
            a_and_b = a & b
            registers[target] = {0xEA: a_and_b | c, 0x6A: a_and_b ^ c}[int(names[3], 16)]
        elif operation == "prmt.b32":
            a, b = (torch.as_tensor(value(name)) for name in names[:2])
            chosen = [int(digit, 16) for digit in reversed(names[2].removeprefix("0x"))]
            bytes_ = [((a if i < 4 else b) >> (8 * (i % 4))) & 0xFF for i in chosen]
            registers[target] = sum(byte << (8 * i) for i, byte in enumerate(bytes_))
        elif operation in ("add.rn.f16x2", "fma.rn.bf16x2"):
            dtype = torch.float16 if operation.startswith("add") else torch.bfloat16
            parts = [[x.view(dtype).double() for x in halves(value(name))] for name in names]
            sums = [a + b if len(rest) == 1 else a * b + rest[1] for a, *rest in zip(*parts) for b in (rest[0],)]
            low, high = (x.to(dtype).view(torch.int16).long() & 0xFFFF for x in torch.broadcast_tensors(*sums))
            registers[target] = low | high << 16
        else:
            raise AssertionError(f"an instruction that this test does not know: {line}")
    return registers


UNPACKING = [(4, torch.bfloat16), (4, torch.float16), (8, torch.bfloat16), (8, torch.float16)]


@pytest.mark.parametrize("index", range(4))
def test_the_inline_ptx_unpacks_every_word_exactly(index):
    bits, dtype = UNPACKING[index]
    source = Path(planes_file.__file__).read_text(encoding="utf-8")
    code = re.findall(r'inline_asm_elementwise\(\s+"""(.*?)"""', source, re.S)[index]
    num_planes = 16 // bits
    words = torch.arange(1 << 16)
    # bfloat16 bytes take their zero point after the PTX; without one it is 128.
    takes_zero = (bits, dtype) != (8, torch.bfloat16)
    zeros = range(0, 1 << bits, 5) if takes_zero else [128]
    for zero in zeros:
        bias = torch.tensor(-(zero + (1024.0 if dtype == torch.float16 else 128.0)), dtype=dtype)
        bias_bits = int(bias.view(torch.int16)) & 0xFFFF
        magic = 0xE400 if dtype == torch.float16 else 0xC300
        assert not takes_zero or bias_bits == magic | zero  # as plane_zeros makes it
        operands = {f"${num_planes}": words | (words.flip(0) << 16)}
        if takes_zero:
            operands |= {f"${num_planes + 1 + i}": torch.tensor(bias_bits << 16 | bias_bits) for i in range(num_planes)}
        registers = run_ptx(code, operands)
        for plane in range(num_planes):
            for half, word in ((0, words), (1, words.flip(0))):
                got = (registers[f"${plane}"] >> (16 * half) & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype)
                assert torch.equal(got.long(), (word >> (bits * plane) & ((1 << bits) - 1)) - zero)


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
    three = QuantizedWeight(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2), 32, bits=3)
    with pytest.raises(ValueError, match=r"the weight has 3 bits; it must have one of \(4, 8\)"):
        Int4Linear(three, None, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="bits is 5"):
        QuantizedWeight(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2), 32, bits=5)
    with pytest.raises(ValueError, match="bias is"):
        Int4Linear(quantized(), torch.zeros(5), dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match="have 3 rows; it must be even"):
        Int4Linear(quantized((3, 64), (3, 2)), None, dtype=torch.float16, device=device, gated=True)
    layer = Int4Linear(quantized(), None, dtype=torch.float16, device=device)
    with pytest.raises(ValueError, match=r"must be \[rows, 64\]"):
        layer(torch.zeros(2, 65, dtype=torch.float16, device=device))
    with pytest.raises(ValueError, match=r"must be torch\.float16"):
        layer(torch.zeros(2, 64, device=device))


def test_a_layer_says_how_it_computes(device):
    layer = Int4Linear(quantized(), None, dtype=torch.float16, device=device)
    assert layer.describe().startswith("int4 g32 symmetric, Triton in planes, K in 1 splits; expanded to float16")
    gated = Int4Linear(quantized(), None, dtype=torch.float16, device=device, gated=True)
    assert "K in 1 splits, silu in the epilogue; expanded" in gated.describe()
