"""Whole directories of packed weights: they speak as their decoded weights, and contradictions in them are named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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
from paged_run import PagedRun
from safetensors.numpy import load_file, save_file

from actors.config import EngineConfig
from actors.decoder import Decoder, _Loader, load_decoder
from actors.weights.checkpoint import CheckpointError, open_checkpoint, open_filesystem
from kernels.int4_linear import QuantizedWeight, dequantize

SIZES = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
PROMPT = [int(token) for token in np.random.default_rng(0).integers(0, 96, 40)]

Packed = tuple[dict[str, np.ndarray], PlainWeight]
Pack = Callable[[str, int, int], Packed | None]
"""(layer, N, K) to the layer's stored arrays and what they stand for, or None for a plain layer."""


def write_packed(source: Path, target: Path, quantization: dict[str, Any], pack: Pack, **config: Any) -> dict[str, Any]:
    """Write a directory of three shards whose linear layers are random packed ones; return the decoded weights."""
    arrays: dict[str, np.ndarray] = {}
    decoded: dict[str, torch.Tensor] = {}
    for name, array in load_file(source / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        is_linear = layer.endswith("_proj") or layer == "lm_head"
        packed = pack(layer, *array.shape) if is_linear else None
        if packed is None:
            arrays[name] = array
            continue
        arrays.update({f"{layer}.{end}": part for end, part in packed[0].items()})
        decoded[name] = torch.from_numpy(packed[1].decode())
    target.mkdir()
    files = [f"model-{i + 1:05}-of-00003.safetensors" for i in range(3)]
    weight_map = {name: files[i % 3] for i, name in enumerate(sorted(arrays))}
    for file in files:
        save_file({name: arrays[name] for name in arrays if weight_map[name] == file}, target / file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    raw = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**raw, "quantization_config": quantization, **config}))
    return decoded


def seed_of(layer: str) -> int:
    return sum(layer.encode())


def input_of(layer: str) -> int:
    """The same number for layers of the same input, which have one order of it."""
    for inputs in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        if layer.endswith(inputs):
            layer = layer.rpartition(".")[0]
    return seed_of(layer)


def gptq(version: int = 1, bits: int = 4, group_size: int | None = 32, is_one_order: bool = True, **kind: Any) -> Pack:
    def pack(layer: str, num_out: int, num_in: int) -> Packed | None:
        if layer == "lm_head":
            return None
        order = input_of(layer) if is_one_order else seed_of(layer)
        plain = random_plain_weight(num_out, num_in, bits, group_size, seed=seed_of(layer), order_seed=order, **kind)
        return encode_gptq(plain, version), plain

    return pack


def gptq_mixed(layer: str, num_out: int, num_in: int) -> Packed | None:
    """Layer 0 plain, the down projections in 8 bits, the head packed."""
    if "layers.0." in layer:
        return None
    plain = random_plain_weight(num_out, num_in, 8 if "down" in layer else 4, seed=seed_of(layer))
    return encode_gptq(plain, 2), plain


def awq(layer: str, num_out: int, num_in: int) -> Packed | None:
    if layer == "lm_head" or "layers.1.self_attn" in layer or "gate_proj" in layer:
        return None
    plain = random_plain_weight(num_out, num_in, 4, 64, symmetric=False, seed=seed_of(layer))
    return encode_awq(plain), plain


COMPRESSED_BITS = {"q_proj": 3, "o_proj": 8, "down_proj": 8, "lm_head": 8, "v_proj": 16}


def compressed_mixed(layer: str, num_out: int, num_in: int) -> Packed | None:
    bits = COMPRESSED_BITS.get(layer.rpartition(".")[2], 4)
    if bits == 16:
        return None
    group_size = None if layer == "lm_head" else 64
    plain = random_plain_weight(num_out, num_in, bits, group_size, symmetric=bits != 8, seed=seed_of(layer))
    return encode_compressed_tensors(plain, symmetric=bits != 8), plain


def compressed_ordered(layer: str, num_out: int, num_in: int) -> Packed | None:
    if layer == "lm_head":
        return None
    plain = random_plain_weight(num_out, num_in, 4, 32, act_order=True, seed=seed_of(layer), order_seed=input_of(layer))
    return encode_compressed_tensors(plain, act_order=True), plain


def gptq_config(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, **more}


def compressed_config(groups: dict[str, tuple[dict[str, Any], list[str]]], ignore: list[str]) -> dict[str, Any]:
    base = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {
            name: {"targets": targets, "weights": {**base, **weights}} for name, (weights, targets) in groups.items()
        },
    }


COMPRESSED_MIXED = compressed_config(
    {
        "most": ({}, ["Linear"]),
        "three": ({"num_bits": 3}, ["re:.*q_proj$"]),
        "eight": ({"num_bits": 8, "symmetric": False}, ["re:.*(o|down)_proj$"]),
        "head": (
            {"num_bits": 8, "symmetric": False, "strategy": "channel", "group_size": None},
            ["lm_head"],
        ),
    },
    ignore=["re:.*v_proj"],
)
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 64,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["layers.1.self_attn", "gate_proj"],
}
GPTQ_MIXED = gptq_config(
    checkpoint_format="gptq_v2", lm_head=True, dynamic={r"-:.*layers\.0\.": {}, r".*down_proj": {"bits": 8}}
)

CASES: dict[str, tuple[dict[str, Any], Pack]] = {
    "gptq-v1": (gptq_config(), gptq()),
    "gptq-v2-asymmetric-g64": (
        gptq_config(checkpoint_format="gptq_v2", sym=False, group_size=64),
        gptq(2, group_size=64, symmetric=False),
    ),
    "gptq-act-order": (gptq_config(desc_act=True, sym=False), gptq(act_order=True, symmetric=False)),
    "gptq-an-order-per-layer": (gptq_config(desc_act=True), gptq(act_order=True, is_one_order=False)),
    "gptq-8-bits-channel": (gptq_config(bits=8, group_size=-1), gptq(bits=8, group_size=None)),
    "gptq-3-bits": (gptq_config(bits=3), gptq(bits=3)),
    "gptq-mixed-with-head": (GPTQ_MIXED, gptq_mixed),
    "awq-mixed": (AWQ, awq),
    "compressed-mixed-with-head": (COMPRESSED_MIXED, compressed_mixed),
    "compressed-act-order": (
        compressed_config({"all": ({"group_size": 32, "actorder": "group"}, ["Linear"])}, ["lm_head"]),
        compressed_ordered,
    ),
}


@pytest.fixture(scope="module")
def source(model_zoo: Any) -> Path:
    return model_zoo.path("qwen2", **SIZES)


def load(path: Path, **settings: Any) -> Decoder:
    config = EngineConfig(model=str(path), **settings)
    return load_decoder(open_checkpoint(str(path)), config, torch.device("cpu"), torch.float32)


def logits_of(decoder: Decoder) -> torch.Tensor:
    return PagedRun(decoder, 1, 40).step([(0, PROMPT)], wanted=list(range(40)))


@torch.inference_mode()
def reference_logits(model: Any) -> torch.Tensor:
    return model(torch.tensor([PROMPT])).logits[0].float()


@pytest.mark.parametrize("case", CASES)
def test_a_packed_model_speaks_as_its_decoded_weights(model_zoo: Any, source: Path, tmp_path: Path, case: str) -> None:
    decoded = write_packed(source, tmp_path / "packed", *CASES[case])
    checkpoint = open_checkpoint(str(tmp_path / "packed"))
    for linear in checkpoint.architecture.linears():
        weight = checkpoint.read_linear(linear)
        assert weight.dtype == torch.float32
        if (expected := decoded.get(f"{linear.name}.weight")) is not None:
            assert torch.equal(weight, expected)

    model = model_zoo.reference(source)
    assert not model.load_state_dict(decoded, strict=False).unexpected_keys
    expected = reference_logits(model)
    decoder = load(tmp_path / "packed", linear_compute="dense")
    torch.testing.assert_close(logits_of(decoder), expected, rtol=2e-4, atol=2e-4)
    assert ("inputs reordered" in " ".join(decoder.describe())) == ("order" in case)
    torch.testing.assert_close(
        logits_of(load(tmp_path / "packed", quantization="none")), expected, rtol=2e-4, atol=2e-4
    )

    # As the int4 product, which rounds activations to bfloat16: no further off than bfloat16 as a whole.
    their_error = (reference_logits(model.bfloat16()) - expected).square().mean().sqrt()
    error = logits_of(load(tmp_path / "packed", linear_compute="int4")) - expected
    assert error.square().mean().sqrt() <= 1.25 * their_error


def test_layers_of_other_bits_are_noted_and_described(source: Path, tmp_path: Path) -> None:
    write_packed(source, tmp_path / "packed", COMPRESSED_MIXED, compressed_mixed)
    decoder = load(tmp_path / "packed", linear_compute="int4")
    assert sorted(decoder.notes) == [
        "3 x 3-bit weights are multiplied as a copy in float32: no product takes them",
        "7 x 8-bit weights are multiplied as a copy in float32: no product takes them",
    ]
    ways = " ".join(decoder.describe())
    assert "copy of int3" in ways and "copy of int8" in ways and "int4 g64" in ways and "beside" in ways


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_on_a_gpu_four_and_eight_bits_stay_packed_and_three_are_noted(
    source: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[Any] = []
    monkeypatch.setattr("actors.decoder.prepare_linear", lambda weight, *_, **__: prepared.append(weight))
    config = EngineConfig(model=str(source))
    loader = _Loader(open_checkpoint(str(source)), config, torch.device("cuda"), torch.bfloat16)
    values = torch.randint(0, 2**bits, (16, 64), dtype=torch.uint8)
    weight = QuantizedWeight(values, torch.rand(16, 2), 32, bits=bits)
    loader._prepare(weight, None)
    if bits in (4, 8):
        assert prepared == [weight] and loader._notes() == []
    else:
        assert torch.equal(prepared[0], dequantize(weight).bfloat16())
        assert loader._notes() == [
            f"1 x {bits}-bit weights are multiplied as a copy in bfloat16: no product takes them"
        ]


def test_layers_of_one_input_and_order_are_one_product_and_others_stand_side_by_side(
    source: Path, tmp_path: Path
) -> None:
    write_packed(source, tmp_path / "one", *CASES["gptq-act-order"])
    write_packed(source, tmp_path / "many", *CASES["gptq-an-order-per-layer"])
    assert not any("beside" in way for way in load(tmp_path / "one", linear_compute="dense").describe())
    assert any("beside" in way for way in load(tmp_path / "many", linear_compute="dense").describe())


def test_a_stored_packed_head_counts_although_the_config_ties_it(model_zoo: Any, source: Path, tmp_path: Path) -> None:
    decoded = write_packed(source, tmp_path / "packed", COMPRESSED_MIXED, compressed_mixed, tie_word_embeddings=True)
    assert not open_checkpoint(str(tmp_path / "packed")).architecture.tied_head
    model = model_zoo.reference(source)
    model.load_state_dict(decoded, strict=False)
    logits = logits_of(load(tmp_path / "packed", linear_compute="dense"))
    torch.testing.assert_close(logits, reference_logits(model), rtol=2e-4, atol=2e-4)


def test_a_packed_model_is_read_from_s3_by_ranges_without_a_copy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_module = pytest.importorskip("moto.server", reason="needs moto[server], one of the dev dependencies")
    write_packed(source, tmp_path / "packed", *CASES["gptq-act-order"])
    for name, value in {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("actors.weights.model_directory._RANGE_BYTES", 5000)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        filesystem, _ = open_filesystem("s3://packed")
        filesystem.mkdir("packed")
        for file in (tmp_path / "packed").iterdir():
            filesystem.pipe_file(f"packed/gptq/{file.name}", file.read_bytes())
        config = EngineConfig(model="s3://packed/gptq", linear_compute="dense")
        remote = open_checkpoint("s3://packed/gptq")
        decoder = load_decoder(remote, config, torch.device("cpu"), torch.float32)
    finally:
        server.stop()
    assert torch.equal(logits_of(decoder), logits_of(load(tmp_path / "packed", linear_compute="dense")))
    copied = [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert copied == ["config.json"]


# Contradictions, found from headers before a weight is read


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Change the tensors of the shards, and the index with them."""
    weight_map: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        weight_map.update(dict.fromkeys(tensors, file.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def message_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert str(folder) in str(caught.value)
    return str(caught.value)


QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("gptq-v1", {"bits": 8}, f"{QUERY}.qweight has shape [16, 128]; config.json with its quantization_config "
         "(gptq, 8 bits, groups of 32) makes it [32, 128]"),
        ("gptq-v1", {"group_size": 64}, f"{QUERY}.qzeros has shape [4, 16]"),
        ("gptq-v1", {"group_size": 96}, f"layer {QUERY}: its input size 128 is not a multiple of group_size=96"),
        ("gptq-v1", {"lm_head": True}, "tensor lm_head.qweight is missing; config.json with its quantization_config "
         "(gptq, 4 bits, groups of 32) makes it [16, 96]. Of its layer there are lm_head.weight [96, 128]"),
        ("gptq-v1", {"quant_method": "awq"}, f"{QUERY}.qweight has shape [16, 128]; config.json with its "
         "quantization_config (awq, 4 bits, groups of 32) makes it [128, 16]"),
        ("awq-mixed", {"modules_to_not_convert": None}, "model.layers.0.mlp.gate_proj.qweight is missing"),
        ("awq-mixed", {"modules_to_not_convert": ["mlp"]},
         "tensor model.layers.0.mlp.up_proj.weight is missing; config.json makes it [256, 128]. Of its layer there are "
         "model.layers.0.mlp.up_proj.q"),
        ("compressed-mixed-with-head", {"ignore": []}, "v_proj.weight_packed is missing"),
        ("compressed-act-order", {"ignore": ["re:.*self_attn"]}, f"{QUERY}.weight is missing; config.json makes it "
         f"[128, 128]. Of its layer there are {QUERY}.bias [128], {QUERY}.weight_"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_the_tensors_is_named(
    source: Path, tmp_path: Path, case: str, changes: dict[str, Any], message: str
) -> None:
    write_packed(source, tmp_path / "packed", *CASES[case])
    change_config(tmp_path / "packed", **changes)
    assert message in message_of(tmp_path / "packed")


@pytest.mark.parametrize(
    ("case", "missing", "shape"),
    [
        ("gptq-act-order", "qweight", [16, 128]),
        ("gptq-act-order", "scales", [4, 128]),
        ("gptq-act-order", "qzeros", [4, 16]),
        ("gptq-act-order", "g_idx", [128]),
        ("compressed-act-order", "weight_scale", [128, 4]),
        ("compressed-act-order", "weight_g_idx", [128]),
    ],
)
def test_a_missing_part_of_a_packed_layer_is_named_with_its_shape(
    source: Path, tmp_path: Path, case: str, missing: str, shape: list[int]
) -> None:
    write_packed(source, tmp_path / "packed", *CASES[case])
    change_tensors(tmp_path / "packed", lambda tensors: tensors.pop(f"{QUERY}.{missing}", None))
    message = message_of(tmp_path / "packed")
    assert f"tensor {QUERY}.{missing} is missing; config.json with its quantization_config (" in message
    assert f"makes it {shape}. Of its layer there are {QUERY}." in message


def test_words_of_another_dtype_and_truncated_shards_are_named(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    write_packed(source, folder, *CASES["awq-mixed"])
    shutil.copytree(folder, tmp_path / "truncated")

    def widen(tensors: dict[str, np.ndarray]) -> None:
        if (name := f"{QUERY}.qweight") in tensors:
            tensors[name] = tensors[name].astype(np.int64)

    change_tensors(folder, widen)
    assert f"tensor {QUERY}.qweight of shape [128, 16] has dtype I64; it must be one of I32" in message_of(folder)
    shard = tmp_path / "truncated" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    message = message_of(tmp_path / "truncated")
    assert shard.name in message and "truncated" in message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_no_number_is_refused_while_it_is_read(source: Path, tmp_path: Path, value: float) -> None:
    write_packed(source, tmp_path / "packed", *CASES["gptq-v1"])

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        if (name := "model.layers.2.mlp.up_proj.scales") in tensors:
            tensors[name][2, 5] = value

    change_tensors(tmp_path / "packed", spoil)
    message = r"tensor model.layers.2.mlp.up_proj.scales of shape \[4, 256\] holds NaN or infinity"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "packed")


def test_a_bias_of_zeros_where_there_is_none_is_passed_over_and_one_that_counts_is_refused(
    source: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.o_proj.bias"
    write_packed(source, tmp_path / "packed", *CASES["gptq-v1"])
    expected = logits_of(load(tmp_path / "packed", linear_compute="dense"))
    last = sorted((tmp_path / "packed").glob("*.safetensors"))[-1]

    def store(bias: np.ndarray) -> None:
        save_file({**load_file(last), name: bias}, last)
        change_tensors(tmp_path / "packed", lambda tensors: None)

    store(np.zeros(128, dtype=np.float16))
    assert torch.equal(logits_of(load(tmp_path / "packed", linear_compute="dense")), expected)
    store(np.ones(128, dtype=np.float16))
    with pytest.raises(CheckpointError, match=rf"tensor {name} of shape \[128\] is not zero, but config.json gives"):
        load(tmp_path / "packed")


# Memory

MEASURE_PEAK = """
import re, sys, torch
from actors.weights.checkpoint import open_checkpoint
from actors.config import EngineConfig
from actors.decoder import load_decoder

def peak_bytes():  # not getrusage: its maximum is inherited from the parent process
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

config = EngineConfig(model=sys.argv[1], linear_compute="int4")
load_decoder(open_checkpoint(sys.argv[2]), config, torch.device("cpu"), torch.bfloat16)  # what is paid once
checkpoint = open_checkpoint(sys.argv[1])
before = peak_bytes()
decoder = load_decoder(checkpoint, config, torch.device("cpu"), torch.bfloat16)
print(peak_bytes() - before)
"""

LARGE = {
    "vocab_size": 8000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


def fast_pack(kind: str) -> Pack:
    """The same packed layer again for each layer of its shape: encoding 300 MB bit by bit would take minutes."""
    made: dict[tuple[int, int], Packed] = {}

    def pack(layer: str, num_out: int, num_in: int) -> Packed | None:
        if layer == "lm_head":
            return None
        if (num_out, num_in) not in made:
            plain = random_plain_weight(num_out, num_in, 4, 128, symmetric=False, act_order=kind == "act-order")
            encoded = encode_awq(plain) if kind == "awq" else encode_gptq(plain)
            made[num_out, num_in] = encoded, plain
        return made[num_out, num_in]

    return pack


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc; runs on Linux")
@pytest.mark.parametrize("kind", ["awq", "act-order"])
def test_loading_peaks_below_the_packed_bytes_and_15_percent_and_a_layer(
    model_zoo: Any, tmp_path: Path, kind: str
) -> None:
    """As torch multiplies packed int4, in bfloat16; a layer is counted as it is stored."""
    source = model_zoo.path("llama", dtype=torch.float16, **LARGE)
    quantization = gptq_config(group_size=128, sym=False, desc_act=kind == "act-order")
    if kind == "awq":
        quantization = {"quant_method": "awq", "bits": 4, "group_size": 128}
    write_packed(source, tmp_path / "packed", quantization, fast_pack(kind))
    small = model_zoo.path("llama", dtype=torch.float16, **{**LARGE, "num_hidden_layers": 1, "vocab_size": 96})
    write_packed(small, tmp_path / "small", quantization, fast_pack(kind))

    model_bytes = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    checkpoint = open_checkpoint(str(tmp_path / "packed"))
    layer_bytes = sum(checkpoint.read(name).nbytes for name in checkpoint.names() if name.startswith("model.layers.0."))
    assert model_bytes > 120 << 20
    arguments = [str(tmp_path / "packed"), str(tmp_path / "small")]
    done = subprocess.run([sys.executable, "-c", MEASURE_PEAK, *arguments], capture_output=True, text=True, check=True)
    peak = int(done.stdout)
    print(f"{kind}: model {model_bytes >> 20} MiB, layer {layer_bytes / 2**20:.1f} MiB, peak {peak >> 20} MiB")
    assert 0.8 * model_bytes < peak < 1.15 * model_bytes + layer_bytes
