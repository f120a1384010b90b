"""Reads Hugging Face model directories, local or on any fsspec URI: configuration, tokenizer, safetensors.

Everything that can be wrong with a directory is found here from its config.json and its safetensors headers, before a
weight is read. Weights come one at a time, by ranges of bytes; nothing is copied to disk but the small files. Pickle
weights and remote code are refused. Knows no layers beyond what `architecture` says. Called by the decoder, by whoever
needs a tokenizer, and by the driver before it starts anything.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from actors.architecture import Architecture, CheckpointError, LinearSpec, architecture_name, read_architecture
from actors.rotary import resolve_max_model_len, rope_type
from actors.weights.model_directory import Directory, open_directory, open_filesystem
from actors.weights.packed_formats import FLOATS, LayerRules, PackedFormat
from actors.weights.packed_weights import UnpackedWeight, unpack_weight
from actors.weights.quantization_config import parse_quantization
from actors.weights.safetensors_headers import DTYPES, StoredTensor, read_headers

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "check_model",
    "load_tokenizer",
    "open_checkpoint",
    "open_filesystem",
]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Checkpoint:
    """A checked model directory: every tensor that the architecture needs is there, with the right shape.

    config: transformers' configuration. architecture: what of it matters here.
    quantization: how layers are packed; None for plain weights.
    eos_token_ids: which tokens end an answer, as generation_config.json or else config.json says.
    notes: settings of the checkpoint that are ignored.
    """

    uri: str
    config: Any
    architecture: Architecture
    quantization: LayerRules | None
    eos_token_ids: tuple[int, ...]
    notes: list[str]
    _directory: Directory
    _tensors: dict[str, StoredTensor] = field(repr=False)

    def names(self) -> list[str]:
        """The names of all stored tensors."""
        return list(self._tensors)

    def has(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored, on the CPU, in memory of its own. CheckpointError for NaN and infinity in it."""
        stored = self._stored(name)
        dtype = DTYPES[stored.dtype]
        if stored.num_bytes == 0:
            return torch.empty(stored.shape, dtype=dtype)
        data = self._directory.read(stored.file, stored.start, stored.num_bytes)
        tensor = torch.frombuffer(data, dtype=dtype).view(stored.shape)
        if stored.dtype in FLOATS and not all(math.isfinite(bound) for bound in tensor.aminmax()):
            raise CheckpointError(f"{self.uri}: tensor {name} of shape {list(stored.shape)} holds NaN or infinity")
        return tensor

    def read_packed(self, linear: LinearSpec, device: torch.device | None = None) -> UnpackedWeight:
        """Read and decode a packed linear layer (one that has a packed_format), on `device` if one is given."""
        packed = self.packed_format(linear.name)
        assert packed is not None
        parts = {}
        for part in packed.parts(linear):
            if self.has(name := f"{linear.name}.{part}"):
                tensor = self.read(name)
                parts[part] = tensor if device is None else tensor.to(device)
        try:
            return unpack_weight(parts, linear, packed)
        except CheckpointError as error:
            raise CheckpointError(f"{self.uri}: {error}") from error

    def read_bias(self, linear: LinearSpec) -> Tensor | None:
        """The bias of a linear layer; None where it has none.

        GPTQ's first tools stored zeros for layers without: passed over, while a bias that counts is a CheckpointError.
        """
        name = f"{linear.name}.bias"
        if linear.has_bias:
            return self.read(name)
        if self.has(name) and bool(self.read(name).any()):
            raise CheckpointError(
                f"{self.uri}: tensor {name} of shape {list(self.shape(name))} is not zero, but config.json gives the "
                "layer no bias"
            )
        return None

    def read_linear(self, linear: LinearSpec) -> Tensor:
        """The weight [N, K] of a linear layer as float32 on the CPU, decoded if it is packed."""
        if self.packed_format(linear.name) is None:
            return self.read(f"{linear.name}.weight").float()
        return self.read_packed(linear).to_float()

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the stored embedding, which is that of all weights not quantised."""
        return DTYPES[self._stored("model.embed_tokens.weight").dtype]

    def packed_format(self, linear_name: str) -> PackedFormat | None:
        """How a linear layer is packed, or None when it has a plain weight."""
        return None if self.quantization is None else self.quantization.format_of(linear_name)

    def check_tensor(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], source: str = "config.json"
    ) -> None:
        """Raise CheckpointError unless the tensor is there, with this shape and one of these dtypes.

        source: what makes the shape so.
        """
        if name not in self._tensors:
            layer = name.rpartition(".")[0] + "."
            beside = [f"{other} {list(self.shape(other))}" for other in self._tensors if other.startswith(layer)]
            raise CheckpointError(
                f"{self.uri}: tensor {name} is missing; {source} makes it {list(shape)}"
                + (f". Of its layer there are {', '.join(beside)}" if beside else "")
            )
        stored = self._tensors[name]
        if stored.shape != shape:
            raise CheckpointError(
                f"{self.uri}: tensor {name} has shape {list(stored.shape)}; {source} makes it {list(shape)}"
            )
        if stored.dtype not in dtypes:
            raise CheckpointError(
                f"{self.uri}: tensor {name} of shape {list(shape)} has dtype {stored.dtype}; "
                f"it must be one of {', '.join(dtypes)}"
            )

    def _stored(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.uri}: tensor {name} is missing")
        return self._tensors[name]


def open_checkpoint(uri: str) -> Checkpoint:
    """Open a model directory and check all of it that can be checked without reading weights.

    CheckpointError, naming the thing, for: no such directory, no or a broken config.json, an architecture, activation,
    rope scaling or quantization that is not supported, pickle weights, broken or truncated safetensors, a missing
    tensor, a shape or dtype that does not fit.
    """
    directory = open_directory(uri)
    if "config.json" not in directory.sizes:
        raise CheckpointError(f"{uri} has no config.json; a Hugging Face model directory is needed")
    raw_config = directory.read_json("config.json")
    try:
        name = architecture_name(raw_config)
        quantization = parse_quantization(_quantization_config(raw_config))
        config = _load_config(directory)
        architecture = read_architecture(name, config)
        rope_type(config)  # refuses a scaling that is not supported
    except CheckpointError as error:
        raise CheckpointError(f"{uri}: {error}") from error
    checkpoint = Checkpoint(
        uri=uri,
        config=config,
        architecture=architecture,
        quantization=quantization,
        eos_token_ids=_eos_token_ids(directory, config),
        notes=_ignored_settings(raw_config),
        _directory=directory,
        _tensors=read_headers(directory),
    )
    if architecture.tied_head and _has_packed_head(checkpoint):
        checkpoint.architecture = replace(architecture, tied_head=False)
    _check_tensors(checkpoint)
    return checkpoint


def check_model(uri: str, max_model_len: int | None = None) -> None:
    """Raise ValueError unless `uri` is a model that can be run, with rows of this length; no weights are read.

    All that is wrong with the directory itself is a CheckpointError.
    """
    resolve_max_model_len(open_checkpoint(uri).config, max_model_len)


def load_tokenizer(uri: str) -> Any:
    """The transformers tokenizer of a model directory; never runs code that comes with it."""
    directory = open_directory(uri)
    if not any(name.startswith(("tokenizer", "vocab", "merges", "spiece")) for name in directory.sizes):
        raise CheckpointError(f"{uri} has no tokenizer files (tokenizer.json or the like)")
    folder = directory.local_copy()
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises all kinds here: KeyError, OSError, the tokenizer's own
        raise CheckpointError(f"{uri}: the tokenizer cannot be loaded: {error}") from error


def _load_config(directory: Directory) -> Any:
    folder = directory.local_copy()
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # validation errors of many kinds: KeyError for rope, StrictDataclassError, TypeError
        raise CheckpointError(f"config.json is refused by transformers: {type(error).__name__}: {error}") from error


def _eos_token_ids(directory: Directory, config: Any) -> tuple[int, ...]:
    ids = None
    if "generation_config.json" in directory.sizes:
        ids = directory.read_json("generation_config.json").get("eos_token_id")
    if ids is None:
        ids = config.eos_token_id
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _quantization_config(raw_config: dict[str, Any]) -> Any:
    """Older compressed-tensors directories have it by another name."""
    return raw_config.get("quantization_config") or raw_config.get("compression_config")


def _ignored_settings(raw_config: dict[str, Any]) -> list[str]:
    notes = []
    if raw_config.get("auto_map"):
        notes.append("config.json names Python code of its own (auto_map); it is not run")
    if (_quantization_config(raw_config) or {}).get("kv_cache_scheme"):
        notes.append("quantization_config.kv_cache_scheme is ignored: keys and values are kept unquantised")
    for note in notes:
        logger.warning("%s", note)
    return notes


def _has_packed_head(checkpoint: Checkpoint) -> bool:
    """Whether a head of its own is stored packed: it counts even where config.json ties the head to the embedding."""
    is_packed = checkpoint.packed_format("lm_head") is not None
    return is_packed and any(checkpoint.has(f"lm_head.{end}") for end in ("qweight", "weight_packed"))


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Every tensor that will be read: is it there, of this shape, of a usable dtype."""
    for name, shape in checkpoint.architecture.other_tensors():
        checkpoint.check_tensor(name, shape, FLOATS)
    for linear in checkpoint.architecture.linears():
        _check_linear(checkpoint, linear)
        if linear.has_bias:
            checkpoint.check_tensor(f"{linear.name}.bias", (linear.num_out,), FLOATS)


def _check_linear(checkpoint: Checkpoint, linear: LinearSpec) -> None:
    packed = checkpoint.packed_format(linear.name)
    if packed is None:
        checkpoint.check_tensor(f"{linear.name}.weight", (linear.num_out, linear.num_in), FLOATS)
        return
    try:
        parts = packed.parts(linear)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.uri}: {error}") from error
    source = f"config.json with its quantization_config ({packed})"
    for end, part in parts.items():
        name = f"{linear.name}.{end}"
        if part.needed or checkpoint.has(name):
            checkpoint.check_tensor(name, part.shape, part.dtypes, source)
