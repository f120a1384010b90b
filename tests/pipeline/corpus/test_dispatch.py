"""Who gets which slice: each once, prefixes computed about once, and all workers done at about the same time."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from pipeline.corpus.dispatch import Dispatch, cut_evenly
from pipeline.prefix_plan import cut_at_borders


@dataclass
class Outcome:
    """Of a simulated run: worker of each slice in the order of giving, and when the last was done."""

    given: list[tuple[str, int]] = field(default_factory=list)
    makespan: float = 0.0

    def slices_of(self, worker):
        return [index for name, index in self.given if name == worker]


def simulate(dispatch, loads, shared, per_token, speeds, in_flight=1):
    """Workers that do one slice after the other, with `in_flight` of them fetched; ends when nobody gets any more.

    A slice takes its load, and what its worker must compute again of its prefix, for it did another one before.
    """
    outcome, last, queues = Outcome(), {}, {worker: [] for worker in speeds}
    order = itertools.count()
    events = [(0.0, next(order), worker) for worker in speeds]

    def fetch(worker):
        index = dispatch.next_slice(worker)
        if index is None:
            return
        outcome.given.append((worker, index))
        again = shared[index] - common(shared, last.get(worker), index)
        last[worker] = index
        queues[worker].append((index, (loads[index] + per_token * again) / speeds[worker]))

    for worker in speeds:
        for _ in range(in_flight):
            fetch(worker)
    busy = {}
    events = []

    def begin(worker, now):
        if queues[worker] and worker not in busy:
            index, seconds = queues[worker].pop(0)
            busy[worker] = index
            heapq.heappush(events, (now + seconds, next(order), worker))

    for worker in speeds:
        begin(worker, 0.0)
    while events:
        now, _, worker = heapq.heappop(events)
        outcome.makespan = now
        dispatch.finish(busy.pop(worker))
        fetch(worker)
        begin(worker, now)
    return outcome


def common(shared, last, index):
    """Tokens that two slices have in common, of which a worker has computed one; 0 if it has computed none."""
    if last is None:
        return 0
    low, high = sorted((last, index))
    return min([shared[index], *shared[low + 1 : high + 1]])


def best_makespan(loads, shared, per_token, num_workers):
    """The least over all ways to give slices to workers that do theirs in order."""
    best = float("inf")
    for ways in itertools.product(range(num_workers), repeat=len(loads)):
        times, last = [0.0] * num_workers, [None] * num_workers
        for index, worker in enumerate(ways):
            times[worker] += loads[index] + per_token * (shared[index] - common(shared, last[worker], index))
            last[worker] = index
        best = min(best, max(times))
    return best


def random_slices(rng, num_slices):
    loads = [rng.choice([1, 5, 10, 10, 20, 50]) * rng.uniform(0.5, 1.5) for _ in range(num_slices)]
    shared = [0, *(rng.choice([0, 0, 3, 10, 40]) for _ in range(num_slices - 1))]
    return loads, shared


@pytest.mark.parametrize("seed", range(40))
def test_every_slice_is_given_once_whoever_comes_goes_and_restarts(seed):
    rng = random.Random(seed)
    loads, shared = random_slices(rng, rng.randrange(1, 60))
    done = set(rng.sample(range(len(loads)), rng.randrange(len(loads))))
    dispatch = Dispatch(loads, shared, rng.choice([0.0, 0.1, 1.0]), rng.randrange(1, 6), done)
    given, held = Counter(), []
    known = [f"w{i}" for i in range(rng.randrange(1, 5))]
    while dispatch.num_unassigned:
        act = rng.random()
        if act < 0.1:
            known.append(f"w{len(known)}")
        elif act < 0.15:
            dispatch.restart(rng.choice(known))
        elif act < 0.3:
            dispatch.release(rng.choice(known))
        elif act < 0.5 and held:
            dispatch.finish(held.pop(rng.randrange(len(held))))
        index = dispatch.next_slice(rng.choice(known))
        if index is not None:
            given[index] += 1
            held.append(index)
    assert given == Counter(set(range(len(loads))) - done)
    assert all(dispatch.next_slice(worker) is None for worker in [*known, "another"])


@pytest.mark.parametrize("in_flight", [1, 4])
@pytest.mark.parametrize("num_expected", [1, 4])
def test_one_worker_computes_nothing_again(in_flight, num_expected):
    loads, shared = random_slices(random.Random(3), 50)
    dispatch = Dispatch(loads, shared, 0.2, num_expected)
    outcome = simulate(dispatch, loads, shared, 0.2, {"w": 1.0}, in_flight)
    assert dispatch.recomputed_tokens == 0
    assert sorted(outcome.slices_of("w")) == list(range(50))
    if num_expected == 1:
        assert outcome.slices_of("w") == list(range(50))
    else:  # fewer workers came than were expected
        assert outcome.makespan == pytest.approx(sum(loads))


def test_small_cases_end_about_as_early_as_the_best_of_all_ways():
    ratios = []
    for seed in range(100):
        rng = random.Random(seed)
        loads, shared = random_slices(rng, rng.randrange(2, 8))
        num_workers, per_token = rng.choice([2, 3]), rng.choice([0.1, 1.0])
        dispatch = Dispatch(loads, shared, per_token, num_workers)
        speeds = {f"w{i}": 1.0 for i in range(num_workers)}
        outcome = simulate(dispatch, loads, shared, per_token, speeds)
        ratios.append(outcome.makespan / best_makespan(loads, shared, per_token, num_workers))
    assert max(ratios) <= 1.5 and np.mean(ratios) <= 1.05, sorted(ratios)[-5:]


@pytest.mark.parametrize("seed", range(20))
def test_all_workers_are_done_within_a_few_slices_of_each_other_however_fast_each_is(seed):
    rng = random.Random(seed)
    loads, shared = random_slices(rng, 200)
    speeds = {f"w{i}": rng.uniform(0.5, 2.0) for i in range(rng.randrange(2, 9))}
    dispatch = Dispatch(loads, shared, 0.05, len(speeds))
    outcome = simulate(dispatch, loads, shared, 0.05, speeds)
    again = 0.05 * dispatch.recomputed_tokens
    ideal = (sum(loads) + again) / sum(speeds.values())
    assert outcome.makespan <= ideal + 2 * (max(loads) + 0.05 * max(shared)) / min(speeds.values())
    assert again <= 0.02 * sum(loads)


@pytest.mark.parametrize("document_tokens", [500, 4000, 30000])
@pytest.mark.parametrize("questions", [4, 60, 1000])
@pytest.mark.parametrize("speeds", [(1, 1, 1, 1), (1, 1, 1, 0.4), (0.5, 1, 1.5, 2)])
def test_four_workers_reach_97_percent_of_the_achievable_prefix_hits_on_documents(document_tokens, questions, speeds):
    num_documents = max(2, 4000 // questions)
    shared_of_row = np.array(([0] + [document_tokens] * (questions - 1)) * num_documents, np.int32)
    computed = np.where(shared_of_row == 0, document_tokens, 0) + 40
    borders = np.array(cut_at_borders(computed.astype(np.int64), shared_of_row, 65536, 256))
    loads, shared = np.add.reduceat(computed, borders[:-1]).astype(float), shared_of_row[borders[:-1]]
    dispatch = Dispatch(loads, shared, 1.0, 4)
    outcome = simulate(dispatch, loads, shared, 1.0, {f"w{i}": s for i, s in enumerate(speeds)}, in_flight=4)
    achievable = int(shared_of_row.sum())
    assert achievable - dispatch.recomputed_tokens >= 0.97 * achievable
    assert len({worker for worker, _ in outcome.given}) == 4 or len(loads) < 8


def test_a_group_is_split_only_where_its_prefix_costs_less_than_is_won():
    loads, shared = [10.0] * 8, [0, *[100] * 7]
    cheap, dear = Dispatch(loads, shared, 0.01, 2), Dispatch(loads, shared, 1.0, 2)
    assert [dispatch.next_slice(worker) for dispatch in (cheap, dear) for worker in "ab"] == [0, 4, 0, None]
    assert cheap.recomputed_tokens == 100 and dear.recomputed_tokens == 0


def test_what_a_worker_that_went_was_to_do_is_done_by_others_from_where_it_stood():
    dispatch = Dispatch([1.0] * 8, [0] * 8, 1.0, 2)
    assert [dispatch.next_slice(worker) for worker in "abb"] == [0, 4, 5]
    assert dispatch.owners() == ["a", "b"] and dispatch.is_busy("b")
    for index in (4, 5):
        dispatch.finish(index)
    assert not dispatch.is_busy("b") and dispatch.release("b") and not dispatch.release("b")
    assert [dispatch.next_slice("a") for _ in range(6)] == [1, 2, 3, 6, 7, None]


def test_a_dispatch_made_anew_learns_what_workers_have_already():
    dispatch = Dispatch([1.0] * 6, [0, 5, 5, 0, 5, 5], 0.1, 1, done=[0])
    for index in (2, 0, 2):
        dispatch.take("a", index)
    assert dispatch.num_unassigned == 4 and dispatch.is_busy("a")
    assert sorted(dispatch.next_slice("b") for _ in range(4)) == [1, 3, 4, 5]
    dispatch.finish(2)
    dispatch.finish(2)
    assert not dispatch.is_busy("a")


def test_after_a_gap_of_what_is_done_the_prefix_is_part_of_the_work():
    dispatch = Dispatch([1.0, 1.0, 1.0], [0, 50, 50], 1.0, 1, done=[1])
    assert [dispatch.next_slice("a") for _ in range(3)] == [0, 2, None]
    assert dispatch.recomputed_tokens == 0, "slices 0 and 2 share it, and a has it"
    fresh = Dispatch([1.0, 1.0, 1.0], [0, 50, 50], 1.0, 1, done=[0])
    assert fresh.next_slice("a") == 1 and fresh.recomputed_tokens == 0, "nobody could have had it"


@pytest.mark.parametrize(
    ("loads", "cost", "parts", "borders"),
    [
        ([1.0] * 8, [0.0] * 8, 4, [0, 2, 4, 6, 8]),
        ([1.0] * 8, [0.0, 9, 9, 0, 9, 9, 9, 9], 2, [0, 3, 8]),
        ([4.0, 1.0], [0.0, 40.0], 2, [0, 2]),
        ([], [], 3, [0]),
        ([1.0], [0.0], 3, [0, 1]),
    ],
)
def test_borders_move_from_even_to_where_little_is_shared(loads, cost, parts, borders):
    assert cut_evenly(np.array(loads), np.array(cost), parts) == borders
