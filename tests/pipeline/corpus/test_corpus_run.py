"""A corpus planned as one, on a real Ray: the same answers as shard by shard, each row once, whatever happens."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from driver import Driver
from fake_worker import FakeWorkers, answer_to

from jobs.run import run
from pipeline.bill.ledger import read_bill, read_metrics, read_runs
from pipeline.corpus_plan.manifest import CORPUS, PLANS
from pipeline.events import CorpusPlanned, CorpusPlanning, Event, ShardDone, ShardFailed, SliceDone
from pipeline.graph import Graph
from pipeline.job import Job, load_job
from pipeline.shards import list_shards
from pipeline.slice_runner import RunSpec
from pipeline.slices import list_slices
from pipeline.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")


def responses(job: Job) -> dict[str, list[str | None]]:
    files = Storage(job.output.path).list("results")
    return {Path(f.path).stem: pq.read_table(f.uri)["response"].to_pylist() for f in files}


def of_kind(events: list[Event], kind: type) -> list:
    return [event for event in events if isinstance(event, kind)]


def scattered(num_shards: int = 3, questions: int = 12) -> dict[str, list[str | None]]:
    """Documents with questions that lie in all shards, duplicates in and across these, and bad rows."""
    rng = random.Random(1)
    documents = [f"Document {i}: {'abc ' * 12}" for i in range(5)]
    shards: dict[str, list[str | None]] = {}
    for number in range(num_shards):
        rows = [f"{rng.choice(documents)} Question {number} {i}?" for i in range(questions)]
        shards[f"s{number}"] = [*rows, "the same everywhere", rows[0], None]
    return shards


def expected(shards: dict[str, list[str | None]]) -> dict[str, list[str | None]]:
    return {name: [None if row is None else answer_to(row) for row in rows] for name, rows in shards.items()}


def make_graph(job: Path, workers: FakeWorkers) -> tuple[Graph, Job]:
    loaded = load_job(str(job)).resolve()
    spec = RunSpec("run", loaded, loaded.fingerprint(), workers)
    shards = list_shards(loaded).good
    return Graph(spec, shards, list_slices(spec.output), shards), loaded


def test_each_row_of_a_corpus_is_answered_once_by_several_workers_of_which_one_is_killed(
    write_corpus, write_job, fake_workers
):
    shards = {**scattered(questions=40), "empty": []}
    write_corpus(shards)
    workers = fake_workers(delay_s=0.3)
    job = write_job(pool={"num_actors": 2, "num_cpus": 0.5, "max_slices_in_flight": 2})
    graph, loaded = make_graph(job, workers)
    events, is_killed = [], False
    for event in graph.events():
        events.append(event)
        if not is_killed and len(workers.asked()) >= 40 and len(workers.pids()) == 2:
            os.kill(workers.pids()[0], signal.SIGKILL)
            is_killed = True
    assert len(workers.pids()) == 3, "two workers, and one that took a dead one's place"
    assert responses(loaded) == expected(shards)
    (planned,) = of_kind(events, CorpusPlanned)
    told = Counter(event.index for event in of_kind(events, SliceDone))
    assert set(told) == set(range(planned.num_slices)) and set(told.values()) == {1}
    different = {row for rows in shards.values() for row in rows if row is not None}
    asked = Counter(workers.asked())
    assert len(asked) == len(different), "duplicates across shards are answered once"
    assert sum(count > 1 for count in asked.values()) <= 2 * 2 * 4, "only what was in flight is asked again"
    assert {event.metrics.shard for event in of_kind(events, ShardDone)} == set(shards)
    output = Storage(loaded.output.path)
    assert not output.list(PLANS) and not output.list("_slices"), "nothing of the plan is left"


def test_a_shard_that_cannot_be_read_fails_alone_and_a_row_that_kills_is_one_error_row(
    write_corpus, write_job, fake_workers
):
    shards = scattered(num_shards=2, questions=6)
    shards["s1"][2] = "KILL"
    folder = write_corpus({**shards, "torn": ["x"] * 8})
    graph, loaded = make_graph(write_job(), fake_workers())
    torn = folder / "torn.parquet"
    status = torn.stat()
    torn.write_bytes(b"PAR1" + b"\0" * (status.st_size - 4))
    os.utime(torn, ns=(status.st_atime_ns, status.st_mtime_ns))
    events = list(graph.events())
    assert [event.shard for event in of_kind(events, ShardFailed)] == ["torn"]
    answers = expected(shards)
    answers["s1"][2] = None
    assert responses(loaded) == answers
    errors = pq.read_table(Storage(loaded.output.path).uri_of("errors/s1.parquet"))["error"].to_pylist()
    assert sorted(error["kind"] for error in errors) == ["engine_error", "null_prompt"]


def test_both_scopes_give_the_same_rows_and_bills_that_add_up(write_corpus, write_job, fake_workers, tmp_path, capsys):
    shards = scattered()
    write_corpus(shards)
    bills = {}
    for scope in ("shard", "corpus"):
        job = write_job(f"{scope}.yaml", plan={"scope": scope}, output={"path": scope})
        assert run(str(job), [], new_worker=FakeWorkers(tmp_path / f"{scope}.log")) == 0
        assert f"plan: scope {scope} (as the job says)" in capsys.readouterr().out
        output = Storage(str(tmp_path / scope))
        metrics, bills[scope] = read_metrics(output), read_bill(output)
        assert sum(row["rows_in"] for row in metrics) == bills[scope].rows == 45
        assert responses(load_job(str(job)).resolve()) == expected(shards)
        for name in shards:
            table = pq.read_table(tmp_path / scope / "results" / f"{name}.parquet")
            assert table["id"].to_pylist() == list(range(15))
        (record,) = read_runs(output)
        assert record.scope == scope
    assert bills["corpus"].rows_duplicate > bills["shard"].rows_duplicate
    assert bills["corpus"].computed_prompt_tokens < bills["shard"].computed_prompt_tokens
    assert bills["corpus"].prefix_hit_rate_achievable > bills["shard"].prefix_hit_rate_achievable


def test_auto_plans_the_corpus_where_shards_share_and_keeps_to_it_when_it_is_continued(
    write_corpus, write_job, fake_workers, tmp_path, capsys
):
    write_corpus(scattered())
    job, workers = str(write_job(limits={"budget_usd": 1e-9})), fake_workers(delay_s=0.2)
    assert run(job, ["pool.max_slices_in_flight=1"], new_worker=workers) == 4
    said = capsys.readouterr().out
    assert "plan: scope corpus (auto: planning the corpus as one saves" in said
    assert "as one corpus; " in said and "duplicates across shards; from 45 rows)" in said
    before = Counter(workers.asked())
    assert len(before) > 0 and list((tmp_path / "out" / "_slices" / CORPUS).iterdir())
    assert run(job, ["limits.budget_usd=null"], new_worker=workers) == 0
    assert "scope corpus (auto: the corpus is planned already)" in capsys.readouterr().out
    assert max(Counter(workers.asked()).values()) == 1, "what is published is not asked again"
    assert responses(load_job(job).resolve()) == expected(scattered())
    _, second = read_runs(Storage(str(tmp_path / "out")))
    assert second.scope == "corpus" and second.num_slices_found > 0


def test_auto_plans_shard_by_shard_where_nothing_is_shared(write_corpus, write_job, fake_workers, capsys):
    rng = random.Random(2)
    write_corpus({name: ["".join(rng.choices("abcdefgh", k=30)) for _ in range(12)] for name in "ab"})
    assert run(str(write_job()), [], new_worker=fake_workers()) == 0
    assert "plan: scope shard (auto: planning the corpus as one saves" in capsys.readouterr().out


def test_a_run_stopped_in_the_middle_of_planning_ends_and_is_planned_and_done_by_the_next(
    write_corpus, write_job, fake_workers
):
    write_corpus(scattered())
    job, workers = write_job(pool={"num_actors": [1, 2], "num_cpus": 0.5}), fake_workers()
    graph, loaded = make_graph(job, workers)
    for event in graph.events():
        assert not isinstance(event, CorpusPlanned | SliceDone)
        if isinstance(event, CorpusPlanning):
            graph.stop()
    assert not workers.asked() and not Storage(loaded.output.path).list("results")
    graph, loaded = make_graph(job, workers)
    (planned,) = of_kind(list(graph.events()), CorpusPlanned)
    assert planned.is_new and planned.num_found == 0
    assert responses(loaded) == expected(scattered())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_admission_that_dies_in_mid_run_forgets_and_every_row_is_answered_all_the_same(
    write_corpus, write_job, fake_workers
):
    shards = scattered(questions=30)
    write_corpus(shards)
    job, workers = write_job(pool={"max_slices_in_flight": 2}), fake_workers(delay_s=0.3)
    graph, loaded = make_graph(job, workers)
    told = Counter()
    for event in graph.events():
        if isinstance(event, SliceDone):
            told[event.index] += 1
            if told.total() == 4:
                ray.kill(graph._gate, no_restart=False)
    assert set(told.values()) == {1}
    assert responses(loaded) == expected(shards)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_driver_killed_in_a_corpus_run_is_continued_to_the_same_bytes_as_shard_by_shard(
    write_corpus, write_job, tmp_path
):
    write_corpus(scattered(questions=30))

    def write(name: str, scope: str) -> Path:
        return write_job(
            f"{name}.yaml",
            plan={"scope": scope, "max_rows_per_slice": 6},
            sampling={"max_tokens": 40},
            engine={"deterministic": True, "max_num_seqs": 8},
            output={"path": name},
        )

    assert run(str(write("by_shard", "shard")), []) == 0
    job = write("killed", "corpus")
    with Driver(job) as driver:
        driver.wait_until(lambda: len(list((tmp_path / "killed" / "_slices").rglob("*.parquet"))) >= 3)
        driver.process.send_signal(signal.SIGKILL)
    assert not list((tmp_path / "killed").glob("results/*"))
    assert run(str(job), []) == 0
    (record,) = read_runs(Storage(str(tmp_path / "killed")))
    assert record.num_slices_found >= 3
    for name in scattered():
        tables = [pq.read_table(tmp_path / one / "results" / f"{name}.parquet") for one in ("by_shard", "killed")]
        for column in ("id", "response", "finish_reason", "mean_logprob"):
            assert tables[0][column].equals(tables[1][column]), (name, column)
