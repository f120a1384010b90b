"""`shoal bench online`: what HTTP and Serve cost over the bare engine, and a soak at what the machine holds and at ten
times it.

Both deploy the endpoint as `shoal serve` does. `--only overhead` or `--only soak` is one of them alone; `--minutes` is
the soak's length. RAY_SERVE_ENABLE_HA_PROXY=1 measures with HAProxy. Needs psutil, of the extra `dev`.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console

from jobs.bench.online.overhead import measure_overhead
from jobs.bench.online.soak import measure_soak
from jobs.bench.result import Bar, BenchResult

PARTS = ("overhead", "soak")
SOAK_MINUTES = 30.0


def bench_online(only: str | None = None, minutes: float = SOAK_MINUTES) -> BenchResult:
    """Run one part, or both. ValueError for a part that is none."""
    if only is not None and only not in PARTS:
        raise ValueError(f"this bench has no part {only!r}; choose one of {', '.join(PARTS)}")
    console = Console(stderr=True, width=160)
    is_correct = True
    bars: list[Bar] = []
    config: dict[str, Any] = {}
    if only != "soak":
        is_right, found, config["overhead"] = measure_overhead(console)
        is_correct, bars = is_correct and is_right, bars + found
    if only != "overhead":
        is_right, found, config["soak"] = measure_soak(minutes, console)
        is_correct, bars = is_correct and is_right, bars + found
    return BenchResult("online" if only is None else f"online-{only}", is_correct, bars, config)
