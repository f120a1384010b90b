"""A cheap HTTP/1.1 client for load: bytes out, bytes in, and when they came.

It shares the cores with what it measures, so it parses nothing while it waits: an answer's text is read afterwards, by
`Reply.events` or `Reply.json`.

Knows HTTP and server-sent events; no engine, no Serve.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

_END_OF_HEAD = b"\r\n\r\n"
_END_OF_CHUNKS = b"0\r\n\r\n"


@dataclass(slots=True)
class Reply:
    """What came back. Times are perf_counter seconds; `first_at` is when the first bytes of a body were there.
    `is_whole` is False where the connection ended before the body did."""

    sent_at: float
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    first_at: float = 0.0
    ended_at: float = 0.0
    is_whole: bool = False
    raw_body: bytes = b""

    @property
    def body(self) -> bytes:
        """The body, out of its chunks."""
        if self.headers.get("transfer-encoding") != "chunked":
            return self.raw_body
        pieces, at = [], 0
        while (end := self.raw_body.find(b"\r\n", at)) >= 0:
            size = int(self.raw_body[at:end].split(b";")[0] or b"0", 16)
            pieces.append(self.raw_body[end + 2 : end + 2 + size])
            at = end + 2 + size + 2
        return b"".join(pieces)

    @property
    def json(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.body)
        return answer

    @property
    def events(self) -> list[bytes]:
        """The data of a stream's events."""
        return [event.removeprefix(b"data: ") for event in self.body.split(b"\n\n") if event]


class Connection(asyncio.Protocol):
    """One connection that asks one thing at a time, and is kept for the next."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reply: Reply | None = None
        self._pieces: list[bytes] = []
        self._missing: int | None = None  # bytes of a body with a length
        self._ended: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, *, leave_after_s: float | None = None) -> Reply:
        """Send a request and read its answer. With `leave_after_s` the connection is cut that long after, if the answer
        is not whole by then."""
        assert self._transport is not None
        reply = self._reply = Reply(time.perf_counter())
        self._pieces, self._missing = [], None
        ended = self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        if leave_after_s is not None:
            await asyncio.wait([ended], timeout=leave_after_s)
            if not ended.done():
                self.cut()
        await ended
        return reply

    def cut(self) -> None:
        """Leave without a word."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        reply = self._reply
        if reply is None:
            return
        if reply.status == 0:
            data = self._read_head(reply, data)
            if not data and self._missing != 0:
                return
        self._take_body(reply, data)

    def connection_lost(self, error: Exception | None) -> None:
        if self._reply is not None:
            self._end(is_whole=False)

    def _read_head(self, reply: Reply, data: bytes) -> bytes:
        """Returns what stands behind the head; nothing while that is not whole."""
        data = b"".join([*self._pieces, data])
        head, end, rest = data.partition(_END_OF_HEAD)
        if not end:
            self._pieces = [data]
            return b""
        self._pieces = []
        first, *lines = head.decode("latin-1").split("\r\n")
        reply.status = int(first.split(" ")[1])
        reply.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if reply.headers.get("transfer-encoding") != "chunked":
            self._missing = int(reply.headers.get("content-length", "0"))
        return rest

    def _take_body(self, reply: Reply, data: bytes) -> None:
        if not reply.first_at:
            reply.first_at = time.perf_counter()
        self._pieces.append(data)
        if self._missing is not None:
            self._missing -= len(data)
            if self._missing <= 0:
                self._end(is_whole=True)
        elif data.endswith(_END_OF_CHUNKS) or (
            len(data) < len(_END_OF_CHUNKS) and b"".join(self._pieces[-5:]).endswith(_END_OF_CHUNKS)
        ):
            self._end(is_whole=True)

    def _end(self, *, is_whole: bool) -> None:
        reply, self._reply = self._reply, None
        assert reply is not None
        reply.ended_at = time.perf_counter()
        reply.is_whole = is_whole
        reply.raw_body = b"".join(self._pieces)
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


def write_request(route: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None) -> bytes:
    """A request's bytes: POST with a JSON body, GET without one."""
    content = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {route} HTTP/1.1", "Host: shoal", f"Content-Length: {len(content)}"]
    if body is not None:
        lines.append("Content-Type: application/json")
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + content
