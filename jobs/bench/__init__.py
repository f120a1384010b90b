"""`shoal bench NAME`: measure against a baseline in the same command, correctness first; the last line is JSON."""

from __future__ import annotations

import importlib

BENCHES = ("engine", "pipeline", "speculation", "quantize", "plan")
"""Each is a file of this folder with a function bench_NAME."""


def bench(name: str, keep: str | None = None) -> int:
    """Run one bench; 1 when its correctness check fails, 0 otherwise, whether or not its bars hold.

    keep: a folder in which the JSON is kept as `<date>_<name>_<device>.json` too.
    """
    if name not in BENCHES:
        raise ValueError(f"there is no bench {name!r}; choose one of {', '.join(BENCHES)}")
    module = importlib.import_module(f"jobs.bench.{name}")
    code: int = getattr(module, f"bench_{name}")().publish(keep)
    return code
