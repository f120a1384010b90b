"""What stands before Serve itself, in its proxies: the key, a limit, and the form of its errors.

A stranger's request must not start a replica; a crowd is refused here, where it takes none of a replica's time; and
Serve's own refusals are lines of text. Serve loads this by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH (`jobs.ingress`).
Plain ASGI; knows no models.
"""

from __future__ import annotations

import json
import math
import os
import time
from typing import Any

from starlette.middleware import Middleware
from starlette.types import Message, Receive, Scope, Send

from jobs.endpoint.gate import key_error, queue_is_full, respond
from jobs.ingress import DIGESTS, MAX_IN_FLIGHT
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
_MAX_RETRY_AFTER_S = 60


def middlewares() -> list[Middleware]:
    """For Serve's HTTP servers."""
    digests = tuple(digest for digest in os.environ.get(DIGESTS, "").split(",") if digest)
    max_in_flight = int(os.environ.get(MAX_IN_FLIGHT, "0")) or None
    return [Middleware(FrontDoor, digests=digests, max_in_flight=max_in_flight)]


class FrontDoor:
    """Wraps Serve's ASGI application. `digests`: of the keys that may pass; none: whoever is behind it decides.
    `max_in_flight`: requests for completions that may be on their way; None: any number."""

    def __init__(self, app: Any, *, digests: tuple[str, ...], max_in_flight: int | None = None) -> None:
        self._app = app
        self._digests = digests
        self._max_in_flight = max_in_flight
        self._num_in_flight = 0
        self._usual_s = 1.0

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
        if self._max_in_flight is not None and self._num_in_flight >= self._max_in_flight:
            await respond(queue_is_full(min(_MAX_RETRY_AFTER_S, max(1, math.ceil(self._usual_s)))))(
                scope, receive, send
            )
            return
        self._num_in_flight += 1
        started = time.perf_counter()
        try:
            await self._pass(scope, receive, send)
        finally:
            self._num_in_flight -= 1
            self._usual_s += 0.1 * (time.perf_counter() - started - self._usual_s)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal: int | None = None
        headers: dict[str, str] = {}
        is_started = is_over = is_stream = False

        async def translate(message: Message) -> None:
            nonlocal refusal, is_started, is_over, is_stream
            if message["type"] == "http.response.start":
                is_started = True
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


def _header(message: Message, name: bytes) -> str:
    values = [value for key, value in message.get("headers", ()) if key.lower() == name]
    return values[0].decode("latin-1") if values else ""
