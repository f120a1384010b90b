"""How long a call takes on a device: quantiles over many calls, each with a cold L2 on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 << 20
"""More than any L2 there is; writing it also keeps the GPU busy while the call is launched."""

WARM_UP_S = 0.2
"""Brings clocks to where they stay."""

MAX_CALLS, MIN_CALLS, BUDGET_S = 100, 10, 0.5


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds per call. how: "graph" (one CUDA graph launch), "launches", or "cpu"."""

    p20: float
    p50: float
    p80: float
    how: str


def measure(run: Callable[[], Any], device: torch.device) -> Times:
    """Quantiles of the time of `run`, after a warm-up."""
    if device.type != "cuda":
        return _quantiles(_time_on_cpu(run), "cpu")
    call, how = _captured(run)
    return _quantiles(_time_on_cuda(call, device), how)


def _quantiles(seconds: list[float], how: str) -> Times:
    p20, p50, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return Times(p20, p50, p80, how)


def _time_on_cpu(run: Callable[[], Any]) -> list[float]:
    run()
    seconds: list[float] = []
    while len(seconds) < MIN_CALLS or (sum(seconds) < BUDGET_S and len(seconds) < MAX_CALLS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def _captured(run: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
    """The call as a CUDA graph, so that Python's launches are not timed; as it is where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, "launches"
    return graph.replay, "graph"


def _time_on_cuda(call: Callable[[], Any], device: torch.device) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    started = time.perf_counter()
    num_calls = 0
    while time.perf_counter() - started < WARM_UP_S:
        call()
        torch.cuda.synchronize()
        num_calls += 1
    per_call = (time.perf_counter() - started) / num_calls
    num_timed = max(MIN_CALLS, min(MAX_CALLS, int(BUDGET_S / per_call)))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(num_timed)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]
