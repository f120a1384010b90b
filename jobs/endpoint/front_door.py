"""What stands before Serve itself, in its proxies: the key, a limit, and the form of its errors.

A stranger's request must not start a replica; a crowd is refused here, where it takes none of a replica's time; and
Serve's own refusals are lines of text. Serve loads this by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH (`jobs.ingress`).

How many are a crowd is what the replicas say: at a 429 of theirs as many as they had taken may come in from here on,
and now and then one more, to see whether that is still so.

Plain ASGI; knows no models.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from typing import Any

from starlette.middleware import Middleware
from starlette.types import Message, Receive, Scope, Send

from jobs.endpoint.config import AccessSection
from jobs.endpoint.gate import key_error, queue_is_full, respond
from jobs.endpoint.keys import read_key_digests
from jobs.ingress import DIGESTS, KEY_FILE, MAX_IN_FLIGHT
from pipeline.openai_api.errors import ApiError

_TEXTS = {
    404: "there is no such route",
    408: "the request took too long",
    429: "the queue is full",
    500: "the server made a mistake; its log says which",
    503: "no replica can take this request now",
}
_RETRY_AFTER_S = {429: "5", 503: "5"}

_LIMITED_ROUTES = ("/v1/completions", "/v1/chat/completions")

_TRY_MORE_S = 0.1
"""Between two times that more are let in than the replicas last took."""

_TRY_ONE_MORE_IN = 50


def middlewares() -> list[Middleware]:
    """For Serve's HTTP servers. JobError if there is to be a file of keys and none is in it: nobody gets in then."""
    digests = tuple(digest for digest in os.environ.get(DIGESTS, "").split(",") if digest)
    digests += read_key_digests(AccessSection(api_key_file=os.environ.get(KEY_FILE) or None))
    max_in_flight = int(os.environ.get(MAX_IN_FLIGHT, "0")) or None
    return [Middleware(FrontDoor, digests=digests, max_in_flight=max_in_flight)]


class FrontDoor:
    """Wraps Serve's ASGI application. `digests`: of the keys that may pass; none: whoever is behind it decides.
    `max_in_flight`: requests for completions that may be on their way, whatever the replicas say; None: any number."""

    def __init__(self, app: Any, *, digests: tuple[str, ...], max_in_flight: int | None = None) -> None:
        self._app = app
        self._digests = digests
        self._most = math.inf if max_in_flight is None else max_in_flight
        self._limit = self._most
        self._tried_at = -math.inf
        self._num_in_flight = 0
        self._wait_s = 1.0  # as the replicas said last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        error = key_error(scope, self._digests)
        if error is not None:
            await respond(error)(scope, receive, send)
        elif scope["path"] in _LIMITED_ROUTES:
            await self._pass_limited(scope, receive, send)
        else:
            await self._pass(scope, receive, send)

    async def _pass_limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._num_in_flight >= self._limit and not self._try_more():
            for message in _refusal(self._wait_s):
                await send(message)
            return
        self._num_in_flight += 1
        try:
            await self._pass(scope, receive, send)
        finally:
            self._num_in_flight -= 1

    def _try_more(self) -> bool:
        now = time.perf_counter()
        if now < self._tried_at + _TRY_MORE_S or self._limit >= self._most:
            return False
        self._tried_at = now
        self._limit = min(self._most, self._limit + 1 + self._limit // _TRY_ONE_MORE_IN)
        return True

    def _learn(self, message: Message) -> None:
        """Note a 429 of the replicas': the others that are on their way are as many as they take."""
        self._limit = min(self._limit, max(1, self._num_in_flight - 1))
        self._tried_at = time.perf_counter()
        wait_s = _header(message, b"retry-after")
        self._wait_s = float(wait_s) if wait_s.isdecimal() else self._wait_s

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal: int | None = None
        headers: dict[str, str] = {}
        is_started = is_over = is_stream = False

        async def translate(message: Message) -> None:
            nonlocal refusal, is_started, is_over, is_stream
            if message["type"] == "http.response.start":
                is_started = True
                if message["status"] == 429 and scope["path"] in _LIMITED_ROUTES:
                    self._learn(message)
                kind = _header(message, b"content-type")
                is_stream = kind.startswith("text/event-stream")
                # Errors of the endpoint's are JSON.
                if message["status"] >= 400 and not kind.startswith("application/json"):
                    refusal = message["status"]
                    wait_s = _header(message, b"retry-after") or _RETRY_AFTER_S.get(refusal)
                    headers.update({"Retry-After": wait_s} if wait_s else {})
            is_over = message["type"] == "http.response.body" and not message.get("more_body", False)
            if refusal is None:
                await send(message)
            elif is_over:
                text = _TEXTS.get(refusal, "the server could not take this request")
                await respond(ApiError(refusal, text, headers=headers))(scope, receive, send)

        await self._app(scope, receive, translate)
        if is_over:
            return
        # The replica died. Serve then says nothing more, or nothing at all.
        lost = ApiError(503, "the engine was lost; try again", code="engine_error", headers={"Retry-After": "5"})
        if not is_started:
            await respond(lost)(scope, receive, send)
        elif is_stream:
            event = b"data: " + json.dumps(lost.body).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": False})


@functools.lru_cache
def _refusal(wait_s: float) -> tuple[Message, Message]:
    """The messages of a 429. Made once: under overload most of what is sent is this."""
    response = respond(queue_is_full(wait_s))
    return (
        {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers},
        {"type": "http.response.body", "body": bytes(response.body)},
    )


def _header(message: Message, name: bytes) -> str:
    values = [value for key, value in message.get("headers", ()) if key.lower() == name]
    return values[0].decode("latin-1") if values else ""
