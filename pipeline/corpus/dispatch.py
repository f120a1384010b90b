"""Which slice of a corpus a worker gets next, so that it continues what lies in its pages and all end together.

The slices, in prefix order, are cut into as many contiguous runs as there are workers; a worker goes through its run,
then helps where most is left. A run is cut only where a prefix computed twice costs less than the time that is saved.
Numbers in, numbers out: knows no Ray, no clock and no files; `pipeline.admission` asks it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(slots=True, eq=False)
class _Run:
    """Slices first to end, by position, that nobody has been given; `owner` is to go through them, if anybody."""

    first: int
    end: int
    owner: str | None = None


@dataclass(slots=True, eq=False)
class _Worker:
    """`last`: position of the slice that it was given last, whose prefixes are in its pages. `held`: load of the slices
    that it was given and has not finished."""

    last: int | None = None
    held: float = 0.0


class Dispatch:
    """Gives every slice that is not done to one worker; workers come and go.

    Called `position`: a slice's place among those that were not done when the run began.
    """

    def __init__(
        self,
        load: Sequence[float] | Floats,
        shared: Sequence[int] | Ints,
        load_per_token: float,
        num_workers: int,
        done: Collection[int] = (),
    ) -> None:
        """load: expected time of each slice, in prefix order, when it follows the one before; in any unit, above 0.
        shared: tokens that its first row has in common with the row before. load_per_token: time to compute one of
        these again. num_workers: those expected; there may be more or fewer. done: indices of slices not to be given.
        """
        every_load, every_shared = np.asarray(load, np.float64), np.asarray(shared, np.int64)
        is_left = np.ones(len(every_load), bool)
        is_left[list(done)] = False
        self._index: Ints = np.flatnonzero(is_left)
        self._position = {int(index): position for position, index in enumerate(self._index)}
        self._load_per_token = load_per_token
        self._shared = _shared_across(every_shared, self._index)
        fresh = every_shared[self._index] - self._shared if len(self._index) else self._index
        self._load: Floats = every_load[self._index] + load_per_token * fresh
        self._before: Floats = np.concatenate([[0.0], np.cumsum(self._load)])
        self._workers: dict[str, _Worker] = {}
        self._holder: dict[int, str] = {}
        borders = cut_evenly(self._load, np.asarray(self._shared * load_per_token, np.float64), num_workers)
        self._runs = [_Run(first, end) for first, end in itertools.pairwise(borders) if first < end]
        self.num_unassigned = len(self._index)
        self.recomputed_tokens = 0
        """Prompt tokens that are computed again, since a run began away from what its worker had computed last."""

    def next_slice(self, worker: str) -> int | None:
        """The index of the slice that this worker is to answer next; None if nothing is left that would pay for it."""
        state = self._workers.setdefault(worker, _Worker())
        run = self._run_of(worker) or self._take_run(worker, state) or self._split_run(worker, state)
        if run is None:
            return None
        position = run.first
        self.recomputed_tokens += self._again_at(state, position)
        run.first += 1
        self._give(worker, state, position)
        return int(self._index[position])

    def finish(self, index: int) -> None:
        """The slice is answered, or given up; said twice, or of a slice that was never given, it changes nothing."""
        position = self._position.get(index)
        worker = self._holder.pop(position, None) if position is not None else None
        if worker is not None:
            assert position is not None
            self._workers[worker].held -= float(self._load[position])

    def take(self, worker: str, index: int) -> None:
        """This worker has the slice already: it was given before there was this Dispatch."""
        position = self._position.get(index)
        run = next((run for run in self._runs if position is not None and run.first <= position < run.end), None)
        if position is None or run is None:
            return
        self._runs.append(_Run(position + 1, run.end))
        run.end = position
        self._give(worker, self._workers.setdefault(worker, _Worker()), position)

    def restart(self, worker: str) -> None:
        """The worker has lost what lay in its pages; its slices and its run are still its own."""
        if worker in self._workers:
            self._workers[worker].last = None

    def release(self, worker: str) -> bool:
        """Let others have all of this worker's run, as it seems to have gone; whether there was anything to let go."""
        run = self._run_of(worker)
        if run is not None:
            run.owner = None
        return run is not None

    def owners(self) -> list[str]:
        """The workers that have a run to go through."""
        return [run.owner for run in self._runs if run.owner is not None]

    def is_busy(self, worker: str) -> bool:
        """Whether the worker was given a slice that it has not finished."""
        return worker in self._holder.values()

    def _give(self, worker: str, state: _Worker, position: int) -> None:
        self._runs = [run for run in self._runs if run.first < run.end]
        state.last = position
        state.held += float(self._load[position])
        self._holder[position] = worker
        self.num_unassigned -= 1

    def _run_of(self, worker: str) -> _Run | None:
        return next((run for run in self._runs if run.owner == worker), None)

    def _take_run(self, worker: str, state: _Worker) -> _Run | None:
        """A run that nobody has: where least must be computed again, of equals the one that follows what this worker
        did last (nobody else has its pages), else the longest. A long one that is left for the end will be split."""
        free = [run for run in self._runs if run.owner is None]
        if not free:
            return None
        follows = None if state.last is None else state.last + 1
        run = min(free, key=lambda run: (self._again_at(state, run.first), run.first != follows, -self._left(run)))
        run.owner = worker
        return run

    def _split_run(self, worker: str, state: _Worker) -> _Run | None:
        """The end of somebody else's run, if that ends the run earlier by more than it takes to begin there."""
        best_gain, best = 0.0, None
        for run in self._runs:
            assert run.owner is not None, "a run that nobody has was taken before"
            starts = np.arange(run.first, run.end)
            begin = self._again(state, run.first, run.end) * self._load_per_token
            total, left = self._left(run), self._before[starts] - self._before[run.first]
            there = self._workers[run.owner].held
            alone = there + total
            together = np.maximum(there + left, state.held + begin + total - left)
            gains = alone - together - begin
            choice = int(gains.argmax())
            if gains[choice] > best_gain + 1e-9 * alone:
                best_gain, best = float(gains[choice]), (run, int(starts[choice]))
        if best is None:
            return None
        run, start = best
        taken = _Run(start, run.end, worker)
        run.end = start
        self._runs.append(taken)
        return taken

    def _left(self, run: _Run) -> float:
        return float(self._before[run.end] - self._before[run.first])

    def _again_at(self, state: _Worker, position: int) -> int:
        return int(self._again(state, position, position + 1)[0])

    def _again(self, state: _Worker, first: int, end: int) -> Ints:
        """Of each position from first to end, the shared tokens that this worker would have to compute again if it went
        there now: rows in prefix order have in common what all borders between them have."""
        shared, last = self._shared[first:end], state.last
        if last is None:
            return shared
        if last < first:
            there = np.minimum.accumulate(self._shared[last + 1 : end])[first - last - 1 :]
        else:  # nothing in a run was given to anybody, so all of it is before `last`
            there = np.minimum.accumulate(self._shared[first + 1 : last + 1][::-1])[::-1][: end - first]
        return np.asarray(shared - np.minimum(shared, there))


def cut_evenly(load: Floats, cost: Floats, num_parts: int) -> list[int]:
    """Where contiguous parts of even load begin, ascending, and the end of the last; cost: of beginning at each slice.

    A border stands where its distance from an even one and the cost of beginning there are least together. Where no
    border is worth it there is none, and fewer parts.
    """
    end = len(load)
    total = np.concatenate([[0.0], np.cumsum(load)])
    borders = [0]
    for part in range(1, num_parts):
        starts = np.arange(borders[-1], end + 1)
        price = np.abs(total[starts] - total[-1] * part / num_parts)
        price[1:-1] += cost[starts[1:-1]]  # the first and the last candidate are no cuts
        borders.append(int(starts[price.argmin()]))
    return sorted({*borders, end})


def _shared_across(shared: Ints, left: Ints) -> Ints:
    """What each slice left shares with the slice left before it: the least of all borders between them."""
    if not len(left):
        return left
    return np.asarray(np.minimum.reduceat(shared[: left[-1] + 1], np.concatenate([[0], left[:-1] + 1])))
