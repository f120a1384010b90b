"""Bytes under a URI: local folders, S3 and every other fsspec store behind the few verbs that a run needs.

An object is there whole or not at all: a local file is written beside its target and renamed, an object is
one PUT.
Knows no Parquet and no rows. Everything in `pipeline` and `jobs` that touches a file does it here.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

logger = logging.getLogger(__name__)

SINGLE_PUT_BYTES = 5 * 2**30
"""The largest object that S3 takes in one PUT."""

_COMPARED_BYTES = 2**20
_GLOB_CHARACTERS = re.compile(r"[*?\[]")
_TEMPORARY = re.compile(r"^\..*\.tmp$")
_OWN_TEMPORARY = re.compile(r"^\..*\.[0-9a-f]{32}\.tmp$")


class StorageError(ValueError):
    """A place cannot be read or written as asked; the message names the URI and the reason."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """One object: its path below the storage's root, its URI, and what tells this version from another."""

    path: str
    uri: str
    size_bytes: int
    etag: str


Files = list[FileInfo]  # inside Storage, `list` is the method


class Storage:
    """A folder, local or in any fsspec store; all paths given to it are relative to that folder.

    Cheap to make and to pickle: it holds the URI only, the connection belongs to the process. An S3 endpoint
    comes from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, credentials from wherever the AWS tools look for them.
    """

    def __init__(self, uri: str) -> None:
        self.protocol, self._root = _split_protocol(uri)
        self.uri = self._root if self.is_local else f"{self.protocol}://{self._root}"
        self._enforces_create: bool | None = None

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.uri,)

    def __repr__(self) -> str:
        return f"Storage({public_uri(self.uri)!r})"

    @property
    def is_local(self) -> bool:
        return self.protocol == "file"

    def uri_of(self, path: str) -> str:
        """The URI of an object, without access to it; StorageError if the path leads out of this storage."""
        return f"{self.uri.rstrip('/')}/{_checked(path)}"

    def list(self, prefix: str = "") -> Files:
        """All files below the folder `prefix`, at any depth, by path; none if there is no such folder."""
        with self._explained("list", prefix):
            if self.is_local:
                return self._walk(Path(self._absolute(prefix)))
            found = self._filesystem().find(self._absolute(prefix), detail=True)
        # Consoles mark an empty folder by an object whose name ends in a slash. And find() asks once more what a prefix
        # is that it found nothing below: if the first object has come meanwhile, the answer is the folder itself.
        files = [
            self._describe(info) for info in found.values() if info["type"] == "file" and not info["name"].endswith("/")
        ]
        return sorted(files, key=lambda file: file.path)

    def glob(self, pattern: str) -> Files:
        """The files that match a pattern of *, ?, [..] and **, by path."""
        with self._explained("list", pattern):
            found = self._filesystem().glob(f"{self._root.rstrip('/')}/{pattern}", detail=True)
        files = [
            self._describe(info) for info in found.values() if info["type"] == "file" and not info["name"].endswith("/")
        ]
        return sorted(files, key=lambda file: file.path)

    def info(self, path: str) -> FileInfo | None:
        """Size and identity of one file, or None where there is none."""
        with self._explained("look at", path):
            try:
                info = self._filesystem().info(self._absolute(path))
                # In here too: a local file may go between the two looks at it.
                return self._describe(info) if info["type"] == "file" else None
            except FileNotFoundError:
                return None

    def exists(self, path: str) -> bool:
        return self.info(path) is not None

    def modified_at(self, path: str) -> float | None:
        """When a file was last written by the store's own clock, in seconds since 1970; None where there is none."""
        with self._explained("look at", path):
            try:
                return float(self._filesystem().modified(self._absolute(path)).timestamp())
            except FileNotFoundError:
                return None

    def is_folder(self, path: str = "") -> bool:
        with self._explained("look at", path):
            return bool(self._filesystem().isdir(self._absolute(path)))

    def read_bytes(self, path: str) -> bytes:
        """The whole object; FileNotFoundError if it is not there."""
        with self._explained("read", path):
            return bytes(self._filesystem().cat_file(self._absolute(path)))

    def read_ranges(self, path: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """Pieces of one object, each from a start to an end offset, requested at once."""
        with self._explained("read", path):
            absolute = self._absolute(path)
            starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
            pieces = self._filesystem().cat_ranges([absolute] * len(ranges), starts, ends, on_error="raise")
            return [bytes(piece) for piece in pieces]

    def open_input(self, path: str, size_bytes: int | None = None, tail_bytes: int = 0) -> BinaryIO:
        """A seekable file to read from; a known size saves the store one request.

        tail_bytes: of a file whose size is known, so many last ones come in the first request: all of a small Parquet
        file, or the footer of a larger one. Nothing else is read ahead: Parquet readers ask for exactly the ranges that
        they need.
        """
        with self._explained("open", path):
            if self.is_local:
                return Path(self._absolute(path)).open("rb")
            if tail_bytes and size_bytes:
                (tail,) = self.read_ranges(path, [(max(0, size_bytes - tail_bytes), size_bytes)])
                return cast(BinaryIO, _FileWithTail(self, path, size_bytes, tail))
            options = {} if size_bytes is None else {"size": size_bytes}
            return cast(BinaryIO, self._filesystem().open(self._absolute(path), "rb", cache_type="none", **options))

    def write_whole(self, path: str, data: bytes) -> FileInfo:
        """Write an object so that readers see all of it or what was there before; read it back to be sure.

        StorageError if the store does not hold these bytes afterwards.
        """
        with self._explained("write", path):
            try:
                if self.is_local:
                    self._replace_local(Path(self._absolute(path)), data)
                else:
                    self._put(path, data, mode="overwrite")
            except FileNotFoundError as error:
                raise StorageError(
                    f"cannot write {public_uri(self.uri_of(path))}: {error}; does the bucket exist?"
                ) from error
        return self._verify(path, data)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Write an object if there is none yet, else return False; of many writers one gets True.

        In a store that ignores the condition (`enforces_create` finds out and warns) two writers at the same
        instant can both get True.
        """
        with self._explained("create", path):
            try:
                if self.is_local:
                    self._link_local(Path(self._absolute(path)), data)
                elif not self.enforces_create(near=path) and self.exists(path):
                    return False
                else:
                    self._put(path, data, mode="create")
            except FileExistsError:
                return False
            except FileNotFoundError as error:
                raise StorageError(
                    f"cannot create {public_uri(self.uri_of(path))}: {error}; does the bucket exist?"
                ) from error
        self._verify(path, data)
        return True

    def enforces_create(self, near: str) -> bool:
        """Whether the store refuses to create what exists; probed once, beside the object `near`."""
        if self.is_local:
            return True
        if self._enforces_create is None:
            probe = f"{near}.probe-{uuid.uuid4().hex}"
            self._put(probe, b"first", mode="create")
            try:
                self._put(probe, b"second", mode="create")
                self._enforces_create = False
                logger.warning(
                    "%s ignores 'If-None-Match: *': two runs started at once are not kept apart here",
                    public_uri(self.uri),
                )
            except FileExistsError:
                self._enforces_create = True
            self.remove(probe)
        return self._enforces_create

    def remove(self, path: str) -> None:
        """Remove one object; no error if there is none."""
        with self._explained("remove", path):
            try:
                self._filesystem().rm_file(self._absolute(path))
            except FileNotFoundError:
                return

    def remove_tree(self, prefix: str) -> None:
        """Remove all below the folder `prefix`, unfinished local writes too; no error if there is none."""
        if not prefix:
            raise StorageError(f"refused to remove everything below {public_uri(self.uri)}; name a folder in it")
        with self._explained("remove", prefix):
            if self.is_local:
                folder = Path(self._absolute(prefix))
                if folder.exists():
                    shutil.rmtree(folder)
                return
            paths = self._filesystem().find(self._absolute(prefix))
            if paths:
                self._filesystem().rm(paths)

    def remove_unfinished(self, min_age_s: float) -> int:
        """Remove what writers that were killed left half-written at least so long ago; the number of files.

        Local folders only: in a store nothing is half there, as every object is one PUT and never an upload in parts.
        """
        if not self.is_local:
            return 0
        num_removed, now = 0, time.time()
        for parent, _, names in os.walk(self._root):
            for file in (Path(parent) / name for name in names if _OWN_TEMPORARY.match(name)):
                with self._explained("remove", self._relative(str(file))):
                    try:
                        is_old = now - file.stat().st_mtime >= min_age_s
                    except FileNotFoundError:  # it was not left behind: its writer has just finished
                        continue
                    if is_old:
                        file.unlink(missing_ok=True)
                        num_removed += 1
        return num_removed

    def _filesystem(self) -> Any:
        return fsspec.filesystem(self.protocol, use_listings_cache=False, **_connection_options(self.protocol))

    def _absolute(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{_checked(path)}" if path else self._root

    def _relative(self, absolute: str) -> str:
        return absolute.removeprefix(self._root.rstrip("/")).removeprefix("/")

    def _describe(self, info: dict[str, Any]) -> FileInfo:
        path = self._relative(info["name"])
        etag = _local_identity(os.stat(info["name"])) if self.is_local else _identity(info)  # noqa: PTH116
        return FileInfo(path, self.uri_of(path), int(info["size"]), etag)

    def _walk(self, folder: Path) -> Files:
        files = []
        for parent, _, names in os.walk(folder):
            for name in names:
                if _TEMPORARY.match(name):
                    continue
                file = Path(parent) / name
                try:
                    status = file.stat()
                except FileNotFoundError:  # removed by another process since the walk saw it, or a dangling link
                    continue
                path = self._relative(str(file))
                files.append(FileInfo(path, self.uri_of(path), status.st_size, _local_identity(status)))
        return sorted(files, key=lambda file: file.path)

    def _put(self, path: str, data: bytes, mode: str) -> None:
        if len(data) >= SINGLE_PUT_BYTES:
            raise StorageError(
                f"cannot write {public_uri(self.uri_of(path))}: {len(data)} bytes, and one object takes "
                f"{SINGLE_PUT_BYTES}; split the shard"
            )
        options: dict[str, Any] = {"mode": mode}
        if self.protocol == "s3":
            options["chunksize"] = SINGLE_PUT_BYTES  # s3fs would go multipart, which is two steps, from 100 MiB on
        try:
            self._filesystem().pipe_file(self._absolute(path), data, **options)
        except OSError as error:
            if mode == "create" and _says_precondition_failed(error):
                raise FileExistsError(path) from error
            raise

    def _write_temporary(self, target: Path, data: bytes) -> Path:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StorageError(f"cannot write {target}: a part of its folder's path is a file; move it") from error
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def _replace_local(self, target: Path, data: bytes) -> None:
        temporary = self._write_temporary(target, data)
        try:
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)

    def _link_local(self, target: Path, data: bytes) -> None:
        """A hard link is made whole and fails if the name is taken: exclusive and atomic at once."""
        temporary = self._write_temporary(target, data)
        try:
            target.hardlink_to(temporary)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)

    def _verify(self, path: str, data: bytes) -> FileInfo:
        info = self.info(path)
        if info is None or info.size_bytes != len(data):
            found = "nothing" if info is None else f"{info.size_bytes} bytes"
            raise StorageError(
                f"wrote {len(data)} bytes to {public_uri(self.uri_of(path))} and found {found}; "
                "is another program writing there?"
            )
        checksum_agrees = info.etag == hashlib.md5(data, usedforsecurity=False).hexdigest()
        if not checksum_agrees and not self._holds(info, data):
            raise StorageError(
                f"{public_uri(info.uri)} reads back other bytes than were written; is another program writing there?"
            )
        return info

    def _holds(self, info: FileInfo, data: bytes) -> bool:
        with self._explained("read back", info.path), self.open_input(info.path, info.size_bytes) as file:
            view = memoryview(data)
            return all(
                file.read(len(view[start : start + _COMPARED_BYTES])) == view[start : start + _COMPARED_BYTES]
                for start in range(0, len(data), _COMPARED_BYTES)
            )

    @contextmanager
    def _explained(self, action: str, path: str) -> Iterator[None]:
        """Turn a store's own errors into a StorageError that names action, URI and reason."""
        try:
            yield
        except (StorageError, FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # each store has its own family of errors: botocore's are no OSError
            place = public_uri(f"{self.uri.rstrip('/')}/{path}")
            reason = type(error).__name__ if str(error) in ("", "None") else str(error)
            raise StorageError(f"cannot {action} {place}: {reason}{_way_out(self.protocol, error)}") from error


class _FileWithTail(io.RawIOBase):
    """A file in a store whose last bytes are here; others are asked for when they are read."""

    def __init__(self, storage: Storage, path: str, size_bytes: int, tail: bytes) -> None:
        self._storage, self._path, self._size, self._tail = storage, path, size_bytes, tail
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._between(self._at, min(self._size, self._at + len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _between(self, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        border = self._size - len(self._tail)
        if start >= border:
            return self._tail[start - border : end - border]
        (head,) = self._storage.read_ranges(self._path, [(start, min(end, border))])
        return head + self._tail[: max(0, end - border)]


def split_uri(uri: str) -> tuple[Storage, str]:
    """The folder of a file as a Storage, and the file's name in it."""
    protocol, path = _split_protocol(uri)
    folder, _, name = path.rpartition("/")
    if not name or not folder:
        raise StorageError(f"{public_uri(uri)} names no file; give a path with a folder and a name")
    return Storage(folder if protocol == "file" else f"{protocol}://{folder}"), name


def split_glob(uri: str) -> tuple[Storage, str]:
    """The last folder of a pattern that is not yet a pattern itself, and the pattern below it."""
    match = _GLOB_CHARACTERS.search(uri)
    if match is None:
        raise StorageError(f"{public_uri(uri)} is no pattern: it has none of * ? [")
    cut = uri.rfind("/", 0, match.start())
    if cut < 0:
        return Storage("."), uri
    return Storage(uri[:cut] or "/"), uri[cut + 1 :]


def is_glob(uri: str) -> bool:
    return bool(_GLOB_CHARACTERS.search(uri))


def absolute_uri(uri: str, base: Path) -> str:
    """The one way to write a place: a local path is absolute (relative ones start from the folder `base`, `~` is
    expanded, file:// goes), s3a:// is s3://, any other URI stays as it is."""
    for alias, plain in (("file://", ""), ("local://", ""), ("s3a://", "s3://")):
        if uri.startswith(alias):
            uri = plain + uri.removeprefix(alias)
    if "://" in uri:
        return uri
    return os.path.normpath(base.absolute() / Path(uri).expanduser())


def public_uri(uri: str) -> str:
    """The URI without credentials, fit for messages and logs."""
    return re.sub(r"://[^/@]+@", "://***@", uri)


def _split_protocol(uri: str) -> tuple[str, str]:
    uri = absolute_uri(uri, Path.cwd())
    protocol, separator, _ = uri.partition("://")
    if not separator:
        return "file", uri
    try:
        filesystem = fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise StorageError(f"cannot open {public_uri(uri)}: {error}") from error
    return protocol, str(filesystem._strip_protocol(uri)).rstrip("/")


def _connection_options(protocol: str) -> dict[str, Any]:
    if protocol != "s3":
        return {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        return {}
    # Servers other than AWS stumble over the checksums that botocore adds by default; the user's word wins.
    checksums = {
        name.lower().removeprefix("aws_"): os.environ.get(name, "when_required")
        for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")
    }
    return {"client_kwargs": {"endpoint_url": endpoint}, "config_kwargs": checksums}


def _checked(path: str) -> str:
    parts = path.split("/")
    if path.startswith("/") or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise StorageError(f"{path!r} is no path below a storage's root; use names joined by single slashes")
    return path


def _identity(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "created"):
        value = info.get(key)
        if value:
            return str(value.timestamp() if isinstance(value, datetime) else value).strip('"')
    raise StorageError(f"{info['name']}: the store tells neither an ETag nor a time, so a change would go unseen")


def _local_identity(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def _says_precondition_failed(error: OSError) -> bool:
    """s3fs says FileExistsError only where the server names the condition, which Ceph does not."""
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("Error", {}).get("Code") in (
        "PreconditionFailed",
        "412",
        "ConditionalRequestConflict",
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _way_out(protocol: str, error: Exception) -> str:
    kind = type(error).__name__
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return "; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    if kind == "EndpointConnectionError":
        return "; check AWS_ENDPOINT_URL_S3"
    if isinstance(error, PermissionError):
        return "; check the folder's owner and mode" if protocol == "file" else "; check the credentials' rights there"
    return ""
