"""int4 weights: made by rounding to nearest, or decoded from a compressed-tensors checkpoint.

Knows no files: tensors go in, `QuantizedWeight` comes out. Which layers of a checkpoint are packed, and how, is read
from the `quantization_config` of its config.json. Used by `checkpoint` (to check headers) and `decoder` (to build
layers).

Shape letters: N outputs, K inputs, G groups of weights of a row that share a scale, W words of eight values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.architecture import CheckpointError, LinearSpec
from kernels.int4_linear import QuantizedWeight

SUPPORTED_QUANT_METHODS = ("compressed-tensors",)

GROUP_SIZES = (128, 64, 32)

CLIP_RATIOS = (1.0, 0.95, 0.9, 0.875, 0.85, 0.8)
"""Candidates for the scale, as parts of max|w| / 7. The best of them per group has 20 to 25 % less squared error than
the first alone (Gaussian weights, groups of 32 to 128). 0.875 maps max|w| to -8, so that weights which lie on such a
grid already come back exactly."""

MAX_ROUNDED_VALUES = 1 << 22
"""Weights rounded at a time: bounds the temporaries to about 100 MB."""


def quantize_to_nearest(weight_NK: Tensor, group_size: int) -> QuantizedWeight:
    """Round a floating-point weight to symmetric int4; K must be a multiple of group_size.

    Each group takes the scale of CLIP_RATIOS with the least squared error, the first on ties. Scales are numbers of
    bfloat16 (kept as float32), which every packed form and file format holds exactly. ValueError for NaN or infinity.
    """
    num_rows, num_columns = weight_NK.shape
    num_groups = num_columns // group_size
    q_NK = torch.empty(num_rows, num_columns, dtype=torch.uint8, device=weight_NK.device)
    scale_NG = torch.empty(num_rows, num_groups, dtype=torch.float32, device=weight_NK.device)
    num_rows_at_once = max(1, MAX_ROUNDED_VALUES // num_columns)
    for start in range(0, num_rows, num_rows_at_once):
        rows = slice(start, start + num_rows_at_once)
        groups = weight_NK[rows].float().reshape(-1, group_size)
        q, scale = _round_groups(groups)
        q_NK[rows] = q.view(-1, num_columns)
        scale_NG[rows] = scale.view(-1, num_groups)
    return QuantizedWeight(q_NK=q_NK, scale_NG=scale_NG, group_size=group_size)


def _round_groups(weight_Xg: Tensor) -> tuple[Tensor, Tensor]:
    largest_X = weight_Xg.abs().amax(dim=1)
    if not torch.isfinite(largest_X).all():
        raise ValueError("the weight holds NaN or infinity and cannot be rounded to int4")
    best_error_X = torch.full_like(largest_X, torch.inf)
    best_scale_X = _scale_of(largest_X, CLIP_RATIOS[0])
    for ratio in CLIP_RATIOS:
        scale_X = _scale_of(largest_X, ratio)
        rounded = weight_Xg.div(scale_X[:, None]).round_().clamp_(-8, 7).mul_(scale_X[:, None])
        error_X = rounded.sub_(weight_Xg).square_().sum(dim=1)
        is_better_X = error_X < best_error_X
        best_error_X = torch.where(is_better_X, error_X, best_error_X)
        best_scale_X = torch.where(is_better_X, scale_X, best_scale_X)
    q = weight_Xg.div(best_scale_X[:, None]).round_().clamp_(-8, 7).add_(8)
    return q.to(torch.uint8), best_scale_X


def _scale_of(largest_X: Tensor, ratio: float) -> Tensor:
    scale_X = (largest_X * (ratio / 7)).bfloat16().float()
    return scale_X.masked_fill_(scale_X == 0, 1.0)


def fitting_group_size(num_in: int, largest: int) -> int | None:
    """The largest supported group size up to `largest` that divides num_in; None when none does."""
    return next((size for size in GROUP_SIZES if size <= largest and num_in % size == 0), None)


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """How compressed-tensors packed a layer. group_size None: one scale for a whole row (strategy channel)."""

    group_size: int | None
    symmetric: bool

    def num_groups(self, num_in: int) -> int:
        return 1 if self.group_size is None else -(-num_in // self.group_size)

    def tensors(self, linear: LinearSpec) -> dict[str, tuple[int, ...]]:
        """Name and shape of what stands in place of the layer's `.weight`."""
        num_groups = self.num_groups(linear.num_in)
        shapes: dict[str, tuple[int, ...]] = {
            f"{linear.name}.weight_packed": (linear.num_out, -(-linear.num_in // 8)),
            f"{linear.name}.weight_scale": (linear.num_out, num_groups),
        }
        if not self.symmetric:
            shapes[f"{linear.name}.weight_zero_point"] = (-(-linear.num_out // 8), num_groups)
        return shapes


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """The `quantization_config` of a compressed-tensors checkpoint: which layers are packed, and how.

    A target or ignored layer is an exact name, `re:` and a regular expression, or the class name `Linear`.
    """

    groups: tuple[tuple[tuple[str, ...], PackedFormat], ...]
    ignore: tuple[str, ...]

    def format_of(self, name: str) -> PackedFormat | None:
        """How the linear layer `name` is packed, or None when it is not."""
        if any(_matches(name, pattern) for pattern in self.ignore):
            return None
        for targets, packed in self.groups:
            if any(_matches(name, target) for target in targets):
                return packed
        return None


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern in (name, "Linear")


def parse_quantization(config: Mapping[str, Any] | None) -> CompressedTensors | None:
    """Read a `quantization_config`; None stays None. CheckpointError, naming the field, for what is not supported."""
    if config is None:
        return None
    method = config.get("quant_method")
    if method not in SUPPORTED_QUANT_METHODS:
        raise CheckpointError(
            f"quant_method {method!r} is not supported; supported: {', '.join(SUPPORTED_QUANT_METHODS)} "
            "(format pack-quantized, 4 bits). Use the model's 16-bit checkpoint, with quantization: int4 if wanted"
        )
    _require("quantization_status", config.get("quantization_status", "compressed"), "compressed")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("quantization_config has no config_groups")
    return CompressedTensors(
        groups=tuple(
            _parse_group(name, group, config.get("format")) for name, group in sorted(groups.items(), key=_specificity)
        ),
        ignore=tuple(config.get("ignore") or ()),
    )


def _specificity(item: tuple[str, Any]) -> int:
    """Groups that name layers come before groups that take every Linear."""
    _, group = item
    return int(isinstance(group, Mapping) and "Linear" in group.get("targets", ()))


def _parse_group(name: str, group: Any, format: str | None) -> tuple[tuple[str, ...], PackedFormat]:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise CheckpointError(f"config_groups.{name} has no weights; only a group written out in full is supported")
    weights, where = group["weights"], f"config_groups.{name}"
    _require(f"{where}.format", group.get("format") or format, "pack-quantized")
    _require(f"{where}.input_activations", group.get("input_activations"), None)
    _require(f"{where}.output_activations", group.get("output_activations"), None)
    _require(f"{where}.weights.num_bits", weights.get("num_bits"), 4)
    _require(f"{where}.weights.type", weights.get("type", "int"), "int")
    _require(f"{where}.weights.dynamic", bool(weights.get("dynamic")), False)
    _require(f"{where}.weights.strategy", weights.get("strategy"), "group", "channel")
    # "group" reorders the columns by a g_idx tensor; "weight" and "static" only changed how the weights were found.
    _require(f"{where}.weights.actorder", weights.get("actorder"), None, False, "weight", "static")
    group_size = weights.get("group_size") if weights["strategy"] == "group" else None
    if weights["strategy"] == "group" and (not isinstance(group_size, int) or group_size < 1):
        raise CheckpointError(f"{where}.weights.group_size is {group_size!r}; it must be a positive integer")
    return tuple(group.get("targets") or ()), PackedFormat(group_size, bool(weights.get("symmetric", True)))


def _require(field: str, value: Any, *allowed: Any) -> None:
    if value not in allowed:
        supported = ", ".join(repr(choice) for choice in allowed)
        raise CheckpointError(
            f"quantization_config: {field} is {value!r}, which is not supported; supported: {supported}"
        )


@dataclass(frozen=True, slots=True)
class UnpackedWeight:
    """A decoded layer with whatever groups it has: w = scale * (q - zero); `zero_NG` None: 8 throughout."""

    q_NK: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None
    group_size: int

    def regroup(self) -> QuantizedWeight | None:
        """The same numbers in groups that the kernels take, scales repeated; None when no size fits."""
        size = fitting_group_size(self.q_NK.shape[1], largest=max(GROUP_SIZES))
        while size is not None and self.group_size % size:
            size = fitting_group_size(self.q_NK.shape[1], largest=size - 1)
        if size is None:
            return None
        return QuantizedWeight(
            q_NK=self.q_NK,
            scale_NG=self._repeat(self.scale_NG, size),
            group_size=size,
            zero_NG=None if self.zero_NG is None else self._repeat(self.zero_NG, size),
        )

    def _repeat(self, per_group: Tensor, size: int) -> Tensor:
        num_groups = self.q_NK.shape[1] // size
        return per_group.repeat_interleave(self.group_size // size, dim=1)[:, :num_groups].contiguous()

    def to_float(self) -> Tensor:
        """The weight as float32 [N, K], for any group size."""
        num_in = self.q_NK.shape[1]
        group_of_K = torch.arange(num_in, device=self.q_NK.device) // self.group_size
        zero = 8.0 if self.zero_NG is None else self.zero_NG.float()[:, group_of_K]
        return (self.q_NK.float() - zero).mul_(self.scale_NG[:, group_of_K])


def unpack_weight(
    packed_NW: Tensor, scale_NG: Tensor, zero_WG: Tensor | None, linear: LinearSpec, format: PackedFormat
) -> UnpackedWeight:
    """Decode a layer of compressed-tensors' pack-quantized format.

    Words are int32, low nibble first, a nibble being the signed value plus 8; weights are packed along K, zero points
    along N.
    """
    zero_NG = None
    if zero_WG is not None:
        zero_NG = _unpack_nibbles(zero_WG.T)[:, : linear.num_out].T.contiguous()
    return UnpackedWeight(
        q_NK=_unpack_nibbles(packed_NW)[:, : linear.num_in].contiguous(),
        scale_NG=scale_NG.float(),
        zero_NG=zero_NG,
        group_size=format.group_size or linear.num_in,
    )


def _unpack_nibbles(words: Tensor) -> Tensor:
    """int32 [R, W] to uint8 [R, 8 W]; relies on little-endian words, as all supported machines have."""
    bytes_ = words.contiguous().view(torch.uint8)
    values = torch.empty(bytes_.shape[0], bytes_.shape[1] * 2, dtype=torch.uint8, device=words.device)
    torch.bitwise_and(bytes_, 15, out=values[:, 0::2])
    torch.bitwise_right_shift(bytes_, 4, out=values[:, 1::2])
    return values


def concatenate(weights: Sequence[Tensor | QuantizedWeight]) -> Tensor | QuantizedWeight | None:
    """Stack weights [N_i, K] on N; None when they are not alike (16-bit beside int4, or other groups)."""
    if all(isinstance(weight, Tensor) for weight in weights):
        return torch.cat(list(weights))  # type: ignore[arg-type]
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if len(quantized) != len(weights) or len({weight.group_size for weight in quantized}) != 1:
        return None
    is_symmetric = all(weight.zero_NG is None for weight in quantized)
    zero_NG = None if is_symmetric else torch.cat([_zeros_of(weight) for weight in quantized])
    return QuantizedWeight(
        q_NK=torch.cat([weight.q_NK for weight in quantized]),
        scale_NG=torch.cat([weight.scale_NG for weight in quantized]),
        group_size=quantized[0].group_size,
        zero_NG=zero_NG,
    )


def _zeros_of(weight: QuantizedWeight) -> Tensor:
    if weight.zero_NG is not None:
        return weight.zero_NG
    return torch.full_like(weight.scale_NG, 8, dtype=torch.uint8)
