"""Linear layers on a CPU: every form gives the product, and the choice is what was measured."""

import os
import subprocess
import sys

import pytest
import torch

import kernels.cpu_linear as cpu_linear
from kernels.cpu_linear import prepare_cpu_linear
from kernels.int4_linear import QuantizedWeight, dequantize


def make_weight(num_out=48, num_in=128, group=32, asymmetric=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return QuantizedWeight(
        q_NK=torch.randint(0, 16, (num_out, num_in), dtype=torch.uint8, generator=generator),
        scale_NG=torch.rand(num_out, num_in // group, generator=generator) * 0.05 + 0.01,
        group_size=group,
        zero_NG=torch.randint(4, 12, (num_out, num_in // group), dtype=torch.uint8, generator=generator)
        if asymmetric
        else None,
    )


@pytest.mark.parametrize("form", ["plain", "packed", "upcast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 5, 67])
def test_every_dense_form_gives_the_product(form, dtype, num_tokens):
    if form == "packed" and not cpu_linear._packs(dtype):
        pytest.skip("this CPU has no packed form of this dtype; CPUs with AVX-512 have")
    torch.manual_seed(num_tokens)
    weight, x = torch.randn(33, 70).to(dtype), torch.randn(num_tokens, 70).to(dtype)
    bias = torch.randn(33).to(dtype)
    expected = x.double() @ weight.double().T + bias.double()
    actual = cpu_linear.dense_product(weight, form)(x, bias)
    assert actual.dtype == dtype
    # Twice the rounding of the result, scaled by the worst column.
    tolerance = 2 * torch.finfo(dtype).eps * expected.abs().amax() + (1e-5 if dtype == torch.float32 else 0)
    assert (actual.double() - expected).abs().amax() <= tolerance


def test_a_cpu_without_instructions_for_bfloat16_multiplies_it_all_the_same():
    program = (
        "import torch; from kernels.cpu_linear import prepare_cpu_linear\n"
        "linear = prepare_cpu_linear(torch.ones(64, 64), None, dtype=torch.bfloat16)\n"
        "assert not linear.describe().startswith('packed'), linear.describe()\n"
        "assert (linear(torch.ones(3, 64, dtype=torch.bfloat16)) == 64).all()\n"
    )
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, check=True)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_packed_int4_product_is_that_of_the_dequantised_weight(group, asymmetric):
    torch.manual_seed(group)
    weight = make_weight(group=group, asymmetric=asymmetric)
    bias = torch.randn(48).bfloat16()
    x = torch.randn(7, 128).bfloat16()
    expected = x.double() @ dequantize(weight).double().T + bias.double()
    linear = prepare_cpu_linear(weight, bias, dtype=torch.bfloat16, compute="int4")
    worst_int4 = (linear(x).double() - expected).abs().amax(0).max()
    # torch's dense product rounds twice too: once before the bias and once after.
    in_torch = x @ dequantize(weight).bfloat16().T + bias
    worst_in_torch = (in_torch.double() - expected).abs().amax(0).max()
    assert worst_int4 <= 2 * worst_in_torch
    assert "int4" in linear.describe()


def test_auto_takes_int4_up_to_the_measured_number_of_tokens_and_says_so(monkeypatch):
    monkeypatch.setattr(cpu_linear, "_choose", lambda *_: cpu_linear.CpuLinearChoice("plain", 4))
    linear = prepare_cpu_linear(make_weight(), None, dtype=torch.bfloat16)
    calls = []
    linear._int4 = lambda x, bias: calls.append(("int4", len(x)))
    linear._dense = lambda x, bias: calls.append(("dense", len(x)))
    for num_tokens in (1, 4, 5):
        linear(torch.zeros(num_tokens, 128).bfloat16())
    assert calls == [("int4", 1), ("int4", 4), ("dense", 5)]
    assert "up to 4 tokens" in linear.describe()


def test_without_memory_for_a_copy_only_int4_is_kept(monkeypatch):
    monkeypatch.setattr(cpu_linear, "available_memory_bytes", lambda: 1000)
    linear = prepare_cpu_linear(make_weight(), None, dtype=torch.bfloat16)
    assert linear._dense is None
    assert "too little memory" in linear.describe()


def test_packing_a_few_rows_at_a_time_gives_the_packed_form_of_the_whole(monkeypatch):
    weight = make_weight(num_out=208)
    x = torch.randn(5, 128).bfloat16()
    whole = prepare_cpu_linear(weight, None, dtype=torch.bfloat16, compute="int4")(x)
    monkeypatch.setattr(cpu_linear, "PACKED_ROWS", 64)
    assert torch.equal(prepare_cpu_linear(weight, None, dtype=torch.bfloat16, compute="int4")(x), whole)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("compute", ["auto", "int4", "dense"])
def test_three_and_eight_bits_are_multiplied_as_a_dense_copy_and_say_so(bits, compute):
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 2**bits, (48, 128), dtype=torch.uint8, generator=generator)
    for zero in (None, torch.randint(0, 2**bits, (48, 4), dtype=torch.uint8, generator=generator)):
        weight = QuantizedWeight(q, torch.rand(48, 4, generator=generator), 32, zero, bits)
        x = torch.randn(7, 128, generator=generator)
        by_hand = q.double() - (2 ** (bits - 1) if zero is None else zero.double().repeat_interleave(32, 1))
        by_hand *= weight.scale_NG.double().repeat_interleave(32, 1)
        assert torch.equal(dequantize(weight), by_hand.float())
        linear = prepare_cpu_linear(weight, None, dtype=torch.float32, compute=compute)
        torch.testing.assert_close(linear(x).double(), x.double() @ by_hand.T, rtol=1e-4, atol=1e-3)
        assert f"float32 copy of int{bits}" in linear.describe()


def test_a_weight_that_is_not_packed_is_not_copied_where_memory_is_to_be_saved(monkeypatch):
    monkeypatch.setattr(cpu_linear, "_choose_form", lambda *_: "packed")
    weight, x = torch.randn(16, 32), torch.randn(3, 32)
    linear = prepare_cpu_linear(weight, None, dtype=torch.float32, compute="int4")
    weight.zero_()  # seen only if the layer multiplies this very tensor
    assert not linear(x).any() and linear.describe() == "plain float32"
    assert prepare_cpu_linear(weight, None, dtype=torch.float32).describe() == "packed float32"


def test_a_shape_that_the_int4_product_does_not_take_is_refused_by_name():
    with pytest.raises(ValueError, match=r"\[40, 128\].*linear_compute"):
        prepare_cpu_linear(make_weight(num_out=40), None, dtype=torch.bfloat16, compute="int4")


@pytest.mark.parametrize(("amx", "avx512_bf16", "dtype"), [(1, 1, "bfloat16"), (0, 1, "bfloat16"), (0, 0, "float32")])
def test_the_dtype_on_a_cpu_follows_from_its_instructions_and_not_from_a_clock(amx, avx512_bf16, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512_bf16))
    assert cpu_linear.fastest_cpu_dtype() == getattr(torch, dtype)


@pytest.mark.parametrize("form", ["plain", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_to_a_bucket_shows_in_no_row(form, dtype):
    weight, bias = torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype)
    product = cpu_linear._bucketed_product(weight, form)
    for num_tokens in (1, 16, 17, 33, 129, 200):
        x = torch.randn(num_tokens, 64).to(dtype)
        y = product(x, bias)
        assert y.shape == (num_tokens, 48)
        error = (y.double() - (x.double() @ weight.double().T + bias.double())).abs().max()
        assert error < (1e-4 if dtype == torch.float32 else 0.3)


def test_buckets_are_few_and_near():
    sizes = [cpu_linear._bucket(n) for n in range(1, 4097)]
    assert len(set(sizes)) < 80
    assert all(n <= size <= max(n * 1.125, n + 15) for n, size in enumerate(sizes, 1))
