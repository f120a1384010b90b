"""Parquet files as whole objects with a word of Shoal's own in the footer.

Knows no rows and no columns; used by slices, results and the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage import FileInfo, Storage

METADATA_KEY = b"shoal"


class ParquetBuffer:
    """A Parquet file made batch by batch in memory: a store takes an object in one PUT or not at all."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        own = {"version": version("shoal"), **metadata}
        self._metadata = {METADATA_KEY: json.dumps(own).encode()}
        self._sink = pa.BufferOutputStream()
        self._writer: pq.ParquetWriter | None = None

    def start(self, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(self._sink, schema.with_metadata(self._metadata), compression="zstd")

    def write(self, table: pa.Table) -> None:
        if self._writer is None:
            self.start(table.schema)
        assert self._writer is not None
        self._writer.write_table(table.replace_schema_metadata(self._metadata))

    def finish(self) -> bytes:
        assert self._writer is not None
        self._writer.close()
        return self._sink.getvalue().to_pybytes()


def to_parquet(table: pa.Table, metadata: Mapping[str, Any]) -> bytes:
    """The bytes of a Parquet file with this metadata in its footer."""
    buffer = ParquetBuffer(metadata)
    buffer.write(table)
    return buffer.finish()


def read_metadata(output: Storage, file: FileInfo) -> dict[str, Any]:
    """What Shoal wrote into a Parquet file's footer; empty for a file that is not Shoal's or not readable."""
    try:
        with output.open_input(file.path, file.size_bytes) as source:
            metadata = pq.ParquetFile(source).metadata
            own = json.loads((metadata.metadata or {}).get(METADATA_KEY, b"{}"))
            return {**own, "num_rows": metadata.num_rows}
    except (pa.ArrowException, OSError, ValueError):
        return {}
