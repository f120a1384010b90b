"""Bits per part of a layer from measured sensitivity: 3, 4, 8 or 16, the least divergence within a number of bytes.

Sensitivity is the KL divergence of the final logits on calibration tokens when one part alone (qkv, output, gate_up or
down of one layer; the engine fuses a part's layers, so they share their bits) is rounded. The layer's own output error
is cheaper, but says nothing of what later layers make of it. One pass over the weights measures all: behind each layer
there is one copy of the hidden states per variant so far, so the cost is about (parts * widths * layers) / 2 forward
passes of a few thousand tokens, and each layer is read once. Divergences of several parts are taken to add up.

The choice is a knapsack, solved exactly by dynamic programming over bytes (in MAX_UNITS units, sizes rounded up).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from actors.quantizers.grid import Grid, round_searched
from actors.quantizers.layer_walk import (
    PARTS,
    HiddenStates,
    WalkedLayer,
    counted_logits,
    embed,
    head_weight,
    part_linears,
)
from actors.quantizers.run import OnProgress, QuantizeSettings, fitting_grid, kl_divergence
from actors.weights.checkpoint import Checkpoint

WIDTHS = (3, 4, 8)
MAX_UNITS = 16384
MAX_TOKENS = 2048
"""Calibration tokens that sensitivity is measured on: each costs a copy of its hidden state per variant."""

Part = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Choice:
    """One width of one part: what it takes, and the mean KL (nats per token) that it alone causes."""

    bits: int
    num_bytes: int
    kl: float


def choices_of_sizes(
    checkpoint: Checkpoint, settings: QuantizeSettings
) -> dict[Part, dict[int, tuple[Grid | None, int]]]:
    """Per part and width: the grid (None: as it is) and the bytes of its weights."""
    sizes: dict[Part, dict[int, tuple[Grid | None, int]]] = {}
    for index in range(checkpoint.architecture.num_layers):
        for part in PARTS:
            linears = part_linears(checkpoint.architecture, index, part)
            by_width: dict[int, tuple[Grid | None, int]] = {}
            for bits in WIDTHS:
                grid = fitting_grid(linears[0].num_in, bits, settings, checkpoint.dtype)
                if grid is not None:
                    by_width[bits] = grid, sum(grid.bytes_of(linear.num_out, linear.num_in) for linear in linears)
            by_width[16] = None, sum(linear.num_out * linear.num_in for linear in linears) * checkpoint.dtype.itemsize
            sizes[index, part] = by_width
    return sizes


def take_tokens(sequences: Sequence[Sequence[int]], max_tokens: int = MAX_TOKENS) -> list[Sequence[int]]:
    """As many sequences from the start as fit into max_tokens, the first one cut if it does not."""
    chosen: list[Sequence[int]] = []
    num_tokens = 0
    for sequence in sequences:
        if chosen and num_tokens + len(sequence) > max_tokens:
            break
        chosen.append(sequence[:max_tokens])
        num_tokens += len(sequence)
    return chosen


@torch.inference_mode()
def measure_sensitivity(
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    settings: QuantizeSettings,
    device: torch.device | None = None,
    on_progress: OnProgress = lambda done, total, what: None,
) -> dict[Part, list[Choice]]:
    """The choices of each part, rounded to nearest with searched ranges, whatever the method of `settings`."""
    device = device or torch.device("cpu")
    sizes = choices_of_sizes(checkpoint, settings)
    base = embed(checkpoint.read("model.embed_tokens.weight"), take_tokens(sequences))
    num_layers = checkpoint.architecture.num_layers
    variants: dict[tuple[int, str, int], HiddenStates] = {}
    for index in range(num_layers):
        on_progress(index, num_layers, "sensitivity")
        layer = WalkedLayer(checkpoint, index, max(base.lengths), device)
        for states in variants.values():
            layer.advance(states)
        for part in PARTS:
            for bits, (grid, _) in sizes[index, part].items():
                if grid is not None:
                    variants[index, part, bits] = _advance_rounded(layer, part, grid, base)
        layer.advance(base)
    all_kl = _divergences(checkpoint, base, variants, device)
    on_progress(num_layers, num_layers, "sensitivity")
    return {
        (index, part): [
            Choice(bits, num_bytes, all_kl.get((index, part, bits), 0.0)) for bits, (_, num_bytes) in by_width.items()
        ]
        for (index, part), by_width in sizes.items()
    }


def _advance_rounded(layer: WalkedLayer, part: str, grid: Grid, base: HiddenStates) -> HiddenStates:
    """A copy of the states behind the layer with one part of it rounded; the layer is as before afterwards."""
    originals = layer.weights
    names = [layer.weight_name(linear) for linear in layer.linears(part)]
    layer.weights = originals | {name: round_searched(originals[name], grid).to_float() for name in names}
    states = copy.copy(base)
    states.x_TH = base.x_TH.clone()
    layer.advance(states)
    layer.weights = originals
    return states


def _divergences(
    checkpoint: Checkpoint,
    base: HiddenStates,
    variants: Mapping[tuple[int, str, int], HiddenStates],
    device: torch.device,
) -> dict[tuple[int, str, int], float]:
    """Mean KL of each variant's logits from the base's."""
    norm_H, head_VH = checkpoint.read("model.norm.weight").to(device), head_weight(checkpoint).to(device).float()
    eps = checkpoint.architecture.rms_norm_eps
    readers = {key: counted_logits(states, norm_H, head_VH, eps, device) for key, states in variants.items()}
    totals = dict.fromkeys(variants, 0.0)
    for logits_TV in counted_logits(base, norm_H, head_VH, eps, device):
        logprobs_TV = logits_TV.log_softmax(-1)
        for key, reader in readers.items():
            totals[key] += float(kl_divergence(logprobs_TV, next(reader)).sum())
    return {key: max(0.0, total / base.num_counted) for key, total in totals.items()}


def bytes_for_bits(choices: Mapping[Part, Sequence[Choice]], checkpoint: Checkpoint, bits_per_weight: float) -> int:
    """The bytes of the decoder's linear layers at so many bits per weight, scales and zero points included."""
    num_weights = sum(
        linear.num_out * linear.num_in
        for index, part in choices
        for linear in part_linears(checkpoint.architecture, index, part)
    )
    return int(num_weights * bits_per_weight / 8)


def choose_bits(choices: Mapping[Part, Sequence[Choice]], budget_bytes: int) -> dict[Part, int]:
    """The bits of each part with the least sum of KL within budget_bytes. ValueError when even the least do not fit."""
    least = sum(min(choice.num_bytes for choice in some) for some in choices.values())
    if least > budget_bytes:
        raise ValueError(
            f"the target allows {budget_bytes:,} bytes for the decoder's linear layers, and the fewest bits take "
            f"{least:,}; raise --target-bits or --target-bytes"
        )
    unit = max(1, -(-budget_bytes // MAX_UNITS))
    # What the least sizes lose by rounding up is given to the budget, so that a target that just fits stays possible.
    num_units = budget_bytes // unit + len(choices)
    cost_U = np.zeros(num_units + 1)
    taken: list[np.ndarray] = []
    for some in choices.values():
        new_U = np.full(num_units + 1, np.inf)
        which_U = np.zeros(num_units + 1, dtype=np.int8)
        for i, choice in enumerate(some):
            units = -(-choice.num_bytes // unit)
            if units > num_units:
                continue
            with_choice_U = np.full(num_units + 1, np.inf)
            with_choice_U[units:] = cost_U[: num_units + 1 - units] + choice.kl
            is_better_U = with_choice_U < new_U
            new_U[is_better_U], which_U[is_better_U] = with_choice_U[is_better_U], i
        cost_U = new_U
        taken.append(which_U)
    return _read_back(choices, taken, unit, budget_bytes, cost_U)


def _read_back(
    choices: Mapping[Part, Sequence[Choice]],
    taken: Sequence[np.ndarray],
    unit: int,
    budget_bytes: int,
    cost_U: np.ndarray,
) -> dict[Part, int]:
    """Follow the table back from the largest end whose real bytes are within the budget."""
    for end in range(len(cost_U) - 1, -1, -1):
        if not np.isfinite(cost_U[end]):
            break
        bits, num_bytes, left = {}, 0, end
        for (part, some), which_U in reversed(list(zip(choices.items(), taken))):
            choice = some[which_U[left]]
            bits[part], num_bytes, left = choice.bits, num_bytes + choice.num_bytes, left - -(-choice.num_bytes // unit)
        if num_bytes <= budget_bytes:
            return {part: bits[part] for part in choices}
    return {part: min(some, key=lambda choice: choice.num_bytes).bits for part, some in choices.items()}
