"""The places of an engine: who has one, who waits for one, and when the next to come may expect one.

A queue of a fixed length is short where answers are, and long where they are long. By Little's law places are given
back at the rate of those there are over the time that one is held; so the time that somebody new would wait is known
beforehand. Knows no engine: that requests begin in the order of their coming is what `actors.scheduler` does.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

_NUM_REMEMBERED = 20
"""Answers that the usual time is a mean of, at least; more where more run at the same time."""


class NoPlaceError(Exception):
    """There are too many already. `wait_s`: until there may be room."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"a place is expected in {wait_s:.3g} s")
        self.wait_s = wait_s


@dataclass(slots=True, eq=False)
class _Holder:
    num_places: int
    began_at: float | None = None


class Places:
    """`num_running` completions run at once; others wait, `num_all` are there at most. Who comes is let in only while
    its first place is expected within `max_wait_s`."""

    def __init__(self, *, num_all: int, num_running: int, max_wait_s: float) -> None:
        self.num_taken = 0
        self._num_all = num_all
        self._num_running = num_running
        self._max_wait_s = max_wait_s
        self._num_begun = 0
        self._waiting: deque[_Holder] = deque()
        self._usual_s = 1.0  # that a place is held; a guess, until some were
        self._num_seen = 0

    @contextlib.contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Have so many places, now or after those who came before; NoPlaceError when that is too late or too many."""
        wait_s = self._usual_s * max(0, self.num_taken + 1 - self._num_running) / self._num_running
        if self.num_taken + count > self._num_all or wait_s > self._max_wait_s:
            raise NoPlaceError(wait_s)
        holder = _Holder(count)
        self.num_taken += count
        self._waiting.append(holder)
        self._begin()
        try:
            yield
        finally:
            self.num_taken -= count
            if holder.began_at is None:
                self._waiting.remove(holder)
            else:
                self._num_begun -= count
                self._learn(time.perf_counter() - holder.began_at)
                self._begin()

    def _begin(self) -> None:
        while self._waiting and self._num_begun < self._num_running:
            holder = self._waiting.popleft()
            holder.began_at = time.perf_counter()
            self._num_begun += holder.num_places

    def _learn(self, held_s: float) -> None:
        self._num_seen = min(self._num_seen + 1, max(_NUM_REMEMBERED, self._num_running))
        self._usual_s += (held_s - self._usual_s) / self._num_seen
