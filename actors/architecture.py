"""What a model's configuration means: dimensions, biases, windows, and which tensors of which shapes it needs.

Knows no files and computes nothing. Used by `checkpoint` (to check headers) and `decoder` (to build layers).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


class CheckpointError(ValueError):
    """A model directory that cannot be used; the message names the thing, what was expected, and the way out."""


_ARCHITECTURE_OF_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SUPPORTED_ARCHITECTURES = tuple(_ARCHITECTURE_OF_TYPE.values())


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """A linear layer as the checkpoint names it: `<name>.weight` is [num_out, num_in]."""

    name: str
    num_out: int
    num_in: int
    has_bias: bool


@dataclass(frozen=True, slots=True)
class Architecture:
    """One of the supported decoders, family by family only through its fields.

    windows[i]: tokens that layer i sees, itself included; None: all.
    """

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool
    windows: tuple[int | None, ...]

    def attention_linears(self, layer: int) -> tuple[LinearSpec, LinearSpec, LinearSpec, LinearSpec]:
        """The projections q, k, v, o of a layer."""
        prefix = f"model.layers.{layer}.self_attn."
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (
            LinearSpec(prefix + "q_proj", query_size, self.hidden_size, self.qkv_bias),
            LinearSpec(prefix + "k_proj", kv_size, self.hidden_size, self.qkv_bias),
            LinearSpec(prefix + "v_proj", kv_size, self.hidden_size, self.qkv_bias),
            LinearSpec(prefix + "o_proj", self.hidden_size, query_size, self.output_bias),
        )

    def mlp_linears(self, layer: int) -> tuple[LinearSpec, LinearSpec, LinearSpec]:
        """The projections gate, up, down of a layer."""
        prefix = f"model.layers.{layer}.mlp."
        return (
            LinearSpec(prefix + "gate_proj", self.intermediate_size, self.hidden_size, self.mlp_bias),
            LinearSpec(prefix + "up_proj", self.intermediate_size, self.hidden_size, self.mlp_bias),
            LinearSpec(prefix + "down_proj", self.hidden_size, self.intermediate_size, self.mlp_bias),
        )

    def head(self) -> LinearSpec | None:
        """The output head, or None when it is the embedding."""
        return None if self.tied_head else LinearSpec("lm_head", self.vocab_size, self.hidden_size, False)

    def linears(self) -> Iterator[LinearSpec]:
        """Every linear layer with a weight of its own."""
        for layer in range(self.num_layers):
            yield from self.attention_linears(layer)
            yield from self.mlp_linears(layer)
        if (head := self.head()) is not None:
            yield head

    def other_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor that is no linear layer's."""
        yield "model.embed_tokens.weight", (self.vocab_size, self.hidden_size)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (self.hidden_size,)
            yield prefix + "post_attention_layernorm.weight", (self.hidden_size,)
            if self.qk_norm:
                yield prefix + "self_attn.q_norm.weight", (self.head_dim,)
                yield prefix + "self_attn.k_norm.weight", (self.head_dim,)
        yield "model.norm.weight", (self.hidden_size,)


def architecture_name(config: dict[str, Any]) -> str:
    """The supported architecture that a raw `config.json` asks for; CheckpointError for any other."""
    named = config.get("architectures") or [_ARCHITECTURE_OF_TYPE.get(config.get("model_type", ""))]
    name = named[0] or f"model_type {config.get('model_type')!r}"
    if name not in SUPPORTED_ARCHITECTURES:
        raise CheckpointError(f"architecture {name} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}")
    if _ARCHITECTURE_OF_TYPE.get(config.get("model_type", "")) != name:
        raise CheckpointError(
            f"config.json says architecture {name} but model_type {config.get('model_type')!r}; mend one of them"
        )
    return name


def read_architecture(name: str, config: Any) -> Architecture:
    """Take the facts from a transformers config of the architecture `name`."""
    if config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act {config.hidden_act!r} is not supported; supported: silu")
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"num_attention_heads={config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )
    # Which projections have a bias is fixed in Mistral and Qwen2 and a setting in Llama and Qwen3.
    has_bias_setting = name in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    attention_bias = has_bias_setting and config.attention_bias
    return Architecture(
        name=name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        rms_norm_eps=config.rms_norm_eps,
        qkv_bias=attention_bias or name == "Qwen2ForCausalLM",
        output_bias=attention_bias,
        mlp_bias=name == "LlamaForCausalLM" and config.mlp_bias,
        qk_norm=name == "Qwen3ForCausalLM",
        tied_head=bool(config.tie_word_embeddings),
        windows=_windows(name, config),
    )


def head_dim(config: Any) -> int:
    """The size of one head; not every config has it of its own."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _windows(name: str, config: Any) -> tuple[int | None, ...]:
    if name == "LlamaForCausalLM":
        return (None,) * config.num_hidden_layers
    if name == "MistralForCausalLM":
        return (config.sliding_window,) * config.num_hidden_layers
    return tuple(
        config.sliding_window if layer_type == "sliding_attention" else None for layer_type in config.layer_types
    )
