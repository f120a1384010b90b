"""Starts `python -m jobs run` or `nightly` as a user would, and ends all that it started; and what it should answer."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import psutil

from actors.weights.checkpoint import load_tokenizer
from actors.worker import EngineWorker
from pipeline.job import Job
from pipeline.prefix_plan import plan_shard
from pipeline.shards import Shard, list_shards


class Driver:
    """A driver process with a Ray of its own. On leaving, whatever of it still lives is ended, by process id."""

    def __init__(self, job: Path, *overrides: str, env: dict[str, str] | None = None, command: str = "run") -> None:
        flags = [word for override in overrides for word in ("--set", override)]
        self.log = job.with_suffix(".log")
        self._out = self.log.open("w")
        words = [sys.executable, "-m", "jobs", command, str(job), *flags]
        environment = {**os.environ, **(env or {})}
        self.process = psutil.Popen(words, stdout=self._out, stderr=subprocess.STDOUT, cwd=job.parent, env=environment)
        self._family: dict[int, psutil.Process] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.family()
        for process in [self.process, *self._family.values()]:
            if process.is_running():
                process.kill()
        psutil.wait_procs([self.process, *self._family.values()], timeout=20)
        self._out.close()

    def family(self) -> list[psutil.Process]:
        """The processes that descend from the driver, as far as they have been seen, and still live."""
        if self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            self._family.update((child.pid, child) for child in self.process.children(recursive=True))
        return [
            process
            for process in self._family.values()
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        ]

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.family()
            assert self.process.poll() is None, f"the driver ended too early:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"waited {timeout_s} s:\n{self.log.read_text()}"
            time.sleep(0.05)

    def wait(self, timeout_s: float = 120) -> int:
        """The exit code; the processes that the driver leaves behind are given a moment to go."""
        code = int(self.process.wait(timeout_s))
        deadline = time.monotonic() + 20
        while self.family() and time.monotonic() < deadline:
            time.sleep(0.1)
        return code


def undisturbed_responses(job: Job) -> dict[str, list[str | None]]:
    """What a job answers, by an engine in this process, without slices, graph or storage."""
    worker, tokenizer = EngineWorker(job.engine), load_tokenizer(job.model)

    async def answer(shard: Shard) -> list[str | None]:
        requests = [
            request for slice_ in plan_shard(job, shard, tokenizer) for request in slice_.requests(job.sampling)
        ]
        completions = await worker.generate(requests)
        texts = {int(completion.request_id): completion.outputs[0].text for completion in completions}
        return [texts.get(row) for row in range(shard.num_rows)]

    try:
        return {shard.name: asyncio.run(answer(shard)) for shard in list_shards(job).good}
    finally:
        worker.close()
