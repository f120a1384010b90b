"""A model's directory, local or on any fsspec URI: which files it has, and reading ranges of them.

Knows nothing of what is in the files. Used by `checkpoint` and `safetensors_headers`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from actors.architecture import CheckpointError

INDEX = "model.safetensors.index.json"
_SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_MAX_SMALL_BYTES = 256 << 20
_RANGE_BYTES = 16 << 20
"""Remote tensors are read in parallel ranges of this size."""

_RANGES_AT_ONCE = 8


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


@dataclass(slots=True)
class Directory:
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
            if name.endswith(_SMALL_SUFFIXES) and name != INDEX and size <= _MAX_SMALL_BYTES
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


def open_directory(uri: str) -> Directory:
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
    return Directory(uri, filesystem, path, sizes)


def _hub_hint(uri: str) -> str:
    if "://" in uri or uri.startswith(("/", ".", "~")) or uri.count("/") != 1:
        return ""
    return f"; models are not downloaded by name: fetch it first, for example with `hf download {uri} --local-dir DIR`"
