"""What docs/ tells a user to type. Fenced blocks begin with one of these, and say by it how they are tested:

    console           run here, in order, in an empty folder
    console cluster   run in order against a local Ray head
    console account   needs AWS or Kubernetes: options parsed by the program's own parser where it has one here
    console serve     a server, started for the blocks below and told to end after them
    console endpoint  run in order against that server
    python endpoint   likewise
    yaml              a job file, checked by Shoal
    yaml endpoint     an endpoint's settings, likewise

Of output that is shown, every line must come, with any numbers; `...` stands for what is left out.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest
import yaml
from local_head import REPOSITORY, Head
from test_cluster_yaml import load_prepare

from jobs.endpoint.config import EndpointConfig
from pipeline.job import Job

PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(.*)\n((?:(?!```).*\n)*)```$", re.MULTILINE)
EXIT = re.compile(r"# exits (\d+)")


@dataclass
class Command:
    text: str
    shown: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        found = EXIT.search(self.text)
        return int(found[1]) if found else 0

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


def commands(page: Path, kind: str) -> list[Command]:
    found: list[Command] = []
    for name, text in blocks(page):
        for line in text.splitlines() if name == kind else ():
            if line.startswith("$ "):
                found.append(Command(line.removeprefix("$ ")))
            elif line != "...":
                found[-1].shown.append(line)
    return found


def masked(line: str) -> str:
    """A line without numbers, and without the colours and the time that Ray's commands write where no terminal is."""
    line = re.sub(r"\x1b\[\d+m", "", line)
    line = re.sub(r"^[-\d]+ [:,\d]+\t\w+ \S+ -- ", "", line)
    return re.sub(r"\b[0-9a-f]{12}\b|[\d.,e-]*\d", "#", line).rstrip(" .")


def check(command: Command, done: subprocess.CompletedProcess[str]) -> None:
    output = done.stdout + done.stderr
    assert done.returncode == command.exit_code, f"{command.text}\n{output}"
    lines = {masked(line) for line in output.splitlines()}
    for line in command.shown:
        assert masked(line) in lines, f"{command.text} does not print: {line}\n{output}"


def pages_with(kind: str) -> list[Path]:
    return [page for page in PAGES if any(name == kind for name, _ in blocks(page))]


def test_every_block_says_how_it_is_tested() -> None:
    kinds = {"console", "console cluster", "console account", "console serve", "console endpoint", "python endpoint"}
    assert {"cluster.md", "corpus.md", "nightly.md", "online.md"} <= {page.name for page in PAGES}
    for page in PAGES:
        assert page.read_text().count("```") == 2 * len(blocks(page))
        assert {name for name, _ in blocks(page)} <= {*kinds, "yaml", "yaml endpoint"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_job_files_are_job_files_and_links_lead_somewhere(page: Path) -> None:
    for name, text in blocks(page):
        if name == "yaml":
            Job.model_validate(yaml.safe_load(text))
        elif name == "yaml endpoint":
            EndpointConfig.model_validate(yaml.safe_load(text))
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_of_deploy_that_are_named_are_there(page: Path) -> None:
    for path in re.findall(r"\bdeploy/[-\w./]+\w", page.read_text()):
        assert (REPOSITORY / path).exists() or path == "deploy/jobs/keys", path  # that one the reader makes


@pytest.mark.parametrize("page", pages_with("console account"), ids=lambda page: page.stem)
def test_what_needs_an_account_has_options_that_exist(page: Path) -> None:
    for command in commands(page, "console account"):
        program, *words = [word for word in command.words if not re.match(r"[A-Z_]+=", word)]
        if program == "ray":
            _parse_ray(words)
        elif program == "python":
            assert words[0] == "deploy/aws/prepare.py"
            load_prepare().parser().parse_args(words[1:])
        else:
            assert program in ("bash", "kubectl", "docker", "export", "printf"), command.text


def _parse_ray(words: list[str]) -> None:
    """Parse a command of Ray's, subcommand by subcommand, without running it; unknown options raise."""
    from ray.scripts.scripts import cli

    command: click.Command = cli
    while isinstance(command, click.Group):
        name, *words = words
        known = command.commands.get(name)
        assert known is not None, name
        command = known
    command.make_context(command.name, words)


@pytest.mark.parametrize("text", ["job submit --submision-id x -- true", "upp my-cluster.yaml"])
def test_a_wrong_word_to_ray_is_found(text: str) -> None:
    with pytest.raises((click.UsageError, AssertionError)):
        _parse_ray(text.split())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", pages_with("console"), ids=lambda page: page.stem)
def test_what_runs_on_a_laptop_runs_and_prints_what_is_shown(page: Path, tmp_path: Path) -> None:
    for command in commands(page, "console"):
        check(command, _run(["bash", "-c", command.text], tmp_path))


def _run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=240)


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", pages_with("console serve"), ids=lambda page: page.stem)
def test_what_asks_a_server_gets_answers_and_the_server_ends_when_told(page: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (serving,) = commands(page, "console serve")
    words = [*serving.words, "--set", f"port={port}"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(words, cwd=tmp_path, env=_environment(), stdout=log, stderr=subprocess.STDOUT)
    try:
        ready = f"until curl -sf http://127.0.0.1:{port}/ready; do kill -0 {server.pid} || exit 1; sleep 0.5; done"
        assert _run(["bash", "-c", ready], tmp_path).returncode == 0, (tmp_path / "log").read_text()
        for command in commands(page, "console endpoint"):
            check(command, _run(["bash", "-c", command.text.replace("8000", str(port))], tmp_path))
        for name, text in blocks(page):
            if name == "python endpoint":
                done = _run([sys.executable, "-c", text.replace("8000", str(port))], tmp_path)
                assert done.returncode == 0 and done.stdout.strip(), done.stderr
        server.terminate()
        code = server.wait(120)
    finally:
        server.kill()
    check(serving, subprocess.CompletedProcess(words, code, (tmp_path / "log").read_text(), ""))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", pages_with("console cluster"), ids=lambda page: page.stem)
def test_what_needs_a_cluster_runs_against_a_head(page: Path, head: Head) -> None:
    left_behind = Path("/tmp/shoal-try-it")
    shutil.rmtree(left_behind, ignore_errors=True)
    try:
        for command in commands(page, "console cluster"):
            program, *words = command.words
            assert program == "ray"
            check(command, head.ray(*words))
    finally:
        shutil.rmtree(left_behind, ignore_errors=True)
