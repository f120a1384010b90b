"""A run of a case by `shoal run`, and when its work began and ended. Called by the parts of `shoal bench plan`."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq

from actors.config import EngineConfig
from actors.worker import EngineWorker
from jobs.run import run
from pipeline.bill.ledger import Bill, read_bill
from pipeline.job import load_job
from pipeline.storage import Storage


@dataclass(frozen=True, slots=True)
class Finished:
    """An output and its bill. work_s: from the first actor that had loaded to the last shard that was published, so
    without the start of actors, but with what planning lasts longer than their loading."""

    output: Path
    bill: Bill
    exit_code: int
    wall_s: float
    work_s: float

    def answers(self) -> dict[str, list[str | None]]:
        """Responses by shard, in the order of its rows."""
        files = sorted((self.output / "results").glob("*.parquet"))
        return {file.name: pq.read_table(file, columns=["response"])["response"].to_pylist() for file in files}


def run_case(job_file: Path, output: Path, overrides: Sequence[str]) -> Finished:
    """Run a job file into an output of its own."""
    ready = output.parent / f"{output.name}-ready"
    ready.mkdir()
    started = time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        exit_code = run(str(job_file), [f"output.path={output}", *overrides], new_worker=partial(timed_worker, ready))
    wall_s = time.time() - started
    job = load_job(str(job_file), [f"output.path={output}"])
    first_ready = min(float(file.read_text()) for file in ready.iterdir())
    last_published = max(file.stat().st_mtime for file in (output / "results").glob("*.parquet"))
    bill = read_bill(Storage(job.output.path))
    return Finished(output, bill, exit_code, wall_s, last_published - first_ready)


def timed_worker(folder: Path, config: EngineConfig) -> EngineWorker:
    """An EngineWorker that notes when it had loaded."""
    worker = EngineWorker(config)
    (folder / f"{time.time_ns()}").write_text(repr(time.time()))
    return worker
