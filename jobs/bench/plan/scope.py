"""Part `scope`: documents with questions that are scattered over shards, planned as one corpus and shard by shard.

Four actors of one thread each answer twice the same rows with the same settings, in deterministic mode, so that every
answer has to be the same. Answers are short and documents long: what a corpus plan saves is their prompts. KV memory
holds a tenth of the documents, as it would of a corpus worth the name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.bench.plan.cases import PLAIN, Case, documents, write_case
from jobs.bench.plan.runs import run_case
from jobs.bench.result import Bar

NUM_DOCUMENTS, NUM_QUESTIONS = 64, 8
WORDS = (120, 160)
MIN_SPEEDUP = 1.5


def measure(folder: Path, console: Console) -> tuple[bool, list[Bar], dict[str, Any]]:
    """Whether all answers are the same, the bars, and both runs' times."""
    settings = {
        **PLAIN,
        "sampling": {"max_tokens": 4, "ignore_eos": True},
        "engine": {"num_threads": 1, "deterministic": True, "num_pages": 96, "max_num_seqs": 16},
        "pool": {"num_actors": 4, "num_cpus": 0.25},
        "plan": {"slice_tokens": 4096},
    }
    case = Case("documents", documents(NUM_DOCUMENTS, NUM_QUESTIONS, WORDS), settings)
    job_file = write_case(case, folder / "job")
    runs = {scope: run_case(job_file, folder / scope, [f"plan.scope={scope}"]) for scope in ("shard", "corpus")}
    for scope, done in runs.items():
        console.print(
            f"scope {scope}: {done.bill.rows / done.work_s:.1f} rows per second, busy {done.bill.busy_s:.1f} s of "
            f"{done.work_s:.1f} s by four actors",
            highlight=False,
        )
    shard, corpus = runs["shard"], runs["corpus"]
    answers, others = shard.answers(), corpus.answers()
    num_rows = sum(len(texts) for texts in answers.values())
    same = sum(a == b for name, texts in answers.items() for a, b in zip(texts, others.get(name, [])))
    is_correct = same == num_rows and all(done.exit_code == 0 and done.bill.rows_error == 0 for done in runs.values())
    bars = [
        Bar("scope: rows with the same answer", same / num_rows, 1.0),
        Bar("scope: rows per second, corpus over shard", shard.work_s / corpus.work_s, MIN_SPEEDUP, unit="x"),
        Bar("scope: whole run, corpus over shard", shard.wall_s / corpus.wall_s, None, unit="x"),
        Bar("scope: busy device time, shard over corpus", shard.bill.busy_s / corpus.bill.busy_s, None, unit="x"),
    ]
    record = {
        name: {
            "rows": done.bill.rows,
            "prompt_tokens": done.bill.prompt_tokens,
            "computed_prompt_tokens": done.bill.prompt_tokens - done.bill.cached_tokens,
            "work_s": round(done.work_s, 2),
            "wall_s": round(done.wall_s, 2),
            "busy_s": round(done.bill.busy_s, 2),
            "idle_s": round(done.bill.idle_s, 2),
        }
        for name, done in runs.items()
    }
    return is_correct, bars, {**record, "settings": {key: settings[key] for key in ("engine", "pool", "plan")}}
