"""Which slices may be planned and tried, without Ray."""

from __future__ import annotations

import asyncio

import pytest

from pipeline.admission import MAX_ATTEMPTS, Admission, CorpusWork
from pipeline.corpus.dispatch import Dispatch

SLICE = ("a", 0)


def test_a_plan_waits_when_enough_slices_are_open_and_goes_on_when_one_is_finished():
    async def go() -> None:
        admission = Admission(window=2)
        await admission.hello("w")
        assert await admission.admit(("a", 0)) and await admission.admit(("a", 1))
        third = asyncio.create_task(admission.admit(("a", 2)))
        await asyncio.sleep(0.01)
        assert not third.done()
        assert await admission.admit(("a", 1)), "a planner that was restarted waits for its own slice"
        await admission.finish(("a", 0), "w")
        assert await asyncio.wait_for(third, 1)

    asyncio.run(go())


def test_a_stop_ends_waiting_plans_and_begins_nothing():
    async def go() -> None:
        admission = Admission(window=1)
        await admission.hello("w")
        await admission.admit(("a", 0))
        waiting = asyncio.create_task(admission.admit(("a", 1)))
        await asyncio.sleep(0.01)
        await admission.stop()
        assert await asyncio.wait_for(waiting, 1) is False
        assert (await admission.begin(("a", 0), "w")).action == "stop"

    asyncio.run(go())


def test_a_row_that_kills_its_worker_is_narrowed_down_to_itself():
    async def go() -> None:
        admission = Admission(window=1)
        await admission.hello("w")
        assert [(await admission.begin(SLICE, "w")).action for _ in range(3)] == [
            "answer",
            "answer",
            "answer_carefully",
        ]
        await admission.try_rows(SLICE, frozenset({1, 2, 3}))  # and dies
        attempt = await admission.begin(SLICE, "w")
        assert attempt.suspects == {1, 2, 3} and not attempt.poison
        await admission.try_rows(SLICE, frozenset({1}))
        await admission.try_rows(SLICE, frozenset({2}))  # and dies
        attempt = await admission.begin(SLICE, "w")
        assert attempt.poison == {2} and attempt.suspects == {1, 2, 3}

    asyncio.run(go())


def test_a_slice_is_not_tried_for_ever():
    async def go() -> None:
        admission = Admission(window=1)
        await admission.hello("w")
        actions = [(await admission.begin(SLICE, "w")).action for _ in range(MAX_ATTEMPTS + 1)]
        assert actions[-2:] == ["answer_carefully", "give_up"]

    asyncio.run(go())


def test_a_finished_slice_that_comes_again_is_known_as_such():
    async def go() -> None:
        admission = Admission(window=1)
        await admission.hello("w")
        await admission.begin(SLICE, "w")
        await admission.finish(SLICE, "w")
        assert (await admission.begin(SLICE, "w")).number == 2

    asyncio.run(go())


def test_the_time_of_a_worker_that_died_is_told_to_the_one_that_replaces_it():
    async def go() -> None:
        admission = Admission(window=1)
        assert await admission.hello("w") == 0.0
        await admission.begin(SLICE, "w")
        await admission.finish(SLICE, "w", unanswered_s=5.0)
        await asyncio.sleep(0.02)
        assert 5.02 <= await admission.hello("w") < 6
        (end,) = await admission.close_accounts()
        assert end.held_s >= 0.02 and end.lost_s == 0.0

    asyncio.run(go())


def make_work(num_slices: int = 6, num_workers: int = 1, shared: int = 0, done: tuple[int, ...] = ()) -> CorpusWork:
    dispatch = Dispatch([1.0] * num_slices, [0] + [shared] * (num_slices - 1), 1.0, num_workers, done)
    return CorpusWork(dispatch, ref=lambda index: f"slice {index}")


def test_tickets_wait_for_the_plan_then_for_room_and_end_with_the_slices():
    async def go() -> None:
        admission = Admission(window=2)
        first = asyncio.create_task(admission.admit_ticket(0))
        await asyncio.sleep(0.01)
        assert not first.done()
        await admission.open_corpus(make_work(num_slices=3, done=(1,)))
        assert await first and await admission.admit_ticket(1)
        third = asyncio.create_task(admission.admit_ticket(2))
        await asyncio.sleep(0.01)
        assert not third.done(), "two tickets are open"
        assert await admission.admit_ticket(0), "a read task that is repeated gets its tickets again"
        assert await admission.slice_for(0, "w", []) == "slice 0"
        await admission.finish(("_corpus", 0), "w")
        assert await asyncio.wait_for(third, 1)
        assert await admission.slice_for(1, "w", [0]) == "slice 2"
        assert await admission.slice_for(2, "w", [2]) is None, "nothing is left"
        assert await admission.admit_ticket(3) is False

    asyncio.run(go())


def test_a_ticket_that_comes_again_means_the_same_slice_for_whichever_worker():
    async def go() -> None:
        admission = Admission(window=9)
        await admission.open_corpus(make_work())
        assert await admission.slice_for(0, "w", []) == await admission.slice_for(0, "another", []) == "slice 0"
        await admission.finish(("_corpus", 0), "w")
        assert await admission.slice_for(0, "w", []) == "slice 0"
        assert (await admission.begin(("_corpus", 0), "w")).number == 2, "so it is looked for before it is answered"

    asyncio.run(go())


def test_a_worker_for_whom_nothing_pays_waits_without_keeping_tickets_from_the_others():
    async def go() -> None:
        admission = Admission(window=1)
        await admission.open_corpus(make_work(num_slices=3, num_workers=2, shared=100))
        assert await admission.admit_ticket(0) and await admission.slice_for(0, "w", []) == "slice 0"
        await admission.finish(("_corpus", 0), "w")
        assert await admission.admit_ticket(1)
        idle = asyncio.create_task(admission.slice_for(1, "idle", []))
        await asyncio.sleep(0.01)
        assert not idle.done(), "to begin in the middle costs more than it brings"
        assert await asyncio.wait_for(admission.admit_ticket(2), 1)
        assert await admission.slice_for(2, "w", []) == "slice 1"
        assert await admission.slice_for(3, "w", [1]) == "slice 2"
        assert await asyncio.wait_for(idle, 5) is None
        assert await admission.recomputed_tokens() == 0

    asyncio.run(go())


def test_the_slices_of_a_worker_that_went_are_given_to_one_that_waits(monkeypatch):
    monkeypatch.setattr("pipeline.admission.RELEASE_AFTER_S", 0.0)

    async def go() -> None:
        admission = Admission(window=9)
        await admission.open_corpus(make_work(num_slices=3, num_workers=2, shared=100))
        assert await admission.slice_for(0, "went", []) == "slice 0"
        stays = asyncio.create_task(admission.slice_for(1, "stays", []))
        await asyncio.sleep(0.01)
        assert not stays.done()
        await admission.finish(("_corpus", 0), "went")
        assert await asyncio.wait_for(stays, 30) == "slice 1"

    asyncio.run(go())


def test_an_admission_started_anew_has_the_plan_and_hears_from_workers_what_they_have():
    async def go() -> None:
        admission = Admission(window=9, find_work=lambda: make_work(num_slices=4, done=(0,)))
        assert await admission.slice_for(7, "a", [2]) == "slice 3", "it has 2, and 3 follows"
        assert await admission.slice_for(8, "a", [2, 3]) == "slice 1"
        await admission.finish(("_corpus", 2), "a")
        assert await admission.admit_ticket(9) is False
        (end,) = await admission.close_accounts()
        assert end.held_s >= 0

    asyncio.run(go())


@pytest.mark.parametrize("is_open", [True, False])
def test_a_stop_ends_the_waiting_for_tickets_and_slices(is_open):
    async def go() -> None:
        admission = Admission(window=1)
        if is_open:
            await admission.open_corpus(make_work(num_slices=3, num_workers=2, shared=100))
            assert await admission.admit_ticket(0) and await admission.slice_for(0, "w", [])
        first = admission.slice_for(1, "idle", []) if is_open else admission.admit_ticket(0)
        tasks = [asyncio.create_task(one) for one in (first, admission.admit_ticket(1))]
        await asyncio.sleep(0.01)
        await admission.stop()
        assert not any([await asyncio.wait_for(task, 5) for task in tasks])

    asyncio.run(go())
