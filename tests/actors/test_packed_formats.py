"""Packed layers of every format against an encoder that knows only the formats' descriptions, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from packed_encoder import (
    PlainWeight,
    encode_awq,
    encode_compressed_tensors,
    encode_gptq,
    random_plain_weight,
)

from actors.architecture import CheckpointError, LinearSpec
from actors.weights.packed_formats import PackedFormat
from actors.weights.packed_weights import UnpackedWeight, unpack_weight
from actors.weights.quantization_config import parse_quantization
from kernels.int4_linear import dequantize


def unpack(arrays: dict[str, np.ndarray], packed: PackedFormat, num_out: int, num_in: int) -> UnpackedWeight:
    """Decode a layer, after its arrays were found to be of the shapes that the format promises."""
    linear = LinearSpec("layer", num_out, num_in, False)
    for name, part in packed.parts(linear).items():
        assert name in arrays or not part.needed
        assert name not in arrays or arrays[name].shape == part.shape
    assert set(arrays) <= set(packed.parts(linear))
    return unpack_weight({name: torch.from_numpy(array) for name, array in arrays.items()}, linear, packed)


def assert_stands_for(unpacked: UnpackedWeight, plain: PlainWeight) -> None:
    """Bit for bit, as floats and in the groups of the kernels."""
    expected = torch.from_numpy(plain.decode())
    assert torch.equal(unpacked.to_float(), expected)
    regrouped = unpacked.regroup()
    if regrouped is None:
        assert unpacked.group_size % 32
        return
    assert regrouped.bits == plain.bits
    in_order = expected if unpacked.order_K is None else expected[:, unpacked.order_K]
    assert torch.equal(dequantize(regrouped), in_order)


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_decodes_bit_for_bit(
    bits: int, version: int, group_size: int | None, symmetric: bool, act_order: bool
) -> None:
    plain = random_plain_weight(64, 256, bits, group_size, symmetric, act_order)
    packed = PackedFormat("gptq", bits, group_size, symmetric, act_order, stored_zero_offset=2 - version)
    unpacked = unpack(encode_gptq(plain, version), packed, 64, 256)
    assert_stands_for(unpacked, plain)
    assert (unpacked.zero_NG is None) == symmetric
    assert (unpacked.order_K is None) == (not act_order or group_size is None)
    if not act_order:
        assert_stands_for(unpack(encode_gptq(plain, version, with_g_idx=False), packed, 64, 256), plain)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_awq_decodes_bit_for_bit(group_size: int | None, symmetric: bool) -> None:
    plain = random_plain_weight(40, 256, 4, group_size, symmetric)
    unpacked = unpack(encode_awq(plain), PackedFormat("awq", 4, group_size, symmetric=False), 40, 256)
    assert_stands_for(unpacked, plain)
    assert (unpacked.zero_NG is None) == symmetric


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [16, 32, 128, None])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_compressed_tensors_decodes_bit_for_bit(
    bits: int, group_size: int | None, symmetric: bool, act_order: bool
) -> None:
    plain = random_plain_weight(21, 256, bits, group_size, symmetric, act_order)
    packed = PackedFormat("compressed-tensors", bits, group_size, symmetric, act_order)
    assert_stands_for(unpack(encode_compressed_tensors(plain, symmetric, act_order), packed, 21, 256), plain)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("num_in", [8, 40, 72, 100])
def test_rows_that_end_within_a_word_are_cut(bits: int, num_in: int) -> None:
    plain = random_plain_weight(5, num_in, bits, None)
    packed = PackedFormat("compressed-tensors", bits, None, symmetric=True)
    unpacked = unpack(encode_compressed_tensors(plain), packed, 5, num_in)
    assert torch.equal(unpacked.to_float(), torch.from_numpy(plain.decode()))


def words(*values: int) -> np.ndarray:
    return np.array([values], dtype=np.uint32).view(np.int32)


def test_words_written_by_hand_are_read_as_the_formats_say() -> None:
    """The descriptions' own constants, so that encoder and decoder cannot err alike."""
    ones = {"scales": np.ones((1, 8), dtype=np.float16)}
    columns = np.repeat(words(0x76543210).T, 8, axis=1)
    for stored_zero, offset in ((0x77777777, 1), (0x88888888, 0)):
        arrays = {"qweight": columns, "qzeros": words(stored_zero), **ones}
        unpacked = unpack(arrays, PackedFormat("gptq", 4, None, True, stored_zero_offset=offset), 8, 8)
        assert unpacked.zero_NG is None and unpacked.q_NK.tolist() == [list(range(8))] * 8
    arrays = {"qweight": words(0x75316420), "qzeros": words(0x75316420), **ones}
    unpacked = unpack(arrays, PackedFormat("awq", 4, None, symmetric=False), 8, 1)
    assert unpacked.q_NK.flatten().tolist() == list(range(8))
    assert unpacked.zero_NG is not None and unpacked.zero_NG.flatten().tolist() == list(range(8))
    arrays = {"weight_packed": words(0x76543210, 0xFEDCBA98), "weight_scale": np.ones((1, 1), dtype=np.float32)}
    unpacked = unpack(arrays, PackedFormat("compressed-tensors", 4, None, symmetric=True), 1, 13)
    assert unpacked.q_NK.tolist() == [list(range(13))]
    # 0, 1, ... 7 in three bits each are 24 bits, 0xFAC688, and again.
    arrays["weight_packed"] = words(0x88FAC688, 0xC688FAC6, 0xFAC688FA)
    unpacked = unpack(arrays, PackedFormat("compressed-tensors", 3, None, symmetric=True), 1, 32)
    assert unpacked.q_NK.tolist() == [[*range(8)] * 4]


def with_their_encoder(
    weight: torch.Tensor, bits: int, group_size: int | None, symmetric: bool
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors as the compressed-tensors package packs them, and the weight as it decodes them."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=bits,
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
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_decoding_equals_the_compressed_tensors_package(
    bits: int, num_out: int, group_size: int | None, symmetric: bool
) -> None:
    pytest.importorskip("compressed_tensors", reason="the package that encodes is not installed")
    weight = torch.randn(num_out, 256, generator=torch.Generator().manual_seed(0)) + 0.3
    arrays, expected = with_their_encoder(weight, bits, group_size, symmetric)
    packed = PackedFormat("compressed-tensors", bits, group_size, symmetric)
    unpacked = unpack({name: tensor.numpy() for name, tensor in arrays.items()}, packed, num_out, 256)
    assert torch.equal(unpacked.to_float(), expected)
    regrouped = unpacked.regroup()
    if group_size == 16:
        assert regrouped is None
    else:
        assert regrouped is not None and regrouped.group_size == min(group_size or 256, 128)
        assert torch.equal(dequantize(regrouped), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: np.where(g == 3, 2, g), "put 64 inputs into each of the groups 0 to 3; its values from 0 to 2"),
        (lambda g: g + 1, "values from 1 to 4 do not"),
        (lambda g: g - 1, "values from -1 to 2 do not"),
    ],
)
def test_an_order_of_inputs_that_is_none_is_refused(change: Any, message: str) -> None:
    plain = random_plain_weight(8, 256, 4, 64, act_order=True)
    arrays = encode_gptq(plain, 2)
    arrays["g_idx"] = change(arrays["g_idx"])
    with pytest.raises(CheckpointError, match=f"layer layer: its g_idx of shape .256. must .*{message}"):
        unpack(arrays, PackedFormat("gptq", 4, 64, True, act_order=True), 8, 256)


def test_an_order_that_was_never_found_is_no_order() -> None:
    plain = random_plain_weight(8, 256, 4, 64)
    arrays = encode_compressed_tensors(plain, act_order=True)
    arrays["weight_g_idx"][:] = -1
    packed = PackedFormat("compressed-tensors", 4, 64, True, act_order=True)
    assert_stands_for(unpack(arrays, packed, 8, 256), plain)


def test_a_weight_shape_that_contradicts_the_layer_is_refused() -> None:
    arrays = encode_compressed_tensors(random_plain_weight(16, 64))
    arrays["weight_shape"] = np.array([16, 63])
    with pytest.raises(CheckpointError, match=r"layer.weight_shape says \[16, 63\]; config.json makes .* \[16, 64\]"):
        unpack(arrays, PackedFormat("compressed-tensors", 4, 32, True), 16, 64)


# Which layers are packed, and how


def group(weights: dict[str, Any] | None = None, *targets: str) -> dict[str, Any]:
    plain = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"targets": list(targets or ["Linear"]), "weights": plain | (weights or {})}


def compressed(weights: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group(weights)},
        "ignore": ["lm_head"],
        **more,
    }


def gptq(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, **more}


def awq(**more: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", **more}


UP, DOWN, QUERY = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.11.self_attn.q_proj"


def format_of(config: dict[str, Any], name: str) -> PackedFormat | None:
    rules = parse_quantization(config)
    assert rules is not None
    return rules.format_of(name)


def test_a_plain_checkpoint_has_no_rules() -> None:
    assert parse_quantization(None) is None


def test_compressed_tensors_targets_and_ignored_layers_are_names_patterns_or_every_linear() -> None:
    config = compressed(
        ignore=["lm_head", r"re:.*layers\.0\."],
        config_groups={
            "all": group({"group_size": 128}),
            "down": group({"strategy": "channel", "group_size": None, "num_bits": 8}, r"re:.*down_proj$"),
            "one": group({"num_bits": 3, "symmetric": False, "actorder": "group"}, DOWN) | {"format": "pack-quantized"},
        },
        format="mixed-precision",
    )
    for other in ("all", "down"):
        config["config_groups"][other]["format"] = "pack-quantized"
    assert format_of(config, "lm_head") is None
    assert format_of(config, "model.layers.0.mlp.up_proj") is None
    method = "compressed-tensors"
    assert format_of(config, UP) == PackedFormat(method, 4, 128, True)
    assert format_of(config, "model.layers.2.mlp.down_proj") == PackedFormat(method, 8, None, True)
    assert format_of(config, DOWN) == PackedFormat(method, 3, 32, False, act_order=True)
    assert format_of(compressed(ignore=[]), "lm_head") == PackedFormat(method, 4, 32, True)


def test_gptq_says_which_layers_are_plain_or_otherwise() -> None:
    v1 = PackedFormat("gptq", 4, 128, True, stored_zero_offset=1)
    assert format_of(gptq(), UP) == v1
    assert format_of(gptq(), "lm_head") is None and format_of(gptq(lm_head=True), "lm_head") == v1
    v2 = gptq(checkpoint_format="gptq_v2", group_size=-1, desc_act=True, sym=False, bits=8)
    assert format_of(v2, UP) == PackedFormat("gptq", 8, None, False, act_order=True)
    inside = gptq(modules_in_block_to_quantize=[["self_attn.k_proj", "self_attn.q_proj"], ["mlp.up_proj"]])
    assert format_of(inside, UP) == v1 and format_of(inside, QUERY) == v1 and format_of(inside, DOWN) is None
    dynamic = gptq(
        dynamic={
            r"-:.*layers\.0\.": {},
            r"+:.*\.mlp\.down": {"bits": 8, "group_size": 32},
            r".*layers\.1\.": {"desc_act": True},
        }
    )
    assert format_of(dynamic, "model.layers.0.mlp.down_proj") is None
    assert format_of(dynamic, DOWN) == PackedFormat("gptq", 8, 32, True, stored_zero_offset=1)
    assert format_of(dynamic, UP) == PackedFormat("gptq", 4, 128, True, act_order=True, stored_zero_offset=1)
    assert format_of(dynamic, QUERY) == v1


def test_awq_says_which_layers_are_plain() -> None:
    packed = PackedFormat("awq", 4, 128, symmetric=False)
    assert format_of(awq(version="GEMM"), UP) == packed
    assert format_of(awq(), "lm_head") is None
    mixed = awq(modules_to_not_convert=["down_proj", "layers.11.self_attn"])
    assert format_of(mixed, DOWN) is None and format_of(mixed, QUERY) is None and format_of(mixed, UP) == packed


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([], "quantization_config is a list; it must be an object"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported; supported: gptq .*; awq"),
        ({"quant_method": "fp8"}, "quant_method 'fp8' is not supported; .*compressed-tensors"),
        (gptq(bits=2), "bits is 2.*supported: 4, 8, 3.*Formats that can be read: gptq .*; awq .*; compressed-tensors"),
        (gptq(checkpoint_format="marlin"), "checkpoint_format is 'marlin'.*'gptq', 'gptq_v2'"),
        (gptq(is_marlin_format=True), "checkpoint_format is 'marlin'"),
        (gptq(checkpoint_format="bitblas"), "checkpoint_format is 'bitblas'"),
        (gptq(pack_dtype="int16"), "pack_dtype is 'int16'.*'int32'"),
        (gptq(group_size=0), "group_size is 0; it must be a positive integer or -1"),
        (gptq(group_size=None), "group_size is None"),
        (gptq(dynamic={"+:.*up": {"bits": 5}}), r"dynamic.\+:.\*up.bits is 5"),
        (gptq(dynamic={"-:*up": {}}), r"dynamic.-:\*up has the broken regular expression '\*up'"),
        (awq(version="gemv"), "version is 'gemv'.*supported: 'gemm'"),
        (awq(version="gemv_fast"), "version is 'gemv_fast'"),
        (awq(version="marlin"), "version is 'marlin'"),
        (awq(bits=8), "bits is 8.*supported: 4"),
        (awq(zero_point=False), "zero_point is False"),
        (compressed(format="float-quantized"), r"group_0.format is 'float-quantized'.*supported: 'pack-quantized'"),
        (compressed({"num_bits": 2}), r"weights.num_bits is 2.*supported: 4, 8, 3"),
        (compressed({"type": "float"}), r"weights.type is 'float'"),
        (compressed({"strategy": "tensor"}), r"weights.strategy is 'tensor'.*'group', 'channel'"),
        (compressed({"actorder": "strange"}), r"weights.actorder is 'strange'"),
        (compressed({"group_size": None}), r"group_size is None"),
        (compressed(quantization_status="frozen"), r"quantization_status is 'frozen'"),
        (compressed(config_groups={}), "no config_groups"),
        (compressed(config_groups={"W4A16": ["Linear"]}), "config_groups.W4A16 has no weights"),
        (compressed(ignore=["re:(x"]), r"ignore has the broken regular expression '\(x'"),
        (
            compressed(config_groups={"g": group() | {"input_activations": {"num_bits": 8}}}),
            "g.input_activations",
        ),
    ],
)
def test_what_is_not_supported_is_named_with_what_is(broken: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_quantization(broken)


@pytest.mark.parametrize(
    ("packed", "size", "message"),
    [
        (PackedFormat("gptq", 4, 64, True), (64, 96), "layer x: its input size 96 is not a multiple of group_size=64"),
        (PackedFormat("awq", 4, 64, False), (64, 96), "input size 96 is not a multiple of group_size=64"),
        (PackedFormat("compressed-tensors", 4, 64, True), (64, 96), "input size 96 is not a multiple"),
        (PackedFormat("gptq", 4, None, True), (60, 64), "its output size 60 in 4 bits does not fill whole 32-bit"),
        (PackedFormat("gptq", 4, None, True), (64, 60), "its input size 60 in 4 bits does not fill whole 32-bit"),
        (PackedFormat("awq", 4, None, False), (60, 64), "its output size 60 in 4 bits .* which awq needs"),
    ],
)
def test_sizes_that_a_format_cannot_hold_are_named(packed: PackedFormat, size: tuple[int, int], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        packed.parts(LinearSpec("x", *size, False))
