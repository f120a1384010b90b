"""Batches across restarts, deaths, expiry and several replicas: the runner over a real folder, with answers made up."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
import uuid

import pytest

from actors.requests import Completion, EngineError, Output, Request, SamplingParams, Usage
from actors.worker import WorkerLoad
from jobs.endpoint import batch_runner
from jobs.endpoint.batch_runner import PART_LINES, BatchRunner
from jobs.endpoint.batches import WINDOW_S, BatchStore
from jobs.endpoint.desk import Desk
from jobs.endpoint.files import FileStore
from pipeline import lease
from pipeline.openai_api.answers import TextAnswer
from pipeline.openai_api.errors import ApiError
from pipeline.storage import Storage

URL = "/v1/completions"
NUM_LINES = 3 * PART_LINES + 5


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class FakeWorker:
    """Answers a prompt of token n with the text `n`, and counts how often; `breaks` on some, holds back at others."""

    failure = None

    def __init__(self, breaks=(), holds=()):
        self.asked: list[int] = []
        self.breaks, self.holds = set(breaks), set(holds)
        self.open = 0
        self.most_open = 0

    async def generate(self, requests: list[Request]) -> list[Completion]:
        (request,) = requests
        (number,) = request.prompt_token_ids
        self.asked.append(number)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(3600 if number in self.holds else 0)
        finally:
            self.open -= 1
        if number in self.breaks:
            raise EngineError("broken")
        return [Completion("0", [Output(0, str(number), [number], "stop")], Usage(3, 1, 2))]

    def load(self):
        return WorkerLoad(0, 0, 0, 100)

    def stats(self):
        raise NotImplementedError


class FakeAnswers:
    def __init__(self, worker):
        self.desk = Desk(worker, num_places=64, num_running=32, max_background=16)

    async def read(self, body):
        if body.prompt == [0]:
            raise ApiError(400, "prompt: is zero", param="prompt", code="invalid_value")
        return [Request("0", body.prompt, SamplingParams())]

    def new_answer(self, body):
        return TextAnswer("demo")


def in_loop(test):
    """Run a test that is a coroutine."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    files = FileStore(Storage(str(tmp_path)), max_file_bytes=1 << 20, max_total_bytes=1 << 30, keep_s=7200, clock=clock)
    return BatchStore(files, "demo", keep_s=7200, clock=clock)


def create(store, numbers=range(1, NUM_LINES + 1)):
    lines = [
        {"custom_id": f"r{n}", "method": "POST", "url": URL, "body": {"model": "demo", "prompt": [n]}} for n in numbers
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = store.files.add(data, "x.jsonl", "batch")
    return store.create({"input_file_id": file["id"], "endpoint": URL, "completion_window": "24h"})["id"]


@contextlib.asynccontextmanager
async def running(store, worker, **more):
    runner = BatchRunner(store, FakeAnswers(worker), max_requests=1000, **more)
    runner.start()
    try:
        yield runner
    finally:
        await runner.stop()


async def until(is_so, within_s=60.0):
    async with asyncio.timeout(within_s):
        while not is_so():
            await asyncio.sleep(0.01)


def lines_of(store, file_id):
    return [json.loads(line) for line in b"".join(store.files.chunks(file_id)).splitlines()] if file_id else []


def has_status(store, batch_id, *statuses):
    return lambda: store.get(batch_id)["status"] in statuses


def texts(store, batch):
    return {
        line["custom_id"]: line["response"]["body"]["choices"][0]["text"]
        for line in lines_of(store, batch["output_file_id"])
    }


def num_parts(store, batch_id):
    return len(store.storage.list(f"batches/{batch_id}/parts"))


@in_loop
async def test_a_restart_answers_only_what_no_part_has(store):
    batch_id = create(store)
    first = FakeWorker(holds={NUM_LINES - 1})
    async with running(store, first):
        await until(lambda: num_parts(store, batch_id) == 3)
    assert store.get(batch_id)["status"] == "in_progress" and first.open == 0
    second = FakeWorker()
    async with running(store, second):
        await until(has_status(store, batch_id, "completed"))
    assert sorted(second.asked) == list(range(3 * PART_LINES + 1, NUM_LINES + 1)), "the last part's lines, once"
    batch = store.get(batch_id)
    assert texts(store, batch) == {f"r{n}": str(n) for n in range(1, NUM_LINES + 1)}
    assert batch["request_counts"] == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
    assert batch["usage"]["input_tokens"] == 3 * NUM_LINES and batch["usage"]["total_tokens"] == 5 * NUM_LINES
    assert first.most_open <= 16, "no more in the engine than batches may have"
    assert num_parts(store, batch_id) == 0


@in_loop
async def test_a_process_that_dies_without_a_word_is_followed_when_its_lease_runs_out(store):
    batch_id = create(store)
    dead = lease.acquire(store.storage, "dead", ttl_s=1.0)
    assert dead.holder.ttl_s == 1.0
    worker = FakeWorker()
    async with running(store, worker, lease_s=1.0):
        await until(has_status(store, batch_id, "completed"))
    assert sorted(worker.asked) == list(range(1, NUM_LINES + 1))


@in_loop
async def test_of_two_replicas_one_works_at_a_time(store):
    ids = [create(store, range(1, 100)) for _ in range(3)]
    workers = [FakeWorker(), FakeWorker()]
    async with running(store, workers[0], lease_s=2.0), running(store, workers[1], lease_s=2.0):
        await until(lambda: all(store.get(one)["status"] == "completed" for one in ids))
    assert sorted(workers[0].asked + workers[1].asked) == sorted(3 * list(range(1, 100))), "each line once"


@in_loop
async def test_a_line_that_ends_every_engine_is_an_error_line_and_the_others_are_answered(store):
    batch_id = create(store, range(1, 100))
    num_starts = 0
    worker = FakeWorker(breaks={50})
    while store.get(batch_id)["status"] != "completed":
        num_starts += 1
        assert num_starts < 10
        worker.asked.clear()
        async with running(store, worker):
            # As with a real engine, which does not come back: the replica is ended once it has broken.
            await until(lambda: 50 in worker.asked or has_status(store, batch_id, "completed")())
            await asyncio.sleep(0.2)
    batch = store.get(batch_id)
    assert batch["request_counts"] == {"total": 99, "completed": 98, "failed": 1}
    (failed,) = lines_of(store, batch["error_file_id"])
    assert failed["custom_id"] == "r50" and failed["response"]["status_code"] == 500
    assert failed["response"]["body"]["error"]["code"] == "engine_error"


@in_loop
async def test_a_batch_that_takes_too_long_expires_with_what_it_has(store, clock):
    batch_id = create(store, [*range(1, 71), 0])
    worker = FakeWorker(holds={70})
    async with running(store, worker) as runner:
        await until(lambda: len(worker.asked) == 70 and num_parts(store, batch_id) == 1)
        clock.now += WINDOW_S
        runner.wake()
        await until(has_status(store, batch_id, "expired"))
    batch = store.get(batch_id)
    assert batch["expired_at"] and batch["request_counts"]["completed"] == 69
    failed = {line["custom_id"]: line for line in lines_of(store, batch["error_file_id"])}
    assert set(failed) == {"r70", "r0"} and failed["r70"]["response"] is None
    assert failed["r70"]["error"]["code"] == "batch_expired"
    assert failed["r0"]["response"]["body"]["error"]["param"] == "prompt"


@in_loop
async def test_cancelling_by_way_of_another_replica_is_seen(store, monkeypatch):
    monkeypatch.setattr(batch_runner, "POLL_S", 0.05)
    batch_id = create(store, range(1, 71))
    worker = FakeWorker(holds={3})
    async with running(store, worker):
        await until(lambda: 3 in worker.asked)
        store.cancel(batch_id)
        await until(has_status(store, batch_id, "cancelled"))
    batch = store.get(batch_id)
    counts = batch["request_counts"]
    assert counts["total"] == 70 == counts["completed"] + counts["failed"] and counts["completed"] < 70
    assert worker.open == 0


@in_loop
async def test_an_input_that_was_deleted_fails_the_batch(store):
    batch_id = create(store, [1])
    store.files.delete(store.get(batch_id)["input_file_id"])
    async with running(store, FakeWorker()):
        await until(has_status(store, batch_id, "failed"))
    assert store.get(batch_id)["errors"]["data"][0]["code"] == "file_not_found"


@in_loop
async def test_a_storage_that_fails_for_a_while_loses_no_line(store, monkeypatch):
    batch_id = create(store)
    num_left = 3
    write, lock = Storage.write_whole, threading.Lock()

    def fail_at_first(self, path, data):
        nonlocal num_left
        with lock:
            if "/parts/" in path and num_left:
                num_left -= 1
                raise OSError("the disk is full")
        return write(self, path, data)

    monkeypatch.setattr(Storage, "write_whole", fail_at_first)
    async with running(store, FakeWorker(), lease_s=0.5):
        await until(has_status(store, batch_id, "completed"))
    assert len(texts(store, store.get(batch_id))) == NUM_LINES


@in_loop
async def test_object_storage_will_do(s3_environment, monkeypatch, clock):
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    storage = Storage(f"s3://batches/{uuid.uuid4().hex}")
    if not storage._filesystem().exists("batches"):
        storage._filesystem().mkdir("batches")
    files = FileStore(storage, max_file_bytes=1 << 20, max_total_bytes=1 << 30, keep_s=2 * WINDOW_S, clock=clock)
    store = BatchStore(files, "demo", keep_s=7200, clock=clock)
    batch_id = create(store, [*range(1, 100), 0])
    async with running(store, FakeWorker()):
        await until(has_status(store, batch_id, "completed"))
    batch = store.get(batch_id)
    assert texts(store, batch) == {f"r{n}": str(n) for n in range(1, 100)}
    assert len(lines_of(store, batch["error_file_id"])) == 1
    assert len(files.list(after=None, limit=10, order="desc", purpose="batch_output")["data"]) == 2
    files.delete(batch["input_file_id"])
    assert store.storage.list(f"files/{batch['input_file_id']}") == []


@in_loop
async def test_what_is_old_is_removed_and_uploads_that_broke_off(store, clock):
    batch_id = create(store, [1])
    async with running(store, FakeWorker()):
        await until(has_status(store, batch_id, "completed"))
    broken_off = f"file-{int(clock.now):08x}{'a' * 24}"
    store.storage.write_whole(f"files/{broken_off}/content", b"half")
    clock.now += 8000
    assert store.files.list(after=None, limit=10, order="asc", purpose=None)["data"] == []
    store.files.remove_expired()
    store.remove_expired()
    assert store.get(batch_id)["status"] == "completed"
    assert [file.path for file in store.storage.list("files")] == [f"files/{broken_off}/content"]
    clock.now += WINDOW_S
    store.files.remove_expired()
    store.remove_expired()
    assert store.storage.list("files") == [] == store.storage.list("batches")
    with pytest.raises(ApiError):
        store.get(batch_id)


def test_a_file_beyond_the_room_for_all_is_refused(tmp_path):
    files = FileStore(Storage(str(tmp_path)), max_file_bytes=100, max_total_bytes=1000, keep_s=7200)
    files.add(b"x" * 400, "a", "batch")
    with pytest.raises(ApiError, match="delete some"):
        files.add(b"x" * 700, "b", "batch")
    assert len(files.list(after=None, limit=10, order="asc", purpose=None)["data"]) == 1
