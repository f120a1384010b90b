"""The table of kernels for the README, from kept records.

`python -m jobs.bench.kernels.table RECORD.json ... README.md` writes it between the README's markers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.bench.result import paste_between

MARKERS = ("<!-- kernels: written by jobs.bench.kernels.table -->", "<!-- /kernels -->")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line per row: times in milliseconds, shares of the machine's own rates, and who else was measured."""
    lines = [
        "| kernel | p20 / p50 / p80 ms | GB/s | of copy | TFLOP/s | of bf16 matmul | beside |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        name = row["name"]
        if not row["is_correct"]:
            lines.append(f"| {name} | **wrong or broken** | | | | | |")
        elif "p50_ms" not in row:
            lines.append(f"| {name} | right, not timed | | | | | |")
        else:
            times = " / ".join(f"{row[key]:.3g}" for key in ("p20_ms", "p50_ms", "p80_ms"))
            cells = [
                _number(row, "gb_per_s", ".0f"),
                _number(row, "share_of_copy", ".0%"),
                _number(row, "tflop_per_s", ".3g"),
                _number(row, "share_of_matmul", ".0%"),
                "; ".join(_baseline(other, found) for other, found in row.get("baselines", {}).items()),
            ]
            lines.append(f"| {name} | {times} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(row: dict[str, Any], key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""


def _baseline(name: str, found: dict[str, Any]) -> str:
    return f"{name} failed" if "failure" in found else f"{found['speedup']:.2f}x {name}"


def paste_table(records: Sequence[Path], readme: Path) -> None:
    """Replace what stands between MARKERS in `readme` by the table of kept records, such as one of each part.

    Of a case that is in several, such as the machine's rates, the last counts. ValueError without markers.
    """
    found = [row for record in records for row in json.loads(record.read_text(encoding="utf-8"))["config"]["kernels"]]
    paste_between(MARKERS, markdown(list({row["name"]: row for row in found}.values())), readme)


if __name__ == "__main__":
    paste_table([Path(path) for path in sys.argv[1:-1]], Path(sys.argv[-1]))
