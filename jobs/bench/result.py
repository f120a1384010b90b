"""What a bench found: bars, the machine, versions. Printed as a table and as one line of JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

VERSIONS_OF = ("shoal", "torch", "transformers", "ray", "triton", "pyarrow")


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and what it has to reach; `bar` None is a figure for information, `value` None was not measured."""

    name: str
    value: float | None
    bar: float | None
    at_least: bool = True
    unit: str = ""

    @property
    def rounded(self) -> float | None:
        return None if self.value is None else round(self.value, 4)

    @property
    def holds(self) -> bool | None:
        if self.bar is None or self.value is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar


@dataclass(slots=True)
class BenchResult:
    """All that a bench has to say; `is_correct` False makes its timings void."""

    bench: str
    is_correct: bool
    bars: list[Bar]
    config: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=dict)

    def publish(self, keep: str | None) -> int:
        """Print the table and the JSON line, keep a copy if asked, and return the exit code."""
        machine = {**describe_machine(), **self.machine}
        record = {
            "bench": self.bench,
            "is_correct": self.is_correct,
            "bars": [{**asdict(bar), "value": bar.rounded, "holds": bar.holds} for bar in self.bars],
            "machine": machine,
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS_OF},
            "commit": _commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": self.config,
        }
        self._print_table()
        line = json.dumps(record)
        if keep is not None:
            device = re.sub(r"[^A-Za-z0-9]+", "-", str(machine["device"])).strip("-").lower()
            path = Path(keep) / f"{record['date'][:10]}_{self.bench}_{device}.json"  # type: ignore[index]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(line + "\n")
        print(line)
        return 0 if self.is_correct else 1

    def _print_table(self) -> None:
        console = Console()
        if not self.is_correct:
            console.print("[bold red]the answers are wrong, so no timing counts[/bold red]")
            return
        table = Table(title=f"shoal bench {self.bench}")
        for heading in ("figure", "value", "bar", "holds"):
            table.add_column(heading, justify="left" if heading == "figure" else "right")
        for bar in self.bars:
            sign = ">=" if bar.at_least else "<="
            table.add_row(
                bar.name,
                "not measured" if bar.value is None else f"{bar.value:.3g} {bar.unit}".strip(),
                "" if bar.bar is None else f"{sign} {bar.bar:g}",
                {None: "", True: "yes", False: "NO"}[bar.holds],
            )
        console.print(table)


def paste_between(markers: tuple[str, str], text: str, file: Path) -> None:
    """Replace what stands between two marker lines of a file. ValueError unless it has both, once each."""
    start, end = markers
    whole = file.read_text(encoding="utf-8")
    if whole.count(start) != 1 or whole.count(end) != 1:
        raise ValueError(f"{file} must have the lines {start} and {end} once each")
    before, rest = whole.split(start)
    _, after = rest.split(end)
    file.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def describe_machine() -> dict[str, Any]:
    """The processor (or GPU), its cores and memory."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "device": device,
        "num_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "cpu_flags": [flag for flag in ("avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in _cpu_flags()],
    }


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.machine()


def _cpu_flags() -> list[str]:
    return _cpu_info("flags").split()


def _cpu_info(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _commit() -> str | None:
    here = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)  # noqa: S607
    return git.stdout.strip() or None
