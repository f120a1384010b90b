"""The graph on a real Ray: laziness, deaths, and shards that fail alone. Workers are fakes that count their rows."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from fake_worker import FakeWorkers, answer_to

from pipeline.events import Event, ShardDone, ShardFailed, ShardPlanned, SliceDone
from pipeline.graph import Graph
from pipeline.job import Job, load_job
from pipeline.shards import list_shards
from pipeline.slice_runner import RunSpec
from pipeline.slices import list_slices
from pipeline.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")


def make_spec(job_file: Path, workers: FakeWorkers) -> RunSpec:
    job = load_job(str(job_file)).resolve()
    return RunSpec("run", job, job.fingerprint(), workers)


def make_graph(spec: RunSpec) -> Graph:
    return Graph(spec, list_shards(spec.job).good, list_slices(spec.output))


def responses(job: Job) -> dict[str, list[str | None]]:
    files = Storage(job.output.path).list("results")
    return {Path(f.path).stem: pq.read_table(f.uri)["response"].to_pylist() for f in files}


def answers_to(prompts: list[str]) -> list[str]:
    return [answer_to(prompt) for prompt in prompts]


def of_kind(events: list[Event], kind: type) -> list:
    return [event for event in events if isinstance(event, kind)]


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Act once, from another thread, as soon as the condition holds; give up after a minute."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if condition():
                act()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_worker_killed_in_mid_run_costs_time_and_no_row(write_corpus, write_job, fake_workers):
    shards = {name: [f"prompt {name} {i}" for i in range(40)] for name in "ab"}
    write_corpus(shards)
    workers = fake_workers(delay_s=0.3)
    spec = make_spec(write_job(pool={"max_slices_in_flight": 2}), workers)
    killer = when(lambda: len(workers.asked()) >= 24, lambda: os.kill(workers.pids()[0], signal.SIGKILL))
    graph = make_graph(spec)
    events = list(graph.events())
    killer.join()
    assert len(workers.pids()) == 2, "one worker was killed and one took over"
    assert responses(spec.job) == {name: answers_to(prompts) for name, prompts in shards.items()}
    published = Counter((event.shard, event.index) for event in of_kind(events, SliceDone))
    (num_a, num_b) = (event.num_slices for event in of_kind(events, ShardPlanned))
    assert len(published) == num_a + num_b and set(published.values()) == {1}
    counts = Counter(workers.asked())
    assert set(counts) == {f"{name}/{i}" for name in "ab" for i in range(40)}
    assert sum(count > 1 for count in counts.values()) <= 2 * 4, "only what was in flight is asked again"
    metrics = [event.metrics for event in of_kind(events, ShardDone)]
    assert sum(m.lost_seconds for m in metrics) > 0.0
    parts = [m.device_seconds + m.load_seconds + m.idle_seconds + m.lost_seconds for m in metrics]
    (end,) = graph.close_accounts()
    assert sum(parts) + end.idle_s + end.lost_s == pytest.approx(end.held_s, abs=0.5)


def test_a_row_that_kills_its_worker_is_one_error_row(write_corpus, write_job, fake_workers):
    prompts = [f"prompt {i}" for i in range(8)]
    prompts[5] = "KILL"
    write_corpus({"a": prompts})
    workers = fake_workers()
    spec = make_spec(write_job(), workers)
    events = list(make_graph(spec).events())
    expected = [None if prompt == "KILL" else answer_to(prompt) for prompt in prompts]
    assert responses(spec.job) == {"a": expected}
    (done,) = of_kind(events, ShardDone)
    assert (done.metrics.rows_ok, done.metrics.rows_error, done.metrics.attempts) == (7, 1, 5)


def test_plans_stay_just_ahead_of_the_pool_and_the_drivers_memory_does_not_grow(
    write_corpus, write_job, fake_workers, tmp_path
):
    num_shards = 120
    write_corpus({f"s{i:04d}": [f"prompt {i} {j}" for j in range(3)] for i in range(num_shards)})
    spec = make_spec(write_job(pool={"max_slices_in_flight": 2}), fake_workers(delay_s=0.05))
    graph, driver, planned, done, ahead, memory = make_graph(spec), psutil.Process(), 0, 0, 0, []
    for event in graph.events():
        planned += isinstance(event, ShardPlanned)
        done += isinstance(event, SliceDone)
        ahead = max(ahead, planned - done)
        if isinstance(event, ShardDone):
            memory.append(driver.memory_info().rss)
    assert planned == done == len(memory) == num_shards
    assert ahead <= 2 * 2 + 2 + 4, "the gate's window, and what was on its way"
    assert memory[-1] - memory[num_shards // 3] < 4 * 2**20, "the driver grows with the number of shards"


def test_a_shard_that_cannot_be_finished_fails_alone(write_corpus, write_job, fake_workers):
    prompts = [f"prompt {i}" for i in range(8)]
    folder = write_corpus({"good": prompts, "changed": prompts, "torn": prompts})
    workers = fake_workers(delay_s=0.5)
    spec = make_spec(write_job(), workers)
    graph = make_graph(spec)
    torn = folder / "torn.parquet"
    status = torn.stat()
    torn.write_bytes(b"PAR1" + b"\0" * (status.st_size - 4))  # the same size and time, so it is found when it is read
    os.utime(torn, ns=(status.st_atime_ns, status.st_mtime_ns))
    toucher = when(
        lambda: any("changed/" in row for row in workers.asked()), lambda: write_corpus({"changed": prompts})
    )
    events = list(graph.events())
    toucher.join()
    failed = {event.shard: event.reason for event in of_kind(events, ShardFailed)}
    assert set(failed) == {"changed", "torn"}
    assert "was changed since the run began" in failed["changed"] and "torn.parquet cannot be read" in failed["torn"]
    assert responses(spec.job) == {"good": answers_to(prompts)}
