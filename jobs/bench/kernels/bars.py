"""The bars on the rows: what each kernel has to reach on an H200. Elsewhere they are not measured, and say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobs.bench.kernels.linear import SHAPES
from jobs.bench.result import Bar

Row = dict[str, Any]

FLOOR_MS = {
    ("bf16", 1): 0.93,
    ("bf16", 32): 1.90,
    ("bf16", 256): 12.9,
    ("int8", 1): 0.92,
    ("int8", 32): 1.41,
    ("int8", 256): 8.9,
}
"""Of one step of Llama-3-8B, int4 with an int4 head and 1k context: bytes at 4.3 TB/s, arithmetic at 790 TFLOP/s."""
STEP_LIMIT = {1: 1.5, 32: 1.5, 256: 1.3}


def judge(rows: list[Row], place: str) -> list[Bar]:
    """Every bar, with value None where its row was not measured on a GPU; then how many cases are red."""
    measured = {row["name"]: row for row in rows if place == "cuda" and row["is_correct"] and "p50_ms" in row}
    bars = [_bar(measured, *spec) for spec in _specs()]
    red = sum(not row["is_correct"] for row in rows)
    return [Bar("cases whose check failed", red, 0, at_least=False), *bars]


def _bar(
    measured: dict[str, Row], name: str, needs: tuple[str, ...], value: Callable[..., float], bar: float, least: bool
) -> Bar:
    found = [measured.get(need) for need in needs]
    if not all(found):
        return Bar(name, None, bar, at_least=least)
    try:
        return Bar(name, value(*found), bar, at_least=least)
    except KeyError:  # a baseline or a rate that this run did not get
        return Bar(name, None, bar, at_least=least)


def _specs() -> list[tuple[str, tuple[str, ...], Callable[..., float], float, bool]]:
    specs: list[tuple[str, tuple[str, ...], Callable[..., float], float, bool]] = []

    def share(row: Row) -> float:
        return float(row["share_of_copy"])

    def over_torch(row: Row) -> float:
        return float(row["baselines"]["torch bfloat16"]["speedup"])

    def times(row: Row, other: Row) -> float:
        return float(row["p50_ms"] / other["p50_ms"])

    for num_out, num_in in SHAPES:
        linear = f"int4 g128 {num_out}x{num_in} M="
        for rows, bar in ((1, 0.75), (4, 0.75), (16, 0.75), (32, 0.65)):
            specs.append((f"{linear}{rows}: share of copy", (f"{linear}{rows}",), share, bar, True))
        for rows, bar in ((64, 1.8), (256, 1.0), (512, 0.95), (1024, 0.95), (2048, 0.95)):
            specs.append((f"{linear}{rows}: times torch bfloat16", (f"{linear}{rows}",), over_torch, bar, True))
    for kv, bar in (("bf16", 0.85), ("int8", 0.7)):
        for batch, context in ((64, 1024), (64, 8192), (256, 1024), (256, 8192)):
            name = f"decode {kv} B={batch} context={context}"
            specs.append((f"{name}: share of copy", (name,), share, bar, True))
        for batch, context in ((64, 1024), (64, 8192), (256, 1024)):
            verify, decode = (f"{what} {kv} B={batch} context={context}" for what in ("verify 4", "decode"))
            specs.append((f"{verify}: times a decode", (verify, decode), times, 1.3, False))
    shared = "decode bf16 B=128 context=4224 shared=4096"
    specs.append(("128 requests on 4k shared: times faster grouped", (shared, f"{shared} grouped"), times, 5.0, True))
    for (kv, batch), floor in FLOOR_MS.items():
        name = f"Llama-3-8B int4 step {kv} B={batch}"

        def over_floor(row: Row, floor: float = floor) -> float:
            return float(row["p50_ms"] / floor)

        specs.append((f"{name}: times the floor", (name,), over_floor, STEP_LIMIT[batch], False))
    return specs
