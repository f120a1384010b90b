"""`shoal bench pipeline`: a whole run against the bare engine on the same rows, the start of the model excluded.

Both answer the demo's corpus with the shipped model, int4, on as many threads. The run is timed from the moment its
engine is loaded until the last results file is published; what comes before and after (Ray's start and end, loading,
the bill) is a figure of its own.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console

from actors.config import EngineConfig
from actors.engine import Engine
from actors.weights.checkpoint import load_tokenizer
from actors.worker import EngineWorker
from jobs.bench.result import Bar, BenchResult
from jobs.demo.main import JOB_FILE
from jobs.demo.tickets import write_corpus
from jobs.run import named_models, run
from pipeline.job import load_job
from pipeline.prefix_plan import plan_shard
from pipeline.shards import list_shards

NUM_ROWS = 2000
NUM_RUNS = 3


def bench_pipeline() -> BenchResult:
    """Alternate runs and bare engines; the best of each counts. Takes a few minutes on two cores."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus", num_rows=NUM_ROWS)
        job_file = folder / JOB_FILE.name
        job_file.write_text(JOB_FILE.read_text())
        bare_s, run_s, walls = [], [], []
        answers: list[list[str | None]] = []
        for attempt in range(NUM_RUNS):
            seconds, texts = _time_bare_engine(str(job_file))
            bare_s.append(seconds)
            answers.append(texts)
            seconds, wall, texts = _time_run(str(job_file), folder / f"answers-{attempt}")
            run_s.append(seconds)
            walls.append(wall)
            answers.append(texts)
            console.print(f"bare engine {bare_s[-1]:.2f} s, run {run_s[-1]:.2f} s of {wall:.2f} s in all")
    same = sum(a == b for a, b in zip(answers[0], answers[1])) / len(answers[0])
    bars = [
        Bar("rows with the bare engine's answer", same, 0.995),
        Bar("time of the run over the bare engine's", min(run_s) / min(bare_s), 1.10, at_least=False, unit="x"),
        Bar("rows per second of the run", NUM_ROWS / min(run_s), None),
        Bar("start and end of Ray, loading, the bill", min(walls) - min(run_s), None, unit="s"),
    ]
    config = {
        "rows": NUM_ROWS,
        "bare_engine_seconds": [round(s, 3) for s in bare_s],
        "run_seconds": [round(s, 3) for s in run_s],
        "wall_seconds": [round(s, 3) for s in walls],
    }
    return BenchResult("pipeline", same >= 0.995, bars, config)


def timed_worker(ready_file: Path, config: EngineConfig) -> EngineWorker:
    """An EngineWorker that notes when it had loaded."""
    worker = EngineWorker(config)
    ready_file.write_text(repr(time.time()))
    return worker


def _time_run(job_file: str, answers: Path) -> tuple[float, float, list[str | None]]:
    """Seconds from the engine's loading to the last publication, seconds in all, and the texts in input order."""
    ready_file = answers.with_suffix(".ready")
    started = time.time()
    exit_code = run(job_file, [f"output.path={answers}"], new_worker=partial(timed_worker, ready_file))
    wall = time.time() - started
    if exit_code:
        raise RuntimeError(f"the run ended with exit code {exit_code}; its message stands above")
    results = sorted((answers / "results").glob("*.parquet"))
    published = max(path.stat().st_mtime for path in results)
    texts = [text for path in results for text in pq.read_table(path, columns=["response"])["response"].to_pylist()]
    return published - float(ready_file.read_text()), wall, texts


def _time_bare_engine(job_file: str) -> tuple[float, list[str | None]]:
    """Seconds of one engine for all rows at once, in the order in which the run would give them to it."""
    job = load_job(job_file, []).resolve(named_models())
    tokenizer = load_tokenizer(job.model)
    shards = sorted(list_shards(job).good, key=lambda shard: shard.name)
    slices = [slice_ for shard in shards for slice_ in plan_shard(job, shard, tokenizer)]
    requests = [
        replace(request, request_id=f"{slice_.shard}/{request.request_id}")
        for slice_ in slices
        for request in slice_.requests(job.sampling)
    ]
    num_threads = len(os.sched_getaffinity(0))
    engine = Engine(job.engine.model_copy(update={"num_threads": num_threads}))
    started = time.perf_counter()
    for request in requests:
        engine.add(request)
    done = {}
    while engine.has_unfinished():
        done.update({completion.request_id: completion for completion in engine.step()})
    seconds = time.perf_counter() - started
    first_row = dict(zip((s.name for s in shards), itertools.accumulate((s.num_rows for s in shards), initial=0)))
    texts: list[str | None] = [None] * sum(shard.num_rows for shard in shards)
    for slice_ in slices:
        for row in slice_.rows:
            completion = done.get(f"{slice_.shard}/{row.row_index}")
            if completion is not None:
                for index in (row.row_index, *row.duplicates):
                    texts[first_row[slice_.shard] + index] = completion.outputs[0].text
    return seconds, texts
