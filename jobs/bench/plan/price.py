"""Part `price`: varied jobs are planned first, then run, and the bills compared with what the plans said.

Each job is planned as `shoal plan` does it, with a pilot, and then run whole by `shoal run` on this machine's CPU.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.bench.plan.cases import Case, price_cases, write_case
from jobs.bench.result import Bar
from jobs.named_models import named_models
from jobs.plan import PlanSettings, make_plan
from jobs.run import run
from pipeline.bill.ledger import Bill, read_bill
from pipeline.job import load_job
from pipeline.price.plan_file import Plan
from pipeline.storage import Storage

MIN_INSIDE = 0.9
MAX_MEDIAN_ERROR = 0.10


@dataclass(frozen=True, slots=True)
class Compared:
    """One case: what was expected and what came."""

    case: str
    plan: Plan
    bill: Bill
    plan_s: float
    exit_code: int

    @property
    def is_inside(self) -> bool:
        cost = self.plan.estimate.cost_usd
        return cost is not None and bool(cost.holds(self.bill.cost_usd))

    def error_of(self, name: str, actual: float) -> float:
        """Predicted over actual, less 1."""
        return float(getattr(self.plan.estimate, name).value / actual - 1) if actual else 0.0


def measure(folder: Path, console: Console) -> tuple[bool, list[Bar], dict[str, Any]]:
    """Plan and run every case. Whether all rows were answered, the bars, and a record per case."""
    compared: list[Compared] = []
    for number, case in enumerate(price_cases()):
        compared.append(compare(case, folder / str(number)))
        console.print(describe(compared[-1]), highlight=False)
    is_correct = all(one.exit_code == 0 and one.bill.rows == one.plan.estimate.num_rows for one in compared)
    return is_correct, _bars(compared), {"runs": [record(one) for one in compared]}


def _bars(compared: Sequence[Compared]) -> list[Bar]:
    def errors(name: str, actual: str) -> list[float]:
        return [abs(one.error_of(name, getattr(one.bill, actual))) for one in compared]

    inside = sum(one.is_inside for one in compared)
    cost = errors("cost_usd", "cost_usd")
    return [
        Bar(f"price: runs of {len(compared)} whose cost is inside the interval", inside / len(compared), MIN_INSIDE),
        Bar("price: median error of the cost", statistics.median(cost), MAX_MEDIAN_ERROR, at_least=False),
        Bar("price: largest error of the cost", max(cost), None),
        Bar("price: median error of the busy time", statistics.median(errors("busy_s", "busy_s")), None),
        Bar(
            "price: median error of completion tokens",
            statistics.median(errors("completion_tokens", "completion_tokens")),
            None,
        ),
        Bar("price: median seconds of a plan", statistics.median(one.plan_s for one in compared), None, unit="s"),
    ]


def compare(case: Case, folder: Path) -> Compared:
    """Plan a case and run it, in an empty folder."""
    job_file = write_case(case, folder)
    started = time.perf_counter()
    job = load_job(str(job_file)).resolve(named_models())
    plan, _, _ = make_plan(job, PlanSettings(sample_rows=case.sample_rows), lambda text: None)
    plan_s = time.perf_counter() - started
    with contextlib.redirect_stdout(io.StringIO()):
        exit_code = run(str(job_file), [])
    return Compared(case.name, plan, read_bill(Storage(job.output.path)), plan_s, exit_code)


def describe(one: Compared) -> str:
    """A line per case, for whoever waits."""
    found, bill = one.plan.estimate, one.bill
    device, busy = found.device_s, found.busy_s
    if device is None or busy is None or found.completion_tokens is None:
        return f"{one.case}: no time was predicted: {'; '.join(found.notes)}"
    held = "inside" if one.is_inside else "OUTSIDE"
    return (
        f"{one.case}: {held}; device {device.value:.1f} s ({device.low or 0:.1f} to {device.high or 0:.1f}) predicted, "
        f"{bill.device_seconds:.1f} actual; busy {busy.value:.1f} / {bill.busy_s:.1f}, "
        f"load {found.load_s or 0:.1f} / {bill.load_s:.1f}, idle {found.idle_s or 0:.1f} / {bill.idle_s:.1f}, "
        f"tokens {found.completion_tokens.value:,.0f} / {bill.completion_tokens:,}"
    )


def record(one: Compared) -> dict[str, Any]:
    found, bill = one.plan.estimate, one.bill
    assert found.device_s is not None and found.busy_s is not None and found.completion_tokens is not None
    return {
        "case": one.case,
        "is_inside": one.is_inside,
        "device_s": [round(x, 3) for x in (found.device_s.value, found.device_s.low or 0, found.device_s.high or 0)],
        "actual_device_s": round(bill.device_seconds, 3),
        "busy_s": [round(found.busy_s.value, 3), round(bill.busy_s, 3)],
        "load_s": [round(found.load_s or 0, 3), round(bill.load_s, 3)],
        "idle_s": [round(found.idle_s or 0, 3), round(bill.idle_s, 3)],
        "completion_tokens": [round(found.completion_tokens.value), bill.completion_tokens],
        "slower_than_steps": round(found.slower_than_steps or 0, 3),
        "prefix_hit_rate": [round(found.achieved_hit_rate or 0, 4), round(bill.prefix_hit_rate or 0, 4)],
        "plan_s": round(one.plan_s, 2),
    }
