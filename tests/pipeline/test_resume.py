"""A run that is killed, repeated, extended: the same end, and nothing that is published is computed again."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from driver import Driver, undisturbed_responses
from fake_worker import ACCEPTED, DRAFTED, FakeWorkers, LocalGate, answer_to

from actors.config import EngineConfig
from actors.weights.checkpoint import load_tokenizer
from jobs.run import run
from jobs.status import status
from pipeline.admission import Admission
from pipeline.bill.ledger import read_metrics, read_runs
from pipeline.job import FingerprintMismatch, Job, load_job
from pipeline.prefix_plan import plan_shard
from pipeline.shards import Shard, list_shards
from pipeline.slice_runner import RunSpec, SliceRunner
from pipeline.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")


def read_results(output: Path) -> dict[str, pa.Table]:
    return {file.stem: pq.read_table(file) for file in sorted((output / "results").glob("*.parquet"))}


def slices(output: Path) -> dict[str, int]:
    """Path and time of writing of each slice."""
    return {str(file): file.stat().st_mtime_ns for file in (output / "_slices").rglob("*.parquet")}


def long_job(write_corpus, write_job) -> Path:
    """Two shards in about 20 slices that take a real engine some seconds; some rows fail."""
    shards = {name: [f"Question {name} {i}: {'why? ' * (i % 7)}" for i in range(60)] for name in "ab"}
    shards["a"][17] = shards["b"][3] = None
    write_corpus(shards)
    return write_job(
        sampling={"max_tokens": 120, "temperature": 0.8, "seed": 7},
        engine={"max_num_seqs": 16},
        plan={"max_rows_per_slice": 8},
    )


def test_a_killed_driver_and_the_same_command_again_end_like_an_undisturbed_run(write_corpus, write_job, tmp_path):
    job = long_job(write_corpus, write_job)
    output = tmp_path / "out"
    with Driver(job) as driver:
        driver.wait_until(lambda: len(slices(output)) >= 4)
        driver.process.send_signal(signal.SIGKILL)
    found = slices(output)
    assert not list((output / "results").glob("*"))
    assert run(str(job), []) == 0

    (record,) = read_runs(Storage(str(output)))  # the killed run could not leave one
    num_slices = sum(row["num_slices"] for row in read_metrics(Storage(str(output))))
    assert record.num_slices_found == len(found) >= 4
    assert record.num_slices_computed == num_slices - len(found) > 0
    assert not slices(output), "slices go once their shard is published"

    expected = undisturbed_responses(load_job(str(job)).resolve())
    assert set(expected) == {"a", "b"}
    for name, table in read_results(output).items():
        assert table["id"].to_pylist() == list(range(60))
        assert table["response"].to_pylist() == expected[name], f"shard {name}"
    assert (output / "_SUCCESS").exists()


def test_sigterm_drains_and_the_next_run_continues(write_corpus, write_job, tmp_path):
    job = long_job(write_corpus, write_job)
    output = tmp_path / "out"
    with Driver(job) as driver:
        driver.wait_until(lambda: len(slices(output)) >= 2)
        driver.process.send_signal(signal.SIGTERM)
        assert driver.wait() == 143, driver.log.read_text()
        assert not driver.family(), "no process is left behind"
        said = driver.log.read_text()
    assert "received SIGTERM" in said and "run the same command again to continue" in said
    (record,) = read_runs(Storage(str(output)))
    assert record.exit_code == 143 and record.num_slices_computed == len(slices(output)) >= 2
    assert not (output / "_SUCCESS").exists()
    assert run(str(job), []) == 0
    _, second = read_runs(Storage(str(output)))
    assert second.num_slices_found == record.num_slices_computed
    assert [table.num_rows for table in read_results(output).values()] == [60, 60]


def test_only_what_is_new_or_changed_is_computed(write_corpus, write_job, fake_workers, tmp_path):
    folder = write_corpus({"a": ["one", "two"], "b": ["three"]})
    job, workers = str(write_job()), fake_workers()
    assert run(job, [], new_worker=workers) == 0
    assert sorted(workers.asked()) == ["a/0", "a/1", "b/0"]
    assert run(job, [], new_worker=workers) == 0
    assert len(workers.asked()) == 3, "all is done, so nothing is asked"

    write_corpus({"c": ["four"]})
    assert run(job, [], new_worker=workers) == 0
    assert workers.asked()[3:] == ["c/0"]

    before = (tmp_path / "out" / "results" / "a.parquet").stat()
    write_corpus({"b": ["five", None]})
    assert run(job, [], new_worker=workers) == 0
    assert workers.asked()[4:] == ["b/0"]
    assert [table.num_rows for table in read_results(tmp_path / "out").values()] == [2, 2, 1]
    assert (tmp_path / "out" / "results" / "a.parquet").stat().st_mtime_ns == before.st_mtime_ns
    assert pq.read_table(tmp_path / "out" / "errors" / "b.parquet").num_rows == 1
    summary = json.loads((tmp_path / "out" / "_SUCCESS").read_text())
    assert (summary["bill"]["rows"], summary["bill"]["rows_error"]) == (5, 1)
    assert folder.exists()


def test_another_job_into_the_same_output_is_refused_by_the_fields_that_differ(
    write_corpus, write_job, fake_workers, tmp_path
):
    write_corpus({"a": ["one"]})
    job, workers = str(write_job()), fake_workers()
    assert run(job, [], new_worker=workers) == 0
    with pytest.raises(FingerprintMismatch) as refusal:
        run(job, ["sampling.max_tokens=9", "pool.max_slices_in_flight=3"], new_worker=workers)
    assert "sampling.max_tokens: 8 -> 9" in str(refusal.value)
    assert "pool" not in str(refusal.value)
    assert run(job, ["pool.max_slices_in_flight=3", "pricing.usd_per_device_hour=2"], new_worker=workers) == 0
    assert len(workers.asked()) == 1


def test_slices_of_another_cut_are_not_mistaken_for_this_ones(write_corpus, write_job, fake_workers, tmp_path):
    prompts = [f"prompt {i}" for i in range(20)]
    write_corpus({"a": prompts})
    job, workers = str(write_job(limits={"budget_usd": 1e-9})), fake_workers(delay_s=0.2)
    assert run(job, ["pool.max_slices_in_flight=1"], new_worker=workers) == 4
    assert 0 < len(slices(tmp_path / "out")) < 5
    assert run(job, ["plan.max_rows_per_slice=7", "limits.budget_usd=null"], new_worker=workers) == 0
    (table,) = read_results(tmp_path / "out").values()
    assert table["prompt"].to_pylist() == prompts and table["error"].null_count == 20


def test_a_shard_with_all_its_slices_is_merged_without_a_model(write_corpus, write_job, fake_workers, tmp_path):
    write_corpus({"a": [f"prompt {i}" for i in range(10)]})
    job = load_job(str(write_job())).resolve()
    (shard,) = list_shards(job).good
    publish_slices(job, shard, fake_workers())  # what a driver leaves that is killed just before the merge
    assert len(slices(tmp_path / "out")) > 1

    def refuse(config: EngineConfig) -> None:
        raise AssertionError("no model is needed")

    assert run(str(tmp_path / "job.yaml"), [], new_worker=refuse) == 0
    assert [table.num_rows for table in read_results(tmp_path / "out").values()] == [10]


def test_a_damaged_slice_is_computed_again(write_corpus, write_job, fake_workers, tmp_path):
    prompts = [f"prompt {i}" for i in range(10)]
    write_corpus({"a": prompts})
    job = load_job(str(write_job())).resolve()
    (shard,) = list_shards(job).good
    publish_slices(job, shard, fake_workers())
    damaged = Path(sorted(slices(tmp_path / "out"))[0])
    damaged.write_bytes(damaged.read_bytes()[:-30])
    again = FakeWorkers(tmp_path / "again.log")
    assert run(str(tmp_path / "job.yaml"), [], new_worker=again) == 0
    assert 0 < len(again.asked()) <= 4
    (table,) = read_results(tmp_path / "out").values()
    assert table["response"].to_pylist() == [answer_to(prompt) for prompt in prompts]


def publish_slices(job: Job, shard: Shard, workers: FakeWorkers) -> None:
    """Answer and publish all slices of a shard, and leave it unmerged."""

    async def go() -> None:
        admission = Admission(window=100)
        await admission.hello("w")
        runner = SliceRunner(RunSpec("earlier", job, job.fingerprint(), workers), LocalGate(admission), "w", "node")
        for slice_ in plan_shard(job, shard, load_tokenizer(job.model)):
            await runner.run(slice_)

    asyncio.run(go())


def test_drafts_of_a_run_stopped_and_continued_sum_to_what_was_drafted_and_the_index_goes_from_run_to_run(
    write_corpus, write_job, fake_workers, tmp_path, capsys
):
    write_corpus({"a": [f"first{i}" for i in range(20)], "b": [f"second{i}" for i in range(10)]})
    output = Storage(str(tmp_path / "out"))
    job, workers = str(write_job(limits={"budget_usd": 1e-9})), fake_workers(delay_s=0.2, drafts=True)
    assert run(job, ["pool.max_slices_in_flight=1"], new_worker=workers) == 4
    assert 0 < workers.num_drafted() < 30
    assert run(job, ["limits.budget_usd=null"], new_worker=workers) == 0
    assert workers.num_drafted() == 30
    known = [f"first{i}" for i in range(20)] + [f"second{i}" for i in range(10)]
    check_drafts(output, 30, known)

    write_corpus({"c": ["third FAIL"]})
    capsys.readouterr()
    assert run(job, ["limits.budget_usd=null"], new_worker=workers) == 0
    check_drafts(output, 31, [*known, "third", "FAIL"])
    said = " ".join(capsys.readouterr().out.split())
    assert "310 drafted, 186 accepted (60.0%), acceptance length 7.0; corpus 155/186, ngram 31/124" in said
    assert "1 switched off after a failure" in said and "speculation 7.8 s of device time" in said
    assert "note the drafter corpus failed and was switched off: out of luck" in said
    assert status(output.uri) == 0
    assert "310 drafted, 186 accepted" in " ".join(capsys.readouterr().out.split())


def check_drafts(output: Storage, num_rows: int, known: list[str]) -> None:
    """Rows, shards and the summary agree on the drafts, and one index holds what all answers had."""
    tables = read_results(Path(output.uri)).values()
    for column, per_row in (("drafted_tokens", DRAFTED), ("accepted_tokens", ACCEPTED)):
        assert sum(sum(table[column].to_pylist()) for table in tables) == num_rows * sum(per_row.values())
    metrics = read_metrics(output)
    expected = [
        {"drafter": name, "drafted_tokens": num_rows * DRAFTED[name], "accepted_tokens": num_rows * ACCEPTED[name]}
        for name in sorted(DRAFTED)
    ]
    summed = [
        {
            "drafter": name,
            **{
                key: sum(drafter[key] for row in metrics for drafter in row["drafters"] if drafter["drafter"] == name)
                for key in ("drafted_tokens", "accepted_tokens")
            },
        }
        for name in sorted(DRAFTED)
    ]
    assert summed == expected
    summary = json.loads(output.read_bytes("_SUCCESS"))
    assert summary["bill"]["drafters"] == expected
    assert summary["bill"]["num_verify_steps"] == sum(row["num_verify_steps"] for row in metrics) == num_rows
    assert summary["bill"]["saved_by_speculation_estimate_s"] == pytest.approx(0.25 * num_rows)
    assert "saved_by_speculation_estimate_s" in summary["estimates"]
    (file,) = output.list("_drafts")
    assert set(output.read_bytes(file.path).decode().split()[1:]) == set(known)
