"""Plans a corpus of made-up token ids, each step in a process of its own, and says what each took at most.

`python tests/support/corpus_plan_memory.py NUM_ROWS NUM_SHARDS` prints JSON. Rows have 300 tokens, of which 250 are
those of one of many documents, scattered over all shards; a tenth of the rows are duplicates.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus_plan.key_ranges import choose_ranges, shards_of
from pipeline.corpus_plan.manifest import plan_folder, plan_settings, planned_shards
from pipeline.corpus_plan.merging import merge_range
from pipeline.corpus_plan.planning import finish_plan
from pipeline.corpus_plan.sorted_runs import sort_shard
from pipeline.job import Job, job_from_dict
from pipeline.prefix_plan import read_batches
from pipeline.shards import Shard
from pipeline.storage import Storage

DOCUMENT_TOKENS, OWN_TOKENS = 250, 50
ROWS_PER_DOCUMENT = 40
VOCABULARY = 100_000
PRINT = "f" * 64


class Numbers:
    """A tokenizer that makes 300 token ids of a number."""

    chat_template = None
    bos_token = None
    bos_token_id = None

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [self._tokens(int(text)) for text in texts]}

    @staticmethod
    def _tokens(number: int) -> list[int]:
        document = np.random.default_rng(number // ROWS_PER_DOCUMENT).integers(VOCABULARY, size=DOCUMENT_TOKENS)
        own = np.random.default_rng([number, 1]).integers(VOCABULARY, size=OWN_TOKENS)
        return [*document.tolist(), *own.tolist()]


def make_shards(folder: Path, num_rows: int, num_shards: int) -> tuple[Job, list[Shard]]:
    numbers = np.random.default_rng(0).permutation(num_rows)
    numbers = np.where(numbers % 10 == 9, numbers - 1, numbers)
    shards = []
    for i, own in enumerate(np.array_split(numbers, num_shards)):
        path = folder / f"s{i:05d}.parquet"
        pq.write_table(pa.table({"prompt": own.astype(str)}), path)
        info = Storage(str(folder)).info(path.name)
        assert info is not None
        shards.append(Shard(path.stem, info.uri, info.size_bytes, info.etag, len(own)))
    job = job_from_dict(
        {
            "input": {"path": str(folder), "prompt_column": "prompt"},
            "model": "m",
            "output": {"path": str(folder / "out")},
        }
    )
    return job, shards


def sort_all(job: Job, shards: list[Shard], folder: str) -> list[Any]:
    return [sort_shard(job, shard, Storage(job.output.path), folder, Numbers()) for shard in shards]


def merge_all(job: Job, folder: str, ranges: list[Any]) -> list[Any]:
    return [merge_range(Storage(job.output.path), folder, plan_settings(job.plan), one) for one in ranges]


def finish(job: Job, folder: str, sorted_shards: list[Any], plans: list[Any]) -> dict[str, int]:
    settings = plan_settings(job.plan)
    shards = shards_of(sorted_shards)
    manifest = finish_plan(Storage(job.output.path), folder, PRINT, settings, shards, plans)
    return {
        "slices": len(manifest.slices),
        "duplicates": manifest.totals.num_duplicates_within + manifest.totals.num_duplicates_across,
        "achievable_prefix_tokens": manifest.totals.achievable_prefix_tokens,
        "prompt_tokens": manifest.totals.prompt_tokens,
    }


def count_rows(shard: Shard) -> int:
    """Read a shard as planning does."""
    return sum(len(batch) for batch in read_batches(shard, ["prompt"]))


def high_water_mib() -> float:
    """The most memory that this process has held. Of the process alone: ru_maxrss is also what its parent had held."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _measure(results: Any, step: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    before, started, cpu = high_water_mib(), time.perf_counter(), time.process_time()
    value = step(*arguments)
    results.put((value, before, high_water_mib(), time.perf_counter() - started, time.process_time() - cpu))


def in_its_own_process(report: dict[str, Any], name: str, step: Callable[..., Any], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_measure, args=(results, step, arguments))
    process.start()
    value, before, most, wall_s, cpu_s = results.get()
    process.join()
    report[name] = {"start_mib": before, "peak_mib": most, "wall_s": wall_s, "cpu_s": cpu_s}
    return value


def measure(num_rows: int, num_shards: int) -> dict[str, Any]:
    """Peak memory of the processes that sort, choose ranges, merge and finish; MiB and seconds."""
    report: dict[str, Any] = {"rows": num_rows, "shards": num_shards}
    with tempfile.TemporaryDirectory() as folder:
        job, shards = make_shards(Path(folder), num_rows, num_shards)
        plan = plan_folder(PRINT, plan_settings(job.plan), planned_shards(shards))
        sorted_shards = in_its_own_process(report, "sort", sort_all, job, shards, plan)
        ranges = in_its_own_process(report, "choose", choose_ranges, sorted_shards)
        report["runs"], report["ranges"] = sum(len(one.runs) for one in sorted_shards), len(ranges)
        report["sorted_mib"] = sum(run.offsets[-1] for one in sorted_shards for run in one.runs) / 2**20
        plans = in_its_own_process(report, "merge", merge_all, job, plan, ranges)
        report["requests"] = sum(len(one.parts) for one in ranges)
        report |= in_its_own_process(report, "finish", finish, job, plan, sorted_shards, plans)
    return report


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2])), indent=1))
