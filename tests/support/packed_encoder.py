"""Writes the public formats of packed weights bit by bit, from their descriptions alone; calls nothing of the product.

A weight is whole numbers q [N, K] from 0 to 2**bits - 1, scales [N, G], zero points [N, G], and the group of each
input; it stands for scale * (q - zero). `encode_*` give the tensors of a layer by the end of their names, `decode` what
they stand for. Slow and plain on purpose: every value is placed by its bit number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass
class PlainWeight:
    """A quantised weight before it is packed; group_K[k] is the group of input k."""

    q_NK: np.ndarray
    scale_NG: np.ndarray
    zero_NG: np.ndarray
    group_K: np.ndarray
    bits: int

    def decode(self) -> np.ndarray:
        """The weight as float32: the exact product, rounded once."""
        q, zero = self.q_NK.astype(np.float64), self.zero_NG.astype(np.float64)[:, self.group_K]
        return ((q - zero) * self.scale_NG.astype(np.float64)[:, self.group_K]).astype(np.float32)


def random_plain_weight(
    num_out: int,
    num_in: int,
    bits: int = 4,
    group_size: int | None = 32,
    symmetric: bool = True,
    act_order: bool = False,
    spread: float = 0.15,
    seed: int = 0,
    order_seed: int | None = None,
) -> PlainWeight:
    """Random values of every kind, the ends of the range among them; weights of about `spread`.

    order_seed: layers with the same one have the same order of inputs, as layers of one input do in checkpoints.
    """
    random = np.random.default_rng(seed)
    num_groups = 1 if group_size is None else num_in // group_size
    group_K = np.arange(num_in) // (group_size or num_in)
    if act_order:
        group_K = group_K[np.random.default_rng(seed if order_seed is None else order_seed).permutation(num_in)]
    middle = 1 << (bits - 1)
    zero = np.full((num_out, num_groups), middle)
    if not symmetric:
        zero = np.clip(np.rint(random.normal(middle, middle / 4, zero.shape)), 0, 2**bits - 1).astype(np.int64)
        zero[0, 0], zero[-1, -1] = 0, 2**bits - 1
    scale = (random.uniform(0.7, 1.3, (num_out, num_groups)) * spread / middle * 2).astype(np.float16)
    q = random.integers(0, 2**bits, (num_out, num_in))
    q = np.where(random.random(q.shape) < 0.9, np.clip((q + middle) // 2, 0, 2**bits - 1), q)
    return PlainWeight(q, scale, zero, group_K, bits)


def to_words(values: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Values as one stream of bits along an axis, in int32 words, low bits first; zeros fill the last word."""
    values = np.moveaxis(values.astype(np.uint64), axis, -1)
    num_words = -(-values.shape[-1] * bits // 32)
    stream = np.zeros((*values.shape[:-1], num_words * 32), dtype=np.uint64)
    for bit in range(bits):
        stream[..., bit : values.shape[-1] * bits : bits] = values >> np.uint64(bit) & np.uint64(1)
    weights_of_bits = np.uint64(1) << np.arange(32, dtype=np.uint64)
    words = (stream.reshape(*stream.shape[:-1], num_words, 32) * weights_of_bits).sum(-1).astype(np.uint32)
    return np.ascontiguousarray(np.moveaxis(words.view(np.int32), -1, axis))


def encode_gptq(weight: PlainWeight, version: int = 1, with_g_idx: bool = True) -> dict[str, np.ndarray]:
    """qweight packed along K, qzeros along N, everything transposed; version 1 stores zero - 1 modulo 2**bits."""
    zero_GN = weight.zero_NG.T
    if version == 1:
        zero_GN = (zero_GN - 1) % 2**weight.bits
    arrays = {
        "qweight": to_words(weight.q_NK.T, weight.bits, axis=0),
        "qzeros": to_words(zero_GN, weight.bits, axis=1),
        "scales": np.ascontiguousarray(weight.scale_NG.T),
    }
    return {**arrays, "g_idx": weight.group_K.astype(np.int32)} if with_g_idx else arrays


def encode_awq(weight: PlainWeight) -> dict[str, np.ndarray]:
    """qweight and qzeros packed along N, eight columns to a word in AWQ_ORDER."""

    def interleaved(values_RN: np.ndarray) -> np.ndarray:
        words = values_RN.reshape(values_RN.shape[0], -1, 8)
        return to_words(words[:, :, AWQ_ORDER].reshape(values_RN.shape), 4, axis=1)

    return {
        "qweight": interleaved(weight.q_NK.T),
        "qzeros": interleaved(weight.zero_NG.T),
        "scales": np.ascontiguousarray(weight.scale_NG.T),
    }


def encode_compressed_tensors(
    weight: PlainWeight, symmetric: bool = True, act_order: bool = False
) -> dict[str, np.ndarray]:
    """weight_packed along K, weight_zero_point along N; a value is stored as the signed one plus 2**(bits - 1)."""
    arrays = {
        "weight_packed": to_words(weight.q_NK, weight.bits, axis=1),
        "weight_scale": weight.scale_NG,
        "weight_shape": np.array(weight.q_NK.shape, dtype=np.int64),
    }
    if not symmetric:
        arrays["weight_zero_point"] = to_words(weight.zero_NG, weight.bits, axis=0)
    if act_order:
        arrays["weight_g_idx"] = weight.group_K.astype(np.int32)
    return arrays
