"""How a night is started: submit.sh with a `ray` that only writes down its calls, the cron line, and Airflow."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import pytest
from local_head import REPOSITORY

JOBS = REPOSITORY / "deploy/jobs"

FAKE_RAY = """#!/usr/bin/env python3
import json, os, sys, time
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[2] == "submit":
    time.sleep(float(os.environ.get("SUBMIT_S", "0")))
    sys.exit(int(os.environ.get("SUBMIT_EXIT", "0")))
if sys.argv[2] == "status":
    with open(os.environ["CALLS"]) as calls:
        known = [json.loads(line)[3] for line in calls if '"submit"' in line]
    if sys.argv[3] not in known + os.environ.get("KNOWN", "").split():
        sys.exit(f"Job {sys.argv[3]} does not exist")
    print(os.environ.get("STATUS", "Job 'x' succeeded"))
"""


@pytest.fixture
def fake_ray(tmp_path: Path) -> dict[str, str]:
    program = tmp_path / "bin/ray"
    program.parent.mkdir()
    program.write_text(FAKE_RAY.replace("/usr/bin/env python3", sys.executable))
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "CALLS": str(tmp_path / "calls")}


def submit(env: dict[str, str], **settings: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "deploy/jobs/submit.sh", "deploy/jobs/nightly.yaml"]
    return subprocess.run(command, cwd=REPOSITORY, env={**env, **settings}, capture_output=True, text=True, timeout=60)


def calls(env: dict[str, str]) -> list[list[str]]:
    return [json.loads(line) for line in Path(env["CALLS"]).read_text().splitlines()]


def test_a_night_is_submitted_under_its_date_with_time_to_drain(fake_ray: dict[str, str]) -> None:
    from ray.dashboard.modules.job.cli import submit as ray_job_submit

    done = submit(fake_ray, WORKING_DIR=".")
    assert done.returncode == 0, done.stderr
    asked, (_, _, *words), status = calls(fake_ray)
    options = ray_job_submit.make_context("submit", list(words)).params
    assert re.fullmatch(r"nightly-\d{4}-\d{2}-\d{2}", options["submission_id"])
    assert options["working_dir"] == "."
    assert json.loads(options["runtime_env_json"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}}
    assert list(options["entrypoint"]) == ["bash", "deploy/jobs/nightly.sh", "deploy/jobs/nightly.yaml"]
    assert asked == status == ["job", "status", options["submission_id"]]


def test_the_date_is_that_of_utc_wherever_the_machine_is(fake_ray: dict[str, str]) -> None:
    dates = {datetime.now(UTC).strftime("%F")}
    for zone in ("Pacific/Kiritimati", "Pacific/Niue"):  # 25 hours apart
        assert submit(fake_ray, TZ=zone).returncode == 0
    dates.add(datetime.now(UTC).strftime("%F"))  # midnight may pass meanwhile
    ids = [words[3] for words in calls(fake_ray) if words[1] == "submit"]
    assert {re.sub(r"-2$", "", id_.removeprefix("nightly-")) for id_ in ids} <= dates


def test_a_second_try_of_the_same_date_gets_a_number(fake_ray: dict[str, str]) -> None:
    today = datetime.now(UTC).strftime("%F")
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).strftime("%F")  # midnight may pass meanwhile
    known = " ".join(f"nightly-{date}{suffix}" for date in (today, tomorrow) for suffix in ("", "-2"))
    assert submit(fake_ray, KNOWN=known).returncode == 0
    (submitted,) = [words[3] for words in calls(fake_ray) if words[1] == "submit"]
    assert submitted in (f"nightly-{today}-3", f"nightly-{tomorrow}-3")


def test_a_name_that_was_given_is_used_once(fake_ray: dict[str, str]) -> None:
    assert submit(fake_ray, NIGHT="x", KNOWN="nightly-x").returncode == 0
    assert calls(fake_ray)[0][:4] == ["job", "submit", "--submission-id", "nightly-x"], "Ray refuses it, and says so"


def test_without_a_folder_nothing_is_uploaded(fake_ray: dict[str, str]) -> None:
    assert submit(fake_ray, NIGHT="2026-11-21-b").returncode == 0
    assert "--working-dir" not in calls(fake_ray)[0]
    assert "nightly-2026-11-21-b" in calls(fake_ray)[0]


def test_a_night_that_failed_fails_here(fake_ray: dict[str, str]) -> None:
    assert submit(fake_ray, SUBMIT_EXIT="1").returncode == 1


def test_a_night_that_somebody_stopped_fails_here_though_ray_says_0(fake_ray: dict[str, str]) -> None:
    assert submit(fake_ray, STATUS="Job 'x' was stopped").returncode == 1


def test_told_to_stop_it_stops_the_night_on_the_cluster(fake_ray: dict[str, str]) -> None:
    command = ["bash", "deploy/jobs/submit.sh", "deploy/jobs/nightly.yaml"]
    env = {**fake_ray, "SUBMIT_S": "20", "NIGHT": "x"}
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=env, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 30
        while not Path(env["CALLS"]).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
        os.killpg(process.pid, signal.SIGKILL)  # the submission that still sleeps
    assert calls(env)[-1] == ["job", "stop", "nightly-x"]


def test_nightly_hands_its_signals_to_shoal(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/bash\necho "$PPID $@"\n')
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(JOBS / "nightly.sh"), "job.yaml"], env=env, capture_output=True, text=True, timeout=30
    )
    parent, *words = done.stdout.split()
    assert words == ["-m", "jobs", "nightly", "job.yaml"]
    assert int(parent) == os.getpid(), "a shell in between would get the signal, and Shoal would not"


def test_the_cron_line_runs_the_script_at_night_and_never_twice() -> None:
    lines = (REPOSITORY / "deploy/cron/shoal.cron").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if re.match(r"[A-Z_]+=", line))
    assert settings["RAY_AUTH_MODE"] == "token" and settings["RAY_API_SERVER_ADDRESS"].startswith("http://127.0.0.1:")
    (line,) = [line for line in lines if line and not line.startswith("#") and not re.match(r"[A-Z_]+=", line)]
    *times, command = line.split(maxsplit=5)
    assert times == ["15", "2", "*", "*", "*"]
    assert "%" not in command, "cron would make a line's end of it"
    subprocess.run(["bash", "-n", "-c", command], check=True)
    assert "flock --nonblock" in command
    script, job = re.findall(r"deploy/jobs/\S+", command)
    assert (REPOSITORY / script).is_file() and (REPOSITORY / job).is_file()


class FakeAirflow:
    """What the DAG file uses of Airflow, which is not installed here: remembers what it is given."""

    def __init__(self) -> None:
        self.given: dict[str, dict[str, Any]] = {}

    def named(self, name: str) -> type:
        given = self.given

        class Remembered:
            def __init__(self, **settings: Any) -> None:
                given[name] = settings

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *_: object) -> None:
                pass

        return Remembered


def test_the_airflow_dag_runs_the_script_once_per_night(monkeypatch: pytest.MonkeyPatch) -> None:
    airflow = FakeAirflow()
    modules = {"airflow.sdk": "DAG", "airflow.providers.standard.operators.bash": "BashOperator"}
    for module, name in modules.items():
        fake = ModuleType(module)
        setattr(fake, name, airflow.named(name))
        for part in range(1, module.count(".") + 1):
            package = ".".join(module.split(".")[:part])
            monkeypatch.setitem(sys.modules, package, sys.modules.get(package, ModuleType(package)))
        monkeypatch.setitem(sys.modules, module, fake)
    source = REPOSITORY / "deploy/airflow/shoal_nightly.py"
    exec(compile(source.read_text(), str(source), "exec"), {"__name__": "shoal_nightly"})
    dag, task = airflow.given["DAG"], airflow.given["BashOperator"]
    assert dag["max_active_runs"] == 1 and dag["catchup"] is False
    assert task["retries"] == 0 and task["append_env"] is True
    assert task["env"]["WORKING_DIR"] == "."
    for file in re.findall(r"deploy/jobs/\S+", task["bash_command"]):
        assert (REPOSITORY / file).is_file()
