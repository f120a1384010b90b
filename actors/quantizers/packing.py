"""compressed-tensors' pack-quantized format: the tensors of a layer, and the quantization_config of a checkpoint.

Values are a stream of bits without gaps in int32 words, low bits first: 32 values of b bits fill b words. Weights are
packed along K, zero points along N. Source: compressed_tensors.compressors.pack_quantized.helpers.pack_to_int32.

Shape letters: N outputs, K inputs, R rows, B bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from actors.quantizers.grid import Grid, GridWeight


def pack_bits(values_RK: Tensor, bits: int) -> Tensor:
    """uint8 [R, K], each below 2^bits, to int32 [R, ceil(K * bits / 32)]; what is left of the last word is zero."""
    num_rows, num_values = values_RK.shape
    num_words = -(-num_values * bits // 32)
    stream_RB = (
        values_RK.unsqueeze(-1) >> torch.arange(bits, device=values_RK.device, dtype=torch.uint8)
    ).bitwise_and_(1)
    stream_RB = torch.nn.functional.pad(stream_RB.view(num_rows, -1), (0, num_words * 32 - num_values * bits))
    weights = (1 << torch.arange(8, device=values_RK.device)).to(torch.uint8)
    bytes_ = (stream_RB.view(num_rows, -1, 8) * weights).sum(-1, dtype=torch.uint8)
    return bytes_.view(torch.int32)


def packed_tensors(name: str, weight: GridWeight) -> dict[str, Tensor]:
    """What the format stores in place of `<name>.weight`, on the CPU."""
    bits = weight.grid.bits
    # The stream of bits takes a byte per bit: a few rows at a time.
    step = max(1, (1 << 24) // weight.q_NK.shape[1])
    tensors = {
        f"{name}.weight_packed": torch.cat([pack_bits(rows, bits).cpu() for rows in weight.q_NK.split(step)]),
        f"{name}.weight_scale": weight.scale_NG.to(weight.grid.scale_dtype).cpu(),
        f"{name}.weight_shape": torch.tensor(weight.q_NK.shape, dtype=torch.int64),
    }
    if weight.zero_NG is not None:
        words = pack_bits(weight.zero_NG.T.contiguous(), bits).T.contiguous()
        tensors[f"{name}.weight_zero_point"] = words.cpu()
    return tensors


def quantization_config(grids: Mapping[str, Grid | None], head: Grid | None) -> dict[str, Any]:
    """The `quantization_config` for linear layers `name: grid` (None: not packed) and the output head.

    One grid for all is written as the class Linear, as other tools do; several as one config_group each, whose targets
    are regular expressions over the layers' names.
    """
    by_grid: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        if grid is not None:
            by_grid.setdefault(grid, []).append(name)
    ignore = sorted(name for name, grid in grids.items() if grid is None)
    if len(by_grid) == 1 and head is None:
        targets = {next(iter(by_grid)): ["Linear"]}
    else:
        targets = {grid: _patterns(names) for grid, names in by_grid.items()}
    if head is None:
        ignore.append("lm_head")
    else:
        targets.setdefault(head, []).append("re:lm_head$")
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {
            f"group_{i}": {
                "targets": names,
                "weights": _weights(grid),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
            for i, (grid, names) in enumerate(targets.items())
        },
    }


def _patterns(names: list[str]) -> list[str]:
    """One pattern per kind of projection: re:model\\.layers\\.(0|3)\\.mlp\\.up_proj$."""
    layers: dict[str, list[str]] = {}
    for name in names:
        _, _, index, module = name.split(".", 3)
        layers.setdefault(module, []).append(index)
    return [rf"re:model\.layers\.({'|'.join(indices)})\.{re.escape(module)}$" for module, indices in layers.items()]


def _weights(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
