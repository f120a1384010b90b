"""`shoal bench nightly`: how long a night takes that finds nothing new, over many shards.

The output is made here, each shard's results as small as they can be: what is measured is finding out that all is done.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from jobs.bench.result import Bar, BenchResult
from jobs.named_models import named_models
from pipeline.claim import claim_output
from pipeline.job import Job, load_job
from pipeline.night.history import NOTHING_NEW, read_nights
from pipeline.parquet import to_parquet
from pipeline.results import RESULTS
from pipeline.shards import list_shards
from pipeline.storage import Storage

NUM_SHARDS = (10, 1000)
REPEATS = 5
MAX_NOTHING_NEW_S = 5.0
"""Our reading of "ends in seconds"."""


@dataclass(frozen=True, slots=True)
class Took:
    """A command's wall and processor seconds, and whether it said what it should."""

    wall_s: float
    cpu_s: float
    is_right: bool


def bench_nightly() -> BenchResult:
    """Nights over outputs that are complete; a minute on two cores."""
    bars, is_correct, samples = [], True, {}
    with tempfile.TemporaryDirectory() as name:
        for num_shards in NUM_SHARDS:
            job_file = make_finished_output(Path(name) / str(num_shards), num_shards)
            nights = [run_command("nightly", job_file) for _ in range(REPEATS)]
            found = read_nights(Storage(str(job_file.parent / "out")))
            is_correct &= all(night.is_right for night in nights)
            is_correct &= [night.outcome for night in found] == [NOTHING_NEW] * REPEATS
            is_correct &= all(night.device_s == night.cost_usd == 0 for night in found)
            wall_s = statistics.median(night.wall_s for night in nights)
            cpu_s = statistics.median(night.cpu_s for night in nights)
            bars.append(Bar(f"nothing new, {num_shards:,} shards", wall_s, MAX_NOTHING_NEW_S, False, "s"))
            bars.append(Bar(f"processor time of it, {num_shards:,} shards", cpu_s, None, unit="s"))
            samples[str(num_shards)] = [round(night.wall_s, 3) for night in nights]
    return BenchResult("nightly", is_correct, bars, {"repeats": REPEATS, "wall_s": samples})


def make_finished_output(folder: Path, num_shards: int) -> Path:
    """A corpus of shards with two rows each, its job file, and an output that is complete but for its metrics."""
    (folder / "in").mkdir(parents=True)
    rows = pa.table({"id": [0, 1], "prompt": ["one", "two"]})
    for number in range(num_shards):
        pq.write_table(rows, folder / "in" / f"shard-{number:05d}.parquet")
    job_file = folder / "job.yaml"
    settings = {"input": {"path": "in", "prompt_column": "prompt"}, "model": "demo", "output": {"path": "out"}}
    job_file.write_text(yaml.safe_dump(settings))
    publish_all(load_job(str(job_file)).resolve(named_models()))
    return job_file


def publish_all(job: Job) -> None:
    output, fingerprint = Storage(job.output.path), job.fingerprint()
    claim_output(output, job)
    folder = Path(output.uri) / RESULTS
    folder.mkdir()
    answers = pa.table({"id": [0, 1], "response": ["1", "2"]})
    for shard in list_shards(job).good:
        metadata = {"fingerprint": fingerprint, "etag": shard.etag, "shard": shard.name}
        (folder / f"{shard.name}.parquet").write_bytes(to_parquet(answers, metadata))
    output.write_whole("_SUCCESS", b"{}")


def run_command(command: str, job_file: Path) -> Took:
    """Run a command of Shoal's in a process of its own, to the end."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words = [sys.executable, "-m", "jobs", command, str(job_file)]
    done = subprocess.run(words, capture_output=True, text=True)  # noqa: S603
    wall_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(wall_s, cpu_s, done.returncode == 0 and "nothing new" in done.stdout)
