"""Decodes packed linear layers, as GPTQ, AWQ and compressed-tensors store them, into plain quantised weights.

Knows no files: the stored tensors of a layer go in, by the end of their names, and an `UnpackedWeight` comes out.
Called by `checkpoint`.

Shape letters: N outputs, K inputs, G groups of inputs that share a scale, R rows, W words, B bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.architecture import CheckpointError, LinearSpec
from actors.weights.packed_formats import PackedFormat
from actors.weights.quantization import GROUP_SIZES, fitting_group_size
from kernels.int4_linear import QuantizedWeight, dequantize_groups

_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns each nibble of an AWQ word holds, from the lowest nibble."""


@dataclass(frozen=True, slots=True)
class UnpackedWeight:
    """A decoded layer with whatever groups it has: w = scale * (q - zero); `zero_NG` None: 2**(bits - 1) throughout.

    order_K: column j of q is input order_K[j] of the layer (int64); None: they are in order.
    """

    q_NK: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None
    bits: int
    order_K: Tensor | None = None

    @property
    def group_size(self) -> int:
        return self.q_NK.shape[1] // self.scale_NG.shape[1]

    def regroup(self) -> QuantizedWeight | None:
        """The same numbers in groups that the kernels take, scales repeated, columns in order_K's order.

        None when no size of group fits.
        """
        num_in = self.q_NK.shape[1]
        size = fitting_group_size(num_in, largest=max(GROUP_SIZES))
        while size is not None and self.group_size % size:
            size = fitting_group_size(num_in, largest=size - 1)
        if size is None:
            return None
        times = self.group_size // size
        return QuantizedWeight(
            q_NK=self.q_NK,
            scale_NG=self.scale_NG.repeat_interleave(times, dim=1),
            group_size=size,
            zero_NG=None if self.zero_NG is None else self.zero_NG.repeat_interleave(times, dim=1),
            bits=self.bits,
        )

    def to_float(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K], its inputs in their own order, for any size of group."""
        dense_NK = dequantize_groups(self.q_NK, self.scale_NG, self.zero_NG, self.bits, dtype)
        return dense_NK if self.order_K is None else dense_NK[:, torch.argsort(self.order_K)]


def unpack_weight(parts: Mapping[str, Tensor], linear: LinearSpec, packed: PackedFormat) -> UnpackedWeight:
    """Decode a layer from its stored tensors, whose shapes are those of `packed.parts(linear)`.

    CheckpointError for a stored shape or an order of inputs that contradicts the layer.
    """
    unpack = _unpack_compressed_tensors if packed.method == "compressed-tensors" else _unpack_gptq_or_awq
    q_NK, scale_NG, zero_NG = unpack(parts, linear, packed)
    if zero_NG is not None and bool((zero_NG == 1 << (packed.bits - 1)).all()):
        zero_NG = None  # the kernels are faster without
    g_idx = parts.get("g_idx", parts.get("weight_g_idx"))
    order_K = None if g_idx is None else _order_of(g_idx, linear, scale_NG.shape[1])
    if order_K is not None:
        q_NK = q_NK[:, order_K]
    return UnpackedWeight(q_NK, scale_NG, zero_NG, packed.bits, order_K)


def _unpack_gptq_or_awq(
    parts: Mapping[str, Tensor], linear: LinearSpec, packed: PackedFormat
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Everything is transposed; GPTQ packs weights along K and zero points along N, AWQ both along N."""
    if packed.method == "awq":
        q_NK, zero_NG = _unpack_awq_columns(parts["qweight"]), _unpack_awq_columns(parts["qzeros"])
    else:
        q_NK = _unpack_rows(parts["qweight"].T, packed.bits)
        zero_NG = _unpack_rows(parts["qzeros"], packed.bits).T.contiguous()
        zero_NG = (zero_NG + packed.stored_zero_offset).bitwise_and_((1 << packed.bits) - 1)
    return q_NK, parts["scales"].T.float().contiguous(), zero_NG


def _unpack_compressed_tensors(
    parts: Mapping[str, Tensor], linear: LinearSpec, packed: PackedFormat
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Signed values plus 2**(bits - 1); weights are packed along K, zero points along N."""
    shape = parts["weight_shape"].tolist() if "weight_shape" in parts else [linear.num_out, linear.num_in]
    if shape != [linear.num_out, linear.num_in]:
        raise CheckpointError(
            f"tensor {linear.name}.weight_shape says {shape}; config.json makes the layer "
            f"{[linear.num_out, linear.num_in]}"
        )
    zero_NG = None
    if "weight_zero_point" in parts:
        zero_NG = _unpack_rows(parts["weight_zero_point"].T, packed.bits)[:, : linear.num_out].T.contiguous()
    q_NK = _unpack_rows(parts["weight_packed"], packed.bits)[:, : linear.num_in].contiguous()
    return q_NK, parts["weight_scale"].float(), zero_NG


def _order_of(g_idx_K: Tensor, linear: LinearSpec, num_groups: int) -> Tensor | None:
    """The inputs sorted by group, those of a group in their own order; None when they already are."""
    group_size = linear.num_in // num_groups
    if bool((g_idx_K == -1).all()):  # as compressed-tensors writes it where no order was found
        return None
    counts = torch.bincount(g_idx_K.long(), minlength=num_groups) if int(g_idx_K.min()) >= 0 else g_idx_K[:0]
    if len(counts) != num_groups or bool((counts != group_size).any()):
        raise CheckpointError(
            f"layer {linear.name}: its g_idx of shape [{linear.num_in}] must put {group_size} inputs into each of the "
            f"groups 0 to {num_groups - 1}; its values from {int(g_idx_K.min())} to {int(g_idx_K.max())} do not"
        )
    if bool((g_idx_K[1:] >= g_idx_K[:-1]).all()):
        return None
    return torch.argsort(g_idx_K, stable=True)


def _unpack_rows(words_RW: Tensor, bits: int) -> Tensor:
    """int32 [R, W] to uint8 [R, 32 W / bits]; relies on little-endian words, as all supported machines have.

    Three bits may end within a word: values past the last whole one are dropped.
    """
    num_rows, num_bytes = words_RW.shape[0], 4 * words_RW.shape[1]
    # Flat, since a single column counts as contiguous with any stride.
    bytes_RB = words_RW.contiguous().flatten().view(torch.uint8).view(num_rows, num_bytes)
    if bits == 8:
        return bytes_RB
    values = torch.empty(num_rows, num_bytes * 8 // bits, dtype=torch.uint8, device=words_RW.device)
    if bits == 4:
        torch.bitwise_and(bytes_RB, 15, out=values[:, 0::2])
        torch.bitwise_right_shift(bytes_RB, 4, out=values[:, 1::2])
        return values
    padded_RB = torch.nn.functional.pad(bytes_RB, (0, 1))
    for i in range(8):  # eight values of three bits lie in three bytes
        low, shift = divmod(i * bits, 8)
        first = padded_RB[:, low::3][:, : values[:, i::8].shape[1]]
        second = padded_RB[:, low + 1 :: 3][:, : first.shape[1]]
        values[:, i::8] = (first >> shift | (second << (8 - shift) if shift > 5 else 0)) & 7
    return values


def _unpack_awq_columns(words_RW: Tensor) -> Tensor:
    """int32 [R, W] with AWQ's order within a word to uint8 [8 W, R]."""
    num_rows, num_words = words_RW.shape
    bytes_RW4 = words_RW.flatten().view(torch.uint8).view(num_rows, num_words, 4)
    values = torch.empty(num_words, 8, num_rows, dtype=torch.uint8, device=words_RW.device)
    for nibble, column in enumerate(_AWQ_COLUMNS):
        values[:, column] = (bytes_RW4[:, :, nibble // 2] >> 4 * (nibble % 2)).bitwise_and_(15).T
    return values.view(num_words * 8, num_rows)
