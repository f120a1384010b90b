"""An engine in a thread of its own, for asyncio callers: what Ray Data or Serve puts on a GPU.

Callers only await futures, so an event loop that is blocked for a while (Ray Data does that under backpressure) never
stops the engine. Imports no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from actors.config import EngineConfig
from actors.engine import Engine
from actors.requests import Completion, DrafterStats, EngineError, FinishReason, Request, TokenLogprob
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


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """How full an engine is right now; pages in use are those that no other request could have."""

    num_running: int
    num_waiting: int
    num_pages_in_use: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """New tokens of one of a request's outputs; `finish_reason` and the output's whole `text` come with its last."""

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    text: str | None = None


@dataclass(slots=True, eq=False)
class _Call:
    """One `generate` or `stream`: where its completions go, and those that are there. Callers may use an id twice at
    the same time, the engine may not; so in the engine each request goes by a number of the worker's own.

    A stream has `events`; its future is only there to be cancelled."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[list[Completion]]
    requests: list[Request]
    own_ids: list[str] = field(default_factory=list)
    completions: dict[str, Completion] = field(default_factory=dict)
    events: asyncio.Queue[TokensEvent | Completion | EngineError] | None = None
    num_sent: dict[tuple[str, int], int] = field(default_factory=dict)  # of a stream: tokens, by own id and output
    min_gap_s: float = 0.0  # of a stream: between the events of one output
    sent_at: dict[tuple[str, int], float] = field(default_factory=dict)

    def settle(self, result: list[Completion] | None, error: EngineError | None) -> None:
        """Hand over the end, in the caller's event loop."""
        if self.events is not None:
            if error is not None:
                self.events.put_nowait(error)
        elif self.future.done():
            return
        elif error is not None:
            self.future.set_exception(error)
        else:
            assert result is not None
            self.future.set_result(result)


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
        self._submit(call)
        return await call.future

    async def stream(
        self, requests: list[Request], min_gap_s: float = 0.0
    ) -> AsyncGenerator[TokensEvent | Completion, None]:
        """The tokens of `requests`, whose ids differ, after each step, and each request's Completion behind its last.
        EngineError when the engine is broken; closing the generator drops the requests. A slow reader holds nothing up.

        min_gap_s: tokens that come sooner after the last ones of their output wait for the next step; only an output's
        first and last never do.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[TokensEvent | Completion | EngineError] = asyncio.Queue()
        call = _Call(loop, loop.create_future(), requests, events=events, min_gap_s=min_gap_s)
        self._submit(call)
        num_open = len(requests)
        try:
            while num_open:
                event = await events.get()
                if isinstance(event, EngineError):
                    raise event
                num_open -= isinstance(event, Completion)
                yield event
        finally:
            call.future.cancel()

    @property
    def failure(self) -> BaseException | None:
        """Why the engine is gone; None while it works."""
        return self._failure

    def load(self) -> WorkerLoad:
        """A snapshot, callable from any thread."""
        scheduler = self.engine.scheduler
        num_pages = scheduler.pool.num_pages
        in_use = num_pages - scheduler.tree.num_available
        return WorkerLoad(len(scheduler.running), len(scheduler.waiting), in_use, num_pages)

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

    def _submit(self, call: _Call) -> None:
        with self._wake:
            self._refuse_if_gone()
            self._arrivals.append(call)
            self._wake.notify()

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
                self._send_events()
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
            if call.future.cancelled():
                continue
            self._calls.add(call)
            for request in call.requests:
                own_id = str(next(self._ids))
                call.own_ids.append(own_id)
                self._call_of[own_id] = call
                self.engine.add(replace(request, request_id=own_id))
            self.engine.expect_more()
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
        own_id = completion.request_id
        call = self._call_of.pop(own_id)
        completion.request_id = call.requests[call.own_ids.index(own_id)].request_id
        call.completions[own_id] = completion
        if call.events is not None:
            _tell(call.loop, _put_all, [(call, event) for event in _last_events(call, own_id)])
        if len(call.completions) == len(call.requests):
            self._calls.remove(call)
            _tell(call.loop, call.settle, [call.completions[own_id] for own_id in call.own_ids], None)

    def _send_events(self) -> None:
        """Tell streams what the step has added to their outputs: one call per event loop, however many streams."""
        news: dict[asyncio.AbstractEventLoop, list[tuple[_Call, TokensEvent | Completion]]] = {}
        now = time.perf_counter()
        for call in self._calls:
            if call.events is None:
                continue
            for own_id, request in zip(call.own_ids, call.requests):
                for sequence in self.engine.sequences_of(own_id):
                    output = own_id, sequence.index
                    start, end = call.num_sent.get(output, 0), sequence.num_generated
                    if start == end or sequence.finish_reason == "error":
                        continue
                    is_soon = now < call.sent_at.get(output, -math.inf) + call.min_gap_s
                    if is_soon and sequence.finish_reason is None:
                        continue
                    event = TokensEvent(
                        request.request_id,
                        sequence.index,
                        sequence.token_ids[sequence.num_prompt + start :],
                        None if sequence.logprobs is None else sequence.logprobs[start:],
                        sequence.finish_reason,
                        None if sequence.finish_reason is None else sequence.text,
                    )
                    call.num_sent[output], call.sent_at[output] = end, now
                    news.setdefault(call.loop, []).append((call, event))
        for loop, events in news.items():
            _tell(loop, _put_all, events)

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
            _tell(call.loop, call.settle, None, failure)


def _last_events(call: _Call, own_id: str) -> list[TokensEvent | Completion]:
    """What a stream has not heard of yet of a request that is complete now."""
    completion = call.completions[own_id]
    events: list[TokensEvent | Completion] = []
    for output in completion.outputs:
        start = call.num_sent.get((own_id, output.index), 0)
        if start < len(output.token_ids):
            logprobs = None if output.logprobs is None else output.logprobs[start:]
            events.append(
                TokensEvent(
                    completion.request_id,
                    output.index,
                    output.token_ids[start:],
                    logprobs,
                    output.finish_reason,
                    output.text,
                )
            )
    return [*events, completion]


def _put_all(events: list[tuple[_Call, TokensEvent | Completion]]) -> None:
    for call, event in events:
        assert call.events is not None
        call.events.put_nowait(event)


def _tell(loop: asyncio.AbstractEventLoop, act: Callable[..., None], *data: Any) -> None:
    """Call in the caller's event loop. One that was closed meanwhile has nobody left who waits."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(act, *data)
