"""The routes: OpenAI's completions, chat completions and models, health, metrics. FastAPI; knows no Ray.

What may go wrong with a request is an ApiError, and one handler answers all of them. No prompt is ever logged.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from jobs.endpoint.batch_routes import Batches, add_batch_routes, upload_limits
from jobs.endpoint.endpoint import Endpoint, no_such_model
from jobs.endpoint.gate import Counted, Gate, respond
from pipeline.openai_api.errors import ApiError, error_of_fields
from pipeline.openai_api.fields import ChatRequest, CompletionRequest

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, text in {
        400: "A field is missing, wrong, unknown or not supported; `param` says which",
        401: "No API key, or a wrong one",
        404: "No such model",
        413: "The body is too large",
        429: "The queue is full; `Retry-After` says for how long",
        503: "The engine is being replaced",
    }.items()
}


def make_app(endpoint: Endpoint, digests: tuple[str, ...]) -> Any:
    """The ASGI application. `digests`: of the API keys; none: everybody may ask."""

    batches = Batches(endpoint)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if batches.runner is not None:
            batches.runner.start()
        yield
        if batches.runner is not None:
            await batches.runner.stop()
        endpoint.desk.is_closing = True
        await asyncio.to_thread(endpoint.close)

    app = FastAPI(
        title="Shoal", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False, responses=_ERRORS
    )
    bearer = [Depends(HTTPBearer(auto_error=False))] if digests else []
    _add_openai_routes(app, endpoint, bearer)
    add_batch_routes(app, batches, bearer)
    _add_operator_routes(app, endpoint, bearer)
    app.add_exception_handler(ApiError, _answer_api_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _answer_invalid_body)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _answer_http_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _answer_bug)
    config = endpoint.config
    gate = Gate(app, limits=config.limits, digests=digests, uploads=upload_limits(config.limits, config.batches))
    return Counted(gate, endpoint.desk.metrics)


def _add_openai_routes(app: FastAPI, endpoint: Endpoint, bearer: list[Any]) -> None:
    @app.post("/v1/chat/completions", dependencies=bearer)
    async def chat(body: ChatRequest, http: Request) -> Response:
        return await endpoint.complete(body, http)

    @app.post("/v1/completions", dependencies=bearer)
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await endpoint.complete(body, http)

    @app.get("/v1/models", dependencies=bearer)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [endpoint.about_model()]}

    @app.get("/v1/models/{name:path}", dependencies=bearer)
    async def model(name: str) -> dict[str, Any]:
        if name != endpoint.config.name:
            raise no_such_model(endpoint.config.name)
        return endpoint.about_model()


def _add_operator_routes(app: FastAPI, endpoint: Endpoint, bearer: list[Any]) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Alive: not so when the engine is broken, which only a new replica mends."""
        is_alive = endpoint.desk.worker.failure is None
        return JSONResponse({"status": "ok" if is_alive else "broken"}, 200 if is_alive else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether a request would be answered now."""
        trouble = endpoint.desk.trouble
        return JSONResponse({"status": trouble or "ready"}, 503 if trouble else 200)

    @app.get("/metrics", dependencies=bearer)
    async def metrics() -> Response:
        return PlainTextResponse(endpoint.desk.metrics.text(), media_type="text/plain; version=0.0.4")


async def _answer_api_error(http: Request, error: ApiError) -> Response:
    return respond(error)


async def _answer_invalid_body(http: Request, error: RequestValidationError) -> Response:
    mistakes = error.errors()
    if mistakes and mistakes[0]["type"] == "json_invalid":
        return respond(ApiError(400, "the body is not valid JSON", code="invalid_json"))
    place = str(mistakes[0]["loc"][0]) if mistakes else "body"  # or query
    return respond(error_of_fields(mistakes, prefix=(place,)))


async def _answer_http_error(http: Request, error: HTTPException) -> Response:
    if isinstance(error.__cause__, ApiError):  # raised while FastAPI read the body
        return respond(error.__cause__)
    text = {404: "there is no such route", 405: "this route has another method"}.get(error.status_code, error.detail)
    return respond(ApiError(error.status_code, text, headers=error.headers))


async def _answer_bug(http: Request, error: Exception) -> Response:
    return respond(ApiError(500, "the server made a mistake; its log says which", code="internal_error"))
