"""Splits the time of a step among the sequences in it, exactly.

The linear layers cost by tokens, attention by the bytes of keys and values read; what a token and what a byte cost
relative to each other follows from the machine's own matrix and copy rates, measured once at start.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Expected seconds per token through the linear layers, and per token of keys and values read."""

    linear_s_per_token: float
    attention_s_per_token: float

    def weigh(self, num_tokens: int, num_read: float) -> float:
        """The expected cost of a sequence that computes `num_tokens` and reads `num_read` tokens of context."""
        return num_tokens * self.linear_s_per_token + num_read * self.attention_s_per_token


def measure_step_costs(
    num_linear_weights: int, kv_bytes_per_token: int, device: torch.device, dtype: torch.dtype
) -> StepCosts:
    """Time a matrix product and a copy on the device (about 20 ms in all)."""
    a, b = torch.ones(256, 1024, device=device, dtype=dtype), torch.ones(1024, 1024, device=device, dtype=dtype)
    flop_per_s = 2 * 256 * 1024 * 1024 / _seconds(lambda: a @ b, device)
    source = torch.ones(16 << 20, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    bytes_per_s = source.numel() / _seconds(lambda: target.copy_(source), device)
    return StepCosts(2 * num_linear_weights / flop_per_s, kv_bytes_per_token / bytes_per_s)


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


def _seconds(work, device: torch.device) -> float:
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
