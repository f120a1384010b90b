"""What the routes share: one request's way from its fields to a response, and how all of it is made from settings.

No prompt is ever logged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from actors.requests import Request as EngineRequest
from actors.streamed_text import Detokenizer
from actors.weights.checkpoint import load_tokenizer
from actors.worker import EngineWorker
from jobs.endpoint.config import EndpointConfig
from jobs.endpoint.desk import Desk
from jobs.endpoint.streams import Events, EventStream, write_chunks
from pipeline.job import identify_model
from pipeline.openai_api.answers import ChatAnswer, TextAnswer
from pipeline.openai_api.batch_lines import read_requests
from pipeline.openai_api.errors import ApiError
from pipeline.openai_api.fields import ChatRequest, CompletionRequest, SamplingFields, ignored_fields
from pipeline.openai_api.reading import RequestReader

logger = logging.getLogger("shoal.endpoint")

IGNORED_HEADER = "X-Shoal-Ignored-Fields"

T = TypeVar("T")


class Endpoint:
    """One model and the desk before it. `fingerprint` changes with the model's weights."""

    def __init__(
        self,
        config: EndpointConfig,
        desk: Desk,
        reader: RequestReader,
        detokenizer: Detokenizer,
        *,
        max_model_len: int,
        fingerprint: str,
    ) -> None:
        self.config = config
        self.desk = desk
        self._reader = reader
        self._detokenizer = detokenizer
        self._max_model_len = max_model_len
        self._fingerprint = fingerprint
        self._started_at = int(time.time())
        self._thread = ThreadPoolExecutor(1, "shoal-reader")  # one: a tokenizer is not made to be shared
        self._warned: set[str] = set()

    async def complete(self, body: ChatRequest | CompletionRequest, http: Request) -> Response:
        """Answer one request, whole or as a stream; ApiError for whatever is wrong with it."""
        headers = self._check(body)
        requests = await self.read(body)
        answer = self.new_answer(body)
        if not body.stream:
            completions = await self._unless_gone(http, self.desk.answer(requests))
            return JSONResponse(answer.whole(completions), headers=headers)
        events = self.desk.stream(requests)
        # A refusal can be a status only as long as nothing is sent, so the first token is awaited here.
        first = await self._unless_gone(http, _first(events))
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        chunks = write_chunks(answer, requests, first, events, self._detokenizer, include_usage=include_usage)
        return EventStream(chunks, events, headers)

    async def read(self, body: ChatRequest | CompletionRequest) -> list[EngineRequest]:
        """The engine's requests for a body; ApiError for what is wrong with it."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, read_requests, self._reader, body)

    def new_answer(self, body: ChatRequest | CompletionRequest) -> ChatAnswer | TextAnswer:
        """The writer of this request's answer."""
        kind = ChatAnswer if isinstance(body, ChatRequest) else TextAnswer
        return kind(self.config.name, self._fingerprint)

    def about_model(self) -> dict[str, Any]:
        """What /v1/models says."""
        return {
            "id": self.config.name,
            "object": "model",
            "created": self._started_at,
            "owned_by": "shoal",
            "max_model_len": self._max_model_len,
        }

    def close(self) -> None:
        """End the engine and its threads."""
        self._thread.shutdown()
        self.desk.worker.close()

    def _check(self, body: SamplingFields) -> dict[str, str]:
        """Whatever can be checked without a tokenizer; returns headers for the response."""
        if body.model != self.config.name:
            raise no_such_model(self.config.name)
        ignored = ignored_fields(body)
        for name in set(ignored) - self._warned:
            self._warned.add(name)
            logger.warning("requests set %s, which has no effect here", name)
        return {IGNORED_HEADER: ", ".join(ignored)} if ignored else {}

    async def _unless_gone(self, http: Request, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, and drop it when the client leaves."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnect_of(http))
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            self.desk.metrics.disconnects.inc()
            raise ApiError(499, "the client left", code="disconnected")
        finally:
            gone.cancel()
            task.cancel()
            await asyncio.wait((task, gone))


def open_endpoint(config: EndpointConfig) -> Endpoint:
    """Load the model and the tokenizer of resolved settings; ValueError for what is wrong with them."""
    worker = EngineWorker(config.engine)
    desk = Desk(
        worker,
        num_places=config.num_places,
        num_running=config.engine.max_num_seqs,
        max_wait_s=config.limits.max_queue_s,
        max_background=config.batches.max_num_seqs or max(1, config.engine.max_num_seqs // 2),
        min_gap_s=config.limits.stream_interval_s,
    )
    max_model_len = worker.engine.max_model_len
    limits = config.limits
    reader = RequestReader(
        config.prompt,
        load_tokenizer(config.engine.tokenizer or config.model),
        max_model_len=max_model_len,
        max_prompt_tokens=limits.max_prompt_tokens,
        max_choices=limits.max_choices,
        defaults=config.sampling_defaults,
    )
    return Endpoint(
        config,
        desk,
        reader,
        Detokenizer(worker.engine.tokenizer),
        max_model_len=max_model_len,
        fingerprint=f"shoal-{identify_model(config.model)[:12]}",
    )


def no_such_model(name: str) -> ApiError:
    return ApiError(404, f"there is no such model here; this server has {name}", param="model", code="model_not_found")


async def _first(events: Events) -> Any:
    return await anext(events)


async def _disconnect_of(http: Request) -> None:
    """Return when the client has left; its request has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
