"""Who is let in to the engine: as many as it has room for, if they can expect a place in time."""

from __future__ import annotations

import heapq
import random
from collections import deque
from types import SimpleNamespace

import pytest

from jobs.endpoint import places as places_module
from jobs.endpoint.places import NoPlaceError, Places


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(places_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def enter(places, count=1):
    """Answers that have begun or wait; leave them with `leave`."""
    held = [places.hold(1) for _ in range(count)]
    for one in held:
        one.__enter__()
    return held


def leave(one):
    one.__exit__(None, None, None)


def expected_s(places):
    """When whoever is refused now may expect a place."""
    before = places.num_taken
    with pytest.raises(NoPlaceError) as found:
        enter(places)
    assert places.num_taken == before
    return found.value.wait_s


def answer(places, clock, seconds, times=100):
    """Answers in an empty engine that take so long."""
    for _ in range(times):
        with places.hold(1):
            clock.now += seconds


@pytest.mark.parametrize(("seconds", "num_waiting", "wait_s"), [(0.5, 8, 1.125), (2.0, 2, 1.5), (30.0, 0, 7.5)])
def test_as_many_wait_as_can_expect_a_place_in_time(clock, seconds, num_waiting, wait_s):
    places = Places(num_running=4, num_all=100, max_wait_s=1.01)
    answer(places, clock, seconds)
    held = enter(places, 4 + num_waiting)
    assert expected_s(places) == pytest.approx(wait_s)
    assert len(held) == places.num_taken


def test_the_count_is_a_limit_too():
    places = Places(num_running=4, num_all=6, max_wait_s=1000)
    held = enter(places, 6)
    assert expected_s(places) > 0
    assert len(held) == places.num_taken


def test_with_no_time_to_wait_places_are_all_there_is():
    places = Places(num_running=4, num_all=100, max_wait_s=0)
    held = enter(places, 4)
    expected_s(places)
    leave(held[0])
    held += enter(places)
    expected_s(places)


def test_a_request_for_more_than_all_places_is_let_in_when_they_are_free(clock):
    places = Places(num_running=4, num_all=100, max_wait_s=1.0)
    answer(places, clock, 10.0)
    with places.hold(64):
        expected_s(places)
    assert places.num_taken == 0


def test_the_time_in_the_queue_is_no_part_of_what_a_place_is_held(clock):
    places = Places(num_running=1, num_all=100, max_wait_s=1000)
    for _ in range(100):
        first, second = enter(places, 2)
        clock.now += 3.0
        leave(first)
        clock.now += 3.0
        leave(second)
    held = enter(places, 100)
    assert expected_s(places) == pytest.approx(300.0)
    for one in reversed(held):  # who leaves while it waits teaches nothing
        clock.now += 0.001
        leave(one)
    assert places.num_taken == 0
    held = enter(places, 100)
    assert expected_s(places) == pytest.approx(300.0, rel=0.06)
    assert len(held) == 100


@pytest.mark.parametrize("num_running", [4, 16, 128])
@pytest.mark.parametrize("speed", [0.2, 1.0, 3.0])
def test_under_overload_those_who_get_in_wait_about_as_long_as_they_may(clock, num_running, speed):
    """A simulation: ten times as many come as can be answered, and a quarter of those inside leave early."""
    rng = random.Random(num_running)
    places = Places(num_running=num_running, num_all=10**6, max_wait_s=1.0)
    num_free, queue, ends, waits, num_refused = num_running, deque(), [], [], 0
    next_arrival = clock.now
    for number in range(20_000):
        next_arrival += rng.expovariate(10 * num_running * speed)
        while ends and ends[0][0] <= next_arrival:
            clock.now, _, done = heapq.heappop(ends)
            leave(done)
            num_free += 1
            if queue:
                came_at, takes_s, one = queue.popleft()
                waits.append(clock.now - came_at)
                heapq.heappush(ends, (clock.now + takes_s, -number - 10**9 - len(waits), one))
                num_free -= 1
        clock.now = next_arrival
        takes_s = rng.uniform(0.3, 1.7) / speed * (rng.random() if rng.random() < 0.25 else 1.0)
        try:
            (one,) = enter(places)
        except NoPlaceError:
            num_refused += 1
            continue
        if num_free:
            num_free -= 1
            waits.append(0.0)
            heapq.heappush(ends, (clock.now + takes_s, number, one))
        else:
            queue.append((clock.now, takes_s, one))
    usual = sorted(waits[len(waits) // 2 :])  # once it is known how long answers take
    most = max(1.0, 2 / speed / num_running)
    assert num_refused > 10_000
    assert sum(usual) / len(usual) <= 1.2 * most
    assert usual[int(0.99 * len(usual))] <= 3.5 * most  # a few gaps between answers that differ by a factor of six
    if num_running * speed > 2:
        assert usual[len(usual) // 2] >= 0.4, "the queue is made use of"
