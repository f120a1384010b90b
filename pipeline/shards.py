"""The input's files: found, checked by their footers, and kept as a few numbers each. A Batch file (.jsonl) has no
footer: its lines are counted.

Knows no prompts and no tokens. Called by the driver before anything is computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as types

from pipeline.batch.batch_jsonl import JsonlFile, read_lines
from pipeline.job import JSONL_SUFFIXES, Job, JobError
from pipeline.storage import FileInfo, Storage, StorageError, is_glob, public_uri, split_glob, split_uri

_FOOTER_THREADS = 16
_MAX_PRE_BUFFER_BYTES = 128 * 2**20
_BUFFER_BYTES = 8 * 2**20
_NUM_NAMED_REASONS = 5


class ShardError(ValueError):
    """One input file cannot be read, or is not what it was when the run began; other shards are not concerned."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file. `name` is the stem of its file name and names its results; `etag` tells its version."""

    name: str
    uri: str
    size_bytes: int
    etag: str
    num_rows: int
    is_batch_jsonl: bool = False


@dataclass(frozen=True, slots=True)
class ShardList:
    """The shards of a job, largest first, and the files that cannot be used as (name, reason)."""

    good: list[Shard]
    bad: list[tuple[str, str]]


def list_shards(job: Job) -> ShardList:
    """Find the job's input files and check each by its footer; only a few numbers per file stay in memory.

    A file that is not Parquet, or lacks what the others have, is in `bad`. Of a job over Batch files each is read whole
    to count its lines; whatever they hold, it is good. JobError if nothing is found, if two
    files would write the same results, or if no file at all can be used.
    """
    files = _find_files(job)
    names = _name_files(files)
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda file: _check_file(job, file), files))
    good, bad = [], []
    for name, file, footer in zip(names, files, footers):
        if isinstance(footer, int):
            good.append(Shard(name, file.uri, file.size_bytes, file.etag, footer, job.is_batch_jsonl))
        else:
            bad.append((name, footer))
    if not good:
        shown = "\n".join(f"  {reason}" for _, reason in bad[:_NUM_NAMED_REASONS])
        more = f"\n  and {len(bad) - _NUM_NAMED_REASONS} more" if len(bad) > _NUM_NAMED_REASONS else ""
        raise JobError(f"input.path: none of {len(bad)} files can be used\n{shown}{more}")
    good.sort(key=lambda shard: (-shard.size_bytes, shard.name))
    return ShardList(good, bad)


@contextmanager
def open_shard(shard: Shard) -> Iterator[pq.ParquetFile]:
    """Open a shard for reading; ShardError if it is gone, no longer Parquet, or another version than listed. A Batch
    file has the interface of a Parquet file, as far as it is used here."""
    storage, name = split_uri(shard.uri)
    try:
        info = storage.info(name)
        if info is None or info.etag != shard.etag:
            state = "is gone" if info is None else "was changed"
            raise ShardError(f"{public_uri(shard.uri)} {state} since the run began; run the same command again")
        opened = storage.open_input(name, info.size_bytes)
        file: Any
        if shard.is_batch_jsonl:
            file = JsonlFile(opened, shard.num_rows, is_gzip=_is_gzip(name))
        else:
            file = _open_parquet(opened)
    except (pa.ArrowException, OSError, StorageError) as error:
        raise ShardError(f"{public_uri(shard.uri)} cannot be read: {_first_line(error)}") from error
    with opened:
        yield file


def _open_parquet(opened: BinaryIO) -> pq.ParquetFile:
    """Read a row group's bytes at once, which takes fewest requests; or page by page where that is too much to hold."""
    metadata = pq.read_metadata(opened)
    groups = (metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if max(groups, default=0) <= _MAX_PRE_BUFFER_BYTES:
        return pq.ParquetFile(opened, metadata=metadata, pre_buffer=True)
    return pq.ParquetFile(opened, metadata=metadata, pre_buffer=False, buffer_size=_BUFFER_BYTES)


def _find_files(job: Job) -> list[FileInfo]:
    output = job.output.path.rstrip("/") + "/"
    found: dict[str, FileInfo] = {}
    for path in job.input_paths:
        files = _match(path, JSONL_SUFFIXES if job.is_batch_jsonl else (".parquet",))
        if not path.startswith(output):  # an output below the input folder is not input to the next run
            files = [file for file in files if not file.uri.startswith(output)]
        if not files:
            kind, suffix = ("Batch", ".jsonl") if job.is_batch_jsonl else ("Parquet", ".parquet")
            raise JobError(
                f"input.path: {public_uri(path)} matches no {kind} file; give a file, a glob, "
                f"or a folder with files that end in {suffix}"
                + ("" if job.is_batch_jsonl else " (or in .jsonl, with input.format: openai_batch)")
            )
        found.update((file.uri, file) for file in files)
    return list(found.values())


def _match(path: str, suffixes: tuple[str, ...]) -> Sequence[FileInfo]:
    try:
        storage, name = split_uri(path.rstrip("/"))
        file = storage.info(name)
        if file is not None:
            return [file]
        if is_glob(path):
            storage, pattern = split_glob(path)
            return storage.glob(pattern)
        return [file for file in Storage(path).list() if _is_input(file.path, suffixes)]
    except StorageError as error:
        raise JobError(f"input.path: {error}") from error


def _is_input(path: str, suffixes: tuple[str, ...]) -> bool:
    """Files and folders that begin with _ or . are the bookkeeping of other programs."""
    parts = PurePosixPath(path).parts
    return parts[-1].lower().endswith(suffixes) and not any(part.startswith(("_", ".")) for part in parts)


def _name_files(files: Sequence[FileInfo]) -> list[str]:
    owners: dict[str, str] = {}
    for file in files:
        name = _shard_name(file.path)
        if name in owners:
            raise JobError(
                f"input.path: {public_uri(owners[name])} and {public_uri(file.uri)} are both shard {name!r} and "
                "would write the same results; rename one, or run them into two outputs"
            )
        owners[name] = file.uri
    return list(owners)


def _shard_name(path: str) -> str:
    """A file's stem as a name for results: no sign that a shell, a URI or a glob reads in its own way, and no
    leading _ or ., which readers of Parquet folders skip."""
    name = PurePosixPath(path).name.removesuffix(".gz")
    return re.sub(r"[^\w.=-]", "_", PurePosixPath(name).stem).lstrip("._") or "shard"


def _check_file(job: Job, file: FileInfo) -> int | str:
    """The number of rows, or why the file cannot be used."""
    storage, name = split_uri(file.uri)
    if job.is_batch_jsonl:
        return _count_lines(storage, name, file)
    try:
        with storage.open_input(name, file.size_bytes) as opened:
            metadata = pq.read_metadata(opened)
            schema = metadata.schema.to_arrow_schema()
    except (pa.ArrowException, OSError, StorageError) as error:
        return f"{public_uri(file.uri)} ({file.size_bytes} bytes) cannot be read as Parquet: {_first_line(error)}"
    mistake = _find_schema_mistake(job, schema)
    return f"{public_uri(file.uri)}: {mistake}" if mistake else int(metadata.num_rows)


def _count_lines(storage: Storage, name: str, file: FileInfo) -> int | str:
    try:
        with storage.open_input(name, file.size_bytes) as opened:
            return sum(1 for _ in read_lines(opened, is_gzip=_is_gzip(name)))
    except (OSError, StorageError) as error:
        return f"{public_uri(file.uri)} ({file.size_bytes} bytes) cannot be read: {_first_line(error)}"


def _is_gzip(name: str) -> bool:
    return name.lower().endswith(".gz")


def _find_schema_mistake(job: Job, schema: pa.Schema) -> str | None:
    wanted = {
        "input.prompt_column": (job.input.prompt_column, _is_text, "text"),
        "input.messages_column": (job.input.messages_column, _is_messages, _MESSAGES),
        "input.id_column": (job.input.id_column, _is_id, "text or integers"),
        "input.sampling_column": (job.input.sampling_column, _is_overrides, "a struct, or JSON text"),
    }
    for key, (column, fits, allowed) in wanted.items():
        if column is None:
            continue
        mistake = _find_column_mistake(key, column, schema)
        if mistake:
            return mistake
        if not fits(schema.field(column).type):
            return f"{key}: column {column!r} holds {schema.field(column).type}, should be {allowed}"
    named = {"prompt.template": job.prompt.template_columns}
    if isinstance(job.input.passthrough, tuple):
        named["input.passthrough"] = job.input.passthrough
    mistakes = (_find_column_mistake(key, column, schema) for key, names in named.items() for column in names)
    return next(filter(None, mistakes), None)


def _find_column_mistake(key: str, column: str, schema: pa.Schema) -> str | None:
    number = len(schema.get_all_field_indices(column))
    if number == 1:
        return None
    found = f"stands {number} times" if number else "is not there"
    return f"{key}: column {column!r} {found}; the columns are {', '.join(schema.names) or 'none'}"


_MESSAGES = "a list of structs with role and content, or JSON text"


def _is_text(kind: pa.DataType) -> bool:
    """Bytes count as text: each row is decoded as UTF-8. A column of nothing but nulls has a type of its own."""
    plain = _plain(kind)
    return any(
        fits(plain)
        for fits in (
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
            types.is_null,
        )
    )


def _plain(kind: pa.DataType) -> pa.DataType:
    """What the values are, below a dictionary or an extension type such as JSON or UUID."""
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    return _plain(kind.value_type) if types.is_dictionary(kind) else kind


def _is_messages(kind: pa.DataType) -> bool:
    if types.is_list(kind) or types.is_large_list(kind):
        element = kind.value_type
        return types.is_struct(element) and {"role", "content"} <= {field.name for field in element}
    return _is_text(kind)


def _is_id(kind: pa.DataType) -> bool:
    return types.is_integer(_plain(kind)) or types.is_fixed_size_binary(_plain(kind)) or _is_text(kind)


def _is_overrides(kind: pa.DataType) -> bool:
    return types.is_struct(kind) or _is_text(kind)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
