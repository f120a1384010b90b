"""`shoal serve` as a user starts it, in processes of its own, and what these processes take of the machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

from jobs.bench.online.client import Connection, write_request

HOST = "127.0.0.1"
_START_S = 300
_END_S = 150


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one process: resident bytes, and seconds of CPU since it started."""

    rss_bytes: int
    cpu_s: float


@dataclass(slots=True)
class Deployment:
    """A running endpoint."""

    port: int
    server: subprocess.Popen[bytes]
    log: Path

    def usages(self) -> dict[str, Usage]:
        """By role, summed over its processes: replica, proxy, and the rest of Ray."""
        found: dict[str, Usage] = {}
        for process in psutil.Process(self.server.pid).children(recursive=True):
            try:
                title = " ".join(process.cmdline()[:1])
                memory, times = process.memory_info().rss, process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            role = "replica" if "ServeReplica" in title else "proxy" if _is_proxy(title) else "rest of Ray"
            before = found.get(role, Usage(0, 0.0))
            found[role] = Usage(before.rss_bytes + memory, before.cpu_s + times.user + times.system)
        return found

    async def metrics(self) -> dict[str, float]:
        """The page of /metrics: samples without labels as they are, those with labels summed."""
        connection = await Connection.open(HOST, self.port)
        reply = await connection.ask(write_request("/metrics"))
        connection.cut()
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(reply.body.decode()):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return values


def _is_proxy(title: str) -> bool:
    return "ProxyActor" in title or "haproxy" in title.lower()


@contextmanager
def deployed(settings: Mapping[str, Any], folder: Path) -> Iterator[Deployment]:
    """The endpoint of `settings`, ready; RuntimeError with its log if it does not get there. Ended by SIGTERM."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    file, log = folder / "serve.yaml", folder / "serve.log"
    file.write_text(yaml.safe_dump({**settings, "port": port}))
    with log.open("wb") as sink:
        server = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "jobs", "serve", str(file)],
            cwd=Path(__file__).resolve().parents[3],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_DEDUP_LOGS": "0"},
        )
    try:
        _wait_until_ready(server, port, log)
        yield Deployment(port, server, log)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(_END_S)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while b"answers on" not in log.read_bytes():
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the endpoint did not start:\n{log.read_text()[-4000:]}")
        time.sleep(0.2)
