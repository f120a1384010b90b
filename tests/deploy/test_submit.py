"""`ray job submit --working-dir . -- python -m jobs run JOB` against a real local head, and `ray job stop`."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from local_head import Head, status_code

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SLOW_ENGINE = {
    "device": "cpu",
    "dtype": "float32",
    "num_threads": 1,
    "page_size": 16,
    "num_pages": 256,
    "max_num_seqs": 1,
}


def submit(head: Head, job: Path, *overrides: str, name: str) -> str:
    """Submit as the README says, wait for the end, and return the log."""
    flags = [word for override in overrides for word in ("--set", override)]
    words = ("job", "submit", "--submission-id", name, "--working-dir", ".", "--", "python", "-m", "jobs", "run")
    done = head.ray(*words, str(job), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_submitted_job_answers_every_row(
    head: Head, write_corpus: Callable[..., Path], write_job: Callable[..., Path], tmp_path: Path
) -> None:
    write_corpus({"a": ["one", None, "three"], "b": ["four", "five"]})
    log = submit(head, write_job(), name="answers-every-row")
    assert "succeeded" in log
    rows = [
        row for name in ("a", "b") for row in pq.read_table(tmp_path / "out/results" / f"{name}.parquet").to_pylist()
    ]
    assert [row["prompt"] for row in rows] == ["one", None, "three", "four", "five"]
    assert [row["error"] is None for row in rows] == [True, False, True, True, True]
    assert (tmp_path / "out/_SUCCESS").exists()


def test_a_stopped_job_drains_and_the_next_one_finishes_it(
    head: Head, write_corpus: Callable[..., Path], write_job: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = [f"row {index} of many" for index in range(240)]
    write_corpus({"a": prompts})
    job = write_job(
        engine=SLOW_ENGINE, sampling={"max_tokens": 100, "ignore_eos": True}, pool={"max_slices_in_flight": 2}
    )
    words = ("job", "submit", "--submission-id", "to-be-stopped", "--no-wait", "--working-dir", ".", "--")
    started = head.ray(*words, "python", "-m", "jobs", "run", str(job))
    assert started.returncode == 0, started.stdout + started.stderr
    slices = tmp_path / "out/_slices"
    deadline = time.monotonic() + 180
    while len(list(slices.rglob("*.parquet"))) < 2:
        log = head.ray("job", "logs", "to-be-stopped").stdout if time.monotonic() > deadline else ""
        assert time.monotonic() < deadline, log
        time.sleep(0.5)

    before = time.monotonic()
    stopped = head.ray("job", "stop", "to-be-stopped")
    took_s = time.monotonic() - before
    assert stopped.returncode == 0
    assert "was stopped" in stopped.stdout
    assert took_s < int(head.env["RAY_JOB_STOP_WAIT_TIME_S"]), "it was killed, not drained"

    (record,) = [json.loads(path.read_text()) for path in (tmp_path / "out/_runs").iterdir()]
    assert record["exit_code"] == 143
    assert "SIGTERM" in record["outcome"]
    kept = {path.name for path in slices.rglob("*.parquet")}
    num_slices = int(min(kept).split("-of-")[1][:5])
    assert 2 <= len(kept) < num_slices
    assert not (tmp_path / "out/_SUCCESS").exists()

    log = submit(head, job, "engine.max_num_seqs=64", name="the-rest")
    assert "succeeded" in log
    assert pq.read_table(tmp_path / "out/results/a.parquet")["prompt"].to_pylist() == prompts
    records = [json.loads(path.read_text()) for path in (tmp_path / "out/_runs").iterdir()]
    (second,) = [record for record in records if record["exit_code"] == 0]
    assert second["num_slices_found"] == len(kept)
    assert second["num_slices_computed"] == num_slices - len(kept)


def test_a_night_is_run_once(
    head: Head, write_corpus: Callable[..., Path], write_job: Callable[..., Path], tmp_path: Path
) -> None:
    write_corpus({"a": ["one", "two"]})
    command = ["bash", "deploy/jobs/submit.sh", str(write_job())]
    env = {**head.env, "WORKING_DIR": ".", "NIGHT": "2030-01-01"}
    for exit_code, words in ((0, "Job 'nightly-2030-01-01' succeeded"), (1, "nightly-2030-01-01 already exists")):
        done = subprocess.run(command, cwd=head.checkout, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == exit_code, done.stdout + done.stderr
        assert words in done.stdout + done.stderr
    assert (tmp_path / "out/_SUCCESS").exists()


def test_a_second_try_of_a_date_finds_nothing_new(
    head: Head, write_corpus: Callable[..., Path], write_job: Callable[..., Path]
) -> None:
    write_corpus({"a": ["one", "two"]})
    command = ["bash", "deploy/jobs/submit.sh", str(write_job())]
    env = {name: value for name, value in head.env.items() if name != "NIGHT"} | {"WORKING_DIR": "."}
    for words in (r"to answer: 1 new", r"nothing new; last success"):
        done = subprocess.run(command, cwd=head.checkout, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert words in done.stdout
    assert re.search(r"Job 'nightly-\d{4}-\d{2}-\d{2}-2' succeeded", done.stdout)


def test_who_has_no_token_is_refused(head: Head) -> None:
    assert status_code(f"{head.address}/api/jobs/", None) == 401
    assert status_code(f"{head.address}/api/jobs/", "guessed") == 403
