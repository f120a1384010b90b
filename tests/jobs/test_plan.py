"""`shoal plan` from the outside: what it prints, what it leaves in the output, and what run and status make of it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from jobs import cli
from jobs.plan import PlanSettings, bar, make_plan
from jobs.run import run
from jobs.status import status
from pipeline.bill.ledger import read_bill
from pipeline.job import load_job
from pipeline.price.plan_file import Figure, Plan, read_plan
from pipeline.storage import Storage

EXIT_DONE, EXIT_USAGE = 0, 2


def shoal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["shoal", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def prompts(num_rows: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"about {''.join(chr(c) for c in rng.integers(97, 123, 30))}" for _ in range(num_rows)]


def planned(job: Path, **settings) -> Plan:
    said: list[str] = []
    return make_plan(load_job(str(job)).resolve(), PlanSettings(**settings), said.append)[0]


def test_a_plan_is_printed_as_json_with_all_that_the_table_has(write_corpus, write_job, monkeypatch, capsys):
    write_corpus({"a": [*prompts(20), None], "b": [*prompts(9, 1), "twice", "twice"]})
    job = str(write_job())
    code, out, _ = shoal(monkeypatch, capsys, "plan", job, "--json")
    assert code == EXIT_DONE
    plan = json.loads(out)
    found = plan["estimate"]
    assert plan["version"] == 1 and plan["num_shards"] == 2
    assert found["num_rows"] == 32 and found["errors"] == {"null_prompt": 1.0}
    assert found["num_duplicates"]["value"] == 1
    assert found["completion_tokens"]["value"] == pytest.approx(31 * 8), "ignore_eos: always max_tokens"
    assert 0 < found["cost_usd"]["low"] <= found["cost_usd"]["value"] <= found["cost_usd"]["high"]
    assert found["device_s"]["value"] == pytest.approx(found["busy_s"]["value"] + found["load_s"] + found["idle_s"])

    code, out, _ = shoal(monkeypatch, capsys, "plan", job)
    assert code == EXIT_DONE
    for words in (
        "all 32 rows were counted",
        "null_prompt 1",
        "8 tokens",
        "prefix hits",
        "cost",
        "by number of actors",
    ):
        assert words in out or words == "8 tokens", words
    assert "█" in out, "a plot"


def test_given_tokens_and_no_step_times_are_tokens_only(write_corpus, write_job, monkeypatch, capsys):
    write_corpus({"a": prompts(40)})
    code, out, _ = shoal(monkeypatch, capsys, "plan", str(write_job()), "--output-tokens", "5", "--json")
    found = json.loads(out)["estimate"]
    assert code == EXIT_DONE
    assert found["completion_tokens"]["value"] == 200 and found["cost_usd"] is None
    assert any("tokens only" in note for note in found["notes"])


def test_rows_that_fail_in_the_pilot_are_said(write_corpus, write_job, monkeypatch, capsys):
    """The pages hold 32 tokens, so longer prompts are refused by the engine and not by the plan."""
    write_corpus({"a": [*["ok"] * 1, *(f"number {i}" for i in range(20)), *("y" * (60 + i) for i in range(10))]})
    job = str(write_job(engine={"num_pages": 2}))
    _, out, _ = shoal(monkeypatch, capsys, "plan", job, "--json", "--pilot-rows", "64")
    notes = json.loads(out)["estimate"]["notes"]
    assert any("10 of 31 pilot rows failed (prompt_too_long 10)" in note for note in notes), notes


def test_a_pilot_that_is_not_possible_is_said(write_corpus, write_job, monkeypatch, capsys):
    write_corpus({"a": prompts(40)})
    job = str(write_job(engine={"num_pages": None, "kv_cache_bytes": 1}))
    code, out, _ = shoal(monkeypatch, capsys, "plan", job, "--json")
    assert code == EXIT_DONE
    notes = json.loads(out)["estimate"]["notes"]
    assert any("no pilot was possible on this machine" in note for note in notes), notes


def test_a_machine_that_others_use_is_said_and_their_time_is_not_counted(write_corpus, write_job, monkeypatch):
    write_corpus({"a": prompts(40)})
    half = SimpleNamespace(perf_counter=time.perf_counter, thread_time=lambda: time.perf_counter() / 2)
    monkeypatch.setattr("pipeline.price.experience.time", half)
    notes = planned(write_job()).estimate.notes
    assert any("the pilot had its core for 50% of the time" in note for note in notes), notes


def test_what_the_order_of_fields_gains_is_said_before_it_is_used(write_corpus, write_job, monkeypatch, capsys):
    rows = [{"review": f"review {i}", "film": f"the film number {i % 3} " * 4} for i in range(60)]
    write_corpus({"a": pa.Table.from_pylist(rows)})
    prompt = {"template": 'Good? {{ fields("review", "film") }}'}
    job = str(write_job(input={"prompt_column": None}, prompt=prompt))
    options = ("--json", "--pilot-rows", "0")
    notes = json.loads(shoal(monkeypatch, capsys, "plan", job, *options)[1])["estimate"]["notes"]
    assert any("plan.reorder_fields: true would raise achievable prefix hits from " in note for note in notes), notes
    reorder = ("--set", "plan.reorder_fields=true")
    plan = json.loads(shoal(monkeypatch, capsys, "plan", job, *options, *reorder)[1])
    (said,) = [note for note in plan["estimate"]["notes"] if "reordered" in note]
    assert f"{plan['estimate']['achievable_hit_rate']:.1%} of prompt tokens are achievable prefix hits" in said


def test_step_times_of_another_model_are_refused(write_corpus, write_job, tmp_path, monkeypatch, capsys):
    write_corpus({"a": prompts(4)})
    times = tmp_path / "times.json"
    profile = {"version": 1, "device": "cpu", "model_identity": "another", "settings": {}, "num_pages": 9}
    profile |= {"load_s": 1.0, "measured_at": "now", "step_times": {"curve_tokens": [1, 2], "curve_s": [0.1, 0.2]}}
    times.write_text(json.dumps(profile))
    code, _, err = shoal(monkeypatch, capsys, "plan", str(write_job()), "--step-times", str(times))
    assert code == EXIT_USAGE and "the model is another one" in err


def test_a_run_leaves_step_times_and_says_predicted_beside_actual(
    write_corpus, write_job, tmp_path, ray_cluster, monkeypatch, capsys
):
    write_corpus({"a": prompts(24), "b": prompts(24, 1)})
    job = write_job()
    assert shoal(monkeypatch, capsys, "plan", str(job), "--keep")[0] == EXIT_DONE
    out = Storage(str(tmp_path / "out"))
    kept, _ = read_plan(out)
    assert kept is not None and kept.estimate.cost_usd is not None
    budget = kept.estimate.cost_usd.value / 1e6
    write_job(limits={"budget_usd": budget})
    capsys.readouterr()
    run(str(job), [])
    said = " ".join(capsys.readouterr().out.split())
    assert "is below the expected cost" in said and "stop before the corpus is done" in said
    write_job(limits={"budget_usd": 100.0})
    assert run(str(job), []) == EXIT_DONE
    said = capsys.readouterr().out
    assert "limits.budget_usd=100 is for one run; earlier runs have spent $" in " ".join(said.split())
    assert "predicted" in said and "actual" in said
    notes = planned(job, pilot_rows=0).estimate.notes
    assert any("earlier runs have spent $" in note for note in notes), notes
    write_job()
    assert status(str(tmp_path / "out")) == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    (tokens,) = [line for line in lines if line.startswith("completion tokens")]
    assert tokens.split()[2] == f"{48 * 8}" and tokens.split()[-1] == f"{read_bill(out).completion_tokens}"
    assert len(list((tmp_path / "out" / "step_times").glob("cpu-*.json"))) == 1

    # New shards of the same corpus: what was answered takes the place of a pilot.
    write_corpus({"c": prompts(24, 2)})
    later = planned(job, pilot_rows=0)
    assert "48 rows of this output that are answered" in later.answers
    assert later.estimate.cost_usd is not None and "step_times/cpu-" in later.step_times
    run(str(job), ["limits.deadline_s=0.001"])
    assert "the corpus has changed since the plan was made (2 shards with 48 rows then, 3 with 72 now)" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 99}, "plan.json is of version 99"),
        ({"fingerprint": "other"}, "plan.json is of another job"),
        ({"estimate": {}}, "plan.json cannot be read"),
    ],
)
def test_a_plan_that_is_of_no_use_is_said(change, said, write_corpus, write_job, tmp_path, monkeypatch, capsys):
    write_corpus({"a": ["one"]})
    job = write_job()
    shoal(monkeypatch, capsys, "plan", str(job), "--keep", "--output-tokens", "3")
    path = tmp_path / "out" / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    monkeypatch.setattr("jobs.run._answer", lambda *_: pytest.skip("reached the run"))
    with pytest.raises(pytest.skip.Exception):
        run(str(job), [])
    assert said in " ".join(capsys.readouterr().out.split())


def test_a_kept_plan_is_read_as_it_was_written(write_corpus, write_job, tmp_path):
    write_corpus({"a": prompts(40)})
    plan = planned(write_job(), output_tokens=4)
    plan.write(Storage(str(tmp_path / "out")))
    assert read_plan(Storage(str(tmp_path / "out"))) == (plan, "")


def test_figures_know_what_they_hold():
    assert Figure(2.0, 1.0, 3.0).holds(3.0) and not Figure(2.0, 1.0, 3.0).holds(3.1)
    assert Figure(2.0).holds(2.0) is None


def test_bars_are_as_long_as_they_say():
    assert bar(1.0, 4) == "████" and bar(0.0, 4) == "" and bar(0.5, 4) == "██" and bar(0.53, 4) == "██▏"


def test_what_shards_have_in_common_is_in_the_price_of_a_run_that_plans_them_as_one(write_corpus, write_job):
    """Each document has its two questions in different shards: as one corpus, half of the documents' tokens go."""
    texts = [f"{text} {text} {text} " for text in prompts(40)]
    write_corpus({"a": [f"{text}first?" for text in texts], "b": [f"{text}other?" for text in texts]})
    job = write_job()
    expected = {}
    for scope in ("shard", "corpus", "auto"):
        write_job(plan={"scope": scope})
        expected[scope] = planned(job, output_tokens=4).estimate
    by_shard, as_one = expected["shard"].computed_prompt_tokens.value, expected["corpus"].computed_prompt_tokens.value
    assert as_one == pytest.approx(by_shard / 2, rel=0.1)
    assert expected["auto"].computed_prompt_tokens == expected["corpus"].computed_prompt_tokens
    assert any("planning the corpus as one saves" in note for note in expected["auto"].notes)
    assert not any("scope" in note for note in expected["shard"].notes)
