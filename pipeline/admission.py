"""Which slices may be planned and tried, by whom, how often each was, and which rows were alone with a dying engine.

The graph keeps one `Admission` in a process of its own: it has to outlive the workers whose deaths it counts. Slices of
a shard's plan are handed out by Ray, those of a corpus here, for tickets. Knows no Ray, no files and no answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.corpus.dispatch import Dispatch

SliceKey = tuple[str, int]
"""A shard's name, or the word for the corpus, and the index of a slice in its plan."""

RELEASE_AFTER_S = 5.0
"""A worker that has had nothing to do for so long, though a run of slices is its own, has gone: pools shrink by taking
workers without work. Ray Data's loop takes up to half a second to hand out the next ticket."""

NORMAL_ATTEMPTS = 2
"""A worker can die for reasons of its own (a node goes, memory runs out); only a slice that saw this many
deaths is answered carefully, a few rows at a time, to find the row that kills."""

MAX_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Attempt:
    """How to try a slice this time.

    `poison` holds the rows that died alone with their worker: they become error rows. `suspects` died together
    and are to be tried one by one.
    """

    action: Literal["answer", "answer_carefully", "give_up", "stop"]
    number: int
    poison: frozenset[int] = frozenset()
    suspects: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """The seconds of a worker between its last slice and the end of the run, and since its start."""

    held_s: float
    idle_s: float
    lost_s: float


@dataclass(slots=True)
class _WorkerState:
    started_at: float
    seen_at: float
    unanswered_s: float = 0.0
    slices: set[SliceKey] = field(default_factory=set)


@dataclass(slots=True)
class _Trial:
    attempts: int = 0
    under_trial: frozenset[int] = frozenset()
    poison: set[int] = field(default_factory=set)
    suspects: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class CorpusWork:
    """The slices of a planned corpus: who gets which, and for each what a process needs to read it."""

    dispatch: Dispatch
    ref: Callable[[int], Any]


class Admission:
    """At most `window` slices are planned and not yet answered; after `stop` nothing new begins.

    find_work: what is known of a corpus that is planned already; called once. An Admission that was started anew,
    since its node went, has it from there; which slices workers have, they say themselves.
    """

    def __init__(self, window: int, find_work: Callable[[], CorpusWork | None] = lambda: None) -> None:
        self._window = window
        self._open: set[SliceKey] = set()
        self._finished: set[SliceKey] = set()
        self._workers: dict[str, _WorkerState] = {}
        self._trials: dict[SliceKey, _Trial] = {}
        self._stopped = False
        self._work = find_work()
        self._num_tickets = 0
        self._waiting: set[int] = set()
        self._index_of: dict[int, int | None] = {}
        self._ticket_of: dict[int, int] = {}
        self._changed = asyncio.Condition()

    async def open_corpus(self, work: CorpusWork) -> None:
        """The corpus is planned: tickets are given out from now on."""
        async with self._changed:
            self._work = self._work or work
            self._changed.notify_all()

    async def admit_ticket(self, ticket: int) -> bool:
        """Wait until this ticket, the next after the last, may go to whichever worker is free; False if no more are
        wanted. One that went before may go again."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._stopped or self._may_go(ticket))
            if self._stopped:
                return False
            if ticket < self._num_tickets:
                return True
            if self._work is None or self._work.dispatch.num_unassigned == 0:
                return False
            self._num_tickets = ticket + 1
            self._waiting.add(ticket)
            return True

    async def slice_for(self, ticket: int, worker: str, holding: Collection[int]) -> Any:
        """What a worker with this ticket is to answer, as a ref; None for nothing. The same ticket, the same slice, for
        Ray repeats a call whose worker or result was lost.

        holding: indices of the slices that the worker has. Waits if what is left is better done by others: it may turn
        out that they have gone.
        """
        async with self._changed:
            work, state = self._work, self._state_of(worker)
            assert work is not None, "a ticket before the corpus is planned"
            state.seen_at = time.monotonic()
            for held in holding:
                work.dispatch.take(worker, held)
            if ticket not in self._index_of:
                given = await self._wait_for_slice(work.dispatch, worker, ticket)
                self._index_of[ticket] = given
                if given is not None:
                    self._ticket_of[given] = ticket
                self._changed.notify_all()
            index = self._index_of[ticket]
            return None if index is None else work.ref(index)

    async def _wait_for_slice(self, dispatch: Dispatch, worker: str, ticket: int) -> int | None:
        """The next slice for this worker, and the ticket counts as open until it is finished."""
        while not self._stopped:
            index = dispatch.next_slice(worker)
            if index is not None:
                self._waiting.add(ticket)
                return index
            if ticket in self._waiting:  # a worker that waits must not keep the others from theirs
                self._waiting.discard(ticket)
                self._changed.notify_all()
            if dispatch.num_unassigned == 0:
                return None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 1.0)
            self._release_departed(dispatch)
        self._waiting.discard(ticket)
        return None

    def _release_departed(self, dispatch: Dispatch) -> None:
        now = time.monotonic()
        for owner in dispatch.owners():
            if not dispatch.is_busy(owner) and now - self._workers[owner].seen_at > RELEASE_AFTER_S:
                dispatch.release(owner)

    def _may_go(self, ticket: int) -> bool:
        if self._work is None:
            return False
        is_done = self._work.dispatch.num_unassigned == 0
        return is_done or ticket < self._num_tickets or len(self._waiting) < self._window

    async def recomputed_tokens(self) -> int:
        """Prompt tokens that workers compute again for each other, so far; see `Dispatch`."""
        return self._work.dispatch.recomputed_tokens if self._work is not None else 0

    async def admit(self, key: SliceKey) -> bool:
        """Wait until this slice may be handed out; False if the run is being stopped.

        A planner that was restarted asks again for slices which it already has, or which are finished.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._stopped or self._has_room(key))
            if self._stopped:
                return False
            if key not in self._finished:
                self._open.add(key)
            return True

    async def hello(self, worker: str) -> float:
        """A worker starts; seconds of device time that its forerunner of the same name took to its grave."""
        now, before = time.monotonic(), self._workers.get(worker)
        self._workers[worker] = _WorkerState(started_at=before.started_at if before else now, seen_at=now)
        if self._work is not None:
            self._work.dispatch.restart(worker)
        return 0.0 if before is None else now - before.seen_at + before.unanswered_s

    async def begin(self, key: SliceKey, worker: str) -> Attempt:
        """A worker starts with this slice. If it did before and never finished, its worker died."""
        if self._stopped:
            return Attempt("stop", 0)
        self._state_of(worker).slices.add(key)
        trial = self._trials.setdefault(key, _Trial(attempts=int(key in self._finished)))
        trial.attempts += 1
        self._blame(trial)
        return Attempt(
            self._action(trial.attempts),
            trial.attempts,
            frozenset(trial.poison),
            frozenset(trial.suspects),
        )

    async def try_rows(self, key: SliceKey, rows: frozenset[int]) -> None:
        """These rows, and no others, are in the worker's engine from now on; none ends the trial."""
        trial = self._trials.get(key)
        if trial is not None:
            trial.under_trial = rows

    async def finish(self, key: SliceKey, worker: str, unanswered_s: float = 0.0) -> None:
        """The slice is published, or dropped because the run stops.

        unanswered_s: what the worker's engine has spent until now on rows that it has not yet answered.
        """
        state = self._state_of(worker)
        state.seen_at, state.unanswered_s = time.monotonic(), unanswered_s
        state.slices.discard(key)
        self._trials.pop(key, None)
        async with self._changed:
            self._open.discard(key)
            self._finished.add(key)
            if self._work is not None:
                self._work.dispatch.finish(key[1])
                self._waiting.discard(self._ticket_of.get(key[1], -1))
            self._changed.notify_all()

    async def close_accounts(self) -> list[WorkerEnd]:
        """What each worker has done since it was last heard of, and how long it was held in all."""
        now = time.monotonic()
        return [
            WorkerEnd(
                held_s=now - state.started_at,
                idle_s=0.0 if state.slices else now - state.seen_at,
                lost_s=state.unanswered_s + (now - state.seen_at if state.slices else 0.0),
            )
            for state in self._workers.values()
        ]

    async def stop(self) -> None:
        async with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _state_of(self, worker: str) -> _WorkerState:
        """A worker that said hello to an Admission which is gone is known from now on."""
        return self._workers.setdefault(worker, _WorkerState(started_at=time.monotonic(), seen_at=time.monotonic()))

    def _has_room(self, key: SliceKey) -> bool:
        return key in self._open or key in self._finished or len(self._open) < self._window

    @staticmethod
    def _action(attempts: int) -> Literal["answer", "answer_carefully", "give_up"]:
        if attempts <= NORMAL_ATTEMPTS:
            return "answer"
        return "answer_carefully" if attempts <= MAX_ATTEMPTS else "give_up"

    @staticmethod
    def _blame(trial: _Trial) -> None:
        if len(trial.under_trial) == 1:
            trial.poison |= trial.under_trial
        elif trial.under_trial:
            trial.suspects |= trial.under_trial
        trial.under_trial = frozenset()
