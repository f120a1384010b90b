"""Splits the time of a step among the sequences in it, exactly. What each should bear, `actors.step_times` knows."""

from __future__ import annotations

from collections.abc import Sequence


def split_exactly(total_ns: int, weights: Sequence[float]) -> list[int]:
    """Cut `total_ns` into integer parts in proportion to positive `weights`; the parts sum to the total."""
    scale = total_ns / sum(weights)
    parts, reached, exact = [], 0, 0.0
    for weight in weights:
        exact += weight * scale
        border = min(round(exact), total_ns)
        parts.append(border - reached)
        reached = border
    parts[-1] += total_ns - reached
    return parts
