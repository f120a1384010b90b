"""The nights as a table, and what counts as unusual: made-up histories, noise and planted changes. Without Ray."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.bill.ledger import RunRecord, WorkerTime
from pipeline.events import ShardFailed, SliceDone, Tick
from pipeline.night.history import FAILED, KILLED, RUNNING, SUCCESS, Night, mark_killed, read_nights, write_night
from pipeline.night.usual import MAX_NIGHTS, MIN_NIGHTS, MIN_ROWS, find_differences
from pipeline.storage import Storage

FIRST = datetime(2026, 1, 1, 2, 15, tzinfo=UTC)
ROWS = 10_000


def night_of(number: int, *, rows: int = ROWS, outcome: str = SUCCESS, noise: float = 0.0, seed: int = 0) -> Night:
    """A night with usual figures, each off by so much noise (a share, or an absolute share for fractions)."""
    rng = np.random.default_rng([number, seed])

    def about(value: float) -> float:
        return value * float(np.exp(noise * rng.normal()))

    started_at = FIRST + timedelta(days=number)
    prompt_tokens, completion_tokens = int(rows * about(300)), int(rows * about(80))
    drafted = int(rows * 40)
    busy_s = rows * about(0.05)
    return Night(
        night=f"{started_at:%Y%m%dT%H%M%SZ}-{number:04d}",
        date=f"{started_at:%Y-%m-%d}",
        started_at=started_at,
        finished_at=started_at + timedelta(hours=1),
        outcome=outcome,
        exit_code=0,
        fingerprint="f",
        versions={"shoal": "0.1.0"},
        shards_published=4,
        rows=rows,
        rows_error=int(rng.binomial(rows, 0.0005)),
        rows_duplicate=int(rng.binomial(rows, 0.04)),
        prompt_tokens=prompt_tokens,
        cached_tokens=int(prompt_tokens * min(1.0, max(0.0, 0.6 + noise * rng.normal() / 2))),
        completion_tokens=completion_tokens,
        drafted_tokens=drafted,
        accepted_tokens=int(drafted * min(1.0, max(0.0, 0.5 + noise * rng.normal() / 2))),
        num_verify_steps=rows * 20,
        busy_s=busy_s,
        overhead_s=120.0,
        rows_usd=busy_s * 2 / 3600,
        overhead_usd=120.0 * 2 / 3600,
    )


def nights_of(count: int, **settings) -> list[Night]:
    return [night_of(number, **settings) for number in range(count)]


def figures(tonight: Night, nights: list[Night]) -> set[str]:
    return {difference.figure for difference in find_differences(tonight, nights)}


# --- the table ----------------------------------------------------------------------------------------------------


def test_nights_read_back_as_they_were_written_and_as_one_table(tmp_path: Path) -> None:
    output = Storage(str(tmp_path))
    nights = [replace(night_of(0), warnings=["dear"], notes=["x"]), night_of(1), night_of(2, outcome=RUNNING)]
    nights[2].finished_at = nights[2].exit_code = None
    for night in nights:
        write_night(output, night)
    assert read_nights(output) == nights
    assert read_nights(output, 1) == nights[-1:]
    table = pq.read_table(tmp_path / "history")
    assert table["outcome"].to_pylist() == [SUCCESS, SUCCESS, RUNNING]
    assert table["cost_usd"].to_pylist() == pytest.approx([night.cost_usd for night in nights])
    assert table["prefix_hit_rate"][0].as_py() == pytest.approx(0.6, abs=1e-4)
    assert table["wall_s"].to_pylist() == [3600.0, 3600.0, None]
    assert table["date"].to_pylist() == ["2026-01-01", "2026-01-02", "2026-01-03"]
    assert dict(table["versions"][0].as_py()) == {"shoal": "0.1.0"}


def test_a_night_that_never_ended_is_marked_as_killed_once(tmp_path: Path) -> None:
    output = Storage(str(tmp_path))
    for night in (night_of(0), night_of(1, outcome=RUNNING)):
        write_night(output, night)
    assert [night.night for night in mark_killed(output, read_nights(output))] == [night_of(1).night]
    assert [night.outcome for night in read_nights(output)] == [SUCCESS, KILLED]
    assert mark_killed(output, read_nights(output)) == []


def test_a_night_without_rows_has_no_rates(tmp_path: Path) -> None:
    night = Night("n", "2026-01-01", FIRST)
    write_night(Storage(str(tmp_path)), night)
    assert night.usd_per_1000_rows is None and night.error_fraction is None and night.acceptance_length is None
    assert read_nights(Storage(str(tmp_path))) == [night]


def slice_done(**settings) -> SliceDone:
    values = {
        **dict(shard="a", is_new=True, path="p", index=0, num_slices=1, rows=10, rows_error=1, rows_duplicate=2),
        **dict(prompt_tokens=100, cached_tokens=40, completion_tokens=50, device_seconds=3.0, cost_usd=0.3),
        **dict(overhead_s=36.0, wall_s=4.0, usd_per_device_hour=100.0, num_engine_rebuilds=0, drafted_tokens=8),
        **dict(accepted_tokens=6, num_verify_steps=3),
    }
    return SliceDone(**{**values, **settings})


def test_a_night_counts_what_it_computed_and_not_what_it_found() -> None:
    night = Night("n", "2026-01-01", FIRST)
    for event in (slice_done(), slice_done(is_new=False), slice_done(index=1), ShardFailed("b", "torn"), Tick()):
        night.add(event)
    record = RunRecord("r", 0.0, after_slices=WorkerTime(idle_s=10, lost_s=8, usd_per_device_hour=100.0))
    night.add_end(record)
    assert (night.rows, night.rows_error, night.rows_duplicate, night.shards_failed) == (20, 2, 4, 1)
    assert (night.prompt_tokens, night.cached_tokens, night.completion_tokens) == (200, 80, 100)
    assert (night.busy_s, night.overhead_s, night.device_s) == (6.0, 90.0, 96.0)
    assert night.rows_usd == pytest.approx(0.6) and night.cost_usd == pytest.approx(0.6 + 90 * 100 / 3600)
    assert night.acceptance_rate == 0.75 and night.acceptance_length == 1 + 12 / 6


# --- the usual ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("num_nights", [MIN_NIGHTS, 10, 30])
def test_noise_alone_alarms_in_less_than_one_night_of_thirty(noise: float, num_nights: int) -> None:
    num_trials = 300
    alarms = 0
    for seed in range(num_trials):
        nights = nights_of(num_nights, noise=noise, seed=seed)
        alarms += bool(find_differences(night_of(num_nights, noise=noise, seed=seed), nights))
    assert alarms <= num_trials / 30, f"{alarms} of {num_trials}"


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("num_nights", [10, 30])
@pytest.mark.parametrize(
    ("change", "figure"),
    [
        (lambda n: replace(n, rows_usd=2 * n.rows_usd), "usd_per_1000_rows"),
        (lambda n: replace(n, busy_s=2 * n.busy_s), "tokens_per_device_s"),
        (lambda n: replace(n, rows_error=n.rows // 100), "error_fraction"),
        (lambda n: replace(n, cached_tokens=0), "prefix_hit_rate"),
        (lambda n: replace(n, accepted_tokens=n.drafted_tokens // 10), "acceptance_rate"),
        (lambda n: replace(n, rows_duplicate=n.rows // 2), "duplicate_fraction"),
        (lambda n: replace(n, completion_tokens=2 * n.completion_tokens), "completion_tokens_per_row"),
        (lambda n: replace(n, prompt_tokens=n.prompt_tokens // 2, cached_tokens=0), "prompt_tokens_per_row"),
    ],
)
def test_a_real_change_is_named(change, figure: str, num_nights: int, noise: float) -> None:
    for seed in range(20):
        nights = nights_of(num_nights, noise=noise, seed=seed)
        assert figure in figures(change(night_of(num_nights, noise=noise, seed=seed)), nights)


def test_error_rows_that_jump_from_none_to_one_in_a_hundred_are_named_with_value_and_range() -> None:
    nights = [replace(night, rows_error=0) for night in nights_of(7)]
    (found,) = find_differences(replace(night_of(7), rows_error=100), nights)
    assert found.figure == "error_fraction" and found.value == 0.01 and found.usual == 0.0
    assert found.text == "error rows: 1.00%, usually 0.00% (at most 0.20%, by the last 7 nights)"


def test_fewer_errors_than_usual_are_no_reason_to_wake_anybody() -> None:
    nights = [replace(night, rows_error=500) for night in nights_of(10)]
    assert find_differences(replace(night_of(10), rows_error=0), nights) == []


@pytest.mark.parametrize("rows", [1, 3, MIN_ROWS, 100, 1000])
def test_a_night_with_few_rows_alarms_about_no_total_and_not_about_one_error(rows: int) -> None:
    nights = [replace(night, rows_error=0) for night in nights_of(20, noise=0.05)]
    tonight = replace(night_of(20, rows=rows, noise=0.05), rows_error=1)
    assert find_differences(tonight, nights) == []


def test_a_night_with_many_rows_alarms_about_no_total() -> None:
    assert find_differences(night_of(20, rows=100 * ROWS), nights_of(20, noise=0.02)) == []


def test_half_of_a_small_night_failing_is_named() -> None:
    assert figures(replace(night_of(20, rows=200), rows_error=100), nights_of(20)) == {"error_fraction"}


def test_with_fewer_than_five_successes_nothing_is_usual() -> None:
    dear = replace(night_of(9), rows_usd=100.0)
    failures = [night_of(number, outcome=FAILED) for number in range(4, 8)]
    assert find_differences(dear, [*nights_of(4), *failures]) == []
    assert figures(dear, [*nights_of(5), *failures]) == {"usd_per_1000_rows"}


def test_nights_of_another_job_and_nights_to_come_are_not_the_usual() -> None:
    dear = replace(night_of(9), rows_usd=100.0)
    others = [replace(night, fingerprint="g") for night in nights_of(9)]
    assert find_differences(dear, others) == []
    assert find_differences(dear, [night_of(number) for number in range(10, 20)]) == []


def test_one_wild_night_does_not_hide_the_next() -> None:
    nights = nights_of(10, noise=0.02)
    nights[4] = replace(nights[4], rows_usd=50 * nights[4].rows_usd)
    dear = night_of(10, noise=0.02)
    assert figures(replace(dear, rows_usd=2 * dear.rows_usd), nights) == {"usd_per_1000_rows"}


def test_what_lasts_becomes_the_usual() -> None:
    nights = nights_of(10) + [
        replace(night_of(number), rows_usd=3 * night_of(number).rows_usd) for number in range(10, 10 + MAX_NIGHTS)
    ]
    tonight = night_of(10 + MAX_NIGHTS)
    assert find_differences(replace(tonight, rows_usd=3 * tonight.rows_usd), nights) == []


def test_quality_that_gets_worse_is_named() -> None:
    nights = [replace(night, quality_kl=0.01) for night in nights_of(6)]
    assert figures(replace(night_of(6), quality_kl=0.05), nights) == {"quality_kl"}
    assert figures(replace(night_of(6), quality_kl=0.001), nights) == set()
