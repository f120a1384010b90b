"""From slices to a shard's files: each row once, in the input's order, and sums that agree."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.requests import Completion, Output, RowError, TokenLogprob, Usage
from pipeline.bill.pricing import Price
from pipeline.drafts import DraftCounts, DrafterCount
from pipeline.job import Job, job_from_dict
from pipeline.prefix_plan import PlannedRow, Slice
from pipeline.results import (
    METRICS_SCHEMA,
    OutputError,
    ShardMetrics,
    merge_shard,
    passthrough_columns,
    published_shards,
)
from pipeline.shards import Shard, ShardError, list_shards
from pipeline.slices import SliceName, SliceTimes, complete_set, list_slices, publish_slice, slice_table
from pipeline.storage import Storage

PRINT = "f" * 64
PRICE = Price(3600.0, "a dollar a second")


def make_job(folder: Path, **sections: Any) -> Job:
    data: dict[str, Any] = {
        "input": {"path": str(folder / "in"), "prompt_column": "prompt"},
        "model": "m",
        "output": {"path": str(folder / "out")},
    }
    for section, values in sections.items():
        data[section] = {**data.get(section, {}), **values}
    return job_from_dict(data)


def make_shard(job: Job, table: pa.Table | None = None, num_rows: int = 6) -> Shard:
    folder = Path(job.input.path)
    folder.mkdir(exist_ok=True)
    if table is None:
        table = pa.table({"id": list(range(num_rows)), "prompt": [f"prompt {i}" for i in range(num_rows)]})
    pq.write_table(table, folder / "a.parquet")
    (shard,) = list_shards(job).good
    return shard


def answer_of(row: int, seconds: float = 0.5) -> Completion:
    usage = Usage(
        prompt_tokens=10, cached_tokens=4, completion_tokens=3, device_seconds=seconds, time_to_first_token_s=0.1 * row
    )
    return Completion(str(row), [Output(0, f"answer {row}", [1, 2, 3], "stop", -0.25)], usage)


def error_of(row: int) -> Completion:
    return Completion(str(row), error=RowError("prompt_too_long", f"row {row} is too long"))


def planned(row: int, duplicates: tuple[int, ...] = ()) -> PlannedRow:
    return PlannedRow(row, [1, 2, 3], None, 0, None, list(duplicates))


def publish(job: Job, shard: Shard, slices: list[list[tuple[PlannedRow, Completion]]], **times: Any) -> list[str]:
    """Publish these slices of a shard and return their paths."""
    output, paths = Storage(job.output.path), []
    for index, rows in enumerate(slices):
        slice_ = Slice(shard.name, shard.etag, index, len(slices), [row for row, _ in rows], plan_id="p")
        name = SliceName.of(slice_, index, PRINT)
        table = slice_table(job.sampling, slice_.rows, [completion for _, completion in rows], PRICE)
        publish_slice(output, shard.name, name, table, SliceTimes(usd_per_device_hour=3600.0, **times), {"rows": 1})
        paths.append(name.path(shard.name))
    return paths


def merge(job: Job, shard: Shard, slices: list[list[tuple[PlannedRow, Completion]]], **times: Any) -> ShardMetrics:
    return merge_shard(job, shard, Storage(job.output.path), publish(job, shard, slices, **times), PRINT)


def read(job: Job, folder: str) -> pa.Table:
    return pq.ParquetFile(Path(job.output.path) / folder / "a.parquet").read()


def test_results_have_the_inputs_rows_and_columns_in_its_order(tmp_path):
    job = make_job(tmp_path)
    shard = make_shard(job)
    order = [4, 2, 0, 5, 1, 3]
    merge(
        job, shard, [[(planned(i), answer_of(i)) for i in order[:4]], [(planned(i), answer_of(i)) for i in order[4:]]]
    )
    results = read(job, "results")
    assert results["id"].to_pylist() == list(range(6))
    assert results["prompt"].to_pylist() == [f"prompt {i}" for i in range(6)]
    assert results["response"].to_pylist() == [f"answer {i}" for i in range(6)]
    assert results["finish_reason"].to_pylist() == ["stop"] * 6
    assert results["cost_usd"].to_pylist() == [0.5] * 6
    assert results["error"].null_count == 6
    assert not Storage(job.output.path).list("_slices"), "slices go once the results are there"
    assert not (tmp_path / "out" / "errors").exists(), "no errors, no file"


def test_folded_rows_have_the_same_answer_for_free(tmp_path):
    job = make_job(tmp_path)
    metrics = merge(job, make_shard(job), [[(planned(1, (0, 5)), answer_of(1)), (planned(2, (3, 4)), answer_of(2))]])
    results = read(job, "results").to_pylist()
    assert [row["response"][-1] for row in results] == ["1", "1", "2", "2", "2", "1"]
    assert [row["device_seconds"] for row in results] == [0, 0.5, 0.5, 0, 0, 0]
    assert [row["cost_usd"] for row in results] == [0, 0.5, 0.5, 0, 0, 0]
    assert [row["cached_tokens"] for row in results] == [10, 4, 4, 10, 10, 10]
    assert (metrics.rows_ok, metrics.rows_duplicate) == (6, 4)
    assert (metrics.duplicate_prompt_tokens, metrics.duplicate_completion_tokens) == (40, 12)


def test_metrics_are_the_sums_of_the_results_columns(tmp_path):
    job = make_job(tmp_path)
    rows = [(planned(0, (3,)), answer_of(0, 0.1)), (planned(1), answer_of(1, 0.2)), (planned(2), error_of(2))]
    times = {"load_s": 2.0, "idle_s": 0.25, "prefill_s": 0.1, "decode_s": 0.2, "achievable_prefix_tokens": 5}
    merge(job, make_shard(job), [rows, [(planned(4), answer_of(4, 0.3)), (planned(5), answer_of(5, 0.4))]], **times)
    results, table = read(job, "results"), read(job, "metrics")
    assert table.schema.remove_metadata() == METRICS_SCHEMA
    (metrics,) = table.to_pylist()
    for column in ("prompt_tokens", "cached_tokens", "completion_tokens"):
        assert metrics[column] == sum(results[column].to_pylist())
    for column in ("device_seconds", "cost_usd"):
        assert metrics[column] == math.fsum(results[column].to_pylist()) == pytest.approx(1.0)
    assert (metrics["rows_in"], metrics["rows_ok"], metrics["rows_error"]) == (6, 5, 1)
    assert (metrics["load_seconds"], metrics["idle_seconds"], metrics["overhead_usd"]) == (4.0, 0.5, 4.5)
    assert metrics["prefix_hit_rate"] == 16 / 40 and metrics["prefix_hit_rate_achievable"] == 10 / 40
    assert metrics["usd_per_million_tokens"] == pytest.approx(5.5e6 / 52)
    assert metrics["time_to_first_token_p50_s"] == pytest.approx(0.25)


def test_failed_rows_are_kept_apart_with_all_their_input_and_can_be_the_input_of_another_run(tmp_path):
    job = make_job(tmp_path, input={"passthrough": ["id"]})
    merge(job, make_shard(job), [[(planned(i), error_of(i) if i in (1, 4) else answer_of(i)) for i in range(6)]])
    failed = read(job, "errors")
    assert failed.column_names == ["id", "prompt", "error"]
    assert failed["prompt"].to_pylist() == ["prompt 1", "prompt 4"]
    assert failed["error"][1].as_py() == {"kind": "prompt_too_long", "message": "row 4 is too long"}
    assert "prompt" not in read(job, "results").column_names
    assert passthrough_columns(make_job(tmp_path), failed.schema, "a") == ["id", "prompt"]


def test_errors_of_an_older_version_of_a_shard_go_when_the_new_one_has_none(tmp_path):
    job = make_job(tmp_path)
    merge(job, make_shard(job, num_rows=1), [[(planned(0), error_of(0))]])
    assert (tmp_path / "out" / "errors" / "a.parquet").exists()
    merge(job, make_shard(job, num_rows=2), [[(planned(0), answer_of(0)), (planned(1), answer_of(1))]])
    assert not (tmp_path / "out" / "errors" / "a.parquet").exists()


def test_several_completions_per_row_are_lists(tmp_path):
    job = make_job(tmp_path, sampling={"n": 2, "temperature": 1.0})
    outputs = [Output(0, "one", [1], "stop", -0.1), Output(1, "two", [1], "length", -0.2)]
    merge(job, make_shard(job, num_rows=2), [[(planned(1), Completion("1", outputs)), (planned(0), error_of(0))]])
    error, row = read(job, "results").to_pylist()
    assert (row["response"], row["finish_reason"]) == (["one", "two"], ["stop", "length"])
    assert row["mean_logprob"] == [-0.1, -0.2]
    assert (error["response"], error["finish_reason"]) == (None, ["error"])


def test_logprobs_are_a_column_only_when_asked_for(tmp_path):
    job = make_job(tmp_path, sampling={"logprobs": 1})
    tokens = [TokenLogprob(7, "x", -0.5, ((7, "x", -0.5),))]
    output = Output(0, "x", [7], "stop", -0.5, tokens)
    merge(job, make_shard(job, num_rows=1), [[(planned(0), Completion("0", [output]))]])
    (row,) = read(job, "results").to_pylist()
    top = [{"token_id": 7, "token": "x", "logprob": -0.5}]
    assert row["logprobs"] == [{"token_id": 7, "token": "x", "logprob": -0.5, "top": top}]
    assert "logprobs" not in slice_table(make_job(tmp_path).sampling, [], [], PRICE).column_names


def test_an_empty_shard_has_empty_results_with_all_columns(tmp_path):
    job = make_job(tmp_path)
    metrics = merge(job, make_shard(job, num_rows=0), [])
    assert read(job, "results").num_rows == metrics.rows_in == 0
    assert {"id", "prompt", "response", "cost_usd"} <= set(read(job, "results").column_names)


def test_a_large_shard_is_merged_in_batches_across_row_groups(tmp_path):
    job, num_rows = make_job(tmp_path), 20_000
    (tmp_path / "in").mkdir()
    table = pa.table({"id": range(num_rows), "prompt": ["p"] * num_rows})
    pq.write_table(table, tmp_path / "in" / "a.parquet", row_group_size=3000)
    (shard,) = list_shards(job).good
    rows = [(planned(i), answer_of(i)) for i in reversed(range(num_rows))]
    merge(job, shard, [rows[:7000], rows[7000:]])
    results = read(job, "results")
    assert results["id"].to_pylist() == list(range(num_rows))
    assert results["response"].to_pylist() == [f"answer {i}" for i in range(num_rows)]


@pytest.mark.parametrize("wrong", [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 5, 5], [0, 1, 2, 3, 4, 6]])
def test_rows_that_are_missing_or_double_are_never_published(tmp_path, wrong):
    job = make_job(tmp_path)
    with pytest.raises(ShardError, match="its slices hold"):
        merge(job, make_shard(job), [[(planned(i), answer_of(i)) for i in wrong]])
    assert not (tmp_path / "out" / "results").exists()


def test_an_input_that_changed_during_the_run_is_not_published_beside_old_answers(tmp_path):
    job = make_job(tmp_path)
    shard = make_shard(job)
    paths = publish(job, shard, [[(planned(i), answer_of(i)) for i in range(6)]])
    make_shard(job, num_rows=6)  # the same again, later: another version
    with pytest.raises(ShardError, match="was changed since the run began"):
        merge_shard(job, shard, Storage(job.output.path), paths, PRINT)
    assert not (tmp_path / "out" / "results").exists()


def test_a_damaged_slice_is_removed_and_the_message_says_to_run_again(tmp_path):
    job = make_job(tmp_path)
    shard = make_shard(job)
    (path,) = publish(job, shard, [[(planned(i), answer_of(i)) for i in range(6)]])
    file = Path(job.output.path) / path
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ShardError, match="run the same command again"):
        merge_shard(job, shard, Storage(job.output.path), [path], PRINT)
    assert not file.exists()


def test_a_shards_metrics_have_the_drafts_of_its_slices_per_drafter(tmp_path):
    job = make_job(tmp_path)
    shard = make_shard(job)
    rows = [(planned(i), answer_of(i)) for i in range(6)]
    for _, completion in rows:
        completion.usage.drafted_tokens, completion.usage.accepted_tokens = 5, 2
    drafts = DraftCounts(4, 1, 0.5, [DrafterCount("ngram", 9, 3), DrafterCount("corpus", 6, 3)])
    metrics = merge(job, shard, [rows[:3], rows[3:]], drafts=drafts)
    (row,) = read(job, "metrics").to_pylist()
    assert row["drafters"] == [
        {"drafter": "corpus", "drafted_tokens": 12, "accepted_tokens": 6},
        {"drafter": "ngram", "drafted_tokens": 18, "accepted_tokens": 6},
    ]
    assert (row["drafted_tokens"], row["accepted_tokens"], row["acceptance_rate"]) == (30, 12, 0.4)
    assert (row["num_verify_steps"], row["num_drafter_failures"], row["saved_by_speculation_seconds"]) == (8, 2, 1.0)
    assert row["acceptance_length"] == metrics.acceptance_length == 1 + 12 / 8


def test_slices_from_before_there_was_speculation_are_merged_with_those_after(tmp_path, monkeypatch):
    job = make_job(tmp_path)
    shard = make_shard(job)
    rows = [(planned(i), answer_of(i)) for i in range(6)]

    def without_drafts(times: SliceTimes) -> dict[str, Any]:
        return {name: value for name, value in asdict(times).items() if name != "drafts"}

    monkeypatch.setattr("pipeline.slices.asdict", without_drafts)
    metrics = merge(job, shard, [rows])
    assert (metrics.drafters, metrics.acceptance_length, metrics.num_slices) == ([], None, 1)


def test_a_shard_counts_as_published_only_for_the_same_job_and_the_same_input(tmp_path):
    job = make_job(tmp_path)
    shard = make_shard(job)
    merge(job, shard, [[(planned(i), answer_of(i)) for i in range(6)]])
    output = Storage(job.output.path)
    assert published_shards(output, [shard], PRINT) == {"a"}
    assert published_shards(output, [shard], "0" * 64) == set()
    assert published_shards(output, [make_shard(job)], PRINT) == set()


def test_a_slices_name_tells_job_input_and_plan_apart_and_reads_back(tmp_path):
    slice_ = Slice("a", "etag", 3, 12, [planned(0)], plan_id="plan")
    name = SliceName.of(slice_, 3, PRINT)
    assert SliceName.parse(str(name)) == name
    assert name.belongs_to(PRINT, "etag")
    assert not name.belongs_to(PRINT, "other") and not name.belongs_to("0" * 64, "etag")
    assert SliceName.of(Slice("a", "etag", 3, 12, [], plan_id="other"), 3, PRINT) != name
    assert SliceName.parse("00003-of-00012.parquet") is None


def test_only_a_whole_set_of_slices_of_one_plan_is_complete(tmp_path):
    job = make_job(tmp_path)
    shard = make_shard(job)
    rows = [(planned(i), answer_of(i)) for i in range(6)]
    paths = publish(job, shard, [rows[:3], rows[3:]])
    slices = list_slices(Storage(job.output.path))["a"]
    assert complete_set(slices, PRINT, shard.etag) == paths
    assert complete_set(slices, "0" * 64, shard.etag) is None
    assert complete_set({paths[1]: slices[paths[1]]}, PRINT, shard.etag) is None
    other = SliceName.of(Slice("a", shard.etag, 0, 2, [], plan_id="other"), 0, PRINT)
    assert complete_set({**slices, other.path("a"): other}, PRINT, shard.etag) is None


def test_an_input_column_with_the_name_of_one_of_shoals_is_refused_with_the_way_out(tmp_path):
    schema = pa.schema([("prompt", pa.string()), ("response", pa.string()), ("error", pa.string())])
    with pytest.raises(OutputError, match=r"error, response.*input\.passthrough"):
        passthrough_columns(make_job(tmp_path), schema, "a")
    kept = make_job(tmp_path, input={"passthrough": ["prompt"]})
    assert passthrough_columns(kept, schema, "a") == ["prompt"]
    assert passthrough_columns(make_job(tmp_path, input={"passthrough": "none"}), schema, "a") == []


def test_a_parquet_file_says_in_its_footer_what_it_belongs_to(tmp_path):
    job = make_job(tmp_path)
    shard = make_shard(job)
    merge(job, shard, [[(planned(i), answer_of(i)) for i in range(6)]])
    for folder in ("results", "metrics"):
        own = json.loads(read(job, folder).schema.metadata[b"shoal"])
        assert own["fingerprint"] == PRINT and own["etag"] == shard.etag and own["shard"] == "a"
        assert own["version"]
