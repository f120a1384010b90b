"""int4 rounding against a search by brute force, and joining weights."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from actors.weights.quantization import CLIP_RATIOS, concatenate, fitting_group_size, quantize_to_nearest
from kernels.int4_linear import QuantizedWeight, dequantize


def random_weight(num_out: int, num_in: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_each_group_has_the_best_scale_of_the_candidates(group_size: int) -> None:
    weight = random_weight(7, 256)
    quantized = quantize_to_nearest(weight, group_size)
    assert quantized.zero_NG is None and quantized.group_size == group_size
    rounded = dequantize(quantized).double().numpy()
    for n, g in itertools.product(range(7), range(256 // group_size)):
        columns = slice(g * group_size, (g + 1) * group_size)
        group = weight[n, columns].double().numpy()
        errors = []
        for ratio in CLIP_RATIOS:
            scale = float(torch.tensor(np.abs(group).max() * ratio / 7).bfloat16())
            errors.append(np.square(np.clip(np.rint(group / scale), -8, 7) * scale - group).sum())
        assert np.square(rounded[n, columns] - group).sum() == pytest.approx(min(errors), rel=1e-5)


def test_rounding_beats_the_plain_scale_by_a_sixth_in_squared_error() -> None:
    weight = random_weight(64, 1024)
    groups = weight.view(64, -1, 64)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scale).round() * scale - groups).square().sum()
    assert (dequantize(quantize_to_nearest(weight, 64)) - weight).square().sum() < plain * 5 / 6


def test_weights_on_an_int4_grid_come_back_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-8, 8, (16, 128), generator=generator)
    values[:, ::32] = -8
    values[3, ::32] = 7  # a row that does not reach -8
    values[3] = values[3].clamp(min=-7)
    scale = torch.rand(16, 4, generator=generator).add_(0.1).bfloat16().float()
    weight = values * scale.repeat_interleave(32, dim=1)
    quantized = quantize_to_nearest(weight, 32)
    assert torch.equal(quantized.q_NK, (values + 8).to(torch.uint8))
    assert torch.equal(quantized.scale_NG, scale)
    assert torch.equal(dequantize(quantized), weight)


def test_rounding_in_pieces_and_from_16_bits_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(50, 64).bfloat16()
    whole = quantize_to_nearest(weight.float(), 32)
    monkeypatch.setattr("actors.weights.quantization.MAX_ROUNDED_VALUES", 64 * 7)
    pieces = quantize_to_nearest(weight, 32)
    assert torch.equal(pieces.q_NK, whole.q_NK) and torch.equal(pieces.scale_NG, whole.scale_NG)


def test_zeros_tiny_and_huge_weights_are_rounded_and_nan_is_refused() -> None:
    weight = torch.zeros(5, 32)
    weight[1] = 1e-42
    weight[2, 0] = 3e38
    weight[3] = -1.0
    weight[4, 7] = 1e-30
    rounded = dequantize(quantize_to_nearest(weight, 32))
    assert torch.isfinite(rounded).all()
    assert torch.equal(rounded[0], weight[0])
    torch.testing.assert_close(rounded[2:], weight[2:], rtol=5e-3, atol=0.0)
    for bad in (float("nan"), float("inf")):
        weight[0, 3] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantize_to_nearest(weight, 32)


def test_the_group_size_shrinks_until_it_divides() -> None:
    assert [fitting_group_size(256, size) for size in (128, 64, 32)] == [128, 64, 32]
    assert [fitting_group_size(size, 128) for size in (192, 96, 80, 32, 172)] == [64, 32, None, 32, None]


def test_weights_are_joined_when_they_are_alike() -> None:
    a, b = quantize_to_nearest(random_weight(8, 64), 32), quantize_to_nearest(random_weight(4, 64, 1), 32)
    zero_NG = torch.randint(0, 16, (4, 2), dtype=torch.uint8)
    shifted = QuantizedWeight(q_NK=b.q_NK, scale_NG=b.scale_NG, group_size=32, zero_NG=zero_NG)
    for second in (b, shifted):
        joined = concatenate([a, second])
        assert isinstance(joined, QuantizedWeight)
        assert torch.equal(dequantize(joined), torch.cat([dequantize(a), dequantize(second)]))
    dense = random_weight(4, 64)
    joined = concatenate([dense, dense])
    assert isinstance(joined, torch.Tensor) and torch.equal(joined, torch.cat([dense, dense]))
    assert concatenate([a, dense]) is None
    assert concatenate([a, quantize_to_nearest(random_weight(4, 64), 64)]) is None
    eight = QuantizedWeight(q_NK=b.q_NK, scale_NG=b.scale_NG, group_size=32, bits=8)
    assert concatenate([a, eight]) is None
    shifted = QuantizedWeight(q_NK=b.q_NK, scale_NG=b.scale_NG, group_size=32, zero_NG=zero_NG, bits=8)
    joined = concatenate([eight, shifted])
    assert isinstance(joined, QuantizedWeight) and joined.bits == 8
    assert torch.equal(dequantize(joined), torch.cat([dequantize(eight), dequantize(shifted)]))
