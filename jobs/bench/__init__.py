"""`shoal bench NAME`: measure against a baseline in the same command, correctness first; the last line is JSON."""

from __future__ import annotations

BENCHES = ("engine", "pipeline")


def bench(name: str, keep: str | None = None) -> int:
    """Run one bench; 1 when its correctness check fails, 0 otherwise, whether or not its bars hold.

    keep: a folder in which the JSON is kept as `<date>_<name>_<device>.json` too.
    """
    if name == "engine":
        from jobs.bench.engine import bench_engine

        return bench_engine().publish(keep)
    if name == "pipeline":
        from jobs.bench.pipeline import bench_pipeline

        return bench_pipeline().publish(keep)
    raise ValueError(f"there is no bench {name!r}; choose one of {', '.join(BENCHES)}")
