"""Rotary embeddings: the cos/sin tables of a model, for every scaling that transformers has.

The frequencies come from transformers' own functions. Some scalings depend on the length of the sequence: transformers
then changes the frequencies of a running batch when it grows. Here a row must not depend on its neighbours, nor a
cached key on what follows it; so the choice is made once, by the engine's `max_model_len`:

- dynamic: the NTK base for a sequence of max_model_len tokens (the plain base up to max_position_embeddings);
- longrope: the long factors when max_model_len is above original_max_position_embeddings, else the short ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from actors.architecture import CheckpointError, head_dim


def rope_type(config: Any) -> str:
    """The model's kind of scaling; CheckpointError for one that transformers' decoders do not have."""
    parameters = config.rope_parameters
    supported = ["default", *ROPE_INIT_FUNCTIONS]
    kind = parameters.get("rope_type")
    if kind not in supported:
        raise CheckpointError(f"rope type {kind!r} is not supported; supported: {', '.join(supported)}")
    if kind != "proportional" and parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise CheckpointError(
            f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported with rope type {kind!r}"
        )
    return kind


def resolve_max_model_len(config: Any, wanted: int | None) -> int:
    """Tokens per row: what is wanted, or the model's own max_position_embeddings.

    ValueError when more is wanted than the positions that the model or its rope scaling reaches.
    """
    own = config.max_position_embeddings
    if wanted is None:
        return own
    parameters = config.rope_parameters
    trained = parameters.get("original_max_position_embeddings") or own
    longest = max(own, int(trained * (parameters.get("factor") or 1.0)))
    if wanted > longest:
        raise ValueError(
            f"max_model_len={wanted} is above the {longest} positions of the model "
            f"(max_position_embeddings={own}, rope type {rope_type(config)!r}); lower max_model_len"
        )
    return wanted


def rope_tables(config: Any, max_model_len: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin by position, float32 [max_model_len, rotary_dim / 2].

    The values are rounded to `dtype`, the activations' type, as transformers rounds them before it rotates.
    """
    inv_freq_R, scaling = _inverse_frequencies(config, max_model_len)
    angles_LR = torch.arange(max_model_len).float()[:, None] * inv_freq_R[None, :].float()
    tables = (angles_LR.cos() * scaling, angles_LR.sin() * scaling)
    cos_LR, sin_LR = (table.to(dtype).float().to(device) for table in tables)
    return cos_LR, sin_LR


def _inverse_frequencies(config: Any, max_model_len: int) -> tuple[Tensor, float]:
    """Frequencies, and the factor that yarn and longrope put on cos and sin."""
    kind = rope_type(config)
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=max_model_len)
    rotary_dim = head_dim(config)
    exponents_R = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    return 1.0 / (config.rope_parameters["rope_theta"] ** exponents_R), 1.0
