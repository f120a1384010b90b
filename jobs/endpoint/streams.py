"""Server-sent events: an engine's events become the chunks of an answer, and the chunks become bytes."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from actors.requests import Completion, Request, Usage
from actors.streamed_text import Detokenizer, StreamedText
from actors.worker import TokensEvent
from pipeline.openai_api.answers import ChatAnswer, TextAnswer
from pipeline.openai_api.errors import ApiError

logger = logging.getLogger("shoal.endpoint")

Events = AsyncGenerator[TokensEvent | Completion, None]

DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Sends what `chunks` yields. However it ends, `events` is closed then and there: that gives the pages back."""

    def __init__(self, chunks: AsyncGenerator[bytes, None], events: Events, headers: Mapping[str, str]) -> None:
        no_waiting = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers={**headers, **no_waiting})
        self._chunks = chunks
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events), contextlib.aclosing(self._chunks):
            await super().__call__(scope, receive, send)


async def write_chunks(
    answer: ChatAnswer | TextAnswer,
    requests: list[Request],
    first: TokensEvent | Completion,
    events: Events,
    detokenizer: Detokenizer,
    *,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """The body of a stream that begins with `first`. An error in mid-stream is its last event, without [DONE]."""
    # OpenAI has a usage of null in all chunks but the last, if usage was asked for.
    no_usage = {"usage": None} if include_usage else {}
    n = requests[0].sampling.n
    place = {request.request_id: number * n for number, request in enumerate(requests)}
    texts = [StreamedText(detokenizer, request.sampling.stop) for request in requests for _ in range(n)]
    usages: list[Usage] = []
    for chunk in answer.opening_chunks(len(texts)):
        yield _data({**chunk, **no_usage})
    try:
        event = first
        while True:
            if isinstance(event, Completion):
                usages.append(event.usage)
                if len(usages) == len(requests):
                    break
            else:
                for chunk in _chunks_of(event, answer, place[event.request_id] + event.index, texts):
                    yield _data({**chunk, **no_usage})
            event = await anext(events)
    except ApiError as error:
        yield _data(error.body)
        return
    except RuntimeError:
        logger.exception("a stream could not go on")
        yield _data(ApiError(500, "the stream could not go on; try without streaming").body)
        return
    if include_usage:
        yield _data(answer.usage_chunk(usages))
    yield DONE


def _chunks_of(
    event: TokensEvent, answer: ChatAnswer | TextAnswer, index: int, texts: list[StreamedText]
) -> list[dict[str, Any]]:
    text = texts[index].add(event.token_ids) if event.text is None else texts[index].finish(event.text)
    chunks = [answer.text_chunk(index, text, event.logprobs)] if text or event.logprobs else []
    if event.finish_reason is not None:
        chunks.append(answer.last_chunk(index, event.finish_reason))
    return chunks


def _data(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
