"""`shoal bench NAME`: measure against a baseline in the same command, correctness first; the last line is JSON."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

BENCHES = ("engine", "pipeline", "speculation", "quantize", "plan", "online", "kernels", "nightly")
"""Each is a file or folder of this folder with a function bench_NAME."""


def bench(name: str, keep: str | None = None, **options: Any) -> int:
    """Run one bench; 1 when its correctness check fails, 0 otherwise, whether or not its bars hold.

    keep: a folder in which the JSON is kept as `<date>_<name>_<device>.json` too. options: of that bench's function;
    ValueError for one that it does not have.
    """
    if name not in BENCHES:
        raise ValueError(f"there is no bench {name!r}; choose one of {', '.join(BENCHES)}")
    module = importlib.import_module(f"jobs.bench.{name}")
    run = getattr(module, f"bench_{name}")
    unknown = options.keys() - inspect.signature(run).parameters.keys()
    if unknown:
        raise ValueError(f"the bench {name!r} has no option {', '.join(sorted(unknown))}")
    code: int = run(**options).publish(keep)
    return code
