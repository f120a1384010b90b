"""int4 rounding against a search by brute force, decoding against an encoder of others, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from actors.architecture import CheckpointError, LinearSpec
from actors.quantization import (
    CLIP_RATIOS,
    PackedFormat,
    concatenate,
    fitting_group_size,
    parse_quantization,
    quantize_to_nearest,
    unpack_weight,
)
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
    monkeypatch.setattr("actors.quantization.MAX_ROUNDED_VALUES", 64 * 7)
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


def with_their_encoder(
    weight: torch.Tensor, group_size: int | None, symmetric: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors as the compressed-tensors package packs them, and the weight as it decodes them."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=4,
        type="int",
        symmetric=symmetric,
        strategy="group" if group_size else "channel",
        group_size=group_size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    groups = weight.view(weight.shape[0], -1, group_size or weight.shape[1])
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    packed = PackedQuantizationCompressor.compress(
        {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}, scheme
    )
    decoded = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    return packed, decoded


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 16, None])
@pytest.mark.parametrize("num_out", [16, 21])
def test_decoding_equals_the_compressed_tensors_package(num_out: int, group_size: int | None, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors", reason="the package that encodes is not installed")
    weight = random_weight(num_out, 256) + 0.3
    packed, expected = with_their_encoder(weight, group_size, symmetric)
    linear, format = LinearSpec("layer", num_out, 256, False), PackedFormat(group_size, symmetric)
    for name, shape in format.tensors(linear).items():
        assert tuple(packed[name.removeprefix("layer.")].shape) == shape
    unpacked = unpack_weight(
        packed["weight_packed"], packed["weight_scale"], packed.get("weight_zero_point"), linear, format
    )
    assert torch.equal(unpacked.to_float(), expected)
    regrouped = unpacked.regroup()
    if group_size == 16:
        assert regrouped is None
    else:
        assert regrouped is not None and regrouped.group_size == min(group_size or 256, 128)
        assert torch.equal(dequantize(regrouped), expected)


def test_words_hold_the_low_nibble_first() -> None:
    words = torch.tensor([[0x76543210, -0x01234568]], dtype=torch.int32)  # the second is 0xFEDCBA98
    unpacked = unpack_weight(
        words, torch.ones(1, 1), None, LinearSpec("layer", 1, 13, False), PackedFormat(None, symmetric=True)
    )
    assert unpacked.q_NK.tolist() == [list(range(13))]


def test_a_last_group_that_is_not_full_is_kept_apart() -> None:
    linear, format = LinearSpec("layer", 4, 96, False), PackedFormat(64, symmetric=True)
    packed = torch.randint(-(2**31), 2**31 - 1, (4, 12), dtype=torch.int32)
    unpacked = unpack_weight(packed, random_weight(4, 2), None, linear, format)
    regrouped = unpacked.regroup()
    assert regrouped is not None and regrouped.group_size == 32
    assert torch.equal(dequantize(regrouped), unpacked.to_float())


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


def config(weights: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        | (weights or {}),
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **more,
    }


def test_targets_and_ignored_layers_are_names_patterns_or_every_linear() -> None:
    parsed = parse_quantization(
        config(
            ignore=["lm_head", r"re:.*layers\.0\."],
            config_groups={
                "all": config({"group_size": 128})["config_groups"]["group_0"],
                "down": config({"strategy": "channel", "group_size": None})["config_groups"]["group_0"]
                | {"targets": [r"re:.*down_proj$"]},
            },
        )
    )
    assert parsed is not None
    assert parsed.format_of("lm_head") is None
    assert parsed.format_of("model.layers.0.mlp.up_proj") is None
    assert parsed.format_of("model.layers.1.mlp.up_proj") == PackedFormat(128, True)
    assert parsed.format_of("model.layers.1.mlp.down_proj") == PackedFormat(None, True)  # the group that names it
    assert parse_quantization(None) is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"quant_method": "gptq"}, r"quant_method 'gptq' is not supported; supported: compressed-tensors"),
        (config(format="float-quantized"), r"group_0.format is 'float-quantized'.*supported: 'pack-quantized'"),
        (config({"num_bits": 8}), r"weights.num_bits is 8.*supported: 4"),
        (config({"type": "float"}), r"weights.type is 'float'"),
        (config({"strategy": "tensor"}), r"weights.strategy is 'tensor'.*'group', 'channel'"),
        (config({"actorder": "group"}), r"weights.actorder is 'group'"),
        (config({"group_size": None}), r"group_size is None"),
        (config(quantization_status="frozen"), r"quantization_status is 'frozen'"),
        (config(config_groups={}), "no config_groups"),
        (config(config_groups={"W4A16": ["Linear"]}), "config_groups.W4A16 has no weights"),
        (
            config(config_groups={"g": config()["config_groups"]["group_0"] | {"input_activations": {"num_bits": 8}}}),
            "g.input_activations",
        ),
    ],
)
def test_what_is_not_supported_is_named(broken: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_quantization(broken)
