"""Part `planning`: a corpus of many rows planned as one, in processes of their own, as the tasks of a run do it.

Memory is the peak of each process. What planning takes of a run: core-seconds of planning per row over those of an
engine per row, which answers neighbours in that plan with 32 tokens each, on all cores. The bar is that of the model of
`shoal bench engine` (135 million weights: most that are run are larger, and take more); the demo's is beside it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console

from actors.config import EngineConfig
from actors.engine import Engine
from actors.requests import Request, SamplingParams
from actors.weights.checkpoint import load_tokenizer
from jobs.bench.engine import VOCAB, make_model
from jobs.bench.result import Bar
from jobs.named_models import named_models
from pipeline.corpus_plan.key_ranges import choose_ranges, shards_of
from pipeline.corpus_plan.manifest import CorpusManifest, plan_folder, plan_settings, planned_shards, read_slice
from pipeline.corpus_plan.merging import merge_range
from pipeline.corpus_plan.planning import finish_plan
from pipeline.corpus_plan.sorted_runs import sort_shard
from pipeline.job import Job, load_job
from pipeline.plan_tokenizer import planning_tokenizer
from pipeline.shards import list_shards
from pipeline.storage import Storage

ROW_TOKENS = 300
QUESTIONS = 10
ROWS_PER_SHARD = 25_000
SENTENCES = 5000
ANSWERED_ROWS, ANSWER_TOKENS = 64, 32

MAX_WORKER_GIB = 2.0
MAX_SHARE = 0.02
FLAT_GIB = 0.25
"""A driver that grows by less while all rows are planned is flat."""


def measure(folder: Path, console: Console, num_rows: int) -> tuple[bool, list[Bar], dict[str, Any]]:
    """Plan `num_rows` rows; whether each is in one slice, the bars, and what was planned."""
    job = _write_job(folder, num_rows, console)
    spent = _Spent(console)
    started = time.perf_counter()
    manifest, driver_gib = _plan(job, spent)
    wall_s = time.perf_counter() - started
    num_planned = sum(len(read_slice(Storage(job.output.path), manifest, i).row_indices) for i in _some(manifest))
    expected = sum(manifest.slices[i].num_rows for i in _some(manifest))
    is_correct = manifest.totals.num_rows == num_rows and num_planned == expected
    per_row_s = spent.seconds / num_rows
    shares = {}
    for name, make in _models(folder).items():
        row_s = _core_seconds_per_row(make(), job, manifest)
        shares[name] = per_row_s / (per_row_s + row_s)
        console.print(
            f"planning: {per_row_s * 1e6:.0f} us of a core per row, {name}: {row_s * 1e3:.2f} ms", highlight=False
        )
    mean_tokens = manifest.totals.prompt_tokens / max(1, manifest.totals.num_rows)
    bars = [
        Bar("planning: share of the run, 135M weights", shares["135M"], MAX_SHARE, at_least=False),
        Bar("planning: share of the run, the demo's model", shares["demo"], None),
        Bar("planning: peak memory of a worker", spent.peak_gib, MAX_WORKER_GIB, at_least=False, unit="GiB"),
        Bar("planning: growth of the driver", driver_gib, FLAT_GIB, at_least=False, unit="GiB"),
        Bar("planning: rows per second and core", num_rows / spent.seconds, None),
    ]
    record = {
        "rows": num_rows,
        "mean_prompt_tokens": round(mean_tokens, 1),
        "core_seconds": round(spent.seconds, 1),
        "wall_s": round(wall_s, 1),
        "slices": len(manifest.slices),
        "seconds_by_step": {name: round(seconds, 1) for name, seconds in spent.by_step.items()},
    }
    return is_correct, bars, record


class _Spent:
    """What the planning processes took: seconds, the memory of the largest, and that of the driver at the most."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.by_step: dict[str, float] = {}
        self.peak_gib = 0.0
        self.driver_gib = 0.0

    @property
    def seconds(self) -> float:
        return sum(self.by_step.values())

    def note(self, step: str, seconds: float, peak_gib: float) -> None:
        self.by_step[step] = self.by_step.get(step, 0.0) + seconds
        self.peak_gib = max(self.peak_gib, peak_gib)
        self.driver_gib = max(self.driver_gib, _resident_gib())

    def say(self, step: str, num_done: int, num_tasks: int) -> None:
        if num_done == num_tasks or num_done % max(1, num_tasks // 10) == 0:
            self._console.print(
                f"planning: {step} {num_done} of {num_tasks}, {self.seconds:.0f} s, {self.peak_gib:.2f} GiB",
                highlight=False,
            )


def _plan(job: Job, spent: _Spent) -> tuple[CorpusManifest, float]:
    """The plan, and by how many GiB this process grew meanwhile."""
    storage, settings = Storage(job.output.path), plan_settings(job.plan)
    shards = list_shards(job).good
    folder = plan_folder(job.fingerprint(), settings, planned_shards(shards))
    before = _resident_gib()
    context = multiprocessing.get_context("spawn")  # a fork would begin with all that this process holds
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=context) as pool:
        tasks = [(_sort, (job, shard, folder)) for shard in shards]
        sorted_shards = _run_all(pool, "sorting", tasks, spent)
        ranges = choose_ranges(sorted_shards)
        plans = _run_all(pool, "merging", [(_merge, (job, folder, range_)) for range_ in ranges], spent)
    manifest = finish_plan(storage, folder, job.fingerprint(), settings, shards_of(sorted_shards), plans)
    return manifest, max(spent.driver_gib, _resident_gib()) - before


def _run_all(
    pool: ProcessPoolExecutor, step: str, tasks: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], spent: _Spent
) -> list[Any]:
    """The tasks' results, in their order."""
    futures: list[Future[Any]] = [pool.submit(function, *arguments) for function, arguments in tasks]
    left, num_done = set(futures), 0
    while left:
        done, left = wait(left, return_when=FIRST_COMPLETED)
        for future in done:
            _, seconds, peak_gib = future.result()
            num_done += 1
            spent.note(step, seconds, peak_gib)
            spent.say(step, num_done, len(futures))
    return [future.result()[0] for future in futures]


def _sort(job: Job, shard: Any, folder: str) -> tuple[Any, float, float]:
    started = time.process_time()
    found = sort_shard(job, shard, Storage(job.output.path), folder, planning_tokenizer(job))
    return found, time.process_time() - started, _peak_gib()


def _merge(job: Job, folder: str, range_: Any) -> tuple[Any, float, float]:
    started = time.process_time()
    plan = merge_range(Storage(job.output.path), folder, plan_settings(job.plan), range_)
    return plan, time.process_time() - started, _peak_gib()


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _resident_gib() -> float:
    """Of this process now: what it held before, while it made the corpus, is not to hide that it grows."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def _some(manifest: CorpusManifest) -> range:
    """Up to a hundred slices, all over the plan."""
    return range(0, len(manifest.slices), max(1, len(manifest.slices) // 100))


def _write_job(folder: Path, num_rows: int, console: Console) -> Job:
    """Documents with ten questions each, scattered over shards; a prompt has ROW_TOKENS tokens or a few more."""
    (folder / "corpus").mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = np.array(["".join(chr(c) for c in rng.integers(97, 123, rng.integers(2, 9))) for _ in range(2000)])
    sentences = [" ".join(words[rng.integers(0, len(words), 8)]) + ". " for _ in range(SENTENCES)]
    tokenizer = load_tokenizer(named_models()["demo"])
    mean_tokens = len(tokenizer("".join(sentences[:500]), add_special_tokens=False, verbose=False)["input_ids"]) / 500
    num_sentences = max(2, math.ceil(ROW_TOKENS / mean_tokens))
    num_shared = round(num_sentences * 2 / 3)
    documents = (num_rows + QUESTIONS - 1) // QUESTIONS
    order = rng.permutation(num_rows)
    for number, start in enumerate(range(0, num_rows, ROWS_PER_SHARD)):
        prompts = []
        for row in order[start : start + ROWS_PER_SHARD].tolist():
            document, own = np.random.default_rng(row % documents), np.random.default_rng(documents + row)
            chosen = [
                *document.integers(0, SENTENCES, num_shared),
                *own.integers(0, SENTENCES, num_sentences - num_shared),
            ]
            prompts.append("".join(sentences[i] for i in chosen))
        pq.write_table(pa.table({"prompt": prompts}), folder / "corpus" / f"{number:05d}.parquet")
    console.print(f"planning: {num_rows:,} rows written", highlight=False)
    job_file = folder / "job.yaml"
    job_file.write_text(
        yaml.safe_dump(
            {
                "input": {"path": "corpus", "prompt_column": "prompt"},
                "model": "demo",
                "output": {"path": "planned"},
                "sampling": {"max_tokens": ANSWER_TOKENS},
            }
        )
    )
    return load_job(str(job_file)).resolve(named_models())


def _models(folder: Path) -> dict[str, Callable[[], str]]:
    def large() -> str:
        (folder / "model").mkdir()
        return make_model(folder / "model")

    return {"demo": lambda: named_models()["demo"], "135M": large}


def _core_seconds_per_row(model: str, job: Job, manifest: CorpusManifest) -> float:
    """Of an engine that answers neighbours of the plan on all cores; the same token ids by any model."""
    num_cores = len(os.sched_getaffinity(0))
    engine = Engine(EngineConfig(model=model, num_threads=num_cores))
    slice_ = read_slice(Storage(job.output.path), manifest, len(manifest.slices) // 2)
    sampling = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
    requests = [replace(request, sampling=sampling) for request in slice_.requests(sampling)[:ANSWERED_ROWS]]
    assert all(max(request.prompt_token_ids) < VOCAB for request in requests)
    engine.add(Request("warm-up", [1] * 8, sampling))
    while engine.has_unfinished():
        engine.step()
    started = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.has_unfinished():
        engine.step()
    return (time.perf_counter() - started) * num_cores / len(requests)
