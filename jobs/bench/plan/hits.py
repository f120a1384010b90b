"""Part `hits`: of the prompt tokens that need be computed once only, how many were found in an actor's cache.

With `scope: corpus`, by one actor and by four (one thread each). Achievable is what the trie of the whole corpus says,
so a prefix that two actors compute is a loss here. The baseline, `scope: shard` with one actor, is measured against the
same figure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.bench.plan.cases import PLAIN, SHARED, Case, documents, shared, write_case
from jobs.bench.plan.runs import Finished, run_case
from jobs.bench.result import Bar

MIN_SHARE = {1: 0.99, 4: 0.97}


def measure(folder: Path, console: Console) -> tuple[bool, list[Bar], dict[str, Any]]:
    """Run each corpus by one actor and four. Whether all rows were answered, the bars, and the bills' figures."""
    bars: list[Bar] = []
    record: dict[str, Any] = {}
    is_correct = True
    for number, case in enumerate(cases()):
        job_file = write_case(case, folder / str(number))
        runs = {
            f"{num_actors} {scope}": run_case(
                job_file,
                folder / str(number) / f"answers-{num_actors}-{scope}",
                [f"pool.num_actors={num_actors}", f"plan.scope={scope}"],
            )
            for num_actors, scope in ((1, "corpus"), (4, "corpus"), (1, "shard"))
        }
        achievable = runs["1 corpus"].bill.achievable_prefix_tokens
        for name, done in runs.items():
            share = _achieved(done) / achievable
            record[f"{case.name}, {name}"] = {
                "achieved_prefix_tokens": _achieved(done),
                "achievable_prefix_tokens": done.bill.achievable_prefix_tokens,
                "prompt_tokens": done.bill.prompt_tokens,
                "device_seconds": round(done.bill.device_seconds, 2),
            }
            num_actors, scope = name.split()
            bar = MIN_SHARE[int(num_actors)] if scope == "corpus" else None
            plural = "s" if num_actors != "1" else ""
            bars.append(Bar(f"hits: {case.name}, {num_actors} actor{plural}, scope {scope}", share, bar))
            console.print(f"{case.name}, {name}: {share:.2%} of achievable prefix hits", highlight=False)
            is_correct &= done.exit_code == 0 and done.bill.rows_error == 0
    return is_correct, bars, record


def _achieved(done: Finished) -> int:
    """Of rows that were computed: those of folded duplicates are no hits."""
    return done.bill.cached_tokens - done.bill.duplicate_prompt_tokens


def cases() -> list[Case]:
    """Documents scattered over eight shards, and, where it is there, GSM8K behind eight worked examples."""
    settings = {
        **PLAIN,
        "sampling": {"max_tokens": 4, "ignore_eos": True},
        "engine": {"num_threads": 1},
        "pool": {"num_cpus": 0.25},
        "plan": {"slice_tokens": 4096},  # some dozen slices, for four actors to have something to divide
    }
    found = [Case("documents", documents(60, 12), settings)]
    if (SHARED / "gsm8k_test_cot8").is_dir():
        found.append(Case("gsm8k_test_cot8", shared("gsm8k_test_cot8"), settings))
    return found
