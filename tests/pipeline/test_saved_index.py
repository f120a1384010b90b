"""The drafters' index in `_drafts/`: loaded again, bounded, and never in the way of a row. Without Ray."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from fake_worker import FIRST_CHARACTER, INDEX_WORD, FakeWorker, FakeWorkers, LocalGate

from actors.config import SpeculativeConfig
from actors.requests import EngineError
from pipeline.admission import Admission
from pipeline.events import SliceDone, SliceDropped
from pipeline.job import job_from_dict
from pipeline.prefix_plan import PlannedRow, Slice
from pipeline.saved_index import DRAFTS, STALE_S, SavedIndex
from pipeline.slice_runner import RunSpec, SliceRunner
from pipeline.storage import Storage, StorageError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def saved(tmp_path, clock):
    """Makes the side of a worker, over one output."""

    def make(worker: str = "w", run: str = "run2", **config: Any) -> SavedIndex:
        return SavedIndex(Storage(str(tmp_path)), run, worker, SpeculativeConfig(**config), clock)

    return make


@pytest.fixture
def new_worker(fake_workers):
    def make(*learnt: str) -> FakeWorker:
        worker = FakeWorker(fake_workers(drafts=True))
        worker.learnt.update(learnt)
        return worker

    return make


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / DRAFTS).glob("*"))


def index_of(*words: str) -> bytes:
    return " ".join([INDEX_WORD, *words]).encode()


def put(folder: Path, name: str, data: bytes) -> None:
    (folder / DRAFTS).mkdir(exist_ok=True)
    (folder / DRAFTS / name).write_bytes(data)


def test_what_one_worker_saves_a_worker_of_the_next_run_knows_and_takes_over(tmp_path, saved, new_worker):
    saved(run="run1", worker="a").save_from(new_worker("one"))
    saved(run="run1", worker="b").save_from(new_worker("two"))
    worker, index = new_worker(), saved()
    index.load_into(worker)
    assert worker.learnt == {"one", "two"}
    assert files(tmp_path) == ["run1-a.index", "run1-b.index"], "they stay until what they hold is written again"
    worker.learnt.add("three")
    index.save_from(worker)
    assert files(tmp_path) == ["run2-w.index"]
    assert (tmp_path / DRAFTS / "run2-w.index").read_bytes() == index_of("one", "three", "two")
    assert index.notes == []


def test_a_file_of_the_same_run_goes_only_when_nobody_has_written_it_for_long(tmp_path, saved, new_worker, clock):
    gone, lives = saved(worker="gone"), saved(worker="lives")
    gone.save_from(new_worker("one"))
    lives.save_from(new_worker("two"))
    worker, index = new_worker(), saved()
    index.load_into(worker)
    index.save_from(worker)
    assert files(tmp_path) == ["run2-gone.index", "run2-lives.index", "run2-w.index"]
    clock.now = STALE_S
    lives.save_from(new_worker("two", "more"))
    worker.learnt.add("three")
    index.save_from(worker)
    assert files(tmp_path) == ["run2-lives.index", "run2-w.index"]


def test_broken_and_foreign_files_are_skipped_with_one_note_and_then_removed(tmp_path, saved, new_worker):
    put(tmp_path, "run1-a.index", index_of("one"))
    put(tmp_path, "run1-b.index", b"\xff\xfe not even text")
    put(tmp_path, "run1-c.index", b"another tokenizer's")
    put(tmp_path, "run1-d.index", b"")
    put(tmp_path, "notes.txt", b"mine")
    worker, index = new_worker(), saved()
    index.load_into(worker)
    assert worker.learnt == {"one"}
    (note,) = index.notes
    assert note.startswith("3 saved indexes of answers are broken or of another tokenizer")
    index.save_from(worker)
    assert files(tmp_path) == ["notes.txt", "run2-w.index"]


def test_the_newest_files_are_read_up_to_the_bound_and_the_newest_is_read_last(
    tmp_path, saved, new_worker, monkeypatch
):
    bound, padding = 1 << 16, "x" * 30_000
    for night in range(4):
        put(tmp_path, f"2026112{night}T-a.index", index_of(f"night{night}", padding))
    worker, index = new_worker(), saved(run="20261129T", corpus_index_bytes=4 * bound)
    order: list[str] = []

    def keep_order(self: FakeWorker, data: bytes) -> bool:
        order.append(data.split()[1].decode())
        return True

    monkeypatch.setattr(FakeWorker, "import_corpus_index", keep_order)
    index.load_into(worker)
    assert order == ["night2", "night3"]
    index.save_from(worker)
    assert files(tmp_path) == ["20261129T-w.index"], "older ones do not pile up"
    worker.learnt.add("y" * bound)
    index.save_from(worker)
    (note,) = index.notes
    assert "engine.speculative_config.corpus_index_bytes, 65536, may be written" in note
    assert (tmp_path / DRAFTS / "20261129T-w.index").stat().st_size < bound


def test_an_unchanged_index_is_not_written_again(tmp_path, saved, new_worker):
    worker, index = new_worker("one"), saved()
    index.save_from(worker)
    written_at = (tmp_path / DRAFTS / "run2-w.index").stat().st_mtime_ns
    index.save_from(worker)
    assert (tmp_path / DRAFTS / "run2-w.index").stat().st_mtime_ns == written_at


@pytest.mark.parametrize("method", ["none", "ngram"])
def test_a_method_without_an_index_reads_and_writes_nothing(method, tmp_path, saved, new_worker):
    put(tmp_path, "run1-a.index", b"broken")
    worker, index = new_worker("one"), saved(method=method)
    index.load_into(worker)
    assert index.notes == [] and worker.learnt == {"one"}
    assert not index.is_due(is_idle=True)


def test_it_is_saved_at_pauses_and_twice_a_minute_but_not_for_more_than_a_twentieth_of_the_time(
    saved, new_worker, clock, monkeypatch
):
    index = saved()
    assert index.is_due(is_idle=True) and not index.is_due(is_idle=False)
    clock.now = 30.0
    assert index.is_due(is_idle=False)

    def take_four_seconds(self: FakeWorker) -> bytes:
        clock.now += 4.0
        return b"index"

    monkeypatch.setattr(FakeWorker, "export_corpus_index", take_four_seconds)
    index.save_from(new_worker())
    assert not index.is_due(is_idle=True), "4 s of 34, and the first 2 are free"
    clock.now = 40.0
    assert index.is_due(is_idle=True) and not index.is_due(is_idle=False)
    clock.now = 64.0
    assert index.is_due(is_idle=False)


def test_an_engine_that_is_gone_is_no_matter_of_the_index(saved, new_worker, monkeypatch):
    def refuse(self: FakeWorker) -> bytes:
        raise EngineError("gone")

    monkeypatch.setattr(FakeWorker, "export_corpus_index", refuse)
    index = saved()
    index.save_from(new_worker())
    assert index.notes == []


# --- a worker's slices ---------------------------------------------------------------------------------------------


def answer(folder: Path, workers: FakeWorkers, prompts: list[str], run: str = "run") -> list[SliceDone | SliceDropped]:
    """One prompt per slice, one after the other."""
    job = job_from_dict(
        {
            "input": {"path": str(folder), "prompt_column": "p"},
            "model": "m",
            "output": {"path": str(folder)},
            "pricing": {"usd_per_device_hour": 1},
        }
    )

    async def go() -> list[SliceDone | SliceDropped]:
        admission = Admission(window=10)
        await admission.hello("w")
        runner = SliceRunner(RunSpec(run, job, "f" * 64, workers), LocalGate(admission), "w", "node")
        events = []
        for i, prompt in enumerate(prompts):
            rows = [PlannedRow(i, [ord(c) - FIRST_CHARACTER for c in prompt], None, 0, None)]
            events.append(await runner.run(Slice("a", "etag", i, len(prompts), rows, plan_id="p")))
        return events

    return asyncio.run(go())


def test_the_index_is_there_when_the_last_event_is_and_an_engine_made_anew_loads_it(
    tmp_path, fake_workers, monkeypatch
):
    monkeypatch.setattr("pipeline.saved_index.MAX_SAVING_SHARE", 1e9)
    _, broken, _ = answer(tmp_path, fake_workers(drafts=True), ["one", "BREAK", "two"])
    assert isinstance(broken, SliceDone) and broken.rows_error == 1
    known = (tmp_path / DRAFTS / "run-w.index").read_bytes().split()[1:]
    assert known == [b"one", b"two"], "the second engine has not seen the prompt `one`"


def test_a_store_that_refuses_the_index_costs_a_note_and_no_row(tmp_path, fake_workers):
    (tmp_path / DRAFTS).write_text("a file where the folder should be")
    events = answer(tmp_path, fake_workers(drafts=True), ["one", "two"])
    assert [event.rows_error for event in events if isinstance(event, SliceDone)] == [0, 0]
    (note,) = {note for event in events if isinstance(event, SliceDone) for note in event.notes} - {"fake"}
    assert "the index of answers could not be saved" in note and "is a file" in note


def test_a_store_that_hangs_on_the_index_holds_no_slice_for_long(tmp_path, fake_workers, monkeypatch):
    monkeypatch.setattr("pipeline.slice_runner.MAX_SAVE_WAIT_S", 0.05)

    def hang(self: SavedIndex, data: bytes) -> None:
        time.sleep(3.0)
        raise StorageError("timed out")

    monkeypatch.setattr(SavedIndex, "_write", hang)
    done_at: list[float] = []
    monkeypatch.setattr(LocalGate, "finish", _noting(LocalGate.finish, done_at))
    started = time.monotonic()
    answer(tmp_path, fake_workers(drafts=True), ["one", "two", "three"])
    assert len(done_at) == 3 and done_at[-1] - started < 2.9


def _noting(finish: Any, done_at: list[float]) -> Any:
    async def wrapper(*arguments: Any) -> None:
        await finish(*arguments)
        done_at.append(time.monotonic())

    return wrapper
