"""The forward pass of Llama, Mistral, Qwen2 and Qwen3 over a flat batch of tokens of many requests.

Knows tensors, layers and pages; no requests, no scheduler, no sampling. Every operation is one of `kernels.backend`'s,
and values are rounded in the order in which transformers rounds them. The engine builds a decoder once and calls
`forward` once per step.

Shape letters as in `kernels.attention_batch` (T tokens, N heads, K key/value heads, D head dimension, P pages, S slots
of a page); H hidden size, F fused width of a projection, V vocabulary, L positions, R half the rotary dimension.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.architecture import LinearSpec
from actors.config import EngineConfig
from actors.rotary import resolve_max_model_len, rope_tables
from actors.weights.checkpoint import Checkpoint
from actors.weights.quantization import concatenate, fitting_group_size, quantize_to_nearest
from kernels import quantized_kv
from kernels.attention_batch import AttentionBatch, new_kv_pages
from kernels.backend import (
    Gated,
    Linear,
    add_rms_norm,
    check_fixed_order_attention,
    embed_rms_norm,
    norm_rope_write_kv,
    paged_attention,
    prepare_linear,
)
from kernels.cpu_linear import dtype_name
from kernels.fp8_kv import FP8, check_fp8_device, new_fp8_pages
from kernels.int4_linear import PLANE_BITS, QuantizedWeight, dequantize
from kernels.quantized_kv import SCALE_BYTES, Pages, new_quantized_pages

logger = logging.getLogger(__name__)

KVPages = list[tuple[Pages, Pages]]
"""Key and value pages of each layer, [P, K, S, D] both."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer, its weights in the form in which the device multiplies them.

    gate_up: with the activation, so [T, hidden size] to [T, width of the feed-forward].
    """

    input_norm_H: Tensor
    qkv: Linear
    qk_norms: tuple[Tensor, Tensor] | None
    output: Linear
    post_attention_norm_H: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


class Decoder:
    """A loaded model. Make one with `load_decoder`.

    notes: what a user should know of how it was loaded, such as layers that int4 could not take.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        embedding_VH: Tensor,
        layers: list[Layer],
        final_norm_H: Tensor,
        head: Linear,
        max_model_len: int,
        kv_cache_dtype: str,
        deterministic: bool,
        notes: list[str],
    ) -> None:
        architecture = checkpoint.architecture
        self.device, self.dtype = embedding_VH.device, embedding_VH.dtype
        self.kv_dtype = {"auto": self.dtype, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": FP8}[kv_cache_dtype]
        self.num_layers = architecture.num_layers
        self.num_heads = architecture.num_heads
        self.num_kv_heads = architecture.num_kv_heads
        self.head_dim = architecture.head_dim
        self.num_linear_weights = sum(
            linear.num_out * linear.num_in
            for index in range(self.num_layers)
            for linear in (*architecture.attention_linears(index), *architecture.mlp_linears(index))
        )
        self.vocab_size = architecture.vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = checkpoint.eos_token_ids
        self.notes = notes
        self.deterministic = deterministic
        self._embedding_VH = embedding_VH
        self._layers = layers
        self.windows = {layer.window for layer in layers}
        # The norm that follows each layer: the next layer's first, at the end the final one.
        self._next_norms = [layer.input_norm_H for layer in layers[1:]] + [final_norm_H]
        self._head = head
        self._eps = architecture.rms_norm_eps
        self._scale = architecture.head_dim**-0.5
        self._cos_LR, self._sin_LR = rope_tables(checkpoint.config, max_model_len, self.dtype, self.device)

    def new_kv(self, num_pages: int, page_size: int) -> KVPages:
        """Allocate zeroed pages for all layers.

        ValueError if they cannot be attended to deterministically and must, and for odd int8 pages on a GPU.
        """
        if self.deterministic:
            check_fixed_order_attention(self.head_dim, page_size, self.dtype, self.device)
        shape = num_pages, self.num_kv_heads, page_size, self.head_dim
        if self.kv_dtype == torch.int8:
            return [new_quantized_pages(*shape, self.device) for _ in self._layers]
        if self.kv_dtype == FP8:
            return [new_fp8_pages(*shape, self.device) for _ in self._layers]
        return [new_kv_pages(*shape, self.kv_dtype, self.device) for _ in self._layers]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes in all layers."""
        scale_bytes = SCALE_BYTES if self.kv_dtype in (torch.int8, FP8) else 0
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * self.kv_dtype.itemsize + scale_bytes)

    def describe(self) -> list[str]:
        """How the linear layers compute: each way with the number of layers that take it."""
        linears = [
            self._head,
            *(x for layer in self._layers for x in (layer.qkv, layer.output, layer.gate_up, layer.down)),
        ]
        return [f"{count} x {way}" for way, count in Counter(linear.describe() for linear in linears).most_common()]

    @torch.inference_mode()
    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        kv: KVPages,
        batch: AttentionBatch,
        last_rows: Tensor,
    ) -> Tensor:
        """Run the tokens of a step, write their keys and values, and return float32 logits [len(last_rows), V].

        token_ids_T, positions_T and slots_T are int64, in the order of `batch`; slot = page * S + offset. last_rows
        (int64, may be empty) are the rows of T whose logits are wanted: only they go through the rest of the last layer
        and through the head.
        """
        first_norm_H = self._layers[0].input_norm_H
        residual_TH, x_TH = embed_rms_norm(token_ids_T, self._embedding_VH, first_norm_H, self._eps)
        for i, layer in enumerate(self._layers):
            attended_TF = self._attend(layer, x_TH, positions_T, slots_T, kv[i], batch)
            if i == self.num_layers - 1:
                if len(last_rows) == 0:
                    return torch.empty(0, self.vocab_size, device=self.device)
                attended_TF, residual_TH = attended_TF[last_rows], residual_TH[last_rows]
            x_TH = add_rms_norm(layer.output(attended_TF), residual_TH, layer.post_attention_norm_H, self._eps)
            x_TH = layer.down(layer.gate_up(x_TH))
            x_TH = add_rms_norm(x_TH, residual_TH, self._next_norms[i], self._eps)
        return self._head(x_TH).float()

    def _attend(
        self,
        layer: Layer,
        x_TH: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        pages: tuple[Pages, Pages],
        batch: AttentionBatch,
    ) -> Tensor:
        """Project, rotate, store and attend; [T, N * D], before the output projection."""
        num_tokens, num_heads, num_kv_heads = x_TH.shape[0], self.num_heads, self.num_kv_heads
        qkv_TMD = layer.qkv(x_TH).view(num_tokens, num_heads + 2 * num_kv_heads, self.head_dim)
        k_pages, v_pages = pages
        tables = self._cos_LR, self._sin_LR
        q_TND = norm_rope_write_kv(
            qkv_TMD, layer.qk_norms, self._eps, positions_T, *tables, k_pages, v_pages, slots_T, batch.cache
        )
        attended_TND = paged_attention(q_TND, k_pages, v_pages, batch, self._scale, layer.window, self.deterministic)
        return attended_TND.reshape(num_tokens, num_heads * self.head_dim)


def copy_slots(kv: KVPages, source: int, target: int, num_tokens: int) -> None:
    """Copy the first `num_tokens` slots of page `source` to page `target`, in all layers."""
    for k_pages, v_pages in kv:
        quantized_kv.copy_slots(k_pages, source, target, num_tokens)
        quantized_kv.copy_slots(v_pages, source, target, num_tokens)


def clear_pages(kv: KVPages, pages: list[int]) -> None:
    """Zero pages, in all layers."""
    for k_pages, v_pages in kv:
        quantized_kv.clear_slots(k_pages, pages)
        quantized_kv.clear_slots(v_pages, pages)


def load_decoder(checkpoint: Checkpoint, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> Decoder:
    """Read the weights tensor by tensor and build the decoder on `device` with activations of `dtype`.

    Weights are held once, those that are not int4 in `dtype`; the peak is the finished model and one fused layer. With
    quantization "int4" the linear layers of a 16-bit checkpoint are rounded to nearest, the embedding and the head are
    not. "none" decodes an int4 checkpoint to `dtype`. ValueError when config.max_model_len is beyond the model, or the
    device has no fp8 and kv_cache_dtype is.
    """
    return _Loader(checkpoint, config, device, dtype).load()


class _Loader:
    """The state of one `load_decoder`: where weights come from and go to, and what is to be noted."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.config, self.device, self.dtype = checkpoint, config, device, dtype
        self.architecture = checkpoint.architecture
        self.kept_dense: Counter[str] = Counter()
        self.decoded: Counter[str] = Counter()

    def load(self) -> Decoder:
        if self.config.kv_cache_dtype == "fp8":
            check_fp8_device(self.device)
        max_model_len = resolve_max_model_len(self.checkpoint.config, self.config.max_model_len)
        embedding_VH = self._read("model.embed_tokens.weight").to(self.dtype)
        layers = [self._layer(index) for index in range(self.architecture.num_layers)]
        head = self.architecture.head()
        return Decoder(
            checkpoint=self.checkpoint,
            embedding_VH=embedding_VH,
            layers=layers,
            final_norm_H=self._read("model.norm.weight").to(self.dtype),
            head=self._prepare(embedding_VH, None) if head is None else self._linear([head], round_to_int4=False),
            max_model_len=max_model_len,
            kv_cache_dtype=self.config.kv_cache_dtype,
            deterministic=self.config.deterministic,
            notes=self._notes(),
        )

    def _layer(self, index: int) -> Layer:
        prefix = f"model.layers.{index}."
        q, k, v, output = self.architecture.attention_linears(index)
        gate, up, down = self.architecture.mlp_linears(index)

        def norm(name: str) -> Tensor:
            return self._read(f"{prefix}self_attn.{name}_norm.weight").to(self.dtype)

        return Layer(
            input_norm_H=self._read(prefix + "input_layernorm.weight").to(self.dtype),
            qkv=self._linear([q, k, v]),
            qk_norms=(norm("q"), norm("k")) if self.architecture.qk_norm else None,
            output=self._linear([output]),
            post_attention_norm_H=self._read(prefix + "post_attention_layernorm.weight").to(self.dtype),
            gate_up=self._linear([gate, up], gated=True),
            down=self._linear([down]),
            window=self.architecture.windows[index],
        )

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(name).to(self.device)

    def _linear(self, specs: Sequence[LinearSpec], round_to_int4: bool = True, gated: bool = False) -> Linear:
        """Read linear layers of the same input and fuse them into one; gated: with silu_mul after it."""
        parts = [self._weight(spec, round_to_int4) for spec in specs]
        weights, order_K = [weight for weight, _ in parts], parts[0][1]
        biases = [self._bias(spec) for spec in specs]
        if len(specs) == 1:
            return self._prepare(weights[0], biases[0], order_K)
        is_one_order = all(_is_same_order(order_K, order) for _, order in parts)
        fused = concatenate(weights) if is_one_order else None
        if fused is None:
            linear = SideBySide([self._prepare(weight, bias, order) for (weight, order), bias in zip(parts, biases)])
            return Gated(linear, self.config.deterministic) if gated else linear
        # Else the parts would live beside their copy while that is prepared.
        weights.clear()
        parts.clear()
        bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        return self._prepare(fused, bias, order_K, gated)

    def _bias(self, linear: LinearSpec) -> Tensor | None:
        bias_N = self.checkpoint.read_bias(linear)
        return None if bias_N is None else bias_N.to(self.device, self.dtype)

    def _prepare(
        self,
        weight: Tensor | QuantizedWeight,
        bias: Tensor | None,
        order_K: Tensor | None = None,
        gated: bool = False,
    ) -> Linear:
        # How a weight is multiplied is a choice that only a CPU has.
        compute = self.config.linear_compute if self.device.type == "cpu" else "auto"
        products = PLANE_BITS if self.device.type == "cuda" else (4,)
        if isinstance(weight, QuantizedWeight) and weight.bits not in products:
            dtype = dtype_name(self.dtype)
            self.decoded[f"{weight.bits}-bit weights are multiplied as a copy in {dtype}: no product takes them"] += 1
            if self.device.type == "cuda":
                weight = dequantize(weight, self.dtype)
        linear = prepare_linear(
            weight,
            bias,
            dtype=self.dtype,
            device=self.device,
            compute=compute,
            deterministic=self.config.deterministic,
            gated=gated,
        )
        return linear if order_K is None else Reordered(linear, order_K)

    def _weight(self, linear: LinearSpec, round_to_int4: bool) -> tuple[Tensor | QuantizedWeight, Tensor | None]:
        """A layer's weight, and the order of its columns where that is not the order of its inputs."""
        if self.checkpoint.packed_format(linear.name) is not None:
            return self._packed_weight(linear)
        weight_NK = self._read(linear.name + ".weight")
        if self.config.quantization != "int4" or not round_to_int4 or self.checkpoint.quantization is not None:
            return weight_NK.to(self.dtype), None
        group_size = fitting_group_size(linear.num_in, self.config.group_size)
        if group_size is None:
            self.kept_dense[f"input size {linear.num_in} is no multiple of 32"] += 1
            return weight_NK.to(self.dtype), None
        return quantize_to_nearest(weight_NK, group_size), None

    def _packed_weight(self, linear: LinearSpec) -> tuple[Tensor | QuantizedWeight, Tensor | None]:
        unpacked = self.checkpoint.read_packed(linear, self.device)
        if self.config.quantization == "none":
            self.kept_dense[f"quantization is none, so the checkpoint's int{unpacked.bits} is decoded"] += 1
            return unpacked.to_float(self.dtype), None
        weight = unpacked.regroup()
        if weight is None:
            size = unpacked.group_size
            self.kept_dense[f"its groups of {size} on an input size of {linear.num_in} fit no multiple of 32"] += 1
            return unpacked.to_float(self.dtype), None
        return weight, unpacked.order_K

    def _notes(self) -> list[str]:
        dtype = dtype_name(self.dtype)
        notes = [
            f"{count} linear layers stay in {dtype} instead of int4: {reason}"
            for reason, count in self.kept_dense.items()
        ]
        notes += [f"{count} x {way}" for way, count in self.decoded.items()]
        for note in notes:
            logger.warning("%s: %s", self.checkpoint.uri, note)
        return [*self.checkpoint.notes, *notes]


def _is_same_order(a_K: Tensor | None, b_K: Tensor | None) -> bool:
    return (a_K is None) == (b_K is None) and (a_K is None or b_K is None or torch.equal(a_K, b_K))


class Reordered:
    """A linear layer whose weight has its columns in another order (act-order): x is brought into that first."""

    def __init__(self, linear: Linear, order_K: Tensor) -> None:
        self.linear, self.order_K = linear, order_K

    def __call__(self, x_TK: Tensor) -> Tensor:
        return self.linear(x_TK.index_select(1, self.order_K))

    def describe(self) -> str:
        return f"{self.linear.describe()}, inputs reordered"


class SideBySide:
    """Linear layers of the same input whose weights are not alike: computed one by one, outputs joined on N."""

    def __init__(self, linears: list[Linear]) -> None:
        self.linears = linears

    def __call__(self, x_TK: Tensor) -> Tensor:
        return torch.cat([linear(x_TK) for linear in self.linears], dim=-1)

    def describe(self) -> str:
        """The ways of the parts."""
        return " beside ".join(linear.describe() for linear in self.linears)
