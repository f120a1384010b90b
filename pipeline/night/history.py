"""The nights of an output: one row per night in `history/<night>.parquet`, so that the folder reads as one table.

A night's row is there from its beginning and written again as it goes on; whoever finds one that says "running" while
it holds the lease knows that the night was killed. Knows no Ray and no clock. Written by `jobs.nightly`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.bill.ledger import RunRecord
from pipeline.bill.pricing import SECONDS_PER_HOUR
from pipeline.drafts import acceptance_length
from pipeline.events import Event, ShardDone, ShardFailed, SliceDone
from pipeline.parquet import to_parquet
from pipeline.results import FOOTER_THREADS
from pipeline.storage import FileInfo, Storage

FOLDER = "history"
RUNNING, SUCCESS, NOTHING_NEW, LIMIT, STOPPED, FAILED, LEASE_LOST, KILLED = (
    "running",
    "success",
    "nothing_new",
    "limit",
    "stopped",
    "failed",
    "lease_lost",
    "killed",
)


@dataclass(slots=True)
class Night:
    """One night. Counts, tokens, time and money are what this night computed, whichever night publishes the shard;
    `rows` counts folded duplicates too, tokens are those of computed rows. Those of a killed night are as they stood
    when it last wrote its row. `quality_*` are those of the job's `quality` section, against its reference."""

    night: str
    date: str
    started_at: datetime
    finished_at: datetime | None = None
    outcome: str = RUNNING
    exit_code: int | None = None
    reason: str = ""
    host: str = ""
    fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    shards_new: int = 0
    shards_changed: int = 0
    shards_vanished: int = 0
    rows_due: int = 0
    shards_published: int = 0
    shards_failed: int = 0
    rows: int = 0
    rows_error: int = 0
    rows_duplicate: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    num_verify_steps: int = 0
    busy_s: float = 0.0
    overhead_s: float = 0.0
    rows_usd: float = 0.0
    overhead_usd: float = 0.0
    quality_kl: float | None = None
    quality_top1: float | None = None
    quality_exact_match: float | None = None
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Count what a run's event tells; slices of earlier nights are not counted again."""
        if isinstance(event, ShardDone):
            self.shards_published += 1
        elif isinstance(event, ShardFailed):
            self.shards_failed += 1
        elif isinstance(event, SliceDone) and event.is_new:
            for name in _SUMMED:
                setattr(self, name, getattr(self, name) + getattr(event, name))
            self.busy_s += event.device_seconds
            self.rows_usd += event.cost_usd
            self._add_overhead(event.overhead_s, event.usd_per_device_hour)

    def add_end(self, record: RunRecord) -> None:
        """Count what the devices did after the last slices."""
        after = record.after_slices
        self._add_overhead(after.idle_s + after.lost_s, after.usd_per_device_hour)

    def _add_overhead(self, seconds: float, usd_per_device_hour: float) -> None:
        self.overhead_s += seconds
        self.overhead_usd += seconds * usd_per_device_hour / SECONDS_PER_HOUR

    @property
    def wall_s(self) -> float | None:
        return None if self.finished_at is None else (self.finished_at - self.started_at).total_seconds()

    @property
    def rows_ok(self) -> int:
        return self.rows - self.rows_error

    @property
    def device_s(self) -> float:
        return self.busy_s + self.overhead_s

    @property
    def cost_usd(self) -> float:
        return self.rows_usd + self.overhead_usd

    @property
    def num_computed(self) -> int:
        """Rows that a device answered, or tried to."""
        return self.rows - self.rows_duplicate

    @property
    def usd_per_1000_rows(self) -> float | None:
        """Of computed rows, without loading and idling, which a short night has as much of as a long one."""
        return _ratio(1000 * self.rows_usd, self.num_computed)

    @property
    def rows_per_device_s(self) -> float | None:
        return _ratio(self.num_computed, self.busy_s)

    @property
    def tokens_per_device_s(self) -> float | None:
        """Prompt and completion tokens per busy second, as in the bill."""
        return _ratio(self.prompt_tokens + self.completion_tokens, self.busy_s)

    @property
    def prompt_tokens_per_row(self) -> float | None:
        return _ratio(self.prompt_tokens, self.num_computed)

    @property
    def completion_tokens_per_row(self) -> float | None:
        return _ratio(self.completion_tokens, self.num_computed)

    @property
    def error_fraction(self) -> float | None:
        return _ratio(self.rows_error, self.rows)

    @property
    def duplicate_fraction(self) -> float | None:
        return _ratio(self.rows_duplicate, self.rows)

    @property
    def prefix_hit_rate(self) -> float | None:
        return _ratio(self.cached_tokens, self.prompt_tokens)

    @property
    def acceptance_rate(self) -> float | None:
        return _ratio(self.accepted_tokens, self.drafted_tokens)

    @property
    def acceptance_length(self) -> float | None:
        return acceptance_length(self.accepted_tokens, self.num_verify_steps)


_SUMMED = (
    "rows",
    "rows_error",
    "rows_duplicate",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "drafted_tokens",
    "accepted_tokens",
    "num_verify_steps",
)
_DERIVED: dict[str, pa.DataType] = {
    "wall_s": pa.float64(),
    "rows_ok": pa.int64(),
    "device_s": pa.float64(),
    "cost_usd": pa.float64(),
    "usd_per_1000_rows": pa.float64(),
    "rows_per_device_s": pa.float64(),
    "tokens_per_device_s": pa.float64(),
    "prompt_tokens_per_row": pa.float64(),
    "completion_tokens_per_row": pa.float64(),
    "error_fraction": pa.float64(),
    "duplicate_fraction": pa.float64(),
    "prefix_hit_rate": pa.float64(),
    "acceptance_rate": pa.float64(),
    "acceptance_length": pa.float64(),
}
"""Written for whoever reads the table, computed again by `read_nights`."""

_TYPES = {
    "str": pa.string(),
    "int": pa.int64(),
    "int | None": pa.int64(),
    "float": pa.float64(),
    "float | None": pa.float64(),
    "datetime": pa.timestamp("us", tz="UTC"),
    "datetime | None": pa.timestamp("us", tz="UTC"),
    "dict[str, str]": pa.map_(pa.string(), pa.string()),
    "list[str]": pa.list_(pa.string()),
}
SCHEMA = pa.schema(
    [
        *(pa.field(column.name, _TYPES[str(column.type)]) for column in fields(Night)),
        *(pa.field(name, kind) for name, kind in _DERIVED.items()),
    ]
)


def write_night(output: Storage, night: Night) -> None:
    """Write a night's row, over what it said before."""
    row = {**asdict(night), **{name: getattr(night, name) for name in _DERIVED}}
    row["versions"] = list(night.versions.items())
    output.write_whole(f"{FOLDER}/{night.night}.parquet", to_parquet(pa.Table.from_pylist([row], schema=SCHEMA), {}))


def read_nights(output: Storage, last: int | None = None) -> list[Night]:
    """The nights of an output, the oldest first; of many, the last so many. Files of other versions are read as far as
    they have the same columns."""
    files = [file for file in output.list(FOLDER) if file.path.endswith(".parquet")]
    chosen = files if last is None else files[-last:] if last else []
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        nights = list(pool.map(lambda file: _read(output, file), chosen))
    return sorted(nights, key=lambda night: night.night)


def mark_killed(output: Storage, nights: Sequence[Night]) -> list[Night]:
    """Write down of nights that never ended that they were killed; those nights. For the holder of the lease only."""
    killed = [night for night in nights if night.outcome == RUNNING]
    for night in killed:
        night.outcome, night.reason = KILLED, "it never ended: the process or its machine was killed"
        write_night(output, night)
    return killed


def night_name(started_at: datetime, run: str) -> str:
    """The name of a night's file: names sort by time."""
    return f"{started_at.astimezone(UTC):%Y%m%dT%H%M%SZ}-{run}"


def _read(output: Storage, file: FileInfo) -> Night:
    with output.open_input(file.path, file.size_bytes) as source:
        (row,) = pq.ParquetFile(source).read().to_pylist()
    known: dict[str, Any] = {f.name: row[f.name] for f in fields(Night) if f.name in row}
    return Night(**{**known, "versions": dict(known.get("versions") or ())})


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
