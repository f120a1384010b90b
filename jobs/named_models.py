"""Where the shipped models are. A file of its own, so that asking needs neither torch nor Ray."""

from __future__ import annotations

from pathlib import Path


def named_models() -> dict[str, str]:
    """Where the shipped models are, by the words that `Job.resolve` knows them by."""
    demo = Path(__file__).parent / "demo"
    return {"demo": str(demo / "model"), "demo/draft": str(demo / "draft")}
