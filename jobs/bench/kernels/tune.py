"""`shoal bench kernels --tune`: find int4_linear's tiles on this GPU and write them into kernels/tuned.json.

Every candidate is checked before it is timed, on several shapes; the one with the least geometric mean of medians over
the weights of its kind is kept. `--only 16` tunes the tile up to 16 rows alone, `--only g128` one group size, `--only
g128/16` both: a sweep of all takes longer than a GPU is lent for, and the table is written after each tile. Above the
last tile's rows the weight is expanded; where that begins is measured at the end of each kind.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import torch
import torch.nn.functional as F

from jobs.bench.kernels.case import fill
from jobs.bench.kernels.linear import random_weight
from jobs.bench.kernels.timing import measure
from jobs.bench.result import Bar, BenchResult
from kernels.compare import compare
from kernels.int4_linear import Int4Linear, dequantize
from kernels.tuned import TABLE, LinearTile, architecture_of, linear_tiles

SHAPES = ((4096, 14336), (8192, 8192), (6144, 4096), (28672, 4096))
ROWS = (16, 32, 64, 512)
GROUP_SIZES = (128, 64, 32)
MORE_ROWS = (128, 256, 512, 1024, 2048, 4096)
"""At which expanding the weight is compared with the last tile."""


def tune_linear(only: str | None = None) -> BenchResult:
    """Sweep and rewrite the table; every tile that is kept was right."""
    if not torch.cuda.is_available():
        raise ValueError("bench kernels --tune needs a CUDA device")
    device = torch.device("cuda")
    groups, rows = _chosen(only)
    bars: list[Bar] = []
    for group_size in groups:
        for num_rows in rows:
            tile, seconds = best_tile(group_size, num_rows, device)
            keep_tile(architecture_of(device), tile)
            line = {"tile": asdict(tile), "geometric_mean_us": seconds * 1e6}
            print(json.dumps(line), flush=True)
            bars.append(Bar(f"int4 g{group_size} M={num_rows}: geometric mean", seconds * 1e6, None, unit="us"))
        if max(ROWS) in rows:
            max_rows = crossover(group_size, device)
            bars.append(Bar(f"int4 g{group_size}: rows up to which tiles win", max_rows, None))
    return BenchResult("kernels_tune", True, bars, {"only": only, "shapes": SHAPES})


def _chosen(only: str | None) -> tuple[list[int], list[int]]:
    groups, rows = list(GROUP_SIZES), list(ROWS)
    for word in (only or "").split("/"):
        if word.startswith("g") and word[1:].isdigit() and int(word[1:]) in GROUP_SIZES:
            groups = [int(word[1:])]
        elif word.isdigit() and int(word) in ROWS:
            rows = [int(word)]
        elif word:
            raise ValueError(f"bench kernels --tune: --only is {only!r}; it must be like g128, 16 or g128/16")
    return groups, rows


def candidates(group_size: int, num_rows: int) -> Iterator[LinearTile]:
    """All tiles worth a try; those that do not fit the device fail to launch and drop out."""
    tiles = {16: (16,), 32: (32,), 64: (64,), 512: (64, 128, 256)}[num_rows]
    num_processors = torch.cuda.get_device_properties(0).multi_processor_count
    for rows, columns, warps, stages, waves, swapped, rounded in itertools.product(
        tiles, (64, 128), (2, 4, 8), (2, 3, 4, 5), (1, 2, 4, 6), (False, True), (False, True)
    ):
        per_warp = rows * columns // warps
        if swapped != (num_rows > 32) or (rounded and num_rows < 64) or not 256 <= per_warp <= 4096:
            continue
        if swapped and warps < 4:  # wgmma takes four warps
            continue
        programs = waves * num_processors
        yield LinearTile(num_rows, rows, columns, warps, stages, programs, swapped, rounded, (4,), (group_size,))


def best_tile(group_size: int, num_rows: int, device: torch.device) -> tuple[LinearTile, float]:
    """The fastest candidate and its seconds. The number of programs is swept for the best of the rest only."""
    inputs = [_inputs(shape, group_size, num_rows, device) for shape in SHAPES]
    found: dict[LinearTile, float] = {}
    usual = 4 * torch.cuda.get_device_properties(0).multi_processor_count
    pool = list(candidates(group_size, num_rows))
    for tile in (tile for tile in pool if tile.programs == usual):
        found[tile] = _seconds(tile, inputs)
    for best in sorted(found, key=lambda tile: found[tile])[:3]:
        for tile in pool:
            if replace(tile, programs=usual) == best and tile not in found:
                found[tile] = _seconds(tile, inputs)
    tile = min(found, key=lambda tile: found[tile])
    if found[tile] == math.inf:
        raise RuntimeError(f"no candidate for {num_rows} rows in groups of {group_size} was right on {device}")
    return tile, found[tile]


def _inputs(shape: tuple[int, int], group_size: int, num_rows: int, device: torch.device) -> Any:
    weight = random_weight(shape, 4, group_size, False, device)
    x_MK = fill((num_rows, shape[1]), torch.bfloat16, device, 1)
    dense_NK = dequantize(weight)
    return weight, x_MK, F.linear(x_MK, dense_NK.bfloat16()), x_MK.double() @ dense_NK.double().t()


def _seconds(tile: LinearTile, inputs: list[Any]) -> float:
    """Geometric mean of the medians; infinite if the tile is wrong or does not run."""
    logs = 0.0
    for weight, x_MK, torch_MN, reference_MN in inputs:
        try:
            layer = Int4Linear(weight, None, dtype=x_MK.dtype, device=x_MK.device, tiles=(tile,))
            if not compare(layer(x_MK), torch_MN, reference_MN).holds:
                return math.inf
            logs += math.log(measure(lambda: layer(x_MK), x_MK.device).p50)  # noqa: B023
        except Exception as error:  # too much shared memory, or more than the compiler takes
            print(json.dumps({"tile": asdict(tile), "failure": str(error)[:200]}), flush=True)
            return math.inf
    return math.exp(logs / len(inputs))


def crossover(group_size: int, device: torch.device) -> int:
    """The most rows at which the last tile beats expanding the weight; kept as its max_rows."""
    tile = linear_tiles(architecture_of(device), 4, group_size)[-1]
    max_rows = tile.rows
    for num_rows in MORE_ROWS:
        weight, x_MK, _, _ = _inputs(SHAPES[1], group_size, num_rows, device)
        wide = replace(tile, max_rows=num_rows)
        layer = Int4Linear(weight, None, dtype=x_MK.dtype, device=device, tiles=(wide,))
        tiled = measure(lambda: layer._multiply(x_MK, wide), device).p50  # noqa: B023
        expanded = measure(lambda: F.linear(x_MK, layer.expand()), device).p50  # noqa: B023
        if tiled > expanded:
            break
        max_rows = num_rows
    kept = replace(tile, max_rows=max_rows, bits=(4,), group_sizes=(group_size,))
    keep_tile(architecture_of(device), kept, replaces=tile.max_rows)
    return max_rows


def keep_tile(architecture: str, tile: LinearTile, replaces: int | None = None) -> None:
    """Put the tile into kernels/tuned.json in the place of those for the same rows, bits and groups.

    An entry for more kinds of weights than the tile's is kept for the others.
    """
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    entry = table["int4_linear"].setdefault(architecture, {"tiles": []})
    old_rows = tile.max_rows if replaces is None else replaces
    kept: list[dict[str, Any]] = []
    for old in entry["tiles"]:
        if old["max_rows"] == old_rows:
            kept += _without(old, tile)
        else:
            kept.append(old)
    new = {name: value for name, value in asdict(tile).items() if value not in (False, None)}
    kept.append(new)
    entry["tiles"] = sorted(kept, key=lambda item: item["max_rows"])
    entry["from"] = f"measured on {torch.cuda.get_device_name()}, {datetime.now(UTC).date()}"
    TABLE.write_text(format_table(table), encoding="utf-8")
    linear_tiles.cache_clear()
    _forget_table()


def _without(old: dict[str, Any], tile: LinearTile) -> list[dict[str, Any]]:
    """What of an entry is for other weights than the tile's."""
    bits, groups = old.get("bits", [4, 8]), old.get("group_sizes", [32, 64, 128])
    left = []
    if other_groups := [size for size in groups if size not in tile.group_sizes]:
        left.append({**old, "bits": bits, "group_sizes": other_groups})
    same_groups = [size for size in groups if size in tile.group_sizes]
    if same_groups and (other_bits := [number for number in bits if number not in tile.bits]):
        left.append({**old, "bits": other_bits, "group_sizes": same_groups})
    return left


def _forget_table() -> None:
    from kernels.tuned import load_table

    load_table.cache_clear()


def format_table(table: dict[str, Any]) -> str:
    """One line per tile."""
    parts = []
    for architecture, entry in table["int4_linear"].items():
        tiles = ",\n".join(f"        {json.dumps(tile)}" for tile in entry["tiles"])
        head = f'    "{architecture}": {{\n      "from": {json.dumps(entry["from"])},\n      "tiles": [\n'
        parts.append(f"{head}{tiles}\n      ]\n    }}")
    return '{\n  "int4_linear": {\n' + ",\n".join(parts) + "\n  }\n}\n"
