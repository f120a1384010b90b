"""One worker and its slices, without Ray: what is published, and that no second of the worker is missing or double."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_worker import ACCEPTED, DRAFTED, FIRST_CHARACTER, FakeWorker, FakeWorkers, LocalGate, answer_to

from actors.requests import Completion, Output, RowError, Usage
from pipeline.admission import Admission
from pipeline.bill.ledger import add_up, read_metrics
from pipeline.bill.progress import _describe_lost
from pipeline.drafts import DrafterCount, sum_drafts
from pipeline.events import SliceDone, SliceDropped
from pipeline.job import Job, job_from_dict
from pipeline.prefix_plan import PlannedRow, Slice
from pipeline.results import merge_shard
from pipeline.shards import list_shards
from pipeline.slice_runner import RunSpec, SliceRunner
from pipeline.slices import SliceTimes, read_slices
from pipeline.storage import Storage

PRINT = "f" * 64


def make_job(folder: Path) -> Job:
    return job_from_dict(
        {
            "input": {"path": str(folder), "prompt_column": "p"},
            "model": "m",
            "output": {"path": str(folder / "out")},
            "pricing": {"usd_per_device_hour": 3600},
        }
    )


def make_slice(index: int, *prompts: str | RowError, num_slices: int = 3) -> Slice:
    rows = []
    for i, prompt in enumerate(prompts):
        error = prompt if isinstance(prompt, RowError) else None
        tokens = [] if error else [ord(c) - FIRST_CHARACTER for c in str(prompt)]
        rows.append(PlannedRow(10 * index + i, tokens, None, 0, error))
    return Slice("a", "etag", index, num_slices, rows, plan_id="p")


async def start(job: Job, workers: FakeWorkers) -> tuple[SliceRunner, Admission]:
    admission = Admission(window=10)
    await admission.hello("w")
    return SliceRunner(RunSpec("r", job, PRINT, workers), LocalGate(admission), "w", "node"), admission


def run_slices(job: Job, workers: FakeWorkers, *slices: Slice) -> list[SliceDone | SliceDropped]:
    async def go() -> list[SliceDone | SliceDropped]:
        runner, _ = await start(job, workers)
        return await asyncio.gather(*(runner.run(slice_) for slice_ in slices))

    return asyncio.run(go())


def read(job: Job, *events: SliceDone | SliceDropped) -> tuple[list[dict], list[SliceTimes]]:
    paths = [event.path for event in events if isinstance(event, SliceDone)]
    table, times = read_slices(job.sampling, Storage(job.output.path), paths)
    return table.to_pylist(), times


def test_a_slice_object_has_an_answer_or_an_error_for_each_planned_row(tmp_path, fake_workers):
    job, workers = make_job(tmp_path), fake_workers()
    (event,) = run_slices(job, workers, make_slice(1, "x", RowError("null_prompt", "is null"), "y"))
    rows, _ = read(job, event)
    assert [row["row_index"] for row in rows] == [10, 11, 12]
    assert [row["response"] for row in rows] == [answer_to("x"), None, answer_to("y")]
    assert rows[1]["error"] == {"kind": "null_prompt", "message": "is null"}
    assert workers.asked() == ["a/10", "a/12"], "a row that was found bad in planning never sees the engine"
    assert (event.rows, event.rows_error, event.index, event.num_slices) == (3, 1, 1, 3)


def test_slices_sum_to_the_whole_time_that_the_worker_was_held(tmp_path, fake_workers):
    job = make_job(tmp_path)

    async def go() -> tuple[list[SliceDone | SliceDropped], float]:
        started = time.perf_counter()
        runner, _ = await start(job, fake_workers(delay_s=0.05, load_s=0.6))
        first = await asyncio.gather(*(runner.run(make_slice(i, "x", "y")) for i in range(2)))
        await asyncio.sleep(0.6)
        last = await runner.run(make_slice(2, "z"))
        return [*first, last], time.perf_counter() - started

    events, held_s = asyncio.run(go())
    rows, times = read(job, *events)
    parts = [t.load_s + t.idle_s + t.lost_s for t in times] + [row["device_seconds"] for row in rows]
    # Either the load or the pause would be missed; what a busy machine adds around the worker is not its time.
    assert math.fsum(parts) == pytest.approx(held_s, abs=0.25)
    assert [t.load_s > 0 for t in times].count(True) == 1, "the load is on one slice"
    assert math.fsum(row["cost_usd"] for row in rows) == pytest.approx(5e-6)


def test_a_worker_that_died_and_a_broken_engine_are_on_the_bill_as_lost(tmp_path, fake_workers):
    job = make_job(tmp_path)

    async def go() -> SliceDone | SliceDropped:
        admission = Admission(window=10)
        await admission.hello("w")
        spec = RunSpec("r", job, PRINT, fake_workers())
        runner = SliceRunner(spec, LocalGate(admission), "w", "node", lost_before_s=7.0)
        runner._answerer.worker.stats_.busy_s += 2.0
        return await runner.run(make_slice(0, "x", "BREAK"))

    rows, (times,) = read(job, asyncio.run(go()))
    assert times.lost_s == pytest.approx(9.0, abs=1e-3)
    assert [row["error"] and row["error"]["kind"] for row in rows] == [None, "engine_error"]


def test_slices_sum_to_all_that_the_drafters_did_and_engines_that_broke_are_in_the_sum(tmp_path, fake_workers):
    job, workers = make_job(tmp_path), fake_workers(delay_s=0.02, drafts=True)
    slices = [make_slice(0, "x", "y"), make_slice(1, "z", "BREAK"), make_slice(2, "u", "v", "w")]
    rows, times = read(job, *run_slices(job, workers, *slices))
    num_drafted = workers.num_drafted()
    assert num_drafted > 7, "rows were tried again after the engine broke"
    drafts = sum_drafts(t.drafts for t in times)
    assert drafts.drafters == [
        DrafterCount(name, num_drafted * DRAFTED[name], num_drafted * ACCEPTED[name]) for name in DRAFTED
    ]
    assert (drafts.num_verify_steps, drafts.saved_s) == (num_drafted, 0.25 * num_drafted)
    assert [row["drafted_tokens"] for row in rows] == [0 if row["error"] else sum(DRAFTED.values()) for row in rows]


def test_a_drafter_that_failed_is_noted_and_counted_once(tmp_path, fake_workers):
    job = make_job(tmp_path)

    async def go() -> list[SliceDone | SliceDropped]:
        runner, _ = await start(job, fake_workers(drafts=True))
        return [await runner.run(make_slice(i, prompt)) for i, prompt in enumerate(["x", "FAIL", "y"])]

    events = asyncio.run(go())
    rows, times = read(job, *events)
    assert [t.drafts.num_failures for t in times] == [0, 1, 0]
    note = "the drafter corpus failed and was switched off: out of luck"
    assert [note in t.notes for t in times] == [False, True, True]
    assert all(row["error"] is None for row in rows)


def test_nothing_is_begun_once_the_run_is_being_stopped(tmp_path, fake_workers):
    job, workers = make_job(tmp_path), fake_workers()

    async def go() -> SliceDone | SliceDropped:
        runner, admission = await start(job, workers)
        await admission.stop()
        return await runner.run(make_slice(0, "x"))

    assert asyncio.run(go()) == SliceDropped("a", 0)
    assert workers.asked() == []


def test_a_slice_published_by_a_worker_that_died_right_after_is_found_and_not_computed_again(tmp_path, fake_workers):
    job, workers = make_job(tmp_path), fake_workers()
    (event,) = run_slices(job, workers, make_slice(0, "x"))

    async def go() -> SliceDone | SliceDropped:
        runner, admission = await start(job, workers)
        await admission.begin(("a", 0), "w")  # the attempt that died
        return await runner.run(make_slice(0, "x"))

    again = asyncio.run(go())
    assert isinstance(event, SliceDone) and isinstance(again, SliceDone)
    assert not again.is_new and again.path == event.path
    assert workers.asked() == ["a/0"]


def test_rows_that_killed_their_worker_are_error_rows_and_suspects_are_tried_alone(tmp_path, fake_workers):
    job, workers = make_job(tmp_path), fake_workers()

    async def go() -> SliceDone | SliceDropped:
        runner, admission = await start(job, workers)
        for rows in (frozenset(), frozenset(), frozenset({0, 1}), frozenset({1})):  # four attempts that died
            await admission.begin(("a", 0), "w")
            await admission.try_rows(("a", 0), rows)
        return await runner.run(make_slice(0, "x", "KILL", "y", "z"))

    rows, (times,) = read(job, asyncio.run(go()))
    assert [row["error"] and row["error"]["kind"] for row in rows] == [None, "engine_error", None, None]
    assert times.attempts == 5


def test_a_slice_whose_worker_dies_again_and_again_is_given_up_with_error_rows(tmp_path, fake_workers):
    job, workers = make_job(tmp_path), fake_workers()

    async def go() -> SliceDone | SliceDropped:
        runner, admission = await start(job, workers)
        for _ in range(10):
            await admission.begin(("a", 0), "w")
        return await runner.run(make_slice(0, "x", "y"))

    rows, _ = read(job, asyncio.run(go()))
    assert ["died 10 times" in row["error"]["message"] for row in rows] == [True, True]
    assert workers.asked() == []


def test_prompt_tokens_computed_again_have_their_reason_from_the_row_to_the_shards_metrics_and_the_bill(
    tmp_path, fake_workers, monkeypatch
):
    job, workers = make_job(tmp_path), fake_workers()
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"p": ["x"] * 6}), folder / "a.parquet")
    (shard,) = list_shards(job.model_copy(update={"input": job.input.model_copy(update={"path": str(folder)})})).good
    # Of each row: tokens shared with the row before, and of these cached, and evicted.
    numbers = [(50, 20, 0), (40, 40, 0), (40, 30, 10), (40, 33, 0), (90, 10, 0), (30, 35, 0)]
    rows = [PlannedRow(i, [i] * 100, None, 0, shared_prefix_tokens=shared) for i, (shared, _, _) in enumerate(numbers)]
    usages = [Usage(100, cached, 1, evicted_tokens=evicted) for _, cached, evicted in numbers]

    async def generate(self, requests):
        number = [int(request.request_id.rpartition("/")[2]) for request in requests]
        return [Completion(str(i), [Output(0, "x", [1], "stop", -0.5)], usages[i]) for i in number]

    monkeypatch.setattr(FakeWorker, "generate", generate)
    slice_ = Slice("a", shard.etag, 0, 1, rows, plan_id="p", achievable_prefix_tokens=290)
    (event,) = run_slices(job, workers, slice_)
    metrics = merge_shard(job, shard, Storage(job.output.path), [event.path], PRINT)
    assert metrics.evicted_prefix_tokens == 10
    assert metrics.border_prefix_tokens == 30, "the slice's first row"
    assert metrics.short_prefix_tokens == 7, "less than an engine waits for; the row with 80 has no reason"
    bill = add_up(read_metrics(Storage(job.output.path)), [])
    assert (bill.evicted_prefix_tokens, bill.border_prefix_tokens, bill.short_prefix_tokens) == (10, 30, 7)
    shown = _describe_lost(bill)
    assert shown == "; 122 tokens lost: 10 evicted, 30 where slices begin, 7 too short to wait for, 75 otherwise"
    bill.recomputed_prefix_tokens = 25
    assert "25 computed by several actors, 10 evicted, 5 where slices begin, 7 too" in _describe_lost(bill)


def test_an_engine_with_few_pages_says_in_the_metrics_what_it_evicted(tmp_path, small_model):
    """A real engine: groups that take turns, in a plan that does not put them together, and pages for one of them."""
    job = job_from_dict(
        {
            "input": {"path": str(tmp_path), "prompt_column": "p"},
            "model": str(small_model),
            "engine": {
                "device": "cpu",
                "dtype": "float32",
                "num_threads": 1,
                "page_size": 8,
                "num_pages": 14,
                "max_num_seqs": 1,
                "max_model_len": 64,
            },
            "sampling": {"max_tokens": 1},
            "output": {"path": str(tmp_path / "out")},
        }
    ).resolve()
    heads = [[1 + i] * 48 for i in range(4)]
    rows = [PlannedRow(i, [*heads[i % 4], 20 + i], None, 0) for i in range(12)]

    async def go() -> SliceDone | SliceDropped:
        admission = Admission(window=10)
        await admission.hello("w")
        runner = SliceRunner(RunSpec("r", job, PRINT), LocalGate(admission), "w", "node")
        event = await runner.run(Slice("a", "etag", 0, 1, rows, plan_id="p"))
        runner._answerer.worker.close()
        return event

    table, (times,) = read(job, asyncio.run(go()))
    computed_again = sum(49 - row["cached_tokens"] for row in table) - 4 * 48 - 12
    assert computed_again > 0, "the pool is too small for all heads"
    assert times.evicted_prefix_tokens == computed_again
