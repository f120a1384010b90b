"""Deterministic linear layers: a row's bits are the row's own, whatever is beside it."""

import pytest
import torch

from kernels import fixed_order_linear
from kernels.backend import prepare_linear
from kernels.cpu_linear import dense_product
from kernels.fixed_order_linear import TILES, FixedOrderLinear, next_tile, with_threads
from kernels.int4_linear import QuantizedWeight, dequantize

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
# With 576 and more inputs, one library's sums over 32 rows and over 64 differ in bfloat16.
SHAPES = [(33, 70), (256, 768), (192, 576), (192, 1536)]


def prepare(num_out, num_in, dtype, compute="auto", group=None):
    torch.manual_seed(num_out)
    weight = torch.randn(num_out, num_in)
    if group is not None:
        scale = torch.rand(num_out, num_in // group) * 0.05 + 0.01
        weight = QuantizedWeight(torch.randint(0, 16, (num_out, num_in), dtype=torch.uint8), scale, group)
    linear = prepare_linear(weight, torch.randn(num_out), dtype=dtype, device=CPU, compute=compute, deterministic=True)
    return linear, weight


def assert_rows_stay(linear, num_in, dtype):
    """Any number of rows, at any place, beside any others, on one thread and on two."""
    # Values that nearly cancel: another order of the sum shows.
    half = torch.randn(400, num_in // 2)
    x = torch.cat((half, 1.001 * half, torch.ones(400, num_in % 2)), 1).to(dtype)
    expected = with_threads(1, lambda: linear(x))
    for num_threads in (1, 2):
        for num_rows in (1, 2, 7, 17, 33, 50, 64, 65, 127, 257, 399) if num_threads == 1 else (1, 65, 200):
            rows = torch.randperm(400)[:num_rows]
            actual = with_threads(num_threads, lambda rows=rows: linear(x[rows]))
            assert torch.equal(actual, expected[rows]), f"{num_rows} rows, {num_threads} threads"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rows_bits_do_not_depend_on_the_other_rows_nor_on_threads(shape, dtype):
    # Prepared for two threads, so that what one thread alone could do is not relied on.
    linear, _ = with_threads(2, lambda: prepare(*shape, dtype))
    assert_rows_stay(linear, shape[1], dtype)


@pytest.mark.parametrize("compute", ["auto", "int4"])
def test_int4_weights_keep_a_rows_bits_as_a_copy_and_packed(compute):
    linear, weight = with_threads(2, lambda: prepare(96, 256, torch.bfloat16, compute, group=32))
    assert_rows_stay(linear, 256, torch.bfloat16)
    x = torch.randn(5, 256).bfloat16()
    expected = x.double() @ dequantize(weight).double().T + linear._bias.double()
    assert (linear(x) - expected).abs().max() <= 0.02 * expected.abs().max()
    assert ("int4 g32" if compute == "int4" else "bfloat16 copy") in linear.describe()
    assert "fixed tiles of" in linear.describe()


@pytest.mark.parametrize("dtype", DTYPES)
def test_actors_with_other_numbers_of_threads_give_the_same_bits(dtype):
    one, _ = with_threads(1, lambda: prepare(256, 768, dtype))
    two, _ = with_threads(2, lambda: prepare(256, 768, dtype))
    x = torch.randn(150, 768).to(dtype)
    assert torch.equal(with_threads(1, lambda: one(x)), with_threads(2, lambda: two(x)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_is_the_product(dtype):
    linear, weight = prepare(33, 70, dtype)
    x = torch.randn(67, 70).to(dtype)
    expected = x.double() @ weight.to(dtype).double().T + linear._bias.double()
    tolerance = 2 * torch.finfo(dtype).eps * expected.abs().max() + (1e-5 if dtype == torch.float32 else 0)
    assert linear(x).dtype == dtype and (linear(x) - expected).abs().max() <= tolerance
    assert linear(x[:0]).shape == (0, 33)


def test_every_row_is_multiplied_once_with_little_padding():
    for tiles in (TILES, (48, 64, 128, 256), (64,)):
        for num_rows in range(1, 700):
            left, calls = num_rows, []
            while left > 0:
                calls.append(next_tile(tiles, left))
                left -= calls[-1]
            assert set(calls) <= set(tiles)
            assert sum(calls) - num_rows < max(tiles[0], sum(calls) / 3)


def faulty(fault):
    """A product that differs from the true one by one bit where `fault` says so."""

    def make(weight, form):
        true = dense_product(weight, "plain")

        def product(x, bias):
            y = true(x, bias).clone()
            row = fault(form, len(x), torch.get_num_threads())
            if row is not None:
                y[row] = torch.nextafter(y[row], torch.full_like(y[row], torch.inf))
            return y

        return product

    return make


@pytest.fixture
def with_fault(monkeypatch):
    def use(fault):
        fixed_order_linear._choose_tiles.cache_clear()
        monkeypatch.setattr(fixed_order_linear, "dense_product", faulty(fault))
        return prepare(33, 70, torch.float32)[0]

    yield use
    fixed_order_linear._choose_tiles.cache_clear()


def test_a_tile_that_gives_other_bits_at_one_place_is_not_used(with_fault):
    linear = with_fault(lambda form, num_rows, num_threads: 127 if num_rows == 128 else None)
    assert 128 not in linear._tiles and 64 in linear._tiles


def test_a_form_that_differs_from_place_to_place_gives_way_to_the_next(with_fault):
    linear = with_fault(lambda form, num_rows, num_threads: num_rows // 2 if form == "packed" else None)
    assert linear.describe().startswith("plain")


def test_if_no_form_agrees_the_layer_is_refused_by_name(with_fault):
    with pytest.raises(ValueError, match=r"\[33, 70\] in float32.*deterministic to false"):
        with_fault(lambda form, num_rows, num_threads: 0)


def test_where_only_one_thread_agrees_only_one_is_used(with_fault):
    linear = with_threads(2, lambda: with_fault(lambda form, num_rows, num_threads: 0 if num_threads > 1 else None))
    assert linear.describe().endswith("rows on one thread")
    assert_rows_stay(linear, 70, torch.float32)


def test_the_plain_mode_does_not_pay_for_it():
    linear = prepare_linear(torch.randn(8, 8), None, dtype=torch.float32, device=CPU)
    assert not isinstance(linear, FixedOrderLinear)
