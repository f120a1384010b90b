"""`shoal run` from the outside: exit codes, messages, limits, and the files and the bill that it leaves."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cli
from jobs.run import check_speculation, claim_output, run
from jobs.status import status
from pipeline.bill.ledger import ROUNDING, read_metrics, read_runs
from pipeline.job import JobError, load_job
from pipeline.storage import Storage, StorageError

EXIT_USAGE, EXIT_ERRORS, EXIT_LIMIT, EXIT_FINGERPRINT = 2, 3, 4, 5


@pytest.fixture
def refuse_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> bool:
        raise AssertionError("Ray is started, and the mistake should have been found before")

    monkeypatch.setattr("jobs.run.start_ray", refuse)


def shoal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and stderr of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["shoal", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"inputs": {"path": "x"}}, "inputs: unknown key"),
        ({"model": "nowhere"}, "nowhere has no config.json"),
        ({"input": {"path": "none-such"}}, "matches no Parquet file"),
        ({"input": {"prompt_column": "question"}}, "column 'question' is not there"),
        ({"input": {"path": ["in", "in2"]}}, "are both shard 'a'"),
        ({"output": {"path": "/proc/shoal"}}, "/proc/shoal"),
        ({"prompt": {"chat_template": True}}, "has no chat template"),
        ({"input": {"path": "taken"}}, "has the name of a column that Shoal writes"),
    ],
)
def test_a_mistake_is_told_with_exit_code_2_before_ray_or_a_model_is_started(
    sections, said, write_corpus, write_job, monkeypatch, capsys, refuse_ray
):
    write_corpus({"a": ["one"]})
    write_corpus({"a": ["two"]}, "in2")
    write_corpus({"a": pa.table({"prompt": ["x"], "response": ["y"]})}, "taken")
    code, message = shoal(monkeypatch, capsys, "run", str(write_job(**sections)))
    assert code == EXIT_USAGE, message
    assert said in message and "Traceback" not in message


def test_a_model_whose_weights_are_pickled_is_refused_before_ray(
    write_corpus, write_job, small_model, tmp_path, monkeypatch, capsys, refuse_ray
):
    write_corpus({"a": ["one"]})
    model = tmp_path / "pickled"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((small_model / name).read_bytes())
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    code, message = shoal(monkeypatch, capsys, "run", str(write_job(model=str(model))))
    assert code == EXIT_USAGE and "safetensors" in message


@pytest.fixture
def draft_model(small_model, tmp_path):
    """Makes a draft model beside which the target's vocabulary or tokenizer is changed."""

    def make(**config) -> str:
        draft = shutil.copytree(small_model, tmp_path / "draft")
        own = json.loads((draft / "config.json").read_text())
        (draft / "config.json").write_text(json.dumps({**own, **config}))
        return str(draft)

    return make


def test_a_draft_model_with_another_vocabulary_is_refused_before_ray(
    write_corpus, write_job, draft_model, monkeypatch, capsys, refuse_ray
):
    write_corpus({"a": ["one"]})
    draft = draft_model(vocab_size=98)
    job = write_job(engine={"speculative_config": {"model": draft}})
    code, message = shoal(monkeypatch, capsys, "run", str(job))
    assert code == EXIT_USAGE, message
    assert draft in message and "98" in message and "97" in message
    assert "name another engine.speculative_config.model, or leave it out" in message


def test_a_draft_model_with_another_tokenizer_is_refused_before_ray(
    write_corpus, write_job, draft_model, monkeypatch, capsys, refuse_ray
):
    write_corpus({"a": ["one"]})
    draft = draft_model()
    tokenizer = Path(draft) / "tokenizer.json"
    data = json.loads(tokenizer.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer.write_text(json.dumps(data))
    job = write_job(engine={"speculative_config": {"model": draft}})
    code, message = shoal(monkeypatch, capsys, "run", str(job))
    assert code == EXIT_USAGE and "different tokenizers" in message


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"method": "eagle"}, "engine.speculative_config.method: should be 'auto', 'none', 'ngram'"),
        ({"num_speculative_tokens": 64}, "num_speculative_tokens=64 does not fit into rows of at most 64 tokens"),
        ({"model": "nowhere"}, "nowhere is no directory with files in it"),
    ],
)
def test_speculation_that_cannot_be_is_refused_before_ray_with_the_value_and_the_way_out(
    config, said, write_corpus, write_job, monkeypatch, capsys, refuse_ray
):
    write_corpus({"a": ["one"]})
    job = write_job(engine={"max_model_len": 64, "speculative_config": config})
    code, message = shoal(monkeypatch, capsys, "run", str(job))
    assert code == EXIT_USAGE, message
    assert said in message and "Traceback" not in message


def test_rows_shorter_than_the_drafts_that_nobody_asked_for_are_no_mistake(write_job, write_corpus):
    write_corpus({"a": ["one"]})
    job = load_job(str(write_job(engine={"max_model_len": 8}))).resolve()
    check_speculation(job)
    assert job.engine.speculative_config.num_speculative_tokens > 8


def test_another_jobs_output_is_refused_with_exit_code_5(
    write_corpus, write_job, tmp_path, monkeypatch, capsys, refuse_ray
):
    write_corpus({"a": ["one"]})
    job = str(write_job())
    claim_output(Storage(str(tmp_path / "out")), load_job(job).resolve())
    code, message = shoal(monkeypatch, capsys, "run", job, "--set", "sampling.temperature=0.5")
    assert code == EXIT_FINGERPRINT and "sampling.temperature: 0.0 -> 0.5" in message


def test_status_of_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(StorageError, match=r"no run\.json"):
        status(str(tmp_path))


def test_good_shards_are_finished_beside_bad_ones_and_the_exit_code_is_2(
    ray_cluster, write_corpus, write_job, fake_workers, tmp_path, capsys
):
    empty = pa.table({"id": pa.array([], pa.int64()), "prompt": pa.array([], pa.string())})
    folder = write_corpus({"good": ["one", None, "", "two"], "empty": empty, "cut": ["x"] * 50, "odd": empty})
    cut = (folder / "cut.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(cut[: len(cut) // 2])
    pq.write_table(pa.table({"prompt": [1, 2]}), folder / "odd.parquet")
    assert run(str(write_job()), [], new_worker=fake_workers()) == EXIT_USAGE
    said = capsys.readouterr()
    assert "shard cut:" in said.err and "shard odd:" in said.err and "2 of 4 shards" in said.err
    results = {file.stem: pq.read_table(file) for file in (tmp_path / "out" / "results").glob("*.parquet")}
    assert {name: table.num_rows for name, table in results.items()} == {"good": 4, "empty": 0}
    kinds = [error and error["kind"] for error in results["good"]["error"].to_pylist()]
    assert kinds == [None, "null_prompt", "empty_prompt", None]
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_too_many_error_rows_end_the_run_with_exit_code_3_and_the_errors_are_kept(
    ray_cluster, write_corpus, write_job, fake_workers, tmp_path, capsys
):
    write_corpus({"a": ["one", None, None, "two"]})
    job = str(write_job(limits={"max_error_fraction": 0.4}))
    assert run(job, [], new_worker=fake_workers()) == EXIT_ERRORS
    assert "2 of 4 rows are errors, above limits.max_error_fraction=0.4" in capsys.readouterr().err
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert pq.read_table(tmp_path / "out" / "errors" / "a.parquet").num_rows == 2
    assert run(job, [], new_worker=fake_workers()) == EXIT_ERRORS, "nothing left to do, and still too many"
    assert run(job, ["limits.max_error_fraction=0.5"], new_worker=fake_workers()) == 0


@pytest.mark.parametrize("limit", [{"budget_usd": 1e-9}, {"deadline_s": 0.5}])
def test_a_limit_stops_the_run_with_exit_code_4_and_it_can_be_continued(
    limit, ray_cluster, write_corpus, write_job, fake_workers, tmp_path, capsys
):
    write_corpus({"a": [f"prompt {i}" for i in range(60)]})
    job, workers = str(write_job(limits=limit)), fake_workers(delay_s=0.2)
    assert run(job, [], new_worker=workers) == EXIT_LIMIT
    (name,) = limit
    assert f"limits.{name}" in capsys.readouterr().err
    num_asked = len(workers.asked())
    assert num_asked < 60 and not (tmp_path / "out" / "_SUCCESS").exists()
    assert status(str(tmp_path / "out")) == 0
    assert "not complete" in capsys.readouterr().out
    assert run(job, [f"limits.{name}=null"], new_worker=workers) == 0
    assert sorted(workers.asked()) == sorted(f"a/{i}" for i in range(60)), "each row was asked once over both runs"


def test_a_pool_that_no_cluster_here_can_hold_is_refused(ray_cluster, write_corpus, write_job, fake_workers):
    write_corpus({"a": ["one"]})
    with pytest.raises(JobError, match=r"pool: 500 actors with num_cpus=1 need 500 CPUs and there are"):
        run(str(write_job(pool={"num_actors": 500})), [], new_worker=fake_workers())


@pytest.mark.parametrize(("scope", "num_duplicates"), [("shard", 18 + 6), ("corpus", 36)])
def test_the_bill_of_a_real_engine_adds_up_to_the_time_that_the_device_was_held(
    scope, num_duplicates, ray_cluster, write_corpus, write_job, tmp_path, capsys
):
    prompts = [f"A shared beginning of some length, then row {i % 12}" for i in range(48)]
    write_corpus({"a": prompts[:30], "b": prompts[30:]})
    assert run(str(write_job(sampling={"max_tokens": 30}, plan={"scope": scope})), []) == 0
    said = capsys.readouterr().out
    assert "48: 48 answered, no errors" in said and str(tmp_path / "out") in said
    output = Storage(str(tmp_path / "out"))
    tables = [pq.read_table(file) for file in sorted((tmp_path / "out" / "results").glob("*.parquet"))]
    bill = json.loads(output.read_bytes("_SUCCESS"))["bill"]
    (record,) = read_runs(output)
    rows_s = math.fsum(seconds for table in tables for seconds in table["device_seconds"].to_pylist())
    rows_usd = math.fsum(usd for table in tables for usd in table["cost_usd"].to_pylist())
    assert math.isclose(bill["busy_s"], rows_s, rel_tol=ROUNDING)
    assert math.isclose(bill["rows_usd"], rows_usd, rel_tol=ROUNDING)
    assert math.isclose(bill["cost_usd"], bill["device_seconds"] / 3600, rel_tol=ROUNDING), "at 1 USD per hour"
    assert math.isclose(
        bill["device_seconds"], math.fsum(bill[f"{part}_s"] for part in ("busy", "load", "idle", "lost"))
    )
    assert bill["lost_s"] == pytest.approx(0.0, abs=1e-6), "nothing broke, so the engine's busy time is all on rows"
    assert bill["device_seconds"] == pytest.approx(record.held_s, abs=0.5), "measured by another clock"
    assert bill["rows_duplicate"] == sum(row["rows_duplicate"] for row in read_metrics(output)) == num_duplicates
    assert 0 < bill["prefix_hit_rate"] <= 1
    for column in ("prompt_tokens", "cached_tokens", "completion_tokens"):
        assert bill[column] == sum(sum(table[column].to_pylist()) for table in tables)
    assert all(table["completion_tokens"].to_pylist() == [30] * len(table) for table in tables)


def test_the_drafts_of_a_real_engine_are_on_its_rows_and_its_index_is_loaded_by_the_next_run(
    ray_cluster, write_corpus, write_job, tmp_path, capsys
):
    write_corpus({"a": [f"Say this again and again: {i}" for i in range(30)]})
    config = {"method": "combined", "num_speculative_tokens": 4}
    job = str(write_job(sampling={"max_tokens": 60}, engine={"speculative_config": config}))
    assert run(job, []) == 0
    output = Storage(str(tmp_path / "out"))
    bill = json.loads(output.read_bytes("_SUCCESS"))["bill"]
    table = pq.read_table(tmp_path / "out" / "results" / "a.parquet")
    for column in ("drafted_tokens", "accepted_tokens"):
        assert sum(drafter[column] for drafter in bill["drafters"]) == sum(table[column].to_pylist()) > 0
    assert bill["acceptance_length"] == 1 + bill["accepted_tokens"] / bill["num_verify_steps"]
    (first,) = output.list("_drafts")
    assert num_answers_in(output.read_bytes(first.path)) == 30

    write_corpus({"b": ["Something else"]})
    assert run(job, []) == 0
    (second,) = output.list("_drafts")
    assert num_answers_in(output.read_bytes(second.path)) == 31
    assert "indexes of answers" not in capsys.readouterr().out, "it was read, so there is no note"
    assert run(job, ["engine.speculative_config.method=none"]) == 0, "nothing to do, and the same fingerprint"


def num_answers_in(index: bytes) -> int:
    """From the header of a saved index of answers, its second line."""
    return int(json.loads(index.split(b"\n")[1])["num_answers"])


def test_several_completions_and_logprobs_come_through_the_whole_way(ray_cluster, write_corpus, write_job, tmp_path):
    write_corpus({"a": ["one", "two"]})
    sampling = {"n": 3, "temperature": 1.0, "logprobs": 2, "max_tokens": 4}
    assert run(str(write_job(sampling=sampling)), []) == 0
    rows = pq.read_table(tmp_path / "out" / "results" / "a.parquet").to_pylist()
    for row in rows:
        assert len(row["response"]) == len(row["finish_reason"]) == len(row["mean_logprob"]) == 3
        assert [len(tokens) for tokens in row["logprobs"]] == [4, 4, 4]
        assert all(len(token["top"]) >= 2 for tokens in row["logprobs"] for token in tokens)
        assert row["completion_tokens"] == 12


def test_off_a_terminal_there_are_a_few_plain_lines(ray_cluster, write_corpus, write_job, fake_workers, capsys):
    write_corpus({"a": [f"prompt {i}" for i in range(20)]})
    assert run(str(write_job()), [], new_worker=fake_workers()) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("20 rows in 1 shards")
    assert "\x1b" not in out and "bill" in out
    assert not Path("_SUCCESS").exists()
