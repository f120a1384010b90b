"""What stands before Serve itself, in its proxies: the key, a limit, and the form of its errors.

A stranger's request must not start a replica; a crowd is refused here for a tenth of what it costs to hand each of its
requests to a replica for that; and Serve's own refusals are lines of text. Serve loads this by
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH (`jobs.ingress`). Plain ASGI; knows no models.
"""

from __future__ import annotations

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

        async def translate(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and _is_serves_own(message):
                refusal = message["status"]
                found = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]}
                wait_s = found.get("retry-after", _RETRY_AFTER_S.get(message["status"]))
                headers.update({"Retry-After": wait_s} if wait_s else {})
            elif refusal is None:
                await send(message)
            elif not message.get("more_body", False):
                text = _TEXTS.get(refusal, "the server could not take this request")
                await respond(ApiError(refusal, text, headers=headers or None))(scope, receive, send)

        await self._app(scope, receive, translate)


def _is_serves_own(message: Message) -> bool:
    """Errors of the endpoint's are JSON."""
    kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
    return bool(message["status"] >= 400 and not any(kind.startswith(b"application/json") for kind in kinds))
