"""The bill: parts add up to the whole, and a bill that does not is refused."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.bill.ledger import LedgerError, RunRecord, WorkerTime, add_up, read_bill, read_runs, write_run
from pipeline.bill.pricing import LIST_PRICES_USD_PER_HOUR, price_of
from pipeline.bill.progress import bill_table
from pipeline.drafts import DrafterCount
from pipeline.results import METRICS_SCHEMA
from pipeline.storage import Storage

PRICE_USD = 7.2


def metrics_row(**values: Any) -> dict[str, Any]:
    """A shard with 10 rows, 3.1 s of rows and 0.7 s of overhead at 7.2 USD per hour."""
    row: dict[str, Any] = dict.fromkeys(METRICS_SCHEMA.names)
    row.update({f.name: 0 for f in METRICS_SCHEMA if str(f.type) == "int64"})
    row.update({name: 0.0 for name in row if name.endswith("_seconds")})
    row.update(rows_in=10, rows_ok=8, rows_error=2, rows_duplicate=1, prompt_tokens=1000, completion_tokens=100)
    row.update(duplicate_prompt_tokens=100, duplicate_completion_tokens=10, cached_tokens=550, num_slices=2)
    row.update(device_seconds=3.1, load_seconds=0.4, idle_seconds=0.2, lost_seconds=0.1)
    row.update(prefill_seconds=0.9, decode_seconds=1.8, cost_usd=3.1 * PRICE_USD / 3600)
    row.update(overhead_usd=0.7 * PRICE_USD / 3600, usd_per_device_hour=PRICE_USD, device="cpu", price_source="job")
    row.update(saved_by_speculation_seconds=0.0, drafters=[])
    row.update(notes=["a note"], achievable_prefix_tokens=600, **values)
    return row


def test_device_time_is_busy_load_idle_and_lost_and_cost_is_rows_and_overhead():
    run = RunRecord("r", 0.0, 9.0, after_slices=WorkerTime(idle_s=1.0, lost_s=0.5, usd_per_device_hour=PRICE_USD))
    bill = add_up([metrics_row() for _ in range(3)], [run])
    assert bill.device_seconds == math.fsum([bill.busy_s, bill.load_s, bill.idle_s, bill.lost_s])
    assert bill.device_seconds == pytest.approx(3 * 3.8 + 1.5)
    assert bill.cost_usd == pytest.approx(bill.device_seconds * PRICE_USD / 3600, rel=1e-12)
    assert (bill.rows, bill.rows_ok, bill.rows_error) == (30, 24, 6)
    assert bill.notes == ["a note"] and bill.wall_s == 9.0


def test_hit_rates_and_savings_count_computed_rows_only():
    bill = add_up([metrics_row()], [])
    assert bill.prefix_hit_rate == 450 / 900
    assert bill.prefix_hit_rate_achievable == 600 / 900
    assert bill.saved_by_prefix_cache_estimate_s == pytest.approx(450 * 0.9 / 450)
    assert bill.saved_by_folding_estimate_s == pytest.approx(100 * 0.9 / 450 + 10 * 1.8 / 90)


@pytest.mark.parametrize("wrong", [{"rows_ok": 9}, {"cost_usd": 0.01}, {"overhead_usd": 0.0}])
def test_a_bill_that_does_not_add_up_is_refused(wrong):
    row = metrics_row()
    row.update(wrong)
    with pytest.raises(LedgerError):
        add_up([row], [])


def test_shards_computed_at_two_prices_have_no_single_one_and_still_add_up():
    row = metrics_row()
    row.update(usd_per_device_hour=None, cost_usd=1.0)
    assert add_up([row], []).rows_usd == 1.0


def test_an_output_without_any_shard_has_an_empty_bill():
    bill = add_up([], [])
    assert bill.rows == 0 and bill.cost_usd == 0.0 and bill.prefix_hit_rate is None


def test_drafts_add_up_per_drafter_and_the_rates_are_of_the_sums():
    ngram = {"drafter": "ngram", "drafted_tokens": 40, "accepted_tokens": 10}
    corpus = {"drafter": "corpus", "drafted_tokens": 60, "accepted_tokens": 50}
    speculation = {"num_verify_steps": 15, "saved_by_speculation_seconds": 1.5}
    rows = [metrics_row(drafters=[ngram], **speculation), metrics_row(drafters=[corpus, ngram], **speculation)]
    rows.append(metrics_row(num_drafter_failures=1, saved_by_speculation_seconds=-0.5))
    bill = add_up(rows, [])
    assert bill.drafters == [DrafterCount("corpus", 60, 50), DrafterCount("ngram", 80, 20)]
    assert (bill.acceptance_rate, bill.acceptance_length) == (70 / 140, 1 + 70 / 30)
    assert (bill.saved_by_speculation_estimate_s, bill.num_drafter_failures) == (2.5, 1)


def test_the_bill_shows_speculation_where_there_were_drafts_and_only_there():
    def shown(row: dict[str, Any]) -> str:
        console = Console(width=120)
        with console.capture() as text:
            console.print(bill_table(add_up([row], []), "out"))
        return " ".join(text.get().split())

    drafters = [{"drafter": "ngram", "drafted_tokens": 4000, "accepted_tokens": 1000}]
    said = shown(
        metrics_row(drafters=drafters, num_verify_steps=500, num_drafter_failures=1, saved_by_speculation_seconds=-3.14)
    )
    assert "4,000 drafted, 1,000 accepted (25.0%), acceptance length 3.0; ngram 1,000/4,000" in said
    assert "1 switched off after a failure" in said and "speculation -3.1 s of device time" in said
    assert "speculation" not in shown(metrics_row())


def test_metrics_of_a_version_without_speculation_are_read_all_the_same(tmp_path):
    row = {**metrics_row(), "shard": "a"}
    new = ("num_verify_steps", "num_drafter_failures", "saved_by_speculation_seconds", "drafters", "acceptance_length")
    schema = pa.schema([field for field in METRICS_SCHEMA if field.name not in new])
    (tmp_path / "metrics").mkdir()
    pq.write_table(pa.Table.from_pylist([row], schema=schema), tmp_path / "metrics" / "a.parquet")
    assert read_bill(Storage(str(tmp_path))).drafters == []


def test_a_runs_record_reads_back(tmp_path):
    run = RunRecord("r", 1.0, 2.0, 4, "stopped", 3, 2, after_slices=WorkerTime(1.0, 2.0, 3.0), notes=["n"])
    write_run(Storage(str(tmp_path)), run)
    assert [asdict(one) for one in read_runs(Storage(str(tmp_path)))] == [asdict(run)]


def test_a_price_in_the_job_file_wins_and_zero_is_a_price():
    assert price_of("cpu", 0.0).usd_per_device_hour == 0.0
    assert price_of("NVIDIA H100 80GB HBM3", 1.5).cost_usd(3600) == 1.5


@pytest.mark.parametrize(
    ("device", "name"),
    [("cpu", "cpu"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4")],
)
def test_without_a_price_the_list_price_of_the_device_is_taken_and_named(device, name):
    price = price_of(device, None)
    assert price.usd_per_device_hour == LIST_PRICES_USD_PER_HOUR[name]
    assert f"list price of {name}" in price.source


def test_a_device_without_a_list_price_costs_nothing_and_says_so():
    price = price_of("NVIDIA GeForce RTX 3090", None)
    assert price.usd_per_device_hour == 0.0 and "unknown" in price.source
