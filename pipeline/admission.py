"""Which slices may be planned and tried, how often each was, and which rows were alone with an engine that died.

The graph keeps one `Admission` in a process of its own: it has to outlive the workers whose deaths it counts.
Knows no Ray, no files and no answers.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Literal

SliceKey = tuple[str, int]
"""A shard's name and the index of a slice in its plan."""

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


class Admission:
    """At most `window` slices are planned and not yet answered; after `stop` nothing new begins."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._open: set[SliceKey] = set()
        self._finished: set[SliceKey] = set()
        self._workers: dict[str, _WorkerState] = {}
        self._trials: dict[SliceKey, _Trial] = {}
        self._stopped = False
        self._changed = asyncio.Condition()

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
        return 0.0 if before is None else now - before.seen_at + before.unanswered_s

    async def begin(self, key: SliceKey, worker: str) -> Attempt:
        """A worker starts with this slice. If it did before and never finished, its worker died."""
        if self._stopped:
            return Attempt("stop", 0)
        self._workers[worker].slices.add(key)
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
        state = self._workers[worker]
        state.seen_at, state.unanswered_s = time.monotonic(), unanswered_s
        state.slices.discard(key)
        self._trials.pop(key, None)
        async with self._changed:
            self._open.discard(key)
            self._finished.add(key)
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
