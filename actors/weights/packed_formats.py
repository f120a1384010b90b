"""How a quantised linear layer lies in a checkpoint: the tensors in place of its `.weight`, and which layers have them.

The public formats of GPTQ, AWQ and compressed-tensors. Knows names, shapes and dtypes; reads nothing and decodes
nothing. `quantization_config` makes these from a config.json, `checkpoint` checks headers against them,
`packed_weights` decodes what they describe.

Shape letters: N outputs, K inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from actors.architecture import CheckpointError, LinearSpec

FLOATS = ("F64", "F32", "F16", "BF16")
_WORDS = ("I32",)


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One of the tensors of a packed layer; `needed` False: it may be missing."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    needed: bool = True


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """How a layer is packed. Values are a stream of bits in int32 words, low bits first.

    group_size None: one scale for a whole row. symmetric: no zero points are stored and 2**(bits - 1) is meant (GPTQ
    and AWQ store them all the same). act_order: the groups are of inputs in another order, which `g_idx` gives.
    stored_zero_offset: what a stored zero point lacks (1 in GPTQ's first format, modulo 2**bits).
    """

    method: Literal["gptq", "awq", "compressed-tensors"]
    bits: int
    group_size: int | None
    symmetric: bool
    act_order: bool = False
    stored_zero_offset: int = 0

    def __str__(self) -> str:
        groups = "one group per row" if self.group_size is None else f"groups of {self.group_size}"
        order = ", act-order" if self.act_order else ""
        return f"{self.method}, {self.bits} bits, {groups}{order}"

    def parts(self, linear: LinearSpec) -> dict[str, StoredPart]:
        """What is stored in place of the layer's `.weight`, by the end of the name.

        CheckpointError for sizes that the format cannot hold.
        """
        if self.group_size is not None and linear.num_in % self.group_size:
            raise CheckpointError(
                f"layer {linear.name}: its input size {linear.num_in} is not a multiple of group_size={self.group_size}"
            )
        num_groups = 1 if self.group_size is None else linear.num_in // self.group_size
        if self.method == "compressed-tensors":
            return self._compressed_tensors(linear, num_groups)
        self._require_whole_words(linear, "output", linear.num_out)
        common = {
            "qzeros": StoredPart((num_groups, self._num_words(linear.num_out)), _WORDS),
            "scales": StoredPart((num_groups, linear.num_out), FLOATS),
        }
        if self.method == "awq":
            return {"qweight": StoredPart((linear.num_in, self._num_words(linear.num_out)), _WORDS), **common}
        self._require_whole_words(linear, "input", linear.num_in)
        return {
            "qweight": StoredPart((self._num_words(linear.num_in), linear.num_out), _WORDS),
            **common,
            "g_idx": StoredPart((linear.num_in,), _WORDS, needed=self.act_order),
        }

    def _compressed_tensors(self, linear: LinearSpec, num_groups: int) -> dict[str, StoredPart]:
        parts = {
            "weight_packed": StoredPart((linear.num_out, self._num_words(linear.num_in)), _WORDS),
            "weight_scale": StoredPart((linear.num_out, num_groups), FLOATS),
            "weight_shape": StoredPart((2,), ("I64", "I32"), needed=False),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = StoredPart((self._num_words(linear.num_out), num_groups), _WORDS)
        if self.act_order:
            parts["weight_g_idx"] = StoredPart((linear.num_in,), _WORDS)
        return parts

    def _num_words(self, num_values: int) -> int:
        return -(-num_values * self.bits // 32)

    def _require_whole_words(self, linear: LinearSpec, side: str, size: int) -> None:
        if size * self.bits % 32:
            raise CheckpointError(
                f"layer {linear.name}: its {side} size {size} in {self.bits} bits does not fill whole 32-bit words, "
                f"which {self.method} needs"
            )


@dataclass(frozen=True, slots=True)
class LayerRules:
    """Which linear layers of a checkpoint are packed, and how: the first pattern that matches from a name's start."""

    rules: tuple[tuple[re.Pattern[str], PackedFormat | None], ...]

    def format_of(self, name: str) -> PackedFormat | None:
        """How the linear layer `name` is packed, or None when it has a plain weight."""
        return next((packed for pattern, packed in self.rules if pattern.match(name)), None)
