"""Merging many scattered shards asks the store for each slice once, whatever the number of groups and their size."""

from __future__ import annotations

import tempfile
import uuid
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.requests import Completion, Output, Usage
from pipeline.bill.pricing import Price
from pipeline.corpus import corpus_graph, slice_objects
from pipeline.corpus.corpus_graph import group_by_rows, merge_corpus_task
from pipeline.corpus.shared_slices import publish_shared_slice, read_shared_slices
from pipeline.corpus.slice_objects import SliceObjects
from pipeline.corpus_plan.manifest import CORPUS
from pipeline.job import Job, job_from_dict
from pipeline.prefix_plan import PlannedRow, Slice
from pipeline.shards import Shard, list_shards
from pipeline.slice_runner import RunSpec
from pipeline.slices import SliceName, SliceTimes, slice_table
from pipeline.storage import Storage

PRINT = "f" * 64
NUM_SHARDS, NUM_SLICES = 12, 10


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What a store is asked for: pieces of objects, and files that are opened."""
    counts: Counter[str] = Counter()
    read_ranges, open_input = Storage.read_ranges, Storage.open_input

    def count_ranges(self, path, ranges):
        counts["ranges"] += len(ranges)
        return read_ranges(self, path, ranges)

    def count_opened(self, path, size_bytes=None, tail_bytes=0):
        if not (size_bytes and tail_bytes):
            counts["opened"] += 1
        return open_input(self, path, size_bytes, tail_bytes)

    monkeypatch.setattr(Storage, "read_ranges", count_ranges)
    monkeypatch.setattr(Storage, "open_input", count_opened)
    return counts


def make(output: str, folder: Path) -> tuple[Job, list[Shard], dict[str, int]]:
    """Shards of which each has one row in each slice; and the sizes of the slices."""
    folder.mkdir()
    for number in range(NUM_SHARDS):
        pq.write_table(pa.table({"prompt": [f"{i}" for i in range(NUM_SLICES)]}), folder / f"s{number:02d}.parquet")
    job = job_from_dict(
        {
            "input": {"path": str(folder), "prompt_column": "prompt"},
            "model": "m",
            "output": {"path": output},
            "pricing": {"usd_per_device_hour": 1},
        }
    )
    shards, sizes = list_shards(job).good, {}
    for index in range(NUM_SLICES):
        rows = [PlannedRow(index, [1], None, 0, shard_index=number) for number in range(NUM_SHARDS)]
        slice_ = Slice(CORPUS, "e", index, NUM_SLICES, rows, plan_id="p", shards=tuple(s.name for s in shards))
        answers = [
            Completion("", [Output(0, f"{number}.{index}" * 50, [1], "stop", -0.5)], Usage(1, 0, 1, device_seconds=1.0))
            for number in range(NUM_SHARDS)
        ]
        table = slice_table(job.sampling, rows, answers, Price(1.0, ""))
        times = SliceTimes(usd_per_device_hour=1.0)
        name = SliceName.of(slice_, index, PRINT)
        file = publish_shared_slice(Storage(output), slice_, name, table, times, {})
        sizes[file.path] = file.size_bytes
    return job, shards, sizes


@pytest.mark.parametrize("merge_rows", [10**6, 3 * NUM_SLICES, 1])
def test_a_merge_in_any_number_of_groups_asks_for_each_slice_once_and_publishes_all(
    tmp_path, requests, monkeypatch, merge_rows
):
    job, shards, sizes = make(f"memory://{uuid.uuid4().hex}", tmp_path / "in")
    monkeypatch.setattr(corpus_graph, "MERGE_ROWS", merge_rows)
    monkeypatch.setattr(corpus_graph, "publish_answers", lambda job, shard, output, table, *_: (shard.name, table))
    folders_before = set(Path(tempfile.gettempdir()).glob("shoal-merge-*"))
    requests.clear()
    done = merge_corpus_task._function(RunSpec("r", job, PRINT), shards, sizes, {})
    assert requests == {"ranges": NUM_SLICES}, "one request for a slice, and no look at it before"
    for number, (name, table) in enumerate(done):
        assert name == f"s{number:02d}"
        assert table["response"].to_pylist() == [f"{number}.{index}" * 50 for index in range(NUM_SLICES)]
    assert set(Path(tempfile.gettempdir()).glob("shoal-merge-*")) <= folders_before, "copies go"


def test_slices_larger_than_their_tail_and_copies_without_room_are_read_all_the_same(tmp_path, requests, monkeypatch):
    job, shards, sizes = make(f"memory://{uuid.uuid4().hex}", tmp_path / "in")
    names, output = [shard.name for shard in shards], Storage(job.output.path)
    expected = read_shared_slices(job.sampling, output, list(sizes), names)
    for tail in (1, 100, 3000):
        monkeypatch.setattr(slice_objects, "TAIL_BYTES", tail)
        with SliceObjects(output, sizes) as objects:
            assert read_shared_slices(job.sampling, output, list(sizes), names, {}, objects) == expected
    monkeypatch.setattr(slice_objects, "TAIL_BYTES", 10**6)
    monkeypatch.setattr(slice_objects, "COPY_BYTES", sum(list(sizes.values())[:4]))
    requests.clear()
    with SliceObjects(output, sizes, are_read_again=True) as objects:
        for _ in range(2):
            assert read_shared_slices(job.sampling, output, list(sizes), names, {}, objects) == expected
    assert NUM_SLICES < requests["ranges"] < 2 * NUM_SLICES, "some are kept, others asked for again"


def test_an_object_whose_size_nobody_knows_or_that_is_gone_is_no_mystery(tmp_path, requests):
    job, _, sizes = make(f"memory://{uuid.uuid4().hex}", tmp_path / "in")
    output, path = Storage(job.output.path), next(iter(sizes))
    with SliceObjects(output, {path: 0}) as objects, objects.open(path) as source:
        assert pq.ParquetFile(source).metadata.num_rows == NUM_SHARDS
    output.remove(path)
    with SliceObjects(output, sizes) as objects, pytest.raises(FileNotFoundError):
        objects.open(path)


def test_a_local_output_is_not_copied(tmp_path, requests):
    job, _, sizes = make(str(tmp_path / "out"), tmp_path / "in")
    with SliceObjects(Storage(job.output.path), sizes, are_read_again=True) as objects:
        for path in sizes:
            objects.open(path).close()
    assert requests["ranges"] == 0


def test_groups_hold_whole_shards_in_order():
    shards = [Shard(f"s{i}", "", 0, "", rows) for i, rows in enumerate([5, 4, 1, 20, 0, 3])]
    assert [[s.num_rows for s in group] for group in group_by_rows(shards, 10)] == [[5, 4, 1], [20], [0, 3]]
    assert group_by_rows([], 10) == []
