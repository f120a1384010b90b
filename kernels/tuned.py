"""The committed launch configurations of kernels, per GPU architecture; nothing is tuned at a user's run.

`tuned.json` is written by `shoal bench kernels --tune` on a device of that architecture. An entry names where it comes
from: "measured" with the device, or "compiled" where only registers, spills and instructions are known.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("tuned.json")
ARCHITECTURES = {8: "sm_80", 9: "sm_90", 10: "sm_100"}
"""By major compute capability. Others (12: no wgmma, 99 KB of shared memory) are launched as sm_80."""


@dataclass(frozen=True, slots=True)
class LinearTile:
    """How int4_linear runs up to max_rows rows: its tile, and the programs for which K is split.

    swapped and rounded: as in kernels/int4_kernels.py. bits and group_sizes: the weights that it is for.
    """

    max_rows: int
    rows: int
    columns: int
    warps: int
    stages: int
    programs: int
    swapped: bool = False
    rounded: bool = False
    bits: tuple[int, ...] = (4, 8)
    group_sizes: tuple[int, ...] = (32, 64, 128)
    registers: int | None = None


@functools.lru_cache
def architecture_of(device: torch.device) -> str:
    """The table's name of a device; a CPU, where kernels run in Triton's interpreter, is taken for sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    return ARCHITECTURES.get(torch.cuda.get_device_capability(device)[0], "sm_80")


@functools.lru_cache
def load_table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def read_tile(entry: dict[str, Any]) -> LinearTile:
    """A tile from its entry in the table."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
    return LinearTile(**fields)


@functools.lru_cache
def linear_tiles(architecture: str, bits: int, group_size: int) -> tuple[LinearTile, ...]:
    """The tiles for one kind of weight, by rising max_rows; above the last, the weight is expanded."""
    entries = load_table()["int4_linear"][architecture]["tiles"]
    tiles = [read_tile(entry) for entry in entries]
    fitting = [tile for tile in tiles if bits in tile.bits and group_size in tile.group_sizes]
    return tuple(sorted(fitting, key=lambda tile: tile.max_rows))
