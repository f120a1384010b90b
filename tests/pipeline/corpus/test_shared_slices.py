"""Slices that answer rows of several shards: each shard gets its rows, and its exact share of what they cost."""

from __future__ import annotations

import math
import random
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.requests import Completion, Output, RowError, Usage
from pipeline.bill.pricing import Price
from pipeline.corpus import shared_slices
from pipeline.corpus.shared_slices import publish_shared_slice, read_shared_slices, split_times
from pipeline.corpus_plan.manifest import CORPUS
from pipeline.drafts import DraftCounts, DrafterCount
from pipeline.job import Job, job_from_dict
from pipeline.prefix_plan import PlannedRow, Slice, row_key
from pipeline.results import ShardMetrics, publish_answers
from pipeline.shards import Shard, ShardError, list_shards
from pipeline.slices import SliceName, SliceTimes, list_slices, slice_table
from pipeline.storage import Storage

PRINT = "f" * 64
PRICE = Price(3600.0, "a dollar a second")


def make_job(folder: Path) -> Job:
    return job_from_dict(
        {
            "input": {"path": str(folder / "in"), "prompt_column": "prompt"},
            "model": "m",
            "output": {"path": str(folder / "out")},
        }
    )


def make_shards(job: Job, sizes: dict[str, int]) -> dict[str, Shard]:
    folder = Path(job.input_paths[0])
    folder.mkdir()
    for name, size in sizes.items():
        table = pa.table({"prompt": [f"{name} {i}" for i in range(size)], f"only in {name}": list(range(size))})
        pq.write_table(table, folder / f"{name}.parquet")
    return {shard.name: shard for shard in list_shards(job).good}


def answer(text: str, seconds: float = 0.5) -> Completion:
    usage = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=3, device_seconds=seconds)
    return Completion(text, [Output(0, text, [1, 2, 3], "stop", -0.25)], usage)


def planned(shard: int, row: int, *duplicates: tuple[int, int], shared: int = 0) -> PlannedRow:
    keys = [row_key(*duplicate) for duplicate in duplicates]
    return PlannedRow(row, [1, 2, 3], None, 0, None, keys, shard, shared)


def publish(
    job: Job,
    slices: list[tuple[tuple[str, ...], list[tuple[PlannedRow, Completion]]]],
    times: SliceTimes | None = None,
) -> list[str]:
    output, paths = Storage(job.output.path), []
    for index, (shards, rows) in enumerate(slices):
        slice_ = Slice(CORPUS, "e", index, len(slices), [row for row, _ in rows], plan_id="p", shards=shards)
        name = SliceName.of(slice_, index, PRINT)
        table = slice_table(job.sampling, slice_.rows, [completion for _, completion in rows], PRICE)
        own = times or SliceTimes(usd_per_device_hour=3600.0)
        publish_shared_slice(output, slice_, name, table, own, {"rows": len(rows)})
        paths.append(name.path(CORPUS))
    return paths


def merge(job: Job, shards: dict[str, Shard], paths: list[str]) -> dict[str, ShardMetrics]:
    output = Storage(job.output.path)
    answers = read_shared_slices(job.sampling, output, paths, list(shards))
    started = time.perf_counter()
    return {name: publish_answers(job, shard, output, *answers[name], PRINT, started) for name, shard in shards.items()}


def read(job: Job, name: str, folder: str = "results") -> list[dict[str, Any]]:
    return pq.ParquetFile(Path(job.output.path) / folder / f"{name}.parquet").read().to_pylist()


def test_each_shard_gets_its_own_rows_in_its_order_and_its_own_columns(tmp_path):
    job = make_job(tmp_path)
    shards = make_shards(job, {"a": 3, "b": 2, "empty": 0})
    paths = publish(
        job,
        [
            (("a", "b"), [(planned(1, 1), answer("b1")), (planned(0, 2), answer("a2")), (planned(0, 0), answer("a0"))]),
            (("a", "b"), [(planned(0, 1), answer("a1")), (planned(1, 0), answer("b0"))]),
        ],
    )
    merge(job, shards, paths)
    assert [row["response"] for row in read(job, "a")] == ["a0", "a1", "a2"]
    assert [row["response"] for row in read(job, "b")] == ["b0", "b1"]
    assert [row["only in b"] for row in read(job, "b")] == [0, 1] and "only in a" not in read(job, "b")[0]
    assert read(job, "empty") == []
    assert list_slices(Storage(job.output.path))[CORPUS].keys() == set(paths), "other shards may still need them"


def test_a_row_folded_onto_one_of_another_shard_has_its_answer_for_free(tmp_path):
    job = make_job(tmp_path)
    shards = make_shards(job, {"a": 2, "b": 3, "c": 1})
    rows = [(planned(0, 1, (0, 0), (1, 0), (1, 2), (2, 0)), answer("x")), (planned(1, 1), answer("y"))]
    metrics = merge(job, shards, publish(job, [(("a", "b", "c"), rows)]))
    assert [row["response"] for row in read(job, "a")] == ["x", "x"]
    assert [(row["response"], row["cost_usd"]) for row in read(job, "b")] == [("x", 0), ("y", 0.5), ("x", 0)]
    assert [row["cached_tokens"] for row in read(job, "b")] == [10, 4, 10]
    assert [row["response"] for row in read(job, "c")] == ["x"]
    assert {name: m.rows_duplicate for name, m in metrics.items()} == {"a": 1, "b": 2, "c": 1}
    assert {name: m.duplicate_prompt_tokens for name, m in metrics.items()} == {"a": 10, "b": 20, "c": 10}
    for name, one in metrics.items():
        for column in ("prompt_tokens", "cached_tokens", "completion_tokens"):
            assert getattr(one, column) == sum(row[column] for row in read(job, name))
        for column in ("device_seconds", "cost_usd"):
            assert getattr(one, column) == math.fsum(row[column] for row in read(job, name))


def test_shards_sum_to_the_workers_time_to_the_last_bit_that_counts(tmp_path):
    job = make_job(tmp_path)
    generator = random.Random(3)
    names = [f"s{i:02d}" for i in range(40)]
    shards = make_shards(job, dict.fromkeys(names, 5))
    seconds = {(i, row): generator.random() / 7 for i in range(40) for row in range(5)}
    drafts = DraftCounts(17, 1, -0.125, [DrafterCount("corpus", 1001, 500), DrafterCount("ngram", 7, 0)])
    times = SliceTimes(
        load_s=10 / 3, idle_s=1 / 7, lost_s=1e-7, prefill_s=2 / 3, decode_s=5 / 9, write_s=1 / 11, drafts=drafts,
        usd_per_device_hour=3600.0,
    )  # fmt: skip
    slices = []
    for row in range(5):
        rows = [(planned(i, row, shared=i), answer(f"{i}.{row}", seconds[i, row])) for i in range(40)]
        slices.append((tuple(names), rows))
    metrics = merge(job, shards, publish(job, slices, times)).values()

    def total(field: str) -> float:
        return math.fsum(getattr(one, field) for one in metrics)

    for field in ("load", "idle", "lost", "prefill", "decode"):
        assert total(f"{field}_seconds") == pytest.approx(5 * getattr(times, f"{field}_s"), rel=1e-13, abs=0)
    assert total("device_seconds") == pytest.approx(math.fsum(seconds.values()), rel=1e-14)
    assert total("cost_usd") + total("overhead_usd") == pytest.approx(
        math.fsum([*seconds.values(), 5 * (times.load_s + times.idle_s + times.lost_s)]), rel=1e-13
    )
    assert total("num_verify_steps") == 5 * 17 and total("num_drafter_failures") == 5
    assert total("saved_by_speculation_seconds") == pytest.approx(5 * -0.125, rel=1e-13)
    drafted = [d for one in metrics for d in one.drafters]
    assert sum(d.drafted_tokens for d in drafted) == 5 * 1008 and sum(d.accepted_tokens for d in drafted) == 5 * 500
    assert total("achievable_prefix_tokens") == 5 * sum(range(40))
    busiest = max(metrics, key=lambda one: one.device_seconds)
    assert busiest.load_seconds > 1.5 * 5 * times.load_s / 40, "in proportion to the rows' own seconds"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0, 1e3), min_size=1, max_size=30).filter(lambda weights: sum(weights) > 1e-6),
    st.floats(-1e5, 1e5),
)
def test_a_slices_times_are_split_without_a_rest(weights, seconds):
    drafts = DraftCounts(3, 2, seconds / 3, [DrafterCount("ngram", 10**6 + 1, 9)])
    times = SliceTimes(idle_s=seconds, load_s=abs(seconds) / 3, drafts=drafts)
    parts = split_times(times, weights, [0] * len(weights))
    assert math.fsum(part.idle_s for part in parts) == pytest.approx(seconds, rel=1e-13, abs=1e-14)
    assert math.fsum(part.load_s for part in parts) == pytest.approx(times.load_s, rel=1e-13, abs=1e-14)
    assert sum(part.drafts.num_verify_steps for part in parts) == 3
    assert sum(part.drafts.drafted_tokens for part in parts) == 10**6 + 1
    assert all(part.load_s >= 0 and part.drafts.drafted_tokens >= 0 for part in parts)


def test_a_slice_of_nothing_but_error_rows_still_leaves_its_times_with_its_shards(tmp_path):
    job = make_job(tmp_path)
    shards = make_shards(job, {"a": 3, "b": 1})
    bad = Completion("", error=RowError("null_prompt", "the prompt is null"))
    rows = [(planned(0, 0), bad), (planned(0, 1), bad), (planned(0, 2), bad), (planned(1, 0), bad)]
    metrics = merge(job, shards, publish(job, [(("a", "b"), rows)], SliceTimes(idle_s=4.0)))
    assert (metrics["a"].idle_seconds, metrics["b"].idle_seconds) == (3.0, 1.0)
    assert [len(read(job, name, "errors")) for name in ("a", "b")] == [3, 1]
    assert metrics["a"].rows_error == 3


def test_a_merge_reads_only_the_row_groups_that_hold_its_shards(tmp_path):
    job = make_job(tmp_path)
    names = tuple(f"s{i:03d}" for i in range(200))
    rows = [(planned(i, row), answer(f"{i}.{row}")) for row in range(2) for i in range(200)]
    (path,) = publish(job, [(names, rows)])
    file = pq.ParquetFile(Path(job.output.path) / path)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [64] * 6 + [16], "whole shards, and none so small that its footer outweighs it"
    shards = [set(file.read_row_group(i)["shard"].to_pylist()) for i in range(len(groups))]
    assert all(not one & other for one, other in pairwise(shards))
    asked: list[list[int]] = []
    read_row_groups = pq.ParquetFile.read_row_groups

    def note(self, groups, *args, **kwargs):
        asked.append(list(groups))
        return read_row_groups(self, groups, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq.ParquetFile, "read_row_groups", note)
        answers = read_shared_slices(job.sampling, Storage(job.output.path), [path], ["s040", "s199", "elsewhere"])
    assert asked == [[1, 6]]
    assert answers["s040"][0]["response"].to_pylist() == ["40.0", "40.1"]
    assert answers["elsewhere"] == (answers["s040"][0].slice(0, 0), [])


def test_what_is_read_of_a_slice_keeps_no_rows_of_other_shards_in_memory(tmp_path):
    job = make_job(tmp_path)
    names = tuple(f"s{i:03d}" for i in range(100))
    rows = [(planned(i, row), answer(f"{i}.{row}" + "long" * 10_000)) for row in range(2) for i in range(100)]
    paths = publish(job, [(names, rows)])
    with Storage(job.output.path).open_input(paths[0]) as source:
        found = shared_slices._read_one(job.sampling, source, frozenset(["s040", "s041"]))
    texts = found["s041"][0]["response"]
    held = sum(buffer.size for chunk in texts.chunks for buffer in chunk.buffers() if buffer is not None)
    assert 160_000 <= held < 170_000, "two rows of each of the two, and not the 2.5 MB of their row group"
    assert [text[:5] for text in texts.to_pylist()] == ["41.0l", "41.1l"]


def test_a_damaged_shared_slice_is_removed_and_the_message_says_to_run_again(tmp_path):
    job = make_job(tmp_path)
    shards = make_shards(job, {"a": 1})
    (path,) = publish(job, [(("a",), [(planned(0, 0), answer("x"))])])
    file = Path(job.output.path) / path
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ShardError, match="run the same command again"):
        merge(job, shards, [path])
    assert not file.exists()


def test_a_shard_with_a_row_that_no_slice_has_is_not_published(tmp_path):
    job = make_job(tmp_path)
    shards = make_shards(job, {"a": 2})
    with pytest.raises(ShardError, match="its slices hold 1 rows"):
        merge(job, shards, publish(job, [(("a",), [(planned(0, 0), answer("x"))])]))
    assert not (tmp_path / "out" / "results").exists()


def test_a_row_with_very_many_duplicates_is_written_quickly(tmp_path):
    job = make_job(tmp_path)
    keys = [row_key(i % 2, i // 2) for i in range(1, 200_000)]
    row = PlannedRow(0, [1], None, 0, None, keys, 0, 0)
    (path,) = publish(job, [(("a", "b"), [(row, answer("x"))])])
    answers = read_shared_slices(job.sampling, Storage(job.output.path), [path], ["a", "b"])
    assert answers["a"][0]["row_index"].to_pylist() == [0] and answers["b"][0]["row_index"].to_pylist() == [None]
    assert np.array_equal(answers["b"][0]["duplicates"][0].values.to_numpy(), np.arange(100_000))
