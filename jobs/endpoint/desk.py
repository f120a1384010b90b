"""Where requests meet the engine: admitted while there is room, answered whole or as a stream, counted, given back.
Requests of batches come in by the back door: they wait for places that clients leave free, and give way to clients that
come later.

Knows no HTTP; `jobs.endpoint.app` turns its errors into responses.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Protocol

from actors.requests import Completion, EngineError, Request
from actors.worker import TokensEvent, WorkerLoad, WorkerStats
from jobs.endpoint.gate import queue_is_full
from jobs.endpoint.metrics import Metrics
from jobs.endpoint.places import NoPlaceError, Places
from pipeline.openai_api.errors import ApiError, error_of_row

_LOOK_AGAIN_S = 0.02
_BATCH_PRIORITY = 1
"""A client's is 0, which is better."""


class Worker(Protocol):
    """What `actors.worker.EngineWorker` offers."""

    async def generate(self, requests: list[Request]) -> list[Completion]: ...

    def stream(
        self, requests: list[Request], min_gap_s: float = 0.0
    ) -> AsyncGenerator[TokensEvent | Completion, None]: ...

    def load(self) -> WorkerLoad: ...

    def stats(self) -> WorkerStats: ...

    @property
    def failure(self) -> BaseException | None: ...

    def close(self) -> None: ...


class Desk:
    """One worker and the places in it: `num_places` completions may run or wait, `num_running` of them run. Of these
    batches have `max_background` at most."""

    def __init__(
        self,
        worker: Worker,
        *,
        num_places: int,
        num_running: int,
        max_wait_s: float = math.inf,
        max_background: int = 1,
        min_gap_s: float = 0.0,
    ) -> None:
        """max_wait_s: until a place is expected, for whoever is let in. min_gap_s: between two pieces of a stream."""
        self.worker = worker
        self._min_gap_s = min_gap_s
        self.metrics = Metrics(worker.load, worker.stats)
        self.is_closing = False
        self.num_background = 0
        self.max_background = max_background
        self._background_turn = asyncio.Lock()
        self._num_running = num_running
        self._room = Places(num_all=num_places, num_running=num_running, max_wait_s=max_wait_s)

    @property
    def num_taken(self) -> int:
        """Completions of clients' that run or wait."""
        return self._room.num_taken

    @property
    def trouble(self) -> str | None:
        """Why no request can be answered now; None when they can."""
        if self.worker.failure is not None:
            return "the engine broke and is being replaced"
        return "the server is shutting down" if self.is_closing else None

    async def answer(self, requests: list[Request]) -> list[Completion]:
        """All completions at once; ApiError if there is no room or one of them is an error."""
        with self._places(requests):
            return await self._generate(requests, is_online=True)

    async def stream(self, requests: list[Request]) -> AsyncGenerator[TokensEvent | Completion, None]:
        """The worker's events; ApiError before the first if there is no room, and instead of a Completion's error.
        Closing it gives places and pages back."""
        with self._places(requests), _engine_errors():
            async with contextlib.aclosing(self.worker.stream(requests, self._min_gap_s)) as events:
                async for event in events:
                    if isinstance(event, Completion):
                        self.metrics.note(event)
                        if event.error is not None:
                            raise error_of_row(event.error)
                    yield event

    async def enter_background(self, requests: list[Request]) -> int:
        """Wait for places for a batch's request and take them; returns how many, for `leave_background`. ApiError 503
        if there will be none."""
        num_wanted = sum(request.sampling.n for request in requests)
        async with self._background_turn:
            while not self._has_background_room(num_wanted):
                await asyncio.sleep(_LOOK_AGAIN_S)
            self._refuse_in_trouble()
            self.num_background += num_wanted
        return num_wanted

    def leave_background(self, num_places: int) -> None:
        self.num_background -= num_places

    async def answer_in_background(self, requests: list[Request]) -> list[Completion]:
        """As `answer`, in places that `enter_background` has taken. Clients that come meanwhile may have these for as
        long as they run."""
        self._refuse_in_trouble()
        behind = [replace(request, priority=_BATCH_PRIORITY) for request in requests]
        return await self._generate(behind, is_online=False)

    async def _generate(self, requests: list[Request], *, is_online: bool) -> list[Completion]:
        with _engine_errors():
            completions = await self.worker.generate(requests)
        for completion in completions:
            self.metrics.note(completion, is_online=is_online)
        for completion in completions:
            if completion.error is not None:
                raise error_of_row(completion.error)
        return completions

    def _has_background_room(self, num_wanted: int) -> bool:
        if self.trouble is not None:
            return True  # for the refusal
        if self.num_background == 0:  # one is always let in, however many completions it asks for
            return self.num_taken < self._num_running
        load = self.worker.load()
        if 2 * load.num_pages_in_use > load.num_pages:
            return False
        return self.num_background + num_wanted <= min(self.max_background, self._num_running - self.num_taken)

    def _refuse_in_trouble(self) -> None:
        if self.trouble is not None:
            raise ApiError(503, self.trouble, code="unavailable", headers={"Retry-After": "5"})

    @contextlib.contextmanager
    def _places(self, requests: list[Request]) -> Iterator[None]:
        self._refuse_in_trouble()
        num_wanted = sum(request.sampling.n for request in requests)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._room.hold(num_wanted))
            except NoPlaceError as error:
                raise queue_is_full(error.wait_s) from None
            with self.metrics.request_s.time():
                yield


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    try:
        yield
    except EngineError as error:
        raise ApiError(503, "the engine broke; try again", code="engine_error", headers={"Retry-After": "5"}) from error
