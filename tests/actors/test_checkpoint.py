"""Model directories: what is read, from where, with how many bytes; and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from actors.config import EngineConfig
from actors.decoder import load_decoder
from actors.weights.checkpoint import CheckpointError, check_model, load_tokenizer, open_checkpoint, open_filesystem


@pytest.fixture
def folder(model_zoo: Any, tmp_path: Path) -> Path:
    """A model directory of one's own, to break."""
    return Path(shutil.copytree(model_zoo.path("llama"), tmp_path / "model"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the small files of remote models are kept during the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shoal" / "models"


def upload(folder: Path, uri: str) -> None:
    filesystem, path = fsspec.core.url_to_fs(uri)
    for file in folder.iterdir():
        filesystem.pipe_file(f"{path}/{file.name}", file.read_bytes())


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def add_tokenizer(folder: Path) -> None:
    words = Tokenizer(WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)


# What is read, and from where


@pytest.mark.parametrize("shard_size", ["1GB", "50KB"], ids=["one-file", "shards"])
def test_every_tensor_comes_back_as_it_was_stored(model_zoo: Any, shard_size: str) -> None:
    path = model_zoo.path("qwen2", dtype=torch.bfloat16, shard_size=shard_size)
    assert (len(list(path.glob("*.safetensors"))) > 3) == (shard_size == "50KB")
    checkpoint = open_checkpoint(str(path))
    expected = model_zoo.reference(path, torch.bfloat16).state_dict()
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == torch.bfloat16 and torch.equal(read, tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
    assert checkpoint.dtype == torch.bfloat16


def test_a_tensor_outlives_its_file_and_can_be_written_to(folder: Path) -> None:
    weight = open_checkpoint(str(folder)).read("model.norm.weight")
    before = weight.clone()
    (folder / "model.safetensors").write_bytes(bytes((folder / "model.safetensors").stat().st_size))
    assert torch.equal(weight, before)
    weight += 1


def test_a_folder_of_links_is_read_as_the_hub_keeps_its_snapshots(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for file in folder.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert open_checkpoint(str(tmp_path / "snapshot")).architecture.num_layers == 3


def test_a_path_may_be_relative_or_in_the_home_or_a_file_uri(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for uri in ("model", "./model/", "~/model", f"file://{folder}"):
        assert open_checkpoint(uri).names()


def test_a_remote_model_is_read_by_ranges_and_only_small_files_are_copied(
    model_zoo: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_zoo.path("mistral", sliding_window=9, shard_size="100KB")
    upload(path, "memory://bucket/mistral")
    asked: list[tuple[str, int]] = []
    cat_file = MemoryFileSystem.cat_file

    def counting(self: Any, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        asked.append((path, end - start))
        return cat_file(self, path, start, end, **more)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counting)
    monkeypatch.setattr("actors.weights.model_directory._RANGE_BYTES", 5000)
    monkeypatch.setattr("actors.weights.model_directory._RANGES_AT_ONCE", 3)
    monkeypatch.setattr("actors.weights.safetensors_headers._FIRST_READ_BYTES", 1000)
    remote = open_checkpoint("memory://bucket/mistral")
    weight_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert sum(size for file, size in asked if file.endswith(".safetensors")) < weight_bytes / 10

    asked.clear()
    local = open_checkpoint(str(path))
    for name in local.names():
        assert torch.equal(remote.read(name), local.read(name))
    assert max(size for _, size in asked) == 5000
    assert sum(size for _, size in asked) == sum(t.nbytes for t in load_all(path).values())

    (copy,) = cache.iterdir()
    assert sorted(file.name for file in copy.iterdir()) == ["config.json", "generation_config.json"]

    config = EngineConfig(model="memory://bucket/mistral")
    decoder = load_decoder(remote, config, torch.device("cpu"), torch.float32)
    assert decoder.max_model_len == 256


def load_all(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_changed_remote_config_is_not_read_from_an_old_copy(folder: Path, cache: Path) -> None:
    upload(folder, "memory://bucket/changing")
    assert open_checkpoint("memory://bucket/changing").config.rms_norm_eps == 1e-6
    open_checkpoint("memory://bucket/changing")
    assert len(list(cache.iterdir())) == 1
    change_config(folder, rms_norm_eps=1e-3)
    upload(folder, "memory://bucket/changing")
    assert open_checkpoint("memory://bucket/changing").config.rms_norm_eps == 1e-3


def test_a_model_on_s3_is_read_through_the_endpoint_of_the_environment(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_module = pytest.importorskip("moto.server", reason="needs moto[server], one of the dev dependencies")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        add_tokenizer(folder)
        filesystem, _ = open_filesystem("s3://models")
        filesystem.mkdir("models")
        for file in folder.iterdir():
            filesystem.pipe_file(f"models/tiny/{file.name}", file.read_bytes())
        monkeypatch.setattr("actors.weights.model_directory._RANGE_BYTES", 10_000)
        remote, local = open_checkpoint("s3://models/tiny"), open_checkpoint(str(folder))
        for name in local.names():
            assert torch.equal(remote.read(name), local.read(name))
        assert load_tokenizer("s3://models/tiny").encode("hello world") == [0, 1]
        with pytest.raises(CheckpointError, match="s3://models/none is no directory"):
            open_checkpoint("s3://models/none")
        with pytest.raises(CheckpointError, match="s3://nobucket/tiny"):
            open_checkpoint("s3://nobucket/tiny")
    finally:
        server.stop()


def test_the_tokenizer_comes_from_local_and_remote_directories(folder: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer files"):
        load_tokenizer(str(folder))
    add_tokenizer(folder)
    upload(folder, "memory://bucket/with-tokenizer")
    for uri in (str(folder), "memory://bucket/with-tokenizer"):
        assert load_tokenizer(uri).encode("world hello moon") == [1, 0, 2]
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load_tokenizer(str(folder))


def test_code_that_comes_with_a_model_is_neither_run_nor_passed_over_in_silence(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(witness)!r}, 'w')\nclass Config: pass\nclass Tokenizer: pass\n")
    add_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    change_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert open_checkpoint(str(folder)).notes == ["config.json names Python code of its own (auto_map); it is not run"]
    load_tokenizer(str(folder))
    assert not witness.exists()


def test_eos_tokens_are_those_of_the_generation_config_else_of_the_config(folder: Path) -> None:
    assert open_checkpoint(str(folder)).eos_token_ids == ()
    change_config(folder, eos_token_id=5)
    assert open_checkpoint(str(folder)).eos_token_ids == (5,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert open_checkpoint(str(folder)).eos_token_ids == (7, 8)
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert open_checkpoint(str(folder)).eos_token_ids == (9,)


# Everything that can be wrong. check_model raises, and the message says what and where.


def message_of(folder: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_model(str(folder))
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_a_good_model_passes_and_no_weight_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.weights.checkpoint.Checkpoint.read", None)
    check_model(str(folder))
    check_model(str(folder), max_model_len=256)
    with pytest.raises(ValueError, match="max_model_len=300 is above the 256 positions"):
        check_model(str(folder), max_model_len=300)


def test_an_unknown_directory_is_named_with_a_hint_for_hub_names(tmp_path: Path) -> None:
    assert "is no directory with files" in message_of(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "is no directory with files" in message_of(tmp_path / "file")
    assert "hf download meta-llama/Llama-3.2-1B" in message_of("meta-llama/Llama-3.2-1B")
    assert "hf download" not in message_of("memory://bucket/nothing-here")
    assert "nosuch" in message_of("nosuch://bucket/model")


def test_a_directory_that_may_not_be_listed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("keys refused")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.ls", refuse)
    assert "cannot be listed: PermissionError: keys refused" in message_of(folder)


def test_a_missing_or_broken_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in message_of(folder)
    (folder / "config.json").write_text("[]")
    assert "it must be a JSON object" in message_of(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in message_of(folder)


def test_an_unsupported_architecture_is_named_with_those_supported(folder: Path) -> None:
    change_config(folder, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    message = message_of(folder)
    assert "GPT2LMHeadModel is not supported" in message
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert name in message
    change_config(folder, architectures=["LlamaForSequenceClassification"], model_type="llama")
    assert "LlamaForSequenceClassification is not supported" in message_of(folder)
    change_config(folder, architectures=["LlamaForCausalLM"], model_type="qwen3")
    assert "model_type 'qwen3'" in message_of(folder)
    change_config(folder, architectures=None, model_type="mamba")
    assert "model_type 'mamba' is not supported" in message_of(folder)
    change_config(folder, architectures=None, model_type="llama")
    check_model(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope type 'spiral' is not supported"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not supported",
        ),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "refused by transformers"),
        ({"hidden_size": "many"}, "refused by transformers"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8' is not supported"),
    ],
)  # fmt: skip
def test_settings_that_are_not_supported_are_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    assert message in message_of(folder)


def test_pickle_weights_are_refused_with_the_way_to_convert_them(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights" in message_of(folder)
    torch.save({}, folder / "pytorch_model.bin")
    message = message_of(folder)
    assert "pytorch_model.bin" in message and "save_pretrained" in message


def test_several_weight_files_without_an_index_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    check_model(str(folder))
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    assert "2 safetensors files (a.safetensors, ...) and no model.safetensors.index.json" in message_of(folder)


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 500, 100_000, -1])
def test_a_truncated_weight_file_is_named(folder: Path, num_bytes: int) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:num_bytes])
    message = message_of(folder)
    assert "model.safetensors" in message and "truncated" in message


def with_header(folder: Path, header: Any, num_data_bytes: int = 8) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(num_data_bytes)
    (folder / "model.safetensors").write_bytes(data)


def test_a_weight_file_that_contradicts_itself_is_named(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for header, num_data_bytes, message in [
        (b"{no", 0, "broken safetensors header"),
        (b"[]", 0, "broken safetensors header"),
        ({"a": {"dtype": "F32"}}, 8, "broken safetensors header"),
        ({"a": entry | {"shape": [3]}}, 8, "tensor a of shape (3,) and dtype F32 lies in 8 bytes"),
        ({"a": entry, "b": entry}, 8, "a hole or an overlap at byte"),
        ({"a": entry | {"data_offsets": [8, 16]}}, 16, "a hole or an overlap at byte"),
        ({"a": entry}, 9, "has bytes left over"),
    ]:
        with_header(folder, header, num_data_bytes)
        assert message in message_of(folder)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "is no safetensors file" in message_of(folder)


def test_an_index_that_does_not_fit_its_files_is_named(model_zoo: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_zoo.path("llama", shard_size="100KB"), tmp_path / "sharded"))
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    name, file = next(iter(index["weight_map"].items()))
    other = next(f for f in index["weight_map"].values() if f != file)
    index_file.write_text(json.dumps({"weight_map": {**index["weight_map"], name: other}}))
    assert f"tensor {name} is missing from {other}" in message_of(folder)
    index_file.write_text("{}")
    assert "has no weight_map" in message_of(folder)
    index_file.write_text(json.dumps(index))
    (folder / file).unlink()
    assert f"names {file}, which is not there" in message_of(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.v_proj.weight"))
    assert "tensor model.layers.1.self_attn.v_proj.weight is missing" in message_of(folder)


def test_a_shape_that_does_not_fit_is_named_with_the_one_expected(folder: Path) -> None:
    change_config(folder, intermediate_size=128)
    message = message_of(folder)
    assert "tensor model.layers.0.mlp.gate_proj.weight has shape [96, 64]; config.json makes it [128, 64]" in message
    change_config(folder, intermediate_size=96, vocab_size=100)
    assert "model.embed_tokens.weight has shape [97, 64]; config.json makes it [100, 64]" in message_of(folder)


def test_a_dtype_that_is_no_float_is_named(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    message = message_of(folder)
    assert f"tensor {name} of shape [96, 64] has dtype F8_E4M3; it must be one of F64, F32, F16, BF16" in message


def test_a_config_that_promises_packed_weights_must_find_them(folder: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    change_config(
        folder,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head"],
        },
    )
    assert "tensor model.layers.0.self_attn.q_proj.weight_packed is missing" in message_of(folder)


def test_a_file_that_changes_under_an_open_checkpoint_is_an_error_and_not_garbage(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match="the file has changed or is truncated"):
        checkpoint.read("model.norm.weight")
