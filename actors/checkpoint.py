"""Reads Hugging Face model directories, local or on any fsspec URI: configuration, tokenizer, safetensors.

Everything that can be wrong with a directory is found here from its config.json and its safetensors headers, before a
weight is read. Weights come one at a time, by ranges of bytes; nothing is copied to disk but the small files. Pickle
weights and remote code are refused. Knows no layers beyond what `architecture` says. Called by the decoder, by whoever
needs a tokenizer, and by the driver before it starts anything.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from actors.architecture import Architecture, CheckpointError, LinearSpec, architecture_name, read_architecture
from actors.packed_formats import FLOATS, LayerRules, PackedFormat
from actors.packed_weights import UnpackedWeight, unpack_weight
from actors.quantization_config import parse_quantization
from actors.rotary import resolve_max_model_len, rope_type

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "check_model",
    "load_tokenizer",
    "open_checkpoint",
    "open_filesystem",
]

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_MAX_SMALL_BYTES = 256 << 20
_MAX_HEADER_BYTES = 100 << 20
"""The limit of the safetensors format itself."""

_FIRST_READ_BYTES = 256 << 10
"""Usually holds the whole header, so that a remote file needs one request."""

_RANGE_BYTES = 16 << 20
"""Remote tensors are read in parallel ranges of this size."""

_RANGES_AT_ONCE = 8

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def open_filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URI, and the path in it. S3 honours AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL."""
    options: dict[str, Any] = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint and uri.startswith(("s3://", "s3a://")):
        options["client_kwargs"] = {"endpoint_url": endpoint}
    try:
        filesystem, path = fsspec.core.url_to_fs(str(Path(uri).expanduser()) if "://" not in uri else uri, **options)
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"{uri}: {error}") from error
    return filesystem, path.rstrip("/")


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    """Where a tensor lies: bytes [start, start + num_bytes) of a file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(slots=True)
class _Directory:
    """A model directory: its files and their sizes, and reading them."""

    uri: str
    filesystem: Any
    path: str
    sizes: dict[str, int]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, LocalFileSystem)

    def read(self, name: str, start: int, num_bytes: int) -> bytearray:
        """A range of a file, in memory of its own."""
        path = f"{self.path}/{name}"
        if self.is_local:
            data = bytearray(num_bytes)
            with open(path, "rb") as file:  # noqa: PTH123
                file.seek(start)
                num_read = file.readinto(data)
        else:
            data, num_read = self._read_ranges(path, start, num_bytes)
        if num_read != num_bytes:
            raise CheckpointError(
                f"{self.uri}/{name}: {num_bytes} bytes wanted at {start}, {num_read} came; "
                "the file has changed or is truncated"
            )
        return data

    def _read_ranges(self, path: str, start: int, num_bytes: int) -> tuple[bytearray, int]:
        """The range and how many bytes of it came, with few of its parts beside it in memory at a time."""
        data, num_read, end = bytearray(num_bytes), 0, start + num_bytes
        batch_bytes = _RANGES_AT_ONCE * _RANGE_BYTES
        for batch in range(start, end, batch_bytes):
            begins = range(batch, min(batch + batch_bytes, end), _RANGE_BYTES)
            ends = [min(begin + _RANGE_BYTES, end) for begin in begins]
            for part in self.filesystem.cat_ranges([path] * len(ends), list(begins), ends):
                data[num_read : num_read + len(part)] = part
                num_read += len(part)
        return data, num_read

    def read_json(self, name: str) -> dict[str, Any]:
        text = self.read(name, 0, self.sizes[name])
        try:
            parsed = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{self.uri}/{name} is not JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise CheckpointError(f"{self.uri}/{name} holds a {type(parsed).__name__}; it must be a JSON object")
        return parsed

    def small_files(self) -> list[str]:
        """What transformers may want for a config or a tokenizer."""
        return sorted(
            name
            for name, size in self.sizes.items()
            if name.endswith(_SMALL_SUFFIXES) and name != _INDEX and size <= _MAX_SMALL_BYTES
        )

    def local_copy(self) -> Path:
        """A local folder with the small files: the directory itself, or a copy in the user's cache.

        The copy is named by the files' identities (size, time, etag), so a changed file is never read from an old copy;
        it appears whole, and several processes may make it at once.
        """
        if self.is_local:
            return Path(self.path)
        names = self.small_files()
        identity = [(name, self.filesystem.ukey(f"{self.path}/{name}")) for name in names]
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal" / "models"
        target = root / fsspec.utils.tokenize(self.uri, identity)
        if target.is_dir():
            return target
        root.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=root, prefix=".unfinished-"))
        try:
            for name in names:
                (unfinished / name).write_bytes(self.read(name, 0, self.sizes[name]))
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same files
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return target


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
    _directory: _Directory
    _tensors: dict[str, _StoredTensor] = field(repr=False)

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
        dtype = _DTYPES[stored.dtype]
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
        return _DTYPES[self._stored("model.embed_tokens.weight").dtype]

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

    def _stored(self, name: str) -> _StoredTensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.uri}: tensor {name} is missing")
        return self._tensors[name]


def open_checkpoint(uri: str) -> Checkpoint:
    """Open a model directory and check all of it that can be checked without reading weights.

    CheckpointError, naming the thing, for: no such directory, no or a broken config.json, an architecture, activation,
    rope scaling or quantization that is not supported, pickle weights, broken or truncated safetensors, a missing
    tensor, a shape or dtype that does not fit.
    """
    directory = _open_directory(uri)
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
        _tensors=_read_headers(directory),
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
    directory = _open_directory(uri)
    if not any(name.startswith(("tokenizer", "vocab", "merges", "spiece")) for name in directory.sizes):
        raise CheckpointError(f"{uri} has no tokenizer files (tokenizer.json or the like)")
    folder = directory.local_copy()
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises all kinds here: KeyError, OSError, the tokenizer's own
        raise CheckpointError(f"{uri}: the tokenizer cannot be loaded: {error}") from error


def _open_directory(uri: str) -> _Directory:
    filesystem, path = open_filesystem(uri)
    filesystem.invalidate_cache(path)
    try:
        listing = filesystem.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        listing = []
    except Exception as error:  # each filesystem has its own kinds for a refused or unreachable store
        raise CheckpointError(f"{uri} cannot be listed: {type(error).__name__}: {error}") from error
    sizes = {
        entry["name"].rstrip("/").rpartition("/")[2]: int(entry["size"])
        for entry in listing
        if entry["type"] != "directory" and entry["name"].rstrip("/") != path
    }
    if not sizes:
        raise CheckpointError(f"{uri} is no directory with files in it{_hub_hint(uri)}")
    return _Directory(uri, filesystem, path, sizes)


def _hub_hint(uri: str) -> str:
    if "://" in uri or uri.startswith(("/", ".", "~")) or uri.count("/") != 1:
        return ""
    return f"; models are not downloaded by name: fetch it first, for example with `hf download {uri} --local-dir DIR`"


def _load_config(directory: _Directory) -> Any:
    folder = directory.local_copy()
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # validation errors of many kinds: KeyError for rope, StrictDataclassError, TypeError
        raise CheckpointError(f"config.json is refused by transformers: {type(error).__name__}: {error}") from error


def _eos_token_ids(directory: _Directory, config: Any) -> tuple[int, ...]:
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


def _read_headers(directory: _Directory) -> dict[str, _StoredTensor]:
    """Where every tensor lies, from the headers of the one weight file or of all that the index names."""
    if _INDEX not in directory.sizes:
        return _read_header(directory, _single_weight_file(directory))
    weight_map = directory.read_json(_INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{directory.uri}/{_INDEX} has no weight_map")
    stored: dict[str, dict[str, _StoredTensor]] = {}
    for file in sorted(set(weight_map.values())):
        if file not in directory.sizes:
            raise CheckpointError(f"{directory.uri}: {_INDEX} names {file}, which is not there")
        stored[file] = _read_header(directory, file)
    for name, file in weight_map.items():
        if name not in stored[file]:
            raise CheckpointError(f"{directory.uri}: tensor {name} is missing from {file}, where {_INDEX} says it is")
    return {name: stored[file][name] for name, file in weight_map.items()}


def _single_weight_file(directory: _Directory) -> str:
    files = sorted(name for name in directory.sizes if name.endswith(".safetensors"))
    if "model.safetensors" in files:
        return "model.safetensors"
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(
            f"{directory.uri} has {len(files)} safetensors files ({files[0]}, ...) and no {_INDEX} "
            "that says what is in them"
        )
    pickles = sorted(name for name in directory.sizes if name.endswith(_PICKLE_SUFFIXES))
    if pickles:
        raise CheckpointError(
            f"{directory.uri} has only pickle weights ({pickles[0]}), which can run code when read and are refused. "
            "Where you trust them, convert: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT) "
            "writes safetensors"
        )
    raise CheckpointError(f"{directory.uri} has no weights: no *.safetensors file")


def _read_header(directory: _Directory, file: str) -> dict[str, _StoredTensor]:
    """Parse and check a safetensors header (github.com/huggingface/safetensors#format).

    Eight bytes of length, JSON with dtype, shape and byte range of each tensor, then the data without holes.
    """
    where, file_bytes = f"{directory.uri}/{file}", directory.sizes[file]
    if file_bytes < 8:
        raise CheckpointError(f"{where} is truncated: {file_bytes} bytes are too few for a safetensors header")
    start = directory.read(file, 0, min(file_bytes, _FIRST_READ_BYTES))
    header_bytes = int.from_bytes(start[:8], "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise CheckpointError(f"{where} is no safetensors file: its first 8 bytes say a header of {header_bytes} bytes")
    data_start = 8 + header_bytes
    if data_start > file_bytes:
        raise CheckpointError(f"{where} is truncated: a header of {header_bytes} bytes in a file of {file_bytes}")
    if data_start > len(start):
        start += directory.read(file, len(start), data_start - len(start))
    try:
        header = json.loads(start[8:data_start])
        tensors = dict(_parse_header(header, file, data_start))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} has a broken safetensors header: {error}") from error
    end = data_start
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.num_bytes)):
        if stored.start != end:
            raise CheckpointError(f"{where} has a broken safetensors header: a hole or an overlap at byte {end}")
        end += stored.num_bytes
    if end != file_bytes:
        state = "is truncated" if file_bytes < end else "has bytes left over"
        raise CheckpointError(f"{where} {state}: its header describes {end} bytes and it has {file_bytes}")
    return tensors


def _parse_header(header: dict[str, Any], file: str, data_start: int) -> Iterator[tuple[str, _StoredTensor]]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"tensor {name} of shape {shape} and dtype {entry['dtype']} lies in {end - begin} bytes")
        yield name, _StoredTensor(file, entry["dtype"], shape, data_start + begin, end - begin)


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
