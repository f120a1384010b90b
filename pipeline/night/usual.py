"""Whether a night differs from the usual: robust statistics over the nights before it, of rates and never of totals.

The usual is the median; how far a night may be from it is the largest of three: what the nights before vary (their
median absolute deviation, wider the fewer they are), what chance does to a night of so few rows, and a margin below
which nobody wants to be woken. Numbers in, sentences out. Called by `jobs.nightly`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.night.history import SUCCESS, Night

MIN_NIGHTS = 5
MAX_NIGHTS = 30
MIN_ROWS = 30
"""Nights of fewer computed rows are neither judged nor part of the usual."""

_NORMAL = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""

_NIGHTS_KNOWN = (5, 6, 7, 8, 10, 12, 14, 20, 30)
_DEVIATIONS = (30.6, 14.1, 14.2, 9.2, 7.5, 6.4, 5.6, 4.7, 4.0)
"""How many such deviations from the median of N normal values the next one stays within in 99.8 % of cases; simulated
with 200,000 samples each. A median of five deviations is often far too small, hence the large number."""

_CHANCE = 4.0
"""Standard deviations of a count by chance alone."""


@dataclass(frozen=True, slots=True)
class _Figure:
    """What is compared. floor: the margin, as a share of the usual or absolute. is_share_of_rows: a count of rows over
    rows, to which chance does what it does to coin tosses. only_above: less of it is no cause to worry."""

    name: str
    words: str
    of: Callable[[Night], float | None]
    floor: float
    is_relative: bool
    show: str
    is_share_of_rows: bool = False
    only_above: bool = False


_FIGURES = (
    _Figure("usd_per_1000_rows", "cost of 1,000 rows", lambda n: n.usd_per_1000_rows, 0.25, True, "${:.4g}"),
    _Figure("tokens_per_device_s", "tokens per device-second", lambda n: n.tokens_per_device_s, 0.25, True, "{:,.0f}"),
    _Figure("prompt_tokens_per_row", "prompt tokens a row", lambda n: n.prompt_tokens_per_row, 0.25, True, "{:,.1f}"),
    _Figure(
        "completion_tokens_per_row", "answer tokens a row", lambda n: n.completion_tokens_per_row, 0.25, True, "{:,.1f}"
    ),
    _Figure("prefix_hit_rate", "prefix hits", lambda n: n.prefix_hit_rate, 0.1, False, "{:.1%}"),
    _Figure("acceptance_rate", "accepted drafts", lambda n: n.acceptance_rate, 0.1, False, "{:.1%}"),
    _Figure("duplicate_fraction", "duplicates", lambda n: n.duplicate_fraction, 0.05, False, "{:.1%}", True),
    _Figure("error_fraction", "error rows", lambda n: n.error_fraction, 0.002, False, "{:.2%}", True, only_above=True),
    _Figure("quality_kl", "KL from the reference", lambda n: n.quality_kl, 0.25, True, "{:.4g}", only_above=True),
)


@dataclass(frozen=True, slots=True)
class Difference:
    """A figure outside of its usual range."""

    figure: str
    value: float
    usual: float
    low: float
    high: float
    num_nights: int
    text: str


def find_differences(tonight: Night, nights: Sequence[Night]) -> list[Difference]:
    """The figures in which a night differs from the last successes of the same job among `nights`, oldest first.

    None with fewer than MIN_NIGHTS of them, and none of a night with fewer than MIN_ROWS rows.
    """
    usual = [night for night in nights if night.outcome == SUCCESS and _counts(night, tonight)][-MAX_NIGHTS:]
    if not _counts(tonight, tonight):
        return []
    found = (_compare(figure, tonight, usual) for figure in _FIGURES)
    return [difference for difference in found if difference is not None]


def _counts(night: Night, tonight: Night) -> bool:
    return night.num_computed >= MIN_ROWS and night.fingerprint == tonight.fingerprint and night.night <= tonight.night


def _compare(figure: _Figure, tonight: Night, nights: Sequence[Night]) -> Difference | None:
    value = figure.of(tonight)
    known = [(float(x), night.rows) for night in nights if (x := figure.of(night)) is not None]
    if value is None or len(known) < MIN_NIGHTS:
        return None
    values, rows = np.array([x for x, _ in known]), np.array([n for _, n in known])
    usual = float(np.median(values))
    # What varies by factors is compared by factors: a cost doubles as easily as it halves.
    by_factors = figure.is_relative and value > 0 and float(values.min()) > 0
    scaled = np.log(values) if by_factors else values
    middle = float(np.median(scaled))
    spread = _NORMAL * float(np.median(np.abs(scaled - middle))) * _num_deviations(len(values))
    # The mean of fewer rows varies more.
    spread *= math.sqrt(max(1.0, float(np.median(rows)) / tonight.rows))
    if by_factors:
        allowed = max(spread, math.log1p(figure.floor))
        low, high = math.exp(middle - allowed), math.exp(middle + allowed)
    else:
        allowed = max(spread, figure.floor * (abs(usual) if figure.is_relative else 1.0))
        if figure.is_share_of_rows:
            # As if one row more had been counted each way: of 100 rows, one error says little about a share of 0.
            share = (usual * tonight.rows + 1) / (tonight.rows + 2)
            allowed = max(allowed, _CHANCE * math.sqrt(share * (1 - share) / tonight.rows))
        low, high = usual - allowed, usual + allowed
    if value <= high and (figure.only_above or value >= low):
        return None
    shown = [figure.show.format(x) for x in (value, usual, max(0.0, low), high)]
    usually = f"at most {shown[3]}" if figure.only_above else f"{shown[2]} to {shown[3]}"
    text = f"{figure.words}: {shown[0]}, usually {shown[1]} ({usually}, by the last {len(values)} nights)"
    return Difference(figure.name, value, usual, low, high, len(values), text)


def _num_deviations(num_nights: int) -> float:
    return float(np.interp(num_nights, _NIGHTS_KNOWN, _DEVIATIONS))
