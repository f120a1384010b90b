"""A Ray head of its own on loopback, as `ray job submit` meets a cluster."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[2]
SHIPPED = ("actors", "deploy", "jobs", "kernels", "pipeline", ".gitignore")
"""What of a checkout a job needs; the rest of a working tree may change while a test packs it."""


@dataclass(frozen=True)
class Head:
    """A running head: how to reach it, and a copy of the repository to submit from."""

    address: str
    env: dict[str, str]
    checkout: Path

    def ray(self, *words: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        """Run `ray job ...` as a user does, in the copy of the repository."""
        command = [str(Path(sys.executable).with_name("ray")), *words]
        return subprocess.run(
            command, cwd=self.checkout, env=self.env, capture_output=True, text=True, timeout=timeout_s
        )


@contextmanager
def start_head(checkout: Path) -> Iterator[Head]:
    """A head with two CPUs, token authentication and the drain time of the manifests; ends by process id.

    checkout: an empty folder for a copy of the repository. Not `ray stop`, which would end every Ray of the machine.
    """
    for name in SHIPPED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.tmp"))
        else:
            shutil.copy(source, checkout / name)
    ports = _free_ports(5)
    # Ray's sockets live in it, and a path of theirs may have 107 characters.
    temp = tempfile.mkdtemp(prefix="shoal-head-")
    address = f"http://127.0.0.1:{ports[0]}"
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_JOB_STOP_WAIT_TIME_S": "90",
        "RAY_API_SERVER_ADDRESS": address,
        "OMP_NUM_THREADS": "1",
    }
    env.pop("RAY_ADDRESS", None)
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", "--port=0", "--num-cpus=2", "--object-store-memory=200000000"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={ports[0]}"),
        *(f"--dashboard-agent-listen-port={ports[1]}", f"--dashboard-agent-grpc-port={ports[2]}"),
        *(f"--metrics-export-port={ports[3]}", f"--ray-client-server-port={ports[4]}", f"--temp-dir={temp}"),
    ]
    log = checkout.with_suffix(".log")
    with log.open("w") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=checkout)
    try:
        _wait_for(address, env["RAY_AUTH_TOKEN"], process, log)
        yield Head(address, env, checkout)
    finally:
        _end(process)
        shutil.rmtree(temp, ignore_errors=True)


def status_code(url: str, token: str | None) -> int | None:
    """The HTTP status of a GET with that token; None where nobody answers."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _wait_for(address: str, token: str, process: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while status_code(f"{address}/api/jobs/", token) != 200:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the head did not start:\n{log.read_text()}")
        time.sleep(0.5)


def _end(process: psutil.Popen) -> None:
    family = [process, *process.children(recursive=True)] if process.poll() is None else []
    process.terminate()
    psutil.wait_procs([process], timeout=10)
    for member in family:
        if member.is_running():
            member.kill()
    psutil.wait_procs(family, timeout=20)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
    finally:
        for free in sockets:
            free.close()
