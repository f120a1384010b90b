"""Opens slice objects of a corpus for merges, with as few requests as their store can be asked with.

A merge of scattered shards reads every slice, and one of more shards than memory holds reads them again for each group:
what is read more than once is copied to this machine first. Knows no Ray and no rows.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from pipeline.storage import Storage

TAIL_BYTES = 256 * 2**10
"""What is read of a slice object with its footer: most are not larger, and one request is all that they take."""

COPY_BYTES = 4 * 2**30
"""Copies of slice objects on this machine, at most, and half of what is free there."""


class SliceObjects:
    """Slice objects of an output by their paths; a context, at whose end all copies go.

    sizes: in bytes, by path; 0 where it is not known. are_read_again: whether to copy them. Safe in several threads,
    each with other paths.
    """

    def __init__(self, output: Storage, sizes: Mapping[str, int], *, are_read_again: bool = False) -> None:
        self._output = output
        self._sizes = sizes
        self._are_copied = are_read_again and not output.is_local
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._bytes_left = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if self._are_copied:
            self._folder = tempfile.TemporaryDirectory(prefix="shoal-merge-")
            self._bytes_left = min(COPY_BYTES, shutil.disk_usage(self._folder.name).free // 2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def open(self, path: str) -> BinaryIO:
        """FileNotFoundError where there is none."""
        size = self._sizes.get(path, 0)
        if self._folder is not None and size:
            copy = Path(self._folder.name) / path.rpartition("/")[2]
            if copy.exists() or self._copy(path, size, copy):
                return copy.open("rb")
        return self._output.open_input(path, size or None, TAIL_BYTES)

    def _copy(self, path: str, size: int, copy: Path) -> bool:
        with self._lock:
            if size > self._bytes_left:
                return False
            self._bytes_left -= size
        (data,) = self._output.read_ranges(path, [(0, size)])
        copy.write_bytes(data)
        return True
