"""`shoal bench plan`: what the plan over a corpus gains and costs, and how far the price before a run holds.

Parts, each of which `--only` runs alone:
    price     twenty jobs planned and run: how often the cost is inside the interval, and by how much it is off
    hits      achieved of achievable prefix hits, with one actor and with four
    scope     rows per second of `plan.scope: corpus` over `shard`, four actors, documents scattered over shards
    planning  the share of a run that planning takes, and its memory for 1,000,000 rows of 300 tokens (`--rows`)

Each part makes its baseline in the same run. Runs of all parts share one Ray.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.bench.plan import hits, planning, price, scope
from jobs.bench.result import Bar, BenchResult
from pipeline.graph import close_ray, start_ray

Part = tuple[bool, list[Bar], dict[str, Any]]
"""Whether all answers were right, the bars, and what they are made of."""

PARTS = ("price", "hits", "scope", "planning")
NUM_ROWS = 1_000_000


def bench_plan(only: str | None = None, rows: int | None = None) -> BenchResult:
    """Run the parts; some twenty minutes on two cores, half of them for the million rows.

    only: one of PARTS. rows: for the part planning, instead of a million.
    """
    if only is not None and only not in PARTS:
        raise ValueError(f"bench plan has no part {only!r}; choose one of {', '.join(PARTS)}")
    console = Console(stderr=True, width=150)
    # Planning first: it has processes of its own, and nothing else is to run beside them.
    parts: dict[str, Callable[[Path], Part]] = {
        "planning": lambda folder: planning.measure(folder, console, rows or NUM_ROWS),
        "price": lambda folder: price.measure(folder, console),
        "hits": lambda folder: hits.measure(folder, console),
        "scope": lambda folder: scope.measure(folder, console),
    }
    result = BenchResult("plan" if only is None else f"plan-{only}", True, [], {"parts": []})
    has_ray = False
    try:
        for name, measure in parts.items():
            if only not in (None, name):
                continue
            if name != "planning" and not has_ray:
                has_ray = start_ray()
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                is_correct, bars, record = measure(Path(folder))
            console.print(f"part {name}: {time.perf_counter() - started:.0f} s", highlight=False)
            result.is_correct &= is_correct
            result.bars += bars
            result.config["parts"].append(name)
            result.config[name] = record
    finally:
        if has_ray:
            close_ray()
    return result
