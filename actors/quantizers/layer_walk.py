"""A model one layer at a time, whole sequences, in plain float32: what calibration runs on.

Only one layer's weights are in memory; the hidden states of all sequences wait between layers. Computes what
transformers computes (bias, QK norm, sliding windows, any rope scaling) but knows no pages and no batching by tokens.
Positions whose whole context another sequence already had (a shared prompt prefix) are run, but not counted.

Shape letters: T tokens of all sequences, B sequences of a batch, L positions, H hidden size, N heads, K inputs of a
linear layer, D head dimension, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.architecture import Architecture, LinearSpec
from actors.rotary import rope_tables
from actors.weights.checkpoint import Checkpoint
from kernels.rope import rope_cpu

BATCH_TOKENS = 4096
"""Tokens, padding included, that go through a layer at once."""

MAX_SECOND_MOMENT_TOKENS = 1024
"""Rows of one product X^T X."""

PARTS = ("qkv", "output", "gate_up", "down")
"""The four inputs that a layer's linear layers have, in the order in which they arise."""


@dataclass(slots=True)
class HiddenStates:
    """What flows between layers, for all sequences, on the CPU.

    x_TH: float32, sequence after sequence. lengths: tokens of each. counted_from: per sequence, the first position
    whose context no other sequence has.
    """

    x_TH: Tensor
    lengths: list[int]
    counted_from: list[int]

    @property
    def num_counted(self) -> int:
        return sum(self.lengths) - sum(self.counted_from)

    def batches(self) -> Iterator[Batch]:
        """Sequences padded on the right, some at a time; order as stored."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        first = 0
        while first < len(self.lengths):
            last, longest = first, 0
            while last < len(self.lengths):
                wider = max(longest, self.lengths[last])
                if last > first and wider * (last + 1 - first) > BATCH_TOKENS:
                    break
                last, longest = last + 1, wider
            yield Batch(
                rows=slice(starts[first], starts[last]),
                lengths=self.lengths[first:last],
                counted_from=self.counted_from[first:last],
            )
            first = last


@dataclass(frozen=True, slots=True)
class Batch:
    """Some sequences of HiddenStates: their rows of x_TH, padded on demand. Padding comes last and is never seen."""

    rows: slice
    lengths: list[int]
    counted_from: list[int]

    def pad(self, x_TH: Tensor, device: torch.device) -> Tensor:
        """[B, L, H] on the device."""
        parts = x_TH[self.rows].to(device).split(self.lengths)
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)

    def unpad(self, x_BLH: Tensor) -> Tensor:
        """All tokens, [T of the batch, H]."""
        return torch.cat([x_BLH[i, :length] for i, length in enumerate(self.lengths)])

    def counted(self, x_BLH: Tensor) -> Tensor:
        """The tokens that count."""
        spans = zip(self.counted_from, self.lengths)
        return torch.cat([x_BLH[i, start:length] for i, (start, length) in enumerate(spans)])


@dataclass(slots=True)
class InputMoments:
    """What the methods need to know of a linear layer's inputs: mean |x| [K] and the mean of x x^T [K, K]."""

    mean_abs_K: Tensor
    second_KK: Tensor


def order_sequences(sequences: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[int]]:
    """Distinct sequences by rising length, and for each the first position whose context none before it has."""
    in_order = sorted({tuple(sequence) for sequence in sequences if len(sequence)})
    counted_from = [0] + [_num_shared(a, b) for a, b in itertools.pairwise(in_order)]
    by_length = sorted(zip(in_order, counted_from), key=lambda pair: len(pair[0]))
    return [list(sequence) for sequence, _ in by_length], [start for _, start in by_length]


def _num_shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def embed(embedding_VH: Tensor, sequences: Sequence[Sequence[int]]) -> HiddenStates:
    """The hidden states before the first layer; duplicates are folded and the order changes (`order_sequences`)."""
    ordered, counted_from = order_sequences(sequences)
    ids_T = torch.tensor([token for sequence in ordered for token in sequence])
    return HiddenStates(F.embedding(ids_T, embedding_VH).float().cpu(), [len(s) for s in ordered], counted_from)


class WalkedLayer:
    """One decoder layer with float32 weights on `device`; `weights` may be replaced between runs.

    weights: by the tensors' names in the checkpoint, less the layer's prefix, such as "self_attn.q_proj.weight".
    """

    def __init__(self, checkpoint: Checkpoint, index: int, longest: int, device: torch.device) -> None:
        self.architecture, self.index, self.device = checkpoint.architecture, index, device
        self.dtype = checkpoint.dtype
        self.prefix = f"model.layers.{index}."
        stored = read_layer(checkpoint, index)
        self.weights = {name: tensor.to(device, torch.float32) for name, tensor in stored.items()}
        tables = rope_tables(checkpoint.config, longest, torch.float32, device)
        self._cos_LR, self._sin_LR = tables

    def linears(self, part: str) -> list[LinearSpec]:
        """The linear layers that read the input `part`."""
        return part_linears(self.architecture, self.index, part)

    def weight_name(self, linear: LinearSpec) -> str:
        return linear.name.removeprefix(self.prefix) + ".weight"

    def run(self, x_BLH: Tensor, until: str | None = None) -> Tensor:
        """The layer's output, or the input that the linear layers of part `until` see."""
        normed = self._norm(x_BLH, "input_layernorm")
        if until == "qkv":
            return normed
        attended = self._attend(normed)
        if until == "output":
            return attended
        x_BLH = x_BLH + self._linear(attended, "self_attn.o_proj")
        normed = self._norm(x_BLH, "post_attention_layernorm")
        if until == "gate_up":
            return normed
        gated = F.silu(self._linear(normed, "mlp.gate_proj")) * self._linear(normed, "mlp.up_proj")
        if until == "down":
            return gated
        return x_BLH + self._linear(gated, "mlp.down_proj")

    def advance(self, states: HiddenStates) -> None:
        """Run all sequences through the layer, in place."""
        for batch in states.batches():
            states.x_TH[batch.rows] = batch.unpad(self.run(batch.pad(states.x_TH, self.device))).cpu()

    def input_moments(self, states: HiddenStates, part: str) -> InputMoments:
        """What the linear layers of `part` see of the tokens that count."""
        num_in = self.linears(part)[0].num_in
        absolute_K = torch.zeros(num_in, dtype=torch.float32, device=self.device)
        second_KK = torch.zeros(num_in, num_in, dtype=torch.float32, device=self.device)
        for batch in states.batches():
            x_TK = batch.counted(self.run(batch.pad(states.x_TH, self.device), until=part))
            absolute_K += x_TK.abs().sum(0)
            for rows in x_TK.split(MAX_SECOND_MOMENT_TOKENS):
                second_KK.addmm_(rows.T, rows)
        return InputMoments(absolute_K / states.num_counted, second_KK.div_(states.num_counted))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self.weights[name + ".weight"], self.architecture.rms_norm_eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def _attend(self, x_BLH: Tensor) -> Tensor:
        num_rows, length, _ = x_BLH.shape
        q, k, v = (
            self._linear(x_BLH, f"self_attn.{name}_proj").view(num_rows, length, -1, self.architecture.head_dim)
            for name in "qkv"
        )
        if self.architecture.qk_norm:
            q, k = self._norm(q, "self_attn.q_norm"), self._norm(k, "self_attn.k_norm")
        positions_T = torch.arange(length, device=self.device).repeat(num_rows)
        q, k = q.contiguous(), k.contiguous()
        rope_cpu(q.flatten(0, 1), k.flatten(0, 1), positions_T, self._cos_LR, self._sin_LR)
        window = self.architecture.windows[self.index]
        mask_LL = None if window is None or window >= length else _window_mask(length, window, self.device)
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask_LL,
            is_causal=mask_LL is None,
            enable_gqa=True,
        )
        return attended.transpose(1, 2).flatten(2)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Which keys a query sees: itself and the window - 1 before it."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def part_linears(architecture: Architecture, index: int, part: str) -> list[LinearSpec]:
    """The linear layers of layer `index` that read the input `part`."""
    q, k, v, output = architecture.attention_linears(index)
    gate, up, down = architecture.mlp_linears(index)
    return {"qkv": [q, k, v], "output": [output], "gate_up": [gate, up], "down": [down]}[part]


def read_layer(checkpoint: Checkpoint, index: int) -> dict[str, Tensor]:
    """The tensors of a layer by name without its prefix: linear weights as float32 (decoded), others as stored."""
    architecture, prefix = checkpoint.architecture, f"model.layers.{index}."
    tensors = {}
    for linear in (*architecture.attention_linears(index), *architecture.mlp_linears(index)):
        tensors[linear.name.removeprefix(prefix) + ".weight"] = checkpoint.read_linear(linear)
        if linear.has_bias:
            tensors[linear.name.removeprefix(prefix) + ".bias"] = checkpoint.read(linear.name + ".bias")
    for name, _ in architecture.other_tensors():
        if name.startswith(prefix):
            tensors[name.removeprefix(prefix)] = checkpoint.read(name)
    return tensors


def head_weight(checkpoint: Checkpoint) -> Tensor:
    """The output head [V, H]: its own, or the embedding."""
    head = checkpoint.architecture.head()
    return checkpoint.read("model.embed_tokens.weight") if head is None else checkpoint.read_linear(head)


def counted_logits(
    states: HiddenStates, norm_H: Tensor, head_VH: Tensor, eps: float, device: torch.device
) -> Iterator[Tensor]:
    """Float32 logits [T, V] of the tokens that count, batch by batch, from the states behind the last layer."""
    norm_H, head_VH = norm_H.to(device, torch.float32), head_VH.to(device, torch.float32)
    for batch in states.batches():
        x_TH = batch.counted(batch.pad(states.x_TH, device))
        for rows in x_TH.split(BATCH_TOKENS // 4):
            yield F.linear(rms_norm(rows, norm_H, eps), head_VH)


@torch.inference_mode()
def walk(checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], device: torch.device) -> Iterator[Tensor]:
    """The float32 logits of a whole model on all tokens that count, in the order of `order_sequences`."""
    states = embed(checkpoint.read("model.embed_tokens.weight"), sequences)
    for index in range(checkpoint.architecture.num_layers):
        WalkedLayer(checkpoint, index, max(states.lengths), device).advance(states)
    norm_H = checkpoint.read("model.norm.weight")
    yield from counted_logits(states, norm_H, head_weight(checkpoint), checkpoint.architecture.rms_norm_eps, device)
