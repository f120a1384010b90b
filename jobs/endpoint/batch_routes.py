"""The routes of /v1/files and /v1/batches. Without a storage they are there too, and say which setting is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, File, Form, Query, Response, UploadFile
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from jobs.endpoint.batch_runner import BatchRunner
from jobs.endpoint.batches import BatchStore
from jobs.endpoint.config import BatchSection, RequestLimits
from jobs.endpoint.endpoint import Endpoint
from jobs.endpoint.files import MAX_EXPIRY_S, MIN_EXPIRY_S, FileStore, storage_errors
from pipeline.openai_api.errors import ApiError
from pipeline.storage import Storage

T = TypeVar("T")

_FORM_BYTES = 1 << 16
"""What a form takes besides its file."""


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)]


class BatchRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


class Batches:
    """The stores and the runner of an endpoint; none without a storage."""

    def __init__(self, endpoint: Endpoint) -> None:
        config = endpoint.config
        self._upload_turn = asyncio.Lock()  # a file is in memory while it is stored
        self._store: BatchStore | None = None
        self.runner: BatchRunner | None = None
        section = config.batches
        if section.storage is None:
            return
        files = FileStore(
            Storage(section.storage),
            max_file_bytes=section.max_file_bytes,
            max_total_bytes=section.max_storage_bytes,
            keep_s=section.keep_s,
        )
        self._store = BatchStore(files, config.name, keep_s=section.keep_s)
        self.runner = BatchRunner(self._store, endpoint, max_requests=section.max_requests)

    @property
    def store(self) -> BatchStore:
        if self._store is None:
            raise ApiError(
                404, "this server keeps no files and no batches: its setting batches.storage names no place for them"
            )
        return self._store

    async def upload(self, file: UploadFile, purpose: str, expires_after_s: int | None) -> dict[str, Any]:
        files = self.store.files
        if purpose != "batch":
            raise ApiError(400, "purpose: should be batch", param="purpose", code="invalid_value")
        if expires_after_s is not None and not MIN_EXPIRY_S <= expires_after_s <= MAX_EXPIRY_S:
            text = f"expires_after: seconds should be {MIN_EXPIRY_S} to {MAX_EXPIRY_S}"
            raise ApiError(400, text, param="expires_after", code="invalid_value")
        if not file.size:
            raise ApiError(400, "file: is empty", param="file", code="empty_file")
        if file.size > files.max_file_bytes:
            raise ApiError(
                413, f"file: is larger than {files.max_file_bytes} bytes", param="file", code="file_too_large"
            )
        async with self._upload_turn:
            content = await file.read()
            return await in_thread(lambda: files.add(content, file.filename or "file", purpose, expires_after_s))

    async def create(self, body: BatchRequest) -> dict[str, Any]:
        store = self.store
        asked = body.model_dump(exclude={"output_expires_after"})
        if body.output_expires_after is not None:
            asked["output_expires_after_s"] = body.output_expires_after.seconds
        batch = await in_thread(lambda: store.create(asked))
        self._wake()
        return batch

    async def cancel(self, batch_id: str) -> dict[str, Any]:
        batch = await in_thread(lambda: self.store.cancel(batch_id))
        self._wake()
        return batch

    def _wake(self) -> None:
        if self.runner is not None:
            self.runner.wake()


async def in_thread(action: Callable[[], T]) -> T:
    """Do what reads or writes the storage, off the event loop."""

    def act() -> T:
        with storage_errors():
            return action()

    return await asyncio.to_thread(act)


def upload_limits(limits: RequestLimits, section: BatchSection) -> dict[str, RequestLimits]:
    """What the gate lets through to the route that takes files."""
    if section.storage is None:
        return {}
    larger = {"max_body_bytes": section.max_file_bytes + _FORM_BYTES, "body_timeout_s": section.upload_timeout_s}
    return {"/v1/files": limits.model_copy(update=larger)}


def add_batch_routes(app: FastAPI, batches: Batches, bearer: list[Any]) -> None:
    _add_file_routes(app, batches, bearer)

    @app.post("/v1/batches", dependencies=bearer)
    async def create_batch(body: BatchRequest) -> dict[str, Any]:
        return await batches.create(body)

    @app.get("/v1/batches", dependencies=bearer)
    async def list_batches(after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> dict[str, Any]:
        return await in_thread(lambda: batches.store.list(after=after, limit=limit))

    @app.get("/v1/batches/{batch_id}", dependencies=bearer)
    async def retrieve_batch(batch_id: str) -> dict[str, Any]:
        return await in_thread(lambda: batches.store.get(batch_id))

    @app.post("/v1/batches/{batch_id}/cancel", dependencies=bearer)
    async def cancel_batch(batch_id: str) -> dict[str, Any]:
        return await batches.cancel(batch_id)


def _add_file_routes(app: FastAPI, batches: Batches, bearer: list[Any]) -> None:
    @app.post("/v1/files", dependencies=bearer)
    async def upload_file(
        file: Annotated[UploadFile, File()],
        purpose: Annotated[str, Form()],
        anchor: Annotated[Literal["created_at"] | None, Form(alias="expires_after[anchor]")] = None,
        seconds: Annotated[int | None, Form(alias="expires_after[seconds]")] = None,
    ) -> dict[str, Any]:
        return await batches.upload(file, purpose, seconds)

    @app.get("/v1/files", dependencies=bearer)
    async def list_files(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> dict[str, Any]:
        return await in_thread(lambda: batches.store.files.list(after=after, limit=limit, order=order, purpose=purpose))

    @app.get("/v1/files/{file_id}", dependencies=bearer)
    async def retrieve_file(file_id: str) -> dict[str, Any]:
        return await in_thread(lambda: batches.store.files.get(file_id))

    @app.get("/v1/files/{file_id}/content", dependencies=bearer)
    async def file_content(file_id: str) -> Response:
        files = batches.store.files
        record = await in_thread(lambda: files.get(file_id))
        headers = {"Content-Length": str(record["bytes"]), "X-Content-Type-Options": "nosniff"}
        return StreamingResponse(files.chunks(file_id), media_type="application/octet-stream", headers=headers)

    @app.delete("/v1/files/{file_id}", dependencies=bearer)
    async def delete_file(file_id: str) -> dict[str, Any]:
        return await in_thread(lambda: batches.store.files.delete(file_id))
