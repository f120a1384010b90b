"""`shoal bench kernels`: each kernel right first, then its time beside the machine's own roofs and beside torch.

Each part runs in a process of its own, so that a kernel that breaks its device takes no other part with it, and each
case's row is kept as soon as it is there: a row whose check failed has no times. On a CPU the parts run the CPU's
versions of the kernels at small sizes; with `--interpret`, the Triton kernels in Triton's interpreter (float16, no
times). Bars that need a GPU are then not measured, and say so.

Parts: machine (copy and bf16 matmul rates), linear, attention, small, step. `--only linear` runs one of them (and
machine); `--tune` sweeps int4_linear's tiles instead and rewrites kernels/tuned.json for this architecture.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from jobs.bench.kernels.bars import judge
from jobs.bench.kernels.table import markdown
from jobs.bench.result import BenchResult

PARTS = ("machine", "linear", "attention", "small", "step")
PART_TIMEOUT_S = 570
"""A little less than the ten minutes for which a GPU may be lent at a time."""

CHECKOUT = Path(__file__).parents[3]

Row = dict[str, Any]


def bench_kernels(only: str | None = None, interpret: bool = False, tune: bool = False) -> BenchResult:
    """Run the parts, in `machine`'s order first; is_correct is False if any case's check failed or broke."""
    console = Console(stderr=True)
    place = "interpreter" if interpret else "cuda" if torch.cuda.is_available() else "cpu"
    if tune:
        from jobs.bench.kernels.tune import tune_linear

        return tune_linear(only)
    if only is not None and only not in PARTS:
        raise ValueError(f"bench kernels: --only is {only!r}; it must be one of {', '.join(PARTS)}")
    parts = [part for part in PARTS if only in (None, part) or part == "machine"]
    rows: list[Row] = []
    for part in parts:
        if place == "interpreter" and part in ("machine", "step"):
            continue
        rows += run_part(part, place, rows)
    console.print(markdown(rows))
    config = {"place": place, "parts": parts, "kernels": rows}
    is_correct = all(row["is_correct"] for row in rows)
    # A part is kept in a file of its own, so that runs of single parts add up.
    name = "kernels" if only is None else f"kernels_{only}"
    return BenchResult(name, is_correct, judge(rows, place), config)


def run_part(part: str, place: str, known: list[Row]) -> list[Row]:
    """The rows of one part, from a process of its own; one that broke or took too long ends with a red row.

    Each row is printed as a line of JSON when it comes.
    """
    rates = [row for row in known if row["part"] == "machine"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"} if place == "interpreter" else dict(os.environ)
    command = [sys.executable, "-m", "jobs.bench.kernels.part", part, place, json.dumps(rates)]
    rows: list[Row] = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(  # noqa: S603
            command, cwd=CHECKOUT, env=environment, text=True, stdout=subprocess.PIPE, stderr=errors
        )
        stopper = threading.Timer(PART_TIMEOUT_S, process.kill)
        stopper.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"part"'):
                rows.append(json.loads(line))
                print(line, end="", flush=True)
        code = process.wait()
        was_stopped = not stopper.is_alive()
        stopper.cancel()
        if code:
            errors.seek(0)
            failure = f"stopped after {PART_TIMEOUT_S} s" if was_stopped else errors.read()[-1500:]
            rows.append({"part": part, "name": f"{part}: the rest", "is_correct": False, "failure": failure})
            print(json.dumps(rows[-1]), flush=True)
    return rows
