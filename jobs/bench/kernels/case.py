"""What a case of the bench is, and how its row is made: checked first, timed only if the check held.

Knows no kernel; the files of the parts build cases.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from jobs.bench.kernels.timing import Times, measure
from kernels.compare import ErrorReport

Row = dict[str, Any]


@dataclass(slots=True)
class Prepared:
    """A kernel with its inputs. check: judges one run. num_bytes and num_flops: what it must move and compute.

    baselines: the same product or operation by somebody else, on the same inputs; a name may say "unavailable: why".
    facts: what else the row should say.
    """

    run: Callable[[], Any]
    check: Callable[[], ErrorReport | bool]
    num_bytes: int = 0
    num_flops: int = 0
    baselines: dict[str, Callable[[], Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Case:
    """name: unique in its part, and what a bar refers to."""

    part: str
    name: str
    prepare: Callable[[], Prepared]


def run_case(case: Case, device: torch.device, rates: Row, is_timed: bool) -> Row:
    """The case's row; whatever goes wrong in it is its failure, and other cases go on."""
    row: Row = {"part": case.part, "name": case.name, "is_correct": False}
    try:
        prepared = case.prepare()
        report = prepared.check()
        row |= prepared.facts
        row["is_correct"] = report if isinstance(report, bool) else report.holds
        if isinstance(report, ErrorReport):
            row |= {"error": report.error, "error_budget": report.budget}
        if not row["is_correct"]:
            row["failure"] = str(report)
        elif is_timed:
            row |= describe_times(measure(prepared.run, device), prepared, rates)
            row["baselines"] = {name: time_baseline(run, device, row) for name, run in prepared.baselines.items()}
    except Exception:  # recorded as red: the other cases go on
        row |= {"is_correct": False, "failure": traceback.format_exc()[-1500:]}
    return row


def describe_times(times: Times, prepared: Prepared, rates: Row) -> Row:
    """Milliseconds, rates, and shares of the machine's own rates where these were measured."""
    seconds = times.p50
    row: Row = {"p20_ms": times.p20 * 1e3, "p50_ms": seconds * 1e3, "p80_ms": times.p80 * 1e3, "timed": times.how}
    if prepared.num_bytes:
        row["gb_per_s"] = prepared.num_bytes / seconds / 1e9
        if rates.get("copy_gb_per_s"):
            row["share_of_copy"] = row["gb_per_s"] / rates["copy_gb_per_s"]
    if prepared.num_flops:
        row["tflop_per_s"] = prepared.num_flops / seconds / 1e12
        if rates.get("matmul_tflop_per_s"):
            row["share_of_matmul"] = row["tflop_per_s"] / rates["matmul_tflop_per_s"]
    return row


def time_baseline(run: Callable[[], Any], device: torch.device, row: Row) -> Row:
    """Its median and how many times as long it takes; a baseline that does not run is said, not hidden."""
    try:
        times = measure(run, device)
    except Exception as error:  # somebody else's code, on whatever version is here
        return {"failure": f"{type(error).__name__}: {error}"[:300]}
    return {"p50_ms": times.p50 * 1e3, "speedup": times.p50 * 1e3 / row["p50_ms"]}


def fill(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int, scale: float = 1.0) -> Tensor:
    """Normal random numbers, the same on every kind of device up to its generator."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)
