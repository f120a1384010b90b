"""Workers that break, without Ray: the row that breaks an engine is found, all others are answered."""

from __future__ import annotations

import asyncio

import pytest
from fake_worker import FIRST_CHARACTER, FakeWorkers

from actors.config import EngineConfig
from actors.requests import Completion, EngineError, Request, SamplingParams
from pipeline.answering import Answerer

CONFIG = EngineConfig(model="m")


def make_requests(*prompts: str) -> list[Request]:
    sampling = SamplingParams()
    return [Request(str(i), [ord(c) - FIRST_CHARACTER for c in p], sampling) for i, p in enumerate(prompts)]


def answer(workers: FakeWorkers, *prompts: str) -> tuple[list[Completion], Answerer]:
    async def go() -> tuple[list[Completion], Answerer]:
        answerer = Answerer(lambda: workers(CONFIG))
        return await answerer.answer(make_requests(*prompts)), answerer

    return asyncio.run(go())


def kinds(completions: list[Completion]) -> list[str | None]:
    return [c.error.kind if c.error else None for c in completions]


def test_a_healthy_worker_is_asked_once_and_answers_in_order(fake_workers):
    workers = fake_workers()
    completions, answerer = answer(workers, "a", "b", "c")
    assert [c.request_id for c in completions] == ["0", "1", "2"]
    assert workers.asked() == ["0", "1", "2"] and answerer.num_rebuilds == 0


def test_a_row_that_breaks_the_engine_is_an_error_row_and_the_others_are_answered(fake_workers):
    prompts = [f"fine {i}" for i in range(20)]
    prompts[13] = "BREAK"
    completions, answerer = answer(fake_workers(), *prompts)
    assert kinds(completions) == ["engine_error" if i == 13 else None for i in range(20)]
    assert answerer.num_rebuilds == 4  # twice with all rows, once with its chunk, once alone


def test_two_rows_that_break_the_engine_are_both_found(fake_workers):
    prompts = [f"fine {i}" for i in range(9)]
    prompts[0] = prompts[8] = "BREAK"
    assert kinds(answer(fake_workers(), *prompts)[0]) == ["engine_error", *[None] * 7, "engine_error"]


def test_an_engine_that_breaks_on_every_row_is_not_blamed_on_the_rows(fake_workers):
    with pytest.raises(EngineError, match="not the rows' fault"):
        answer(fake_workers(), *["BREAK"] * 8)


def test_slices_that_share_a_broken_engine_are_all_answered_and_it_is_rebuilt_once_per_break(fake_workers):
    workers = fake_workers(delay_s=0.01)

    async def go() -> tuple[list[list[Completion]], Answerer]:
        answerer = Answerer(lambda: workers(CONFIG))
        slices = [make_requests("a", "b"), make_requests("c", "BREAK"), make_requests("d", "e")]
        return await asyncio.gather(*(answerer.answer(requests) for requests in slices)), answerer

    slices, answerer = asyncio.run(go())
    assert [kinds(completions) for completions in slices] == [[None, None], [None, "engine_error"], [None, None]]
    assert answerer.num_rebuilds <= 4


def test_rows_under_suspicion_are_tried_alone_and_announced_before(fake_workers):
    workers, announced = fake_workers(), []

    async def go() -> list[Completion]:
        async def try_rows(requests) -> None:
            announced.append([request.request_id for request in requests])

        answerer = Answerer(lambda: workers(CONFIG))
        return await answerer.answer_carefully(make_requests(*"abcdefghi"), frozenset({"2", "5"}), try_rows)

    assert kinds(asyncio.run(go())) == [None] * 9
    assert announced == [["0", "1"], ["3", "4"], ["6", "7"], ["8"], ["2"], ["5"], []]


def test_time_of_a_broken_engine_that_no_row_has_is_lost_time(fake_workers):
    workers = fake_workers()

    async def go() -> Answerer:
        answerer = Answerer(lambda: workers(CONFIG))
        await answerer.answer(make_requests("a", "b"))
        answerer.worker.stats_.busy_s += 0.25  # spent on rows that will never come back
        assert answerer.unanswered_s == pytest.approx(0.25)
        await answerer.answer(make_requests("BREAK"))
        return answerer

    answerer = asyncio.run(go())
    assert answerer.lost_s == pytest.approx(0.25)
    assert answerer.unanswered_s == pytest.approx(0.0)
    assert answerer.times()["busy_s"] == pytest.approx(0.25 + 2e-6)
