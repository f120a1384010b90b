"""Rounds the linear layers of one decoder layer by a method, each on inputs that went through what is rounded already.

The four parts of a layer are taken in the order in which data flows ("true sequential" in GPTQ's reference code): the
inputs of the output projection are those that rounded q, k and v give, and so on. Called by `run` for every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from actors.quantizers.awq import scale_channels
from actors.quantizers.gptq import quantize_gptq
from actors.quantizers.grid import Grid, GridWeight, round_searched
from actors.quantizers.hqq import quantize_hqq
from actors.quantizers.layer_walk import PARTS, HiddenStates, InputMoments, WalkedLayer
from actors.quantizers.rtn import quantize_rtn

METHODS = ("rtn", "hqq", "awq", "gptq")
CALIBRATED_METHODS = ("awq", "gptq")

REROUNDED = {"output": "self_attn.v_proj.weight", "down": "mlp.up_proj.weight"}
"""What AWQ's scales of a part change besides the part itself."""


@dataclass(slots=True)
class RoundedLayer:
    """A layer after rounding, names without the layer's prefix.

    rounded: weight name to GridWeight. floats: the tensors that stay floating-point (some changed by AWQ).
    errors: part to the mean squared error of its outputs over their mean square; empty without calibration.
    """

    rounded: dict[str, GridWeight] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


@torch.inference_mode()
def round_layer(
    layer: WalkedLayer, grids: dict[str, Grid | None], states: HiddenStates | None, method: str, act_order: bool = True
) -> RoundedLayer:
    """Round a layer; `layer.weights` are then the decoded ones, so that it can be run as it will be written.

    grids: part to grid, None for parts that stay as they are. states: what the layer is given, or None.
    """
    floats = dict(layer.weights)
    for name, tensor in floats.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {layer.prefix}{name} holds NaN or infinity and cannot be quantised")
    result = RoundedLayer()
    for part in PARTS:
        grid = grids[part]
        if grid is None:
            continue
        moments = layer.input_moments(states, part) if states is not None else None
        names = [layer.weight_name(linear) for linear in layer.linears(part)]
        if method == "awq":
            assert moments is not None
            scale_channels(layer, floats, part, moments, grid)
            again = REROUNDED.get(part)
            if again in result.rounded:
                result.rounded[again] = round_searched(floats[again], result.rounded[again].grid)
        for name in names:
            result.rounded[name] = round_weight(floats[name], grid, moments, method, act_order)
        if moments is not None:
            result.errors[part] = _relative_error(floats, result.rounded, names, moments)
        layer.weights = floats | {name: rounded.to_float() for name, rounded in result.rounded.items()}
    result.floats = {name: tensor for name, tensor in floats.items() if name not in result.rounded}
    return result


def round_weight(
    weight_NK: Tensor, grid: Grid, moments: InputMoments | None, method: str, act_order: bool = True
) -> GridWeight:
    """Round one weight. AWQ's scaling has been done before; what is left of it is the search of ranges."""
    if method == "rtn":
        return quantize_rtn(weight_NK, grid)
    if method == "hqq":
        return quantize_hqq(weight_NK, grid)
    assert moments is not None
    if method == "awq":
        return round_searched(weight_NK, grid, moments.second_KK.diagonal())
    return quantize_gptq(weight_NK, moments.second_KK, grid, act_order)


def _relative_error(
    floats: dict[str, Tensor], rounded: dict[str, GridWeight], names: list[str], moments: InputMoments
) -> float:
    error = square = 0.0
    for name in names:
        difference_NK = rounded[name].to_float() - floats[name]
        error += float(((difference_NK @ moments.second_KK) * difference_NK).sum())
        square += float(((floats[name] @ moments.second_KK) * floats[name]).sum())
    return error / square if square else 0.0
