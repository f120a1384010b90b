"""Which slices may be planned and tried, without Ray."""

from __future__ import annotations

import asyncio

from pipeline.admission import MAX_ATTEMPTS, Admission

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
