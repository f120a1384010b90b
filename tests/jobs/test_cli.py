"""The command line: what needs what, and which mistake ends with which exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jobs.cli
from pipeline.job import FingerprintMismatch, JobError
from pipeline.storage import StorageError

REPOSITORY = Path(jobs.cli.__file__).resolve().parents[1]


def shoal(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jobs", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def exit_of(monkeypatch, error: Exception) -> int:
    """The exit code when a command fails with this error."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(jobs.cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        jobs.cli.main()
    return int(caught.value.code)


def test_the_schema_is_json_and_needs_neither_torch_nor_ray():
    code = "import sys, jobs.cli; sys.argv = ['shoal', 'schema']\ntry: jobs.cli.main()\n"
    code += "finally: print({'torch', 'ray', 'transformers'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert json.loads(done.stdout)["title"] == "Shoal job"
    assert done.stderr.strip() == "set()"


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert shoal("--version").stdout.strip() == f"shoal {version('shoal')}"


def test_help_names_every_command():
    text = shoal("--help").stdout
    assert all(command in text for command in ("run", "status", "schema", "demo", "bench", "train-demo"))


def test_an_unknown_command_is_a_usage_error():
    done = shoal("rnu")
    assert done.returncode == 2 and "rnu" in done.stderr


def test_a_job_file_that_is_not_there_is_a_usage_error_without_a_traceback(tmp_path):
    done = shoal("run", str(tmp_path / "nope.yaml"))
    assert done.returncode == 2
    assert "nope.yaml: there is no such file" in done.stderr and "Traceback" not in done.stderr


def test_mistakes_of_the_user_exit_with_2_and_their_message(monkeypatch, capsys):
    for error in (JobError("the key x"), StorageError("cannot write")):
        assert exit_of(monkeypatch, error) == 2
        assert capsys.readouterr().err == f"shoal: {error}\n"


def test_another_fingerprint_exits_with_5(monkeypatch, capsys):
    assert exit_of(monkeypatch, FingerprintMismatch("sampling.n: 1 -> 2")) == 5
    assert "sampling.n: 1 -> 2" in capsys.readouterr().err


def test_a_bug_exits_with_1_and_a_traceback(monkeypatch, capsys):
    assert exit_of(monkeypatch, RuntimeError("broken")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_value_error_out_of_a_library_is_a_bug(monkeypatch, capsys):
    try:
        json.loads("{")
    except ValueError as error:
        assert exit_of(monkeypatch, error) == 1
    assert "Traceback" in capsys.readouterr().err


def test_another_package_named_kernels_is_refused_by_name(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(REPOSITORY)!r}]\nimport jobs.cli; jobs.cli.main()"
    done = subprocess.run([sys.executable, "-c", code, "schema"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "the package 'kernels' comes from" in done.stderr and str(tmp_path) in done.stderr
