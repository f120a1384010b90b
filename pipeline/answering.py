"""Get a slice's rows answered by a worker that may break: rebuild the engine, and find the row that breaks it.

Knows no files and no Ray: the graph's actor calls it, tests call it with a worker of their own.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from actors.requests import Completion, EngineError, Request, RowError
from actors.step_times import StepTimes
from pipeline.drafts import DraftCounts, sum_drafts

GIVE_UP_AFTER = 5
"""An engine that breaks on so many rows in a row, each alone, is broken whatever the row."""


TIMES = ("load_s", "busy_s", "prefill_s", "decode_s")


class Worker(Protocol):
    """What `actors.worker.EngineWorker` offers; an engine in a thread of its own."""

    async def generate(self, requests: list[Request]) -> list[Completion]: ...

    def stats(self) -> Any: ...

    def step_times(self) -> StepTimes | None: ...

    def export_corpus_index(self) -> bytes | None: ...

    def import_corpus_index(self, data: bytes) -> bool: ...

    def close(self) -> None: ...


TryRows = Callable[[Sequence[Request]], Awaitable[None]]


class Answerer:
    """One worker, shared by several slices at once, and rebuilt when its engine breaks.

    `new_worker` loads a model: it is called in a thread. `lost_s` is what broken engines spent on rows that they
    never answered, `unanswered_s` what the present one has spent on rows that it has yet to answer.
    """

    def __init__(self, new_worker: Callable[[], Worker]) -> None:
        self._new_worker = new_worker
        self.worker = new_worker()
        self.num_rebuilds = 0
        self.lost_s = 0.0
        self._answered_s = 0.0
        self._totals = dict.fromkeys(TIMES, 0.0)
        self._drafts_before = DraftCounts()
        self._rebuilding = asyncio.Lock()
        self._turns = _Turns()

    async def answer(self, requests: list[Request]) -> list[Completion]:
        """Answer all, in order; an engine that breaks is rebuilt once, then the rows are tried apart."""
        for _ in range(2):
            async with self._turns.shared():
                worker = self.worker
                try:
                    return self._account(await worker.generate(requests))
                except EngineError:
                    pass
            await self._rebuild(worker)
        return await self.answer_carefully(requests)

    async def answer_carefully(
        self, requests: list[Request], suspects: frozenset[str] = frozenset(), try_rows: TryRows | None = None
    ) -> list[Completion]:
        """Answer a few rows at a time with nothing else in the engine; a row that breaks it alone is an error row.

        `suspects` are request ids to be tried alone. `try_rows` hears of the rows before they enter the engine, and
        of none when all is done. EngineError if the engine breaks whatever the row.
        """
        answers: dict[str, Completion] = {}
        async with self._turns.exclusive():
            apart = [request for request in requests if request.request_id in suspects]
            together = [request for request in requests if request.request_id not in suspects]
            for chunk in _chunks(together):
                found = await self._try(chunk, try_rows)
                if found is None:
                    apart += chunk
                else:
                    answers.update(found)
            answers.update(await self._answer_alone(apart, try_rows))
            if try_rows is not None:
                await try_rows([])
        return [answers[request.request_id] for request in requests]

    def times(self) -> dict[str, float]:
        """Seconds of all engines so far, by the names in TIMES."""
        stats = self.worker.stats()
        return {name: self._totals[name] + getattr(stats, name) for name in TIMES}

    def drafts(self) -> DraftCounts:
        """What the drafters of all engines did so far."""
        return sum_drafts([self._drafts_before, DraftCounts.of_worker(self.worker.stats())])

    @property
    def unanswered_s(self) -> float:
        return self.worker.stats().busy_s - self._answered_s

    def _account(self, completions: list[Completion]) -> list[Completion]:
        self._answered_s += math.fsum(completion.usage.device_seconds for completion in completions)
        return completions

    def _retire(self) -> None:
        self.lost_s += self.unanswered_s
        self._totals = self.times()
        self._drafts_before = self.drafts()
        self._answered_s = 0.0

    async def _answer_alone(self, requests: Sequence[Request], try_rows: TryRows | None) -> dict[str, Completion]:
        answers: dict[str, Completion] = {}
        num_broken_in_a_row = 0
        for request in requests:
            found = await self._try([request], try_rows)
            num_broken_in_a_row = num_broken_in_a_row + 1 if found is None else 0
            if num_broken_in_a_row == GIVE_UP_AFTER:
                raise EngineError(
                    f"the engine broke on {GIVE_UP_AFTER} rows in a row, each tried alone after a fresh start: "
                    "not the rows' fault; see the notes of the run and run the same command again"
                )
            answers.update(found or {request.request_id: poisonous(request)})
        return answers

    async def _try(self, requests: Sequence[Request], try_rows: TryRows | None) -> dict[str, Completion] | None:
        if try_rows is not None:
            await try_rows(requests)
        worker = self.worker
        try:
            completions = self._account(await worker.generate(list(requests)))
        except EngineError:
            await self._rebuild(worker)
            return None
        return {completion.request_id: completion for completion in completions}

    async def _rebuild(self, broken: Worker) -> None:
        """Replace the worker, once for all slices that saw the same one break."""
        async with self._rebuilding:
            if self.worker is not broken:
                return
            await asyncio.to_thread(broken.close)
            worker = await asyncio.to_thread(self._new_worker)
            self._retire()  # in one go with the change: whoever asks for totals meanwhile must not see its part twice
            self.worker = worker
            self.num_rebuilds += 1


def poisonous(request: Request) -> Completion:
    """The error row of a request that broke an engine, or killed a worker, while it was alone in it."""
    message = (
        f"the engine broke each time it answered this row ({len(request.prompt_token_ids)} prompt tokens), "
        "the last time with nothing else in it"
    )
    return Completion(request.request_id, error=RowError("engine_error", message))


def _chunks(requests: list[Request]) -> list[list[Request]]:
    """About sqrt(n) chunks of sqrt(n) rows: one row that breaks costs two broken engines, not log2(n)."""
    size = max(1, math.isqrt(len(requests)))
    return [requests[start : start + size] for start in range(0, len(requests), size)]


class _Turns:
    """Many slices share the engine, or one has it alone; whoever wants it alone is not kept waiting by newcomers."""

    def __init__(self) -> None:
        self._num_shared = 0
        self._num_waiting = 0
        self._alone = False
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._alone and not self._num_waiting)
            self._num_shared += 1
        try:
            yield
        finally:
            async with self._changed:
                self._num_shared -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        async with self._changed:
            self._num_waiting += 1
            try:
                await self._changed.wait_for(lambda: not self._alone and not self._num_shared)
                self._alone = True
            finally:
                self._num_waiting -= 1
        try:
            yield
        finally:
            async with self._changed:
                self._alone = False
                self._changed.notify_all()
