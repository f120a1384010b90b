"""The input's files: found, checked by their footers, and kept as a few numbers each.

Knows no prompts and no tokens. Called by the driver before anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass


class ShardError(ValueError):
    """One input file cannot be read, or is not what it was when the run began; other shards are not concerned."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One input file. `name` is the stem of its file name and names its results; `etag` tells its version."""

    name: str
    uri: str
    size_bytes: int
    etag: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class ShardList:
    """The shards of a job by name, and the files that cannot be used as (name, reason)."""

    good: list[Shard]
    bad: list[tuple[str, str]]
