"""An engine in a thread of its own, for asyncio callers: what Ray Data or Serve puts on a GPU.

Callers only await futures, so an event loop that is blocked for a while (Ray Data does that under backpressure) never
stops the engine. Imports no Ray.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from actors.config import EngineConfig
from actors.engine import Engine
from actors.requests import Completion, DrafterStats, EngineError, Request
from actors.step_times import StepTimes
from kernels.cpu_linear import dtype_name

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """What a worker has done so far. load_s + busy_s + idle_s is its life; busy_s is what rows were charged and
    `lost_s`, the part of it whose answers were thrown away. Drafts count with the answers that were thrown away too:
    `num_verify_steps` is the request-steps that had at least one, `saved_by_speculation_s` is an estimate."""

    load_s: float
    busy_s: float
    idle_s: float
    lost_s: float
    num_steps: int
    prefill_s: float
    decode_s: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_preemptions: int
    num_verify_steps: int
    saved_by_speculation_s: float
    drafters: tuple[DrafterStats, ...]
    peak_pages: int
    num_pages: int
    device: str
    dtype: str
    notes: tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Call:
    """One `generate`: where its completions go, and those that are there. Callers may use an id twice at the same
    time, the engine may not; so in the engine each request goes by a number of the worker's own."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[list[Completion]]
    requests: list[Request]
    own_ids: list[str] = field(default_factory=list)
    completions: dict[str, Completion] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Command:
    """Something to do with the engine between two steps, in the engine's own thread."""

    act: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


class EngineWorker:
    """Loads the model before the constructor returns; several `generate` calls run together in one batch."""

    def __init__(self, config: EngineConfig):
        self.engine = Engine(config)
        self._ids = itertools.count()
        self._arrivals: deque[_Call] = deque()
        self._commands: deque[_Command] = deque()
        self._wake = threading.Condition()
        self._is_closing = False
        self._failure: BaseException | None = None
        self._idle_s = 0.0
        self._idle_since: float | None = None
        self._calls: set[_Call] = set()
        self._call_of: dict[str, _Call] = {}  # by own id
        self._thread = threading.Thread(target=self._work, name="shoal-engine", daemon=True)
        self._thread.start()

    async def generate(self, requests: list[Request]) -> list[Completion]:
        """Answer `requests`, in their order. EngineError when the engine is broken; cancelling drops the requests."""
        if not requests:
            return []
        loop = asyncio.get_running_loop()
        call = _Call(loop, loop.create_future(), requests)
        with self._wake:
            self._refuse_if_gone()
            self._arrivals.append(call)
            self._wake.notify()
        return await call.future

    def stats(self) -> WorkerStats:
        """A consistent enough snapshot, callable from any thread."""
        engine, stats = self.engine, self.engine.stats
        since = self._idle_since
        waiting = time.perf_counter() - since if since is not None else 0.0
        return WorkerStats(
            load_s=engine.load_s,
            busy_s=stats.busy_ns / 1e9,
            idle_s=self._idle_s + waiting,
            lost_s=stats.lost_ns / 1e9,
            num_steps=stats.num_steps,
            prefill_s=stats.prefill_ns / 1e9,
            decode_s=(stats.busy_ns - stats.prefill_ns) / 1e9,
            num_prefill_tokens=stats.num_prefill_tokens,
            num_decode_tokens=stats.num_decode_tokens,
            num_preemptions=stats.num_preemptions,
            num_verify_steps=stats.num_verify_steps,
            saved_by_speculation_s=stats.saved_by_speculation_s,
            drafters=engine.drafter_stats(),
            peak_pages=engine.scheduler.peak_pages,
            num_pages=engine.scheduler.pool.num_pages,
            device=str(engine.device),
            dtype=dtype_name(engine.dtype),
            notes=(*engine.notes, *engine.decoder.describe()),
        )

    def step_times(self) -> StepTimes:
        """What the engine expects its steps to take."""
        return self.engine.step_times

    def export_corpus_index(self) -> bytes | None:
        """What the engine's drafters know of the answers so far, None where they keep no index; EngineError when the
        engine is broken. Waits for the running step, so not for an event loop; callable from any thread."""
        return self._between_steps(self.engine.corpus_index)

    def import_corpus_index(self, data: bytes) -> bool:
        """Add what `export_corpus_index` gave, here or elsewhere; False if the engine keeps no index or cannot use it.
        Waits and raises like `export_corpus_index`."""
        return self._between_steps(lambda: self.engine.load_corpus_index(data))

    def close(self) -> None:
        """Stop after the current step; calls that are still open get an EngineError."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._thread.join()

    def _refuse_if_gone(self) -> None:
        if self._failure is not None or self._is_closing:
            raise EngineError(f"the engine is gone: {self._failure or 'closed'}; make a new worker")

    def _between_steps(self, act: Callable[[], T]) -> T:
        command = _Command(act)
        with self._wake:
            self._refuse_if_gone()
            self._commands.append(command)
            self._wake.notify()
        result: T = command.future.result()
        return result

    def _work(self) -> None:
        try:
            while self._take_arrivals():
                self._obey()
                for completion in self.engine.step():
                    self._deliver(completion)
                self._drop_cancelled()
        except BaseException as error:
            self._fail(error)
        else:
            self._fail(EngineError("the worker was closed"))

    def _take_arrivals(self) -> bool:
        """Move new calls into the engine, waiting for one if there is nothing to do; False at the end."""
        with self._wake:
            if not self._has_news() and not self._calls:
                self._idle_since = time.perf_counter()
                self._wake.wait_for(self._has_news)
                self._idle_s += time.perf_counter() - self._idle_since
                self._idle_since = None
            arrivals, self._arrivals = self._arrivals, deque()
            if self._is_closing:
                self._arrivals = arrivals
                return False
        for call in arrivals:
            self._calls.add(call)
            for request in call.requests:
                own_id = str(next(self._ids))
                call.own_ids.append(own_id)
                self._call_of[own_id] = call
                self.engine.add(replace(request, request_id=own_id))
        return True

    def _has_news(self) -> bool:
        return bool(self._arrivals or self._commands or self._is_closing)

    def _obey(self) -> None:
        """Do what was asked for between steps. It is no row's time; a command that fails is its caller's affair."""
        started = time.perf_counter()
        while self._commands:
            command = self._commands.popleft()
            try:
                command.future.set_result(command.act())
            except Exception as error:
                command.future.set_exception(error)
        self._idle_s += time.perf_counter() - started

    def _deliver(self, completion: Completion) -> None:
        call = self._call_of.pop(completion.request_id)
        call.completions[completion.request_id] = completion
        if len(call.completions) < len(call.requests):
            return
        self._calls.remove(call)
        ordered = [call.completions[own_id] for own_id in call.own_ids]
        for request, done in zip(call.requests, ordered):
            done.request_id = request.request_id
        call.loop.call_soon_threadsafe(_settle, call.future, ordered, None)

    def _drop_cancelled(self) -> None:
        for call in [call for call in self._calls if call.future.cancelled()]:
            self._calls.remove(call)
            for own_id in call.own_ids:
                if self._call_of.pop(own_id, None) is not None:
                    self.engine.abort(own_id)

    def _fail(self, error: BaseException) -> None:
        with self._wake:
            self._failure = error
            open_calls = self._calls | set(self._arrivals)
            commands, self._commands = self._commands, deque()
        for command in commands:
            command.future.set_exception(EngineError(f"the engine is gone: {error}; make a new worker"))
        for call in open_calls:
            failure = EngineError(f"the engine broke: {type(error).__name__}: {error}")
            failure.__cause__ = error
            call.loop.call_soon_threadsafe(_settle, call.future, None, failure)


def _settle(
    future: asyncio.Future[list[Completion]], result: list[Completion] | None, error: EngineError | None
) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        assert result is not None
        future.set_result(result)
