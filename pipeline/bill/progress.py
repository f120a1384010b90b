"""What people see of a run: a live line on a terminal, plain lines elsewhere, and one table at the end: the bill.

Counts events, prints numbers; decides nothing. Called by `jobs.run` and `jobs.status`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.bill.ledger import Bill, InProgress
from pipeline.bill.pricing import SECONDS_PER_HOUR
from pipeline.drafts import acceptance_length
from pipeline.events import (
    CorpusPlanned,
    CorpusPlanning,
    Event,
    ShardDone,
    ShardFailed,
    ShardPlanned,
    SliceDone,
)
from pipeline.price.plan_file import Figure, Plan

LINE_EVERY_S = 10
PLAIN_WIDTH = 120


@dataclass(slots=True)
class Tally:
    """A run so far. Rows count what earlier runs have done too; tokens, time and cost are this run's only.

    published: the shards that were done before; rows of theirs in a slice of a corpus are counted already.
    """

    rows_total: int
    rows_done: int = 0
    rows_error: int = 0
    num_shards: int = 0
    shards_done: int = 0
    slices_done: int = 0
    slices_found: int = 0
    slices_in_view: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    num_verify_steps: int = 0
    cost_usd: float = 0.0
    slice_wall_s: float = 0.0
    num_engine_rebuilds: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    published: frozenset[str] = frozenset()
    planning: CorpusPlanning | None = None
    planned: CorpusPlanned | None = None
    started_at: float = field(default_factory=time.monotonic)
    first_slice_at: float | None = None
    _rows_new: int = 0
    _rows_of_shard: dict[str, int] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        if isinstance(event, SliceDone):
            self._add_slice(event)
        elif isinstance(event, ShardPlanned):
            self.slices_in_view += event.num_slices
        elif isinstance(event, CorpusPlanning):
            self.planning = event
        elif isinstance(event, CorpusPlanned):
            self.planned = event
            self.slices_in_view += event.num_slices
        elif isinstance(event, ShardDone):
            self.shards_done += 1
            self.rows_done += event.metrics.rows_in - self._rows_of_shard.pop(event.metrics.shard, 0)
        elif isinstance(event, ShardFailed):
            self.failed[event.shard] = event.reason

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_at

    @property
    def tokens_per_s(self) -> float | None:
        if self.first_slice_at is None:
            return None
        return (self.prompt_tokens + self.completion_tokens) / max(1e-9, time.monotonic() - self.first_slice_at)

    @property
    def hit_rate(self) -> float | None:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None

    @property
    def time_left_s(self) -> float | None:
        """As long as the rows still missing take at this run's pace; None before there is one."""
        if self.first_slice_at is None or not self._rows_new:
            return None
        pace = self._rows_new / max(1e-9, time.monotonic() - self.first_slice_at)
        return (self.rows_total - self.rows_done) / pace

    def _add_slice(self, event: SliceDone) -> None:
        num_new = 0
        for shard, (rows, errors) in (event.by_shard or {event.shard: [event.rows, event.rows_error]}).items():
            if shard not in self.published:
                num_new += rows
                self.rows_error += errors
                self._rows_of_shard[shard] = self._rows_of_shard.get(shard, 0) + rows
        self.rows_done += num_new
        if not event.is_new:
            self.slices_found += 1
            return
        if self.first_slice_at is None:
            self.first_slice_at = time.monotonic() - event.wall_s
        self.slices_done += 1
        self._rows_new += num_new
        self.prompt_tokens += event.prompt_tokens
        self.cached_tokens += event.cached_tokens
        self.completion_tokens += event.completion_tokens
        self.drafted_tokens += event.drafted_tokens
        self.accepted_tokens += event.accepted_tokens
        self.num_verify_steps += event.num_verify_steps
        self.slice_wall_s += event.wall_s
        self.num_engine_rebuilds = max(self.num_engine_rebuilds, event.num_engine_rebuilds)
        self.cost_usd += event.cost_usd + event.overhead_s * event.usd_per_device_hour / SECONDS_PER_HOUR


def new_console() -> Console:
    """A terminal as wide as it is; elsewhere rich would cut at 80."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


class Progress:
    """A live line on a terminal; elsewhere one line at the start and then one in ten seconds at most."""

    def __init__(self, console: Console, tally: Tally) -> None:
        self._console = console
        self._tally = tally
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._last_line_at = time.monotonic()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, message: str) -> None:
        """A line that stays."""
        self._console.print(Text(message), soft_wrap=True)

    def update(self) -> None:
        if self._live is not None:
            self._live.update(_live_view(self._tally))
        elif time.monotonic() - self._last_line_at >= LINE_EVERY_S:
            self._last_line_at = time.monotonic()
            self.say(describe(self._tally))


def _live_view(tally: Tally) -> Table:
    view = Table.grid(padding=(0, 1))
    view.add_row(ProgressBar(total=max(1, tally.rows_total), completed=tally.rows_done, width=30), describe(tally))
    return view


def describe(tally: Tally) -> str:
    """A run in one line."""
    share = tally.rows_done / tally.rows_total if tally.rows_total else 1.0
    parts = [f"{tally.rows_done:,}/{tally.rows_total:,} rows ({share:.0%})"]
    if tally.first_slice_at is None and tally.planning is not None and tally.planned is None:
        parts.append(f"{_describe_planning(tally.planning)}, {seconds(tally.elapsed_s)}")
    elif tally.first_slice_at is None:
        what = "loading the model" if tally.planned is not None else "planning and loading the model"
        parts.append(f"{what}, {seconds(tally.elapsed_s)}")
    else:
        parts.append(f"{tally.tokens_per_s or 0:,.0f} tokens/s")
    if tally.hit_rate is not None:
        parts.append(f"prefix hits {tally.hit_rate:.0%}")
    if tally.drafted_tokens:
        length = acceptance_length(tally.accepted_tokens, tally.num_verify_steps)
        parts.append(
            f"drafts {tally.accepted_tokens / tally.drafted_tokens:.0%} accepted, {decimal(length)} tokens a step"
        )
    if tally.rows_error:
        parts.append(f"{tally.rows_error:,} error rows")
    parts.append(f"{usd(tally.cost_usd)} so far")
    if tally.time_left_s is not None:
        parts.append(f"{seconds(tally.time_left_s)} left")
    return " · ".join(parts)


def _describe_planning(planning: CorpusPlanning) -> str:
    sorted_ = f"{planning.shards_done:,} of {planning.num_shards:,} shards sorted"
    merged = f", {planning.ranges_done:,} of {planning.num_ranges:,} ranges merged" if planning.num_ranges else ""
    spilled = f"{planning.spilled_bytes / 1e6:,.0f} MB spilled"
    return f"planning the corpus: {planning.rows:,} rows, {sorted_}{merged}, {spilled}"


def bill_table(bill: Bill, place: str, in_progress: InProgress | None = None) -> Table:
    """The bill: rows, tokens, time and money of an output, and where its files are."""
    table = Table(title="bill", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    errors = f", {bill.rows_error:,} errors" if bill.rows_error else ", no errors"
    table.add_row("rows", f"{bill.rows:,}: {bill.rows_ok:,} answered{errors} ({bill.rows_duplicate:,} duplicates)")
    if in_progress is not None and in_progress.num_slices:
        table.add_row("", f"and {in_progress.rows:,} in {in_progress.num_slices} slices of unfinished shards")
    table.add_row("tokens", f"{bill.prompt_tokens:,} prompt, {bill.completion_tokens:,} completion")
    table.add_row(
        "prefix hits",
        f"{percent(bill.prefix_hit_rate)} of {percent(bill.prefix_hit_rate_achievable)} achievable"
        + _describe_lost(bill),
    )
    if bill.has_drafts:
        table.add_row("speculation", _describe_speculation(bill))
    table.add_row(
        "throughput", f"{bill.tokens_per_second or 0:,.0f} tokens per busy device-second (prompt + completion)"
    )
    table.add_row(
        "device time",
        f"{seconds(bill.device_seconds)}: busy {seconds(bill.busy_s)}, load {seconds(bill.load_s)}, "
        f"idle {seconds(bill.idle_s)}, lost {seconds(bill.lost_s)} ({bill.devices or 'no device used'})",
    )
    table.add_row(
        "cost",
        f"{usd(bill.cost_usd)}: rows {usd(bill.rows_usd)}, overhead {usd(bill.overhead_usd)}"
        + (f"; {usd(bill.usd_per_million_tokens)} per million tokens" if bill.usd_per_million_tokens else ""),
    )
    if bill.price_source:
        table.add_row("price", bill.price_source)
    by_drafts = f", speculation {signed_seconds(bill.saved_by_speculation_estimate_s)}" if bill.has_drafts else ""
    table.add_row(
        "saved (estimate)",
        f"prefix cache {seconds(bill.saved_by_prefix_cache_estimate_s)}, "
        f"folded duplicates {seconds(bill.saved_by_folding_estimate_s)}{by_drafts} of device time",
    )
    for note in bill.notes:
        table.add_row("note", note)
    table.add_row("files", place)
    return table


def predicted_table(plan: Plan, bill: Bill) -> Table:
    """What a plan expected beside what the bill has so far."""
    expected = plan.estimate
    lines: list[tuple[str, Figure | None, float, Callable[[float], str]]] = [
        ("rows", Figure(expected.num_rows), bill.rows, count),
        ("error rows", expected.num_error_rows, bill.rows_error, count),
        ("duplicates", expected.num_duplicates, bill.rows_duplicate, count),
        ("prompt tokens", expected.prompt_tokens, bill.prompt_tokens, count),
        ("completion tokens", expected.completion_tokens, bill.completion_tokens, count),
        ("busy time", expected.busy_s, bill.busy_s, seconds),
        ("device time", expected.device_s, bill.device_seconds, seconds),
        ("cost", expected.cost_usd, bill.cost_usd, usd),
    ]
    table = Table(title=f"predicted {plan.made_at}", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for heading in ("predicted", "from", "to", "actual"):
        table.add_column(heading, justify="right")
    for name, figure, actual, show in lines:
        if figure is not None:
            low, high = ("" if x is None or x == figure.value else show(x) for x in (figure.low, figure.high))
            table.add_row(name, show(figure.value), low, high, show(actual))
    return table


def _describe_lost(bill: Bill) -> str:
    """Why there were fewer hits than could be. What is none of the reasons counted: rows that were tried again, or
    begun in mid-slice while one before them that was not theirs to wait for computed their prefix."""
    lost = left = bill.achievable_prefix_tokens - (bill.cached_tokens - bill.duplicate_prompt_tokens)
    if lost <= 0:
        return ""
    # Of a corpus it was known before which borders of slices part actors; that is the most of what borders cost.
    known = [
        (bill.recomputed_prefix_tokens, "computed by several actors"),
        (bill.evicted_prefix_tokens, "evicted"),
        (bill.border_prefix_tokens - bill.recomputed_prefix_tokens, "where slices begin"),
        (bill.short_prefix_tokens, "too short to wait for"),
    ]
    parts = []
    for tokens, why in known:
        part = min(left, max(0, tokens))
        left -= part
        parts.append((part, why))
    parts.append((left, "otherwise"))
    return f"; {lost:,} tokens lost: " + ", ".join(f"{tokens:,} {why}" for tokens, why in parts if tokens)


def count(value: float) -> str:
    return f"{value:,.0f}"


def _describe_speculation(bill: Bill) -> str:
    """All from the drafters' own counts, so that the parts sum to the whole in mid-run too."""
    drafted = sum(drafter.drafted_tokens for drafter in bill.drafters)
    accepted = sum(drafter.accepted_tokens for drafter in bill.drafters)
    parts = ", ".join(f"{d.drafter} {d.accepted_tokens:,}/{d.drafted_tokens:,}" for d in bill.drafters)
    failed = f"; {bill.num_drafter_failures:,} switched off after a failure" if bill.num_drafter_failures else ""
    return (
        f"{drafted:,} drafted, {accepted:,} accepted ({percent(bill.acceptance_rate)}), "
        f"acceptance length {decimal(bill.acceptance_length)}; {parts}{failed}"
    )


def seconds(value: float) -> str:
    value = max(0.0, value)  # a difference of equal sums can be -1e-12
    if value < 100:
        return f"{value:.1f} s"
    if value < 2 * SECONDS_PER_HOUR:
        return f"{value / 60:.1f} min"
    return f"{value / SECONDS_PER_HOUR:.1f} h"


def usd(value: float) -> str:
    return f"${value:,.2f}" if value >= 10 else f"${value:.6f}".rstrip("0").rstrip(".") if value else "$0"


def signed_seconds(value: float) -> str:
    """An estimate that may be below 0."""
    return f"-{seconds(-value)}" if value <= -0.05 else seconds(value)


def decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
