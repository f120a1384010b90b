"""The line that people see of a run."""

from __future__ import annotations

from typing import Any

from pipeline.bill.progress import Tally, describe
from pipeline.events import SliceDone


def slice_done(**values: Any) -> SliceDone:
    counts = dict.fromkeys(
        ("rows_error", "rows_duplicate", "cached_tokens", "overhead_s", "num_engine_rebuilds", "cost_usd"), 0
    )
    usual: dict[str, Any] = {
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "device_seconds": 1.0,
        "wall_s": 1.0,
        "usd_per_device_hour": 1.0,
        **counts,
    }
    return SliceDone(shard="a", is_new=True, path="p", index=0, num_slices=9, rows=5, **{**usual, **values})


def test_the_line_shows_how_many_drafts_are_right_and_what_a_step_brings():
    tally = Tally(rows_total=100)
    tally.add(slice_done(drafted_tokens=100, accepted_tokens=50, num_verify_steps=10))
    tally.add(slice_done(drafted_tokens=50, accepted_tokens=43, num_verify_steps=21))
    assert "drafts 62% accepted, 4.0 tokens a step" in describe(tally)


def test_without_drafts_the_line_does_not_speak_of_them():
    tally = Tally(rows_total=100)
    tally.add(slice_done())
    assert "draft" not in describe(tally) and "5/100 rows" in describe(tally)


def test_drafts_of_slices_that_an_earlier_run_left_are_not_this_runs():
    tally = Tally(rows_total=100)
    found = slice_done(drafted_tokens=100, accepted_tokens=50, num_verify_steps=10)
    tally.add(SliceDone(**{**{name: getattr(found, name) for name in SliceDone.__slots__}, "is_new": False}))
    assert "draft" not in describe(tally)
