"""What stands before every route: the key, the size of the body, and the time it may take to arrive.

Plain ASGI, so that a stranger's body is not even read. Knows no models and no prompts.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from jobs.endpoint.config import RequestLimits
from jobs.endpoint.keys import is_known
from jobs.endpoint.metrics import Metrics
from pipeline.openai_api.errors import ApiError

OPEN_ROUTES = ("/health", "/ready")

_MAX_RETRY_AFTER_S = 60
"""OpenAI's client waits no longer, whatever it is told."""


class Gate:
    """Wraps an ASGI application. `digests`: of the keys that may pass; none: everybody may. `uploads`: the limits of
    routes that take larger bodies."""

    def __init__(
        self,
        app: Any,
        *,
        limits: RequestLimits,
        digests: tuple[str, ...],
        uploads: Mapping[str, RequestLimits] = MappingProxyType({}),
    ) -> None:
        self._app = app
        self._limits = limits
        self._uploads = uploads
        self._digests = digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = self._refusal(scope)
        if error is not None:
            await respond(error)(scope, receive, send)
            return
        await self._app(scope, _LimitedBody(receive, self._limits_of(scope)).receive, send)

    def _limits_of(self, scope: Scope) -> RequestLimits:
        return self._uploads.get(scope["path"], self._limits)

    def _refusal(self, scope: Scope) -> ApiError | None:
        error = key_error(scope, self._digests)
        if error is not None:
            return error
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0").decode("latin-1")
        limits = self._limits_of(scope)
        if length.isdecimal() and int(length[:20]) > limits.max_body_bytes:
            return too_large(limits)
        return None


class Counted:
    """Counts the responses of an ASGI application, by route and status."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")  # as the router found it: a path of a stranger's would be a label for ever
                self._metrics.requests.labels(getattr(route, "path", "none"), message["status"]).inc()
            await send(message)

        await self._app(scope, receive, note if scope["type"] == "http" else send)


def key_error(scope: Scope, digests: tuple[str, ...]) -> ApiError | None:
    """Why a request does not get in, None if it does. `digests`: of the keys; none: everybody may."""
    if not digests or scope["path"] in OPEN_ROUTES:
        return None
    scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer" and is_known(key.strip(), digests):
        return None
    what = "is not one of this server's" if key else "is missing: send Authorization: Bearer KEY"
    return ApiError(401, f"the API key {what}", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def queue_is_full(wait_s: float) -> ApiError:
    """wait_s: until there may be room."""
    whole_s = min(_MAX_RETRY_AFTER_S, max(1, math.ceil(wait_s)))
    return ApiError(
        429,
        f"the queue is full; try again in {whole_s} s",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(whole_s)},
    )


def too_large(limits: RequestLimits) -> ApiError:
    return ApiError(413, f"the body is larger than {limits.max_body_bytes} bytes", code="request_too_large")


def respond(error: ApiError) -> JSONResponse:
    """The response that an error is."""
    return JSONResponse(error.body, error.status, headers=error.headers)


class _LimitedBody:
    """Receives a body that may be too large, though it did not say so, or too slow."""

    def __init__(self, receive: Receive, limits: RequestLimits) -> None:
        self._receive = receive
        self._limits = limits
        self._num_bytes = 0
        self._deadline: float | None = asyncio.get_running_loop().time() + limits.body_timeout_s

    async def receive(self) -> Message:
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            text = f"the body did not arrive within {self._limits.body_timeout_s:g} s"
            raise ApiError(408, text, code="request_timeout") from None
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._limits.max_body_bytes:
            raise too_large(self._limits)
        if not message.get("more_body", False):
            self._deadline = None  # from here on, receiving is waiting for the client to leave
        return message
