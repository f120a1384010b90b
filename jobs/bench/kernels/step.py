"""One decode step of a Llama-3-8B shape with random int4 weights and an int4 head, as a CUDA graph.

The layers are those of kernels.backend in the order of the engine's decoder; what the step lacks of it is the sampling
and the scheduling. On a CPU a shape of 135 million weights with two layers runs through the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.bench.kernels.attention import Shape, fill_pages, new_batch
from jobs.bench.kernels.case import Case, Prepared, fill
from jobs.bench.kernels.linear import random_weight
from kernels.backend import (
    Linear,
    add_rms_norm,
    embed_rms_norm,
    norm_rope_write_kv,
    paged_attention,
    prepare_linear,
)

EPS = 1e-5
GROUP_SIZE = 128
NUM_CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class Model:
    num_layers: int
    hidden: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int


LLAMA_8B = Model(32, 4096, 14336, 32, 8, 128, 128256)
SMALL = Model(2, 512, 1536, 8, 2, 64, 4096)


@dataclass(frozen=True, slots=True)
class Layer:
    qkv: Linear
    output: Linear
    gate_up: Linear
    down: Linear


def cases(place: str, device: torch.device) -> Iterator[Case]:
    model = LLAMA_8B if place == "cuda" else SMALL
    weights: dict[str, Any] = {}  # shared by the cases: making them takes longer than measuring
    for num_requests in (1, 32, 256) if place == "cuda" else (1, 8):
        for kv in ("bf16", "int8"):
            name = f"{'Llama-3-8B' if place == 'cuda' else 'small'} int4 step {kv} B={num_requests}"
            yield Case(
                "step",
                name,
                lambda num_requests=num_requests, kv=kv: prepare(model, num_requests, kv, place, device, weights),  # type: ignore[misc]
            )


def make_layers(model: Model, device: torch.device) -> tuple[list[Layer], Linear]:
    """All layers' weights are different memory, as in a model: none finds the last one's in a cache."""

    def linear(num_out: int, num_in: int, gated: bool = False) -> Linear:
        weight = random_weight((num_out, num_in), 4, GROUP_SIZE, False, device)
        return prepare_linear(weight, None, dtype=torch.bfloat16, device=device, gated=gated)

    attended = model.num_heads * model.head_dim
    layers = [
        Layer(
            linear(attended + 2 * model.num_kv_heads * model.head_dim, model.hidden),
            linear(model.hidden, attended),
            linear(2 * model.width, model.hidden, gated=True),
            linear(model.hidden, model.width),
        )
        for _ in range(model.num_layers)
    ]
    return layers, linear(model.vocab, model.hidden)


def prepare(
    model: Model, num_requests: int, kv: str, place: str, device: torch.device, weights: dict[str, Any]
) -> Prepared:
    dtype = torch.bfloat16
    if not weights:
        weights["layers"], weights["head"] = make_layers(model, device)
    layers, head = weights["layers"], weights["head"]
    shape = Shape(
        num_requests,
        NUM_CONTEXT,
        kv=kv,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        page_size=64,  # the engine's
    )
    num_pages_each = NUM_CONTEXT // shape.page_size
    batch = new_batch(shape, 0, num_pages_each)
    pages = [fill_pages(shape, num_requests * num_pages_each, dtype, place, device) for _ in range(model.num_layers)]
    embedding_VH = fill((num_requests, model.hidden), dtype, device, 7)  # of these tokens alone
    token_ids_T = torch.arange(num_requests, device=device)
    weight_H = torch.ones(model.hidden, dtype=dtype, device=device)
    positions_T = torch.full((num_requests,), NUM_CONTEXT - 1, device=device)
    last_pages = torch.tensor([table[-1] for table in batch.page_ids], device=device)
    slots_T = last_pages * shape.page_size + shape.page_size - 1
    half = model.head_dim // 2
    angles = torch.arange(NUM_CONTEXT, device=device)[:, None] * 500000.0 ** (-torch.arange(half, device=device) / half)
    cos, sin = angles.cos(), angles.sin()
    num_all_heads = model.num_heads + 2 * model.num_kv_heads

    def run() -> Tensor:
        residual_TH, x_TH = embed_rms_norm(token_ids_T, embedding_VH, weight_H, EPS)
        for layer, (k_pages, v_pages) in zip(layers, pages):
            qkv_TMD = layer.qkv(x_TH).view(num_requests, num_all_heads, model.head_dim)
            q_TND = norm_rope_write_kv(qkv_TMD, None, EPS, positions_T, cos, sin, k_pages, v_pages, slots_T)
            attended = paged_attention(q_TND, k_pages, v_pages, batch, model.head_dim**-0.5)
            x_TH = add_rms_norm(layer.output(attended.flatten(1)), residual_TH, weight_H, EPS)
            x_TH = layer.down(layer.gate_up(x_TH))
            x_TH = add_rms_norm(x_TH, residual_TH, weight_H, EPS)
        return head(x_TH)

    def check() -> bool:
        """Finite, not constant, and twice the same; the kernels are judged by their own cases."""
        first, second = run(), run()
        return bool(first.isfinite().all()) and bool(first.float().std() > 0) and torch.equal(first, second)

    attended = model.num_heads * model.head_dim
    per_layer = model.hidden * (2 * attended + 2 * model.num_kv_heads * model.head_dim + 3 * model.width)
    num_weights = model.num_layers * per_layer + model.vocab * model.hidden
    per_token = 2 * model.num_kv_heads * (model.head_dim + 4 if kv == "int8" else 2 * model.head_dim)
    return Prepared(
        run,
        check,
        num_bytes=int(num_weights * (0.5 + 4 / GROUP_SIZE)) + model.num_layers * num_requests * NUM_CONTEXT * per_token,
        num_flops=2 * num_requests * num_weights,
    )
