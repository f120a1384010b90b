"""/v1/files: what clients upload for batches, and what batches answer. Objects in a storage folder, no database.

A file is `files/<id>/content` and, written behind it and so the mark that it is there, `files/<id>/file.json`. Ids are
made here, so a path never comes from outside. Blocking: call it in a thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from pipeline.openai_api.errors import ApiError
from pipeline.storage import Storage, StorageError

logger = logging.getLogger("shoal.endpoint")

FILES = "files"
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 30 * 86400
MAX_NAME_CHARACTERS = 255
_CHUNK_BYTES = 1 << 20
_UNFINISHED_S = 86400
"""Until a content without a file.json is taken for one whose upload was cut off."""


class FileStore:
    """The files below a storage folder. `keep_s`: until a file expires that says nothing of it."""

    def __init__(
        self,
        storage: Storage,
        *,
        max_file_bytes: int,
        max_total_bytes: int,
        keep_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.storage = storage
        self.max_file_bytes = max_file_bytes
        self._max_total_bytes = max_total_bytes
        self._keep_s = keep_s
        self._clock = clock

    def add(
        self, content: bytes, name: str, purpose: str, expires_after_s: float | None = None, file_id: str | None = None
    ) -> dict[str, Any]:
        """Keep a file, whole or not at all, and return its object; ApiError if there is no room for it.

        file_id: of a file that is written by the server, and perhaps once more after it was stopped."""
        total = sum(file.size_bytes for file in self.storage.list(FILES))
        if purpose == "batch" and total + len(content) > self._max_total_bytes:
            raise ApiError(
                400,
                f"files hold {total} bytes and {self._max_total_bytes} are allowed; delete some",
                param="file",
                code="storage_full",
            )
        created = int(self._clock())
        file_id = file_id or new_id("file-", created)
        record = {
            "id": file_id,
            "object": "file",
            "bytes": len(content),
            "created_at": created,
            "expires_at": created + int(self._keep_s if expires_after_s is None else expires_after_s),
            "filename": _plain(name),
            "purpose": purpose,
            "status": "processed",
        }
        self.storage.write_whole(f"{FILES}/{file_id}/content", content)
        self.storage.write_whole(f"{FILES}/{file_id}/file.json", json.dumps(record).encode())
        return record

    def get(self, file_id: str, param: str = "id") -> dict[str, Any]:
        """A file's object; ApiError 404 if there is none, or not any more. param: what the client calls the id."""
        record = self._read(file_id) if is_id("file-", file_id) else None
        if record is None or record["expires_at"] <= self._clock():
            raise ApiError(404, "there is no file with this id", param=param, code="file_not_found")
        return record

    def delete(self, file_id: str) -> dict[str, Any]:
        self.get(file_id)
        self._remove(file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    def list(self, *, after: str | None, limit: int, order: str, purpose: str | None) -> dict[str, Any]:
        """One page of files, by time."""
        ids = [path.split("/")[1] for path in self._paths() if path.endswith("/file.json")]
        return page(
            ids,
            self._read,
            after=after,
            limit=limit,
            is_newest_first=order == "desc",
            keep=lambda record: (
                record["expires_at"] > self._clock() and (purpose is None or record["purpose"] == purpose)
            ),
        )

    def open(self, file_id: str) -> BinaryIO:
        """A file's content, to be read and closed."""
        return self.storage.open_input(f"{FILES}/{file_id}/content", self.get(file_id)["bytes"])

    def chunks(self, file_id: str) -> Iterator[bytes]:
        """A file's content, piece by piece."""
        with self.open(file_id) as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk

    def remove_expired(self) -> None:
        """Remove what has expired, and uploads that never came to their end."""
        now = self._clock()
        paths = self._paths()
        whole = {path.split("/")[1] for path in paths if path.endswith("/file.json")}
        for file_id in {path.split("/")[1] for path in paths}:
            if not is_id("file-", file_id):
                continue
            record = self._read(file_id) if file_id in whole else None
            ends_at = created_at(file_id) + _UNFINISHED_S if record is None else record["expires_at"]
            if ends_at <= now:
                self._remove(file_id)

    def _paths(self) -> Any:
        return [file.path for file in self.storage.list(FILES)]

    def _read(self, file_id: str) -> dict[str, Any] | None:
        return read_json(self.storage, f"{FILES}/{file_id}/file.json")

    def _remove(self, file_id: str) -> None:
        self.storage.remove(f"{FILES}/{file_id}/file.json")  # first, for without it there is no file
        self.storage.remove_tree(f"{FILES}/{file_id}")


def new_id(prefix: str, created: int) -> str:
    """An id that nobody guesses; sorted, ids are in the order of their seconds."""
    return f"{prefix}{created:08x}{secrets.token_hex(12)}"


def is_id(prefix: str, text: str) -> bool:
    return re.fullmatch(rf"{prefix}[0-9a-f]{{32}}", text) is not None


def created_at(some_id: str) -> int:
    """The second in which an id was made."""
    return int(some_id[-32:-24], 16)


def page(
    ids: list[str],
    read: Callable[[str], dict[str, Any] | None],
    *,
    after: str | None,
    limit: int,
    is_newest_first: bool,
    keep: Callable[[dict[str, Any]], bool] = lambda record: True,
) -> dict[str, Any]:
    """OpenAI's list object: `limit` objects that follow the one called `after`; reads no more than it has to."""
    ordered = sorted(ids, reverse=is_newest_first)
    if after is not None:
        ordered = [one for one in ordered if (one < after if is_newest_first else one > after)]
    found: list[dict[str, Any]] = []
    for one in ordered:
        record = read(one)
        if record is not None and keep(record):
            found.append(record)
        if len(found) > limit:
            break
    shown = found[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(found) > limit,
    }


def read_json(storage: Storage, path: str) -> dict[str, Any] | None:
    """An object of JSON; None if there is none."""
    try:
        value: dict[str, Any] = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        return None
    return value


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """A store that cannot be reached is for the log, and for the client to try again."""
    try:
        yield
    except (StorageError, OSError) as error:
        logger.error("the batches' storage failed: %s", error)
        text = "the server's storage cannot be used now; try again"
        raise ApiError(503, text, code="storage_unavailable", headers={"Retry-After": "5"}) from error


def _plain(name: str) -> str:
    """A client's name for a file, for showing only: the last part of a path, of printable characters."""
    last = re.split(r"[/\\]", name)[-1]
    return "".join(sign for sign in last if sign.isprintable())[:MAX_NAME_CHARACTERS] or "file"
