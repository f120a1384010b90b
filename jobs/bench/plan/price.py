"""`shoal bench plan`, so far its part about the price: varied jobs are planned first, then run, and the bills compared.

Each job is planned as `shoal plan` does it, with a pilot, and then run whole by `shoal run` on this machine's CPU; one
Ray serves all runs. Corpora are made here, and read from a folder `shared` beside the checkout where there is one.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console

from jobs.bench.result import Bar, BenchResult
from jobs.demo.main import JOB_FILE
from jobs.demo.tickets import write_corpus
from jobs.plan import PlanSettings, make_plan
from jobs.run import named_models, run
from pipeline.graph import close_ray, start_ray
from pipeline.job import load_job
from pipeline.ledger import Bill, read_bill
from pipeline.plan_file import Plan
from pipeline.storage import Storage

SHARED = Path(__file__).resolve().parents[3] / "shared" / "corpora"
MIN_INSIDE = 0.9
MAX_MEDIAN_ERROR = 0.10


@dataclass(frozen=True, slots=True)
class Case:
    """A job: its corpus, and the settings that differ from the demo's. sample_rows: of the plan."""

    name: str
    corpus: Callable[[Path], None]
    settings: dict[str, Any]
    sample_rows: int = 4000


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


def bench_plan() -> BenchResult:
    """Plan and run every case; some minutes on two cores."""
    console = Console(stderr=True, width=150)
    compared: list[Compared] = []
    with tempfile.TemporaryDirectory() as name:
        is_ours = start_ray()
        try:
            for number, case in enumerate(cases()):
                compared.append(compare(case, Path(name) / str(number)))
                console.print(describe(compared[-1]), highlight=False)
        finally:
            if is_ours:
                close_ray()
    errors = [abs(one.error_of("cost_usd", one.bill.cost_usd)) for one in compared]
    busy_errors = [abs(one.error_of("busy_s", one.bill.busy_s)) for one in compared]
    token_errors = [abs(one.error_of("completion_tokens", one.bill.completion_tokens)) for one in compared]
    bars = [
        Bar(
            "runs whose cost is inside the interval", sum(one.is_inside for one in compared) / len(compared), MIN_INSIDE
        ),
        Bar("median error of the cost", statistics.median(errors), MAX_MEDIAN_ERROR, at_least=False),
        Bar("largest error of the cost", max(errors), None),
        Bar("median error of the busy time", statistics.median(busy_errors), None),
        Bar("median error of completion tokens", statistics.median(token_errors), None),
        Bar("median seconds of a plan", statistics.median(one.plan_s for one in compared), None, unit="s"),
    ]
    is_correct = all(one.exit_code == 0 and one.bill.rows == one.plan.estimate.num_rows for one in compared)
    return BenchResult("plan", is_correct, bars, {"runs": [record(one) for one in compared]})


def compare(case: Case, folder: Path) -> Compared:
    """Plan a case and run it, in an empty folder."""
    (folder / "corpus").mkdir(parents=True)
    case.corpus(folder / "corpus")
    job_file = folder / "job.yaml"
    job_file.write_text(yaml.safe_dump(merged(yaml.safe_load(JOB_FILE.read_text()), case.settings)))
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


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections of `above` laid over those of `below`; None removes a section."""
    out = dict(below)
    for key, value in above.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = {**out.get(key, {}), **value} if isinstance(value, dict) else value
    return out


def cases() -> list[Case]:
    """Short and long, greedy and drawn, small batches and large ones, much and nothing shared."""
    plain: dict[str, Any] = {"input": {"prompt_column": "prompt"}, "prompt": None}
    made = [
        Case("tickets", tickets(1500), {}),
        Case("tickets, sampled", tickets(3000), {}, sample_rows=600),
        Case("few tickets", tickets(200), {}),
        Case("tickets, drawn", tickets(800), {"sampling": {"temperature": 1.0}}),
        Case("tickets, cut answers", tickets(1500), {"sampling": {"max_tokens": 12}}),
        Case("tickets, small batch", tickets(400), {"engine": {"max_num_seqs": 8}}),
        Case("tickets, three samples", tickets(400), {"sampling": {"temperature": 0.8, "n": 3}}),
        Case("tickets, no prefix cache", tickets(500), {"engine": {"enable_prefix_caching": False}}),
        Case("tickets, no drafts", tickets(1200), {"engine": {"speculative_config": {"method": "none"}}}),
        Case("tickets, plain weights", tickets(1000), {"engine": {"quantization": "none"}}),
        Case("documents", documents(120, 5), {**plain, "sampling": {"max_tokens": 48}}),
        Case(
            "documents, long answers", documents(40, 5), {**plain, "sampling": {"max_tokens": 200, "ignore_eos": True}}
        ),
        Case("documents, sampled", documents(500, 4), {**plain, "sampling": {"max_tokens": 24}}, sample_rows=500),
        Case("nothing shared", documents(700, 1), {**plain, "sampling": {"max_tokens": 32, "temperature": 0.7}}),
    ]
    read = [
        Case(name, shared(name), {**plain, "sampling": {"max_tokens": tokens}})
        for name, tokens in (
            ("gsm8k_test_chat", 32),
            ("gsm8k_test_cot8", 16),
            ("humaneval", 64),
            ("ifeval", 48),
            ("mgsm_11lang", 16),
            ("mt_bench", 100),
        )
        if (SHARED / name).is_dir()
    ]
    return made + read


def tickets(num_rows: int) -> Callable[[Path], None]:
    """The demo's corpus."""

    def write(folder: Path) -> None:
        write_corpus(folder, num_rows)

    return write


def documents(num_documents: int, num_questions: int) -> Callable[[Path], None]:
    """Made-up documents of 10 to 60 words with questions at their ends, scattered over eight shards."""

    def write(folder: Path) -> None:
        rng = np.random.default_rng(num_documents)
        words = ["".join(chr(c) for c in rng.integers(97, 123, rng.integers(2, 9))) for _ in range(500)]

        def text(num_words: int) -> str:
            return " ".join(words[i] for i in rng.integers(0, len(words), num_words))

        texts = [text(int(rng.integers(10, 60))) for _ in range(num_documents)]
        prompts = [f"{document}\n\n{text(8)}?" for document in texts for _ in range(num_questions)]
        order = rng.permutation(len(prompts))
        for number, part in enumerate(np.array_split(order, 8)):
            table = pa.table({"id": part, "prompt": [prompts[i] for i in part]})
            pq.write_table(table, folder / f"documents-{number}.parquet")

    return write


def shared(name: str) -> Callable[[Path], None]:
    """A corpus that lies beside the checkout."""

    def write(folder: Path) -> None:
        for path in sorted((SHARED / name).glob("*.parquet")):
            (folder / path.name).write_bytes(path.read_bytes())

    return write
