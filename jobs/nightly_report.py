"""What people see of a night: what is to be done, what it may cost, the table of nights, and what is not as usual."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Collection, Sequence

from rich.console import Console
from rich.table import Table

from pipeline.bill.progress import count, percent, seconds, usd
from pipeline.job import Job
from pipeline.night.history import SUCCESS, Night, read_nights
from pipeline.night.usual import MAX_NIGHTS, MIN_ROWS
from pipeline.shards import Shard
from pipeline.storage import Storage, public_uri

_NUM_NAMED = 5


def describe_work(
    new: Sequence[Shard],
    changed: Sequence[Shard],
    published: Collection[str],
    vanished: Sequence[str],
    bad: Sequence[tuple[str, str]],
) -> list[str]:
    """What a night finds, in lines."""
    num_rows = sum(shard.num_rows for shard in [*new, *changed])
    lines = [
        f"to answer: {len(new)} new and {len(changed)} changed shards with {num_rows:,} rows; "
        f"done before: {len(published)}"
    ]
    if changed:
        lines.append(f"changed: {_named([shard.name for shard in changed])}")
    if vanished:
        lines.append(
            f"gone from the input: {_named(vanished)}, {len(vanished)} in all; their results stay, "
            "unless --remove-vanished"
        )
    if bad:
        lines.append(f"cannot be used: {_named([name for name, _ in bad])}, {len(bad)} in all")
    return lines


def print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"shoal: tonight is not as usual: {warning}", file=sys.stderr)


def history_table(nights: Sequence[Night], output: Storage) -> Table:
    """A row per night; below the table, what was not as usual."""
    title = f"nights of {public_uri(output.uri)}" + ("" if nights else ": none yet")
    notes = [f"{night.started_at:%Y-%m-%d %H:%M}  {text}" for night in nights for text in night.warnings]
    table = Table(
        title=title,
        title_justify="left",
        box=None,
        pad_edge=False,
        caption="\n".join(notes) or None,
        caption_justify="left",
    )
    for heading in ("night (UTC)", "outcome"):
        table.add_column(heading, no_wrap=True)
    for heading in ("shards", "rows", "errors", "cost", "per 1,000", "device", "tokens/s", "hits", "drafts", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    for night in nights:
        table.add_row(*_cells(night))
    return table


def _cells(night: Night) -> list[str]:
    cells = [f"{night.started_at:%Y-%m-%d %H:%M}", night.outcome + (" !" if night.warnings else "")]
    took = "" if night.wall_s is None else seconds(night.wall_s)
    if night.rows == 0:
        return [*cells, str(night.shards_published or ""), *[""] * 8, took]
    per_1000 = night.usd_per_1000_rows
    return [
        *cells,
        f"{night.shards_published:,}",
        f"{night.rows:,}",
        percent(night.error_fraction),
        f"${night.cost_usd:.4g}",
        "" if per_1000 is None else f"${per_1000:.4g}",
        seconds(night.device_s),
        f"{night.tokens_per_device_s or 0:,.0f}",
        percent(night.prefix_hit_rate),
        percent(night.acceptance_rate),
        took,
    ]


def print_price(console: Console, job: Job, output: Storage, todo: Sequence[Shard]) -> None:
    """What these shards would cost: by the nights before, and by `shoal plan` with answers as long as theirs."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    num_rows = sum(shard.num_rows for shard in todo)
    nights = [
        night
        for night in read_nights(output, 10 * MAX_NIGHTS)
        if night.outcome == SUCCESS and night.fingerprint == job.fingerprint() and night.num_computed >= MIN_ROWS
    ][-MAX_NIGHTS:]
    costs = [night.usd_per_1000_rows * num_rows / 1000 for night in nights if night.usd_per_1000_rows is not None]
    if costs:
        say(
            f"at the price of the last {len(costs)} nights: {usd(statistics.median(costs))} "
            f"({usd(min(costs))} to {usd(max(costs))}) for the rows; loading and idling come on top"
        )
    lengths = [night.completion_tokens_per_row for night in nights if night.completion_tokens_per_row]
    _print_plan(job, todo, max(1, round(statistics.median(lengths))) if lengths else None, say)


def _print_plan(job: Job, todo: Sequence[Shard], output_tokens: int | None, say: Callable[[str], None]) -> None:
    from jobs.plan import PlanSettings, make_plan
    from jobs.predicted import between

    tonight = job.model_copy(
        update={"input": job.input.model_copy(update={"path": tuple(shard.uri for shard in todo)})}
    )
    settings = PlanSettings(pilot_rows=0, output_tokens=output_tokens)
    found = make_plan(tonight, settings, say)[0].estimate
    say(
        f"plan: {between(found.prompt_tokens, count)} prompt tokens, {percent(found.achievable_hit_rate)} of them "
        "shared within their shard"
    )
    if found.device_s is not None and found.cost_usd is not None:
        say(
            f"plan: {between(found.device_s, seconds)} of device time, {between(found.cost_usd, usd)}, for answers of "
            f"{output_tokens} tokens as in the nights before"
        )
    else:
        say("plan: no device time without a night before; shoal plan answers some rows to see how long answers get")


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more
