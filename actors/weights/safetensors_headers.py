"""Where every tensor of a model lies, from the headers of its safetensors files; what is wrong with them is refused.

Reads no weights. Called by `checkpoint`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from actors.architecture import CheckpointError
from actors.weights.model_directory import INDEX, Directory

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_HEADER_BYTES = 100 << 20
"""The limit of the safetensors format itself."""

_FIRST_READ_BYTES = 256 << 10
"""Usually holds the whole header, so that a remote file needs one request."""

DTYPES = {
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


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: bytes [start, start + num_bytes) of a file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def read_headers(directory: Directory) -> dict[str, StoredTensor]:
    """Where every tensor lies, from the headers of the one weight file or of all that the index names."""
    if INDEX not in directory.sizes:
        return _read_header(directory, _single_weight_file(directory))
    weight_map = directory.read_json(INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{directory.uri}/{INDEX} has no weight_map")
    stored: dict[str, dict[str, StoredTensor]] = {}
    for file in sorted(set(weight_map.values())):
        if file not in directory.sizes:
            raise CheckpointError(f"{directory.uri}: {INDEX} names {file}, which is not there")
        stored[file] = _read_header(directory, file)
    for name, file in weight_map.items():
        if name not in stored[file]:
            raise CheckpointError(f"{directory.uri}: tensor {name} is missing from {file}, where {INDEX} says it is")
    return {name: stored[file][name] for name, file in weight_map.items()}


def _single_weight_file(directory: Directory) -> str:
    files = sorted(name for name in directory.sizes if name.endswith(".safetensors"))
    if "model.safetensors" in files:
        return "model.safetensors"
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(
            f"{directory.uri} has {len(files)} safetensors files ({files[0]}, ...) and no {INDEX} "
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


def _read_header(directory: Directory, file: str) -> dict[str, StoredTensor]:
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


def _parse_header(header: dict[str, Any], file: str, data_start: int) -> Iterator[tuple[str, StoredTensor]]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        dtype = DTYPES.get(entry["dtype"])
        if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(f"tensor {name} of shape {shape} and dtype {entry['dtype']} lies in {end - begin} bytes")
        yield name, StoredTensor(file, entry["dtype"], shape, data_start + begin, end - begin)
