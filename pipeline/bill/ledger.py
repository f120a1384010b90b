"""The bill of an output: what its rows cost, what the workers cost besides, and what was saved.

Sums over the published `metrics/` and over `_runs/`, where each run leaves what belongs to no shard: idle time
after the last slice, time lost with slices that were dropped. Knows no Ray; the run and `shoal status` read the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow.parquet as pq

from pipeline.bill.pricing import SECONDS_PER_HOUR
from pipeline.drafts import DraftCounts, DrafterCount, acceptance_length, sum_drafts
from pipeline.parquet import read_metadata
from pipeline.results import FOOTER_THREADS, METRICS
from pipeline.slices import SLICES, SliceName, list_slices
from pipeline.storage import Storage

RUNS = "_runs"
ROUNDING = 1e-9
"""Relative tolerance of every sum here: parts are added with `math.fsum`, so only their own rounding is left."""


_COLUMNS_OF_LATER_VERSIONS: dict[str, Any] = {
    "num_verify_steps": 0,
    "num_drafter_failures": 0,
    "saved_by_speculation_seconds": 0.0,
    "drafters": [],
    "evicted_prefix_tokens": 0,
    "border_prefix_tokens": 0,
    "short_prefix_tokens": 0,
}
"""What metrics of earlier versions lack; they are read all the same."""


class LedgerError(AssertionError):
    """Parts of the bill do not add up to the whole: a bug, and nothing is published as done."""


@dataclass(slots=True)
class WorkerTime:
    """Seconds that devices were held and no row accounts for, at a price."""

    idle_s: float = 0.0
    lost_s: float = 0.0
    usd_per_device_hour: float = 0.0

    @property
    def cost_usd(self) -> float:
        return (self.idle_s + self.lost_s) * self.usd_per_device_hour / SECONDS_PER_HOUR


@dataclass(slots=True)
class RunRecord:
    """One run over an output, written when it ends, however it ends short of being killed.

    scope: what was planned together; plan: why, in one line. recomputed_prefix_tokens: of prompts, computed
    by several actors each, since a corpus' prefix order was shared out among them; where scope is `shard` that is not
    known.
    """

    run: str
    started_at: float
    finished_at: float = 0.0
    exit_code: int = 0
    outcome: str = ""
    num_slices_computed: int = 0
    num_slices_found: int = 0
    num_engine_rebuilds: int = 0
    scope: str = "shard"
    plan: str = ""
    recomputed_prefix_tokens: int = 0
    held_s: float = 0.0
    after_slices: WorkerTime = field(default_factory=WorkerTime)
    notes: list[str] = field(default_factory=list)

    @property
    def wall_s(self) -> float:
        return self.finished_at - self.started_at


@dataclass(slots=True)
class Bill:
    """Sums over all published shards and all runs; `device_seconds` = busy + load + idle + lost, exactly.

    `drafted_tokens` and `accepted_tokens` are the rows'; `drafters` and the rates have the drafts of answers that were
    thrown away too."""

    num_shards: int = 0
    rows: int = 0
    rows_ok: int = 0
    rows_error: int = 0
    rows_duplicate: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    num_verify_steps: int = 0
    num_drafter_failures: int = 0
    drafters: list[DrafterCount] = field(default_factory=list)
    duplicate_prompt_tokens: int = 0
    duplicate_completion_tokens: int = 0
    achievable_prefix_tokens: int = 0
    recomputed_prefix_tokens: int = 0
    evicted_prefix_tokens: int = 0
    border_prefix_tokens: int = 0
    short_prefix_tokens: int = 0
    device_seconds: float = 0.0
    busy_s: float = 0.0
    load_s: float = 0.0
    idle_s: float = 0.0
    lost_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    write_s: float = 0.0
    wall_s: float = 0.0
    cost_usd: float = 0.0
    rows_usd: float = 0.0
    overhead_usd: float = 0.0
    usd_per_million_tokens: float | None = None
    tokens_per_second: float | None = None
    prefix_hit_rate: float | None = None
    prefix_hit_rate_achievable: float | None = None
    acceptance_rate: float | None = None
    acceptance_length: float | None = None
    saved_by_prefix_cache_estimate_s: float = 0.0
    saved_by_folding_estimate_s: float = 0.0
    saved_by_speculation_estimate_s: float = 0.0
    price_source: str = ""
    devices: str = ""
    num_runs: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def has_drafts(self) -> bool:
        return self.num_drafter_failures > 0 or any(drafter.drafted_tokens for drafter in self.drafters)

    @property
    def computed_prompt_tokens(self) -> int:
        return self.prompt_tokens - self.duplicate_prompt_tokens

    @property
    def computed_tokens(self) -> int:
        return self.computed_prompt_tokens + self.completion_tokens - self.duplicate_completion_tokens


def add_up(metrics: Sequence[dict[str, Any]], runs: Sequence[RunRecord]) -> Bill:
    """The bill of these shards (rows of METRICS_SCHEMA) and runs; LedgerError if rows or costs do not add up."""

    def total(column: str) -> Any:
        return sum(row[column] for row in metrics)

    def exact(column: str) -> float:
        return math.fsum(row[column] for row in metrics)

    same = (
        "rows_ok",
        "rows_error",
        "rows_duplicate",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "drafted_tokens",
        "accepted_tokens",
        "duplicate_prompt_tokens",
        "duplicate_completion_tokens",
        "achievable_prefix_tokens",
    )
    bill = Bill(num_shards=len(metrics), rows=total("rows_in"), num_runs=len(runs))
    for column in same:
        setattr(bill, column, total(column))
    bill.recomputed_prefix_tokens = sum(run.recomputed_prefix_tokens for run in runs)
    for column in ("evicted_prefix_tokens", "border_prefix_tokens", "short_prefix_tokens"):
        setattr(bill, column, total(column))
    bill.busy_s = exact("device_seconds")
    bill.load_s = exact("load_seconds")
    bill.idle_s = math.fsum([exact("idle_seconds"), *(run.after_slices.idle_s for run in runs)])
    bill.lost_s = math.fsum([exact("lost_seconds"), *(run.after_slices.lost_s for run in runs)])
    bill.prefill_s, bill.decode_s = exact("prefill_seconds"), exact("decode_seconds")
    bill.write_s = exact("write_seconds")
    bill.device_seconds = math.fsum([bill.busy_s, bill.load_s, bill.idle_s, bill.lost_s])
    bill.rows_usd = exact("cost_usd")
    bill.overhead_usd = math.fsum([exact("overhead_usd"), *(run.after_slices.cost_usd for run in runs)])
    bill.cost_usd = math.fsum([bill.rows_usd, bill.overhead_usd])
    bill.wall_s = math.fsum(run.wall_s for run in runs)
    bill.price_source = _joined(row["price_source"] for row in metrics)
    bill.devices = _joined(row["device"] for row in metrics)
    _add_drafts(bill, sum_drafts(_drafts_of(row) for row in metrics))
    bill.notes = sorted({note for row in metrics for note in row["notes"]} | {n for run in runs for n in run.notes})
    _add_rates(bill)
    _check(bill, metrics, runs)
    return bill


def read_bill(output: Storage) -> Bill:
    """Add up what is published; of an unfinished output, what there is so far."""
    return add_up(read_metrics(output), read_runs(output))


def read_metrics(output: Storage) -> list[dict[str, Any]]:
    def read(path: str) -> dict[str, Any]:
        with output.open_input(path) as source:
            (row,) = pq.ParquetFile(source).read().to_pylist()
        return {**_COLUMNS_OF_LATER_VERSIONS, **row}

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return list(pool.map(read, [file.path for file in output.list(METRICS)]))


def read_runs(output: Storage) -> list[RunRecord]:
    runs = []
    for file in output.list(RUNS):
        data = json.loads(output.read_bytes(file.path))
        runs.append(RunRecord(**{**data, "after_slices": WorkerTime(**data["after_slices"])}))
    return sorted(runs, key=lambda run: run.started_at)


def write_run(output: Storage, run: RunRecord) -> None:
    output.write_whole(f"{RUNS}/{run.run}.json", json.dumps(asdict(run), indent=2).encode())


@dataclass(slots=True)
class InProgress:
    """Slices that are published of shards that are not."""

    num_shards: int = 0
    num_slices: int = 0
    rows: int = 0
    slices_by_shard: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_in_progress(output: Storage) -> InProgress:
    """What lies in `_slices/`: one listing, and one footer per slice."""
    found = InProgress()
    slices = list_slices(output)
    for shard, names in slices.items():
        latest: dict[int, SliceName] = {name.index: name for name in names.values()}
        found.slices_by_shard[shard] = (len(latest), max(name.num_slices for name in names.values()))
    files = [file for file in output.list(SLICES) if SliceName.parse(file.path.rpartition("/")[2])]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        footers = list(pool.map(lambda file: read_metadata(output, file), files))
    found.num_shards, found.num_slices = len(slices), len(files)
    published = {file.path.rpartition("/")[2].removesuffix(".parquet") for file in output.list(METRICS)}
    found.rows = sum(_count_rows(footer.get("summary", {}), published) for footer in footers)
    return found


def _count_rows(summary: dict[str, Any], published: set[str]) -> int:
    """Rows of a slice that are in no results yet: those of a corpus are of several shards, of which some may be."""
    by_shard = summary.get("by_shard")
    if by_shard is None:
        return int(summary.get("rows", 0))
    return sum(rows for shard, (rows, _) in by_shard.items() if shard not in published)


def _add_rates(bill: Bill) -> None:
    uncached = bill.prompt_tokens - bill.cached_tokens
    cached = bill.cached_tokens - bill.duplicate_prompt_tokens
    completions = bill.completion_tokens - bill.duplicate_completion_tokens
    prefill = bill.prefill_s / uncached if uncached else 0.0
    decode = bill.decode_s / completions if completions else 0.0
    bill.saved_by_prefix_cache_estimate_s = cached * prefill
    bill.saved_by_folding_estimate_s = (
        bill.duplicate_prompt_tokens * prefill + bill.duplicate_completion_tokens * decode
    )
    bill.prefix_hit_rate = _ratio(cached, bill.computed_prompt_tokens)
    bill.prefix_hit_rate_achievable = _ratio(bill.achievable_prefix_tokens, bill.computed_prompt_tokens)
    bill.tokens_per_second = _ratio(bill.computed_tokens, bill.busy_s)
    bill.usd_per_million_tokens = _ratio(bill.cost_usd * 1e6, bill.computed_tokens)


def _drafts_of(row: dict[str, Any]) -> DraftCounts:
    return DraftCounts(
        row["num_verify_steps"],
        row["num_drafter_failures"],
        row["saved_by_speculation_seconds"],
        [DrafterCount(**drafter) for drafter in row["drafters"]],
    )


def _add_drafts(bill: Bill, drafts: DraftCounts) -> None:
    bill.num_verify_steps, bill.num_drafter_failures = drafts.num_verify_steps, drafts.num_failures
    bill.drafters = drafts.drafters
    bill.acceptance_rate = _ratio(drafts.accepted_tokens, drafts.drafted_tokens)
    bill.acceptance_length = acceptance_length(drafts.accepted_tokens, drafts.num_verify_steps)
    bill.saved_by_speculation_estimate_s = drafts.saved_s


def _check(bill: Bill, metrics: Sequence[dict[str, Any]], runs: Sequence[RunRecord]) -> None:
    if bill.rows != bill.rows_ok + bill.rows_error:
        raise LedgerError(f"{bill.rows} rows in, {bill.rows_ok} answered and {bill.rows_error} errors")
    at_price = math.fsum(
        [
            *(_priced(row) for row in metrics),
            *(run.after_slices.cost_usd for run in runs),
        ]
    )
    has_prices = all(row["usd_per_device_hour"] is not None for row in metrics if row["num_slices"])
    if has_prices and not math.isclose(at_price, bill.cost_usd, rel_tol=ROUNDING, abs_tol=1e-12):
        raise LedgerError(
            f"device time at its price is {at_price} USD, and rows and overheads cost {bill.cost_usd} USD"
        )


def _priced(row: dict[str, Any]) -> float:
    seconds = [row[f"{part}_seconds"] for part in ("device", "load", "idle", "lost")]
    return math.fsum(seconds) * (row["usd_per_device_hour"] or 0.0) / SECONDS_PER_HOUR


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _joined(words: Iterable[str]) -> str:
    return ", ".join(sorted(set(words) - {""}))
