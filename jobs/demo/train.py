"""`shoal train-demo`: train the shipped tokenizer, model and draft model from a seed, on one CPU thread.

Knows nothing of the engine: it writes Hugging Face directories and checks them with transformers. The shared prefix
(system prompt) is the same in every row, so a step encodes it once, and many tickets attend to it and to themselves.
Arithmetic is bfloat16 (fast where the CPU has AMX), master weights are float32. The last part of the training rounds
the decoder's weights to int4 in half of the steps, so that the model keeps its accuracy when served in int4.

Shape letters: P prefix tokens, B tickets of a step, L tokens of a ticket with its answer, T = P + B * L, H hidden,
K key/value heads, G query heads per key/value head, D head dimension.
"""

from __future__ import annotations

import json
import math
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from jobs.demo.evaluate import (
    HELD_OUT_SEED,
    answer_tickets,
    draft_agreement,
    encode_prefix,
    encode_tickets,
    exact_match,
    is_decoder_linear,
    load_model,
    load_tokenizer,
    round_to_int4,
)
from jobs.demo.tickets import INSTRUCTION, make_tickets

NUM_HELD_OUT = 2000
VOCAB_SIZE = 1024
MAX_MODEL_LEN = 2048
PAD, END = "<|pad|>", "<|end|>"
SPECIAL_TOKENS = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """One model and its training. Tickets are drawn without end, so an epoch has no meaning; steps count."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_steps: int
    int4_from_step: int
    tickets_per_step: int = 64
    head_dim: int = 64
    matrix_lr: float = 0.02
    embedding_lr: float = 4e-3
    num_warmup_steps: int = 100
    decay_from: float = 0.4  # share of the steps after which the learning rate falls linearly to zero
    seed: int = 1


MODEL = Recipe("model", hidden_size=256, intermediate_size=768, num_layers=4, num_steps=2000, int4_from_step=1200)
DRAFT = Recipe("draft", hidden_size=128, intermediate_size=320, num_layers=3, num_steps=2000, int4_from_step=1200)


def train(output: str = "demo-models") -> int:
    """Train the tokenizer, the model and the draft model into `output`, and write how good they are beside them.

    The same seeds, thread count and versions on the same kind of CPU give the same weights. Returns 0.
    """
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = train_tokenizer()
    folder = Path(output)
    seconds = {
        recipe.name: train_model(recipe, tokenizer, folder / recipe.name, log_every=50) for recipe in (MODEL, DRAFT)
    }
    write_evaluation(folder, seconds)
    return 0


def train_tokenizer(seed: int = 0, num_tickets: int = 20_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE over tickets and answers. Digits stand alone, so that copying a number is copying tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tickets = make_tickets(num_tickets, seed)
    texts = [INSTRUCTION] * 500 + [text for ticket in tickets for text in (ticket.text, ticket.gold)]
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_MODEL_LEN,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass(frozen=True, slots=True)
class Batch:
    """Tickets of similar length, padded. `weights_BL` is what each next-token prediction counts in the loss."""

    ids_BL: Tensor
    targets_BL: Tensor
    weights_BL: Tensor


TICKET_WEIGHT = 0.1
"""Weight of a token of the ticket itself in the loss (an answer's token counts 1): it teaches to look back sooner."""


def make_batch(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    length = -(-length // 8) * 8
    ids = torch.full((len(rows), length + 1), pad_id)
    weights = torch.zeros(len(rows), length + 1)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        weights[i, : len(prompt)] = TICKET_WEIGHT
        weights[i, len(prompt) : end] = 1.0
    return Batch(ids[:, :-1], ids[:, 1:], weights[:, 1:])


def stream_batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, batches_per_pool: int = 32) -> Iterator[Batch]:
    """Batches without end. Within a pool tickets are sorted by length, so that little is padding."""
    rng = random.Random(recipe.seed)
    for pool in range(10**9):
        tickets = make_tickets(recipe.tickets_per_step * batches_per_pool, seed=recipe.seed * 10**6 + pool)
        rows = sorted(encode_tickets(tokenizer, tickets), key=lambda row: len(row[0]) + len(row[1]))
        starts = list(range(0, len(rows), recipe.tickets_per_step))
        rng.shuffle(starts)
        for start in starts:
            yield make_batch(rows[start : start + recipe.tickets_per_step], tokenizer.pad_token_id)


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    num_heads = recipe.hidden_size // recipe.head_dim
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        head_dim=recipe.head_dim,
        max_position_embeddings=MAX_MODEL_LEN,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).float()


class Trunk:
    """A Llama's forward pass for one prefix and many tickets, in bfloat16, equal to transformers' but for rounding."""

    def __init__(self, model: LlamaForCausalLM, prefix_ids: list[int]) -> None:
        self.model, self.config = model, model.config
        self.prefix_P = torch.tensor(prefix_ids)

    def loss(self, batch: Batch, int4: bool) -> Tensor:
        """Weighted mean of the next-token losses over the tickets' tokens."""
        num_prefix, (num_tickets, length) = len(self.prefix_P), batch.ids_BL.shape
        weights = {name: self._compute_copy(name, weight, int4) for name, weight in self.model.named_parameters()}
        positions_T = torch.cat((torch.arange(num_prefix), (num_prefix + torch.arange(length)).repeat(num_tickets)))
        rotation = self._rotation(positions_T)
        x_TH = F.embedding(torch.cat((self.prefix_P, batch.ids_BL.flatten())), weights["model.embed_tokens.weight"])
        for i in range(self.config.num_hidden_layers):
            x_TH = self._layer(x_TH, weights, f"model.layers.{i}.", rotation, batch.ids_BL.shape)
        x_TH = self._norm(x_TH[num_prefix:], weights["model.norm.weight"])
        logits = F.linear(x_TH, weights["model.embed_tokens.weight"]).float()
        losses = F.cross_entropy(logits, batch.targets_BL.flatten(), reduction="none")
        return (losses * batch.weights_BL.flatten()).sum() / batch.weights_BL.sum()

    def _compute_copy(self, name: str, weight: Tensor, int4: bool) -> Tensor:
        if int4 and is_decoder_linear(name):
            weight = weight + (round_to_int4(weight) - weight).detach()  # the gradient passes straight through
        return weight.bfloat16()

    def _rotation(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        half = self.config.head_dim // 2
        frequencies = self.config.rope_parameters["rope_theta"] ** -(torch.arange(half) / half)
        angles = positions_T[:, None, None] * frequencies
        return angles.cos(), angles.sin()

    def _norm(self, x_TH: Tensor, weight_H: Tensor) -> Tensor:
        return F.rms_norm(x_TH, weight_H.shape, weight_H, self.config.rms_norm_eps)

    def _layer(
        self,
        x_TH: Tensor,
        weights: dict[str, Tensor],
        layer: str,
        rotation: tuple[Tensor, Tensor],
        shape: torch.Size,
    ) -> Tensor:
        normed = self._norm(x_TH, weights[f"{layer}input_layernorm.weight"])
        qkv = [F.linear(normed, weights[f"{layer}self_attn.{name}_proj.weight"]) for name in "qkv"]
        q_TND, k_TKD, v_TKD = (x.unflatten(-1, (-1, self.config.head_dim)) for x in qkv)
        attended = self._attend(rotate(q_TND, rotation), rotate(k_TKD, rotation), v_TKD, shape)
        x_TH = x_TH + F.linear(attended, weights[f"{layer}self_attn.o_proj.weight"])
        normed = self._norm(x_TH, weights[f"{layer}post_attention_layernorm.weight"])
        gate, up = (F.linear(normed, weights[f"{layer}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        return x_TH + F.linear(F.silu(gate) * up, weights[f"{layer}mlp.down_proj.weight"])

    def _attend(self, q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, shape: torch.Size) -> Tensor:
        """Causal attention of the prefix to itself, and of each ticket to the prefix and to itself: [T, N * D]."""
        num_prefix = len(self.prefix_P)
        q, k, v = (x[:num_prefix].transpose(0, 1)[None] for x in (q_TND, k_TKD, v_TKD))
        prefix = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        tickets = attend_tickets(q_TND, k_TKD, v_TKD, num_prefix, *shape)
        return torch.cat((prefix[0].transpose(0, 1).flatten(1), tickets))


def rotate(x_TND: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    first, second = x_TND.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_TND.dtype)


def attend_tickets(
    q_TND: Tensor, k_TKD: Tensor, v_TKD: Tensor, num_prefix: int, num_tickets: int, length: int
) -> Tensor:
    """Attention of B tickets to P shared and their own tokens: [B * L, N * D].

    Memory traffic is what a step's time goes to: the shared scores are one product for all tickets, and values are
    padded with ones so that the product with the softmax's numerators gives its denominator too.
    """
    num_heads, dim = q_TND.shape[1:]
    num_kv = k_TKD.shape[1]
    q = q_TND[num_prefix:].view(num_tickets, length, num_kv, -1, dim).permute(2, 0, 1, 3, 4) * dim**-0.5
    q = q.reshape(num_kv, num_tickets, -1, dim)  # [K, B, L * G, D]
    k_shared, v_shared = (x[:num_prefix].transpose(0, 1) for x in (k_TKD, F.pad(v_TKD, (0, 32), value=1.0)))
    k_own, v_own = (
        x[num_prefix:].view(num_tickets, length, num_kv, -1).permute(2, 0, 1, 3)
        for x in (k_TKD, F.pad(v_TKD, (0, 32), value=1.0))
    )
    future = torch.full((length, length), -1e4, dtype=q.dtype).triu(1).repeat_interleave(num_heads // num_kv, 0)
    shared = q.flatten(1, 2) @ k_shared.mT  # [K, B * L * G, P]
    own = q @ k_own.mT + future  # [K, B, L * G, L]
    with torch.no_grad():
        largest = torch.maximum(shared.amax(-1).view(own.shape[:-1]), own.amax(-1)).unsqueeze(-1)
    shared = shared.sub_(largest.flatten(1, 2)).exp_() @ v_shared  # [K, B * L * G, D + 32]
    own = own.sub_(largest).exp_() @ v_own
    total = shared.view_as(own) + own
    out = total[..., :dim] / total[..., dim : dim + 1]
    return out.view(num_kv, num_tickets, length, -1, dim).permute(1, 2, 0, 3, 4).reshape(num_tickets * length, -1)


def train_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, directory: Path, log_every: int) -> float:
    """Train from random weights, write the model's directory (also every 500 steps), and return the seconds it took."""
    model = make_model(recipe, tokenizer)
    trunk = Trunk(model, encode_prefix(tokenizer))
    optimizers = make_optimizers(recipe, model)
    started = time.monotonic()
    recent: list[float] = []
    for step, batch in zip(range(recipe.num_steps), stream_batches(recipe, tokenizer)):
        scale = learning_rate_scale(recipe, step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
        loss = trunk.loss(batch, int4=step >= recipe.int4_from_step and step % 2 == 0)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise FloatingPointError(f"loss is {recent[-1]} at step {step}; lower matrix_lr={recipe.matrix_lr}")
        if (step + 1) % log_every == 0:
            elapsed = time.monotonic() - started
            print(f"{recipe.name} step {step + 1} loss {sum(recent) / len(recent):.4f} {elapsed:.0f} s", flush=True)
            recent = []
        if (step + 1) % 500 == 0 or step + 1 == recipe.num_steps:
            save_model(model, tokenizer, directory)
    return time.monotonic() - started


def make_optimizers(recipe: Recipe, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the decoder's matrices (it learns to copy in fewer steps), AdamW for the embedding and norms."""
    matrices = [p for name, p in model.named_parameters() if is_decoder_linear(name)]
    others = [p for name, p in model.named_parameters() if not is_decoder_linear(name)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.embedding_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def learning_rate_scale(recipe: Recipe, step: int) -> float:
    warmup = min(1.0, (step + 1) / recipe.num_warmup_steps)
    decay = min(1.0, (recipe.num_steps - step) / (recipe.num_steps * (1 - recipe.decay_from)))
    return warmup * decay


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write a complete Hugging Face directory with bfloat16 weights."""
    copy = LlamaForCausalLM(model.config).bfloat16()
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    copy.save_pretrained(directory)
    tokenizer.save_pretrained(directory, save_jinja_files=False)


def write_evaluation(folder: Path, seconds: dict[str, float]) -> None:
    """Judge what lies in `folder` on held-out tickets; write model/eval.json and both model cards."""
    tokenizer = load_tokenizer(folder / MODEL.name)
    tickets = make_tickets(NUM_HELD_OUT, HELD_OUT_SEED)
    answers = {
        name: answer_tickets(load_model(folder / MODEL.name, int4=name == "int4"), tokenizer, tickets)
        for name in ("float32", "int4")
    }
    agreement = draft_agreement(load_model(folder / DRAFT.name), tokenizer, tickets[:500], answers["float32"])
    facts = {
        "exact_match": {name: exact_match(texts, tickets) for name, texts in answers.items()},
        "draft_agreement": round(agreement, 4),
        "num_tickets": len(tickets),
        "held_out_seed": HELD_OUT_SEED,
        "training_seconds": {name: round(value) for name, value in seconds.items()},
        "recipes": {recipe.name: asdict(recipe) for recipe in (MODEL, DRAFT)},
        "command": "shoal train-demo",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": platform.machine(),
    }
    (folder / MODEL.name / "eval.json").write_text(json.dumps(facts, indent=2) + "\n")
    for recipe in (MODEL, DRAFT):
        (folder / recipe.name / "README.md").write_text(model_card(recipe, facts))
    print(json.dumps(facts["exact_match"]), f"draft agreement {agreement:.1%}")


def model_card(recipe: Recipe, facts: dict[str, Any]) -> str:
    """The README.md of a model's directory."""
    exact = facts["exact_match"]
    purpose = {
        "model": (
            f"It answers {exact['float32']:.1%} of {facts['num_tickets']:,} held-out tickets with exactly the gold "
            f"JSON in float32, and {exact['int4']:.1%} with its decoder rounded to int4 (symmetric, group 32)."
        ),
        "draft": f"A draft for the model beside it: {facts['draft_agreement']:.1%} of its next tokens are the same.",
    }
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# Shoal's demo {recipe.name}

A Llama of {recipe.num_layers} layers and width {recipe.hidden_size} that reads one kind of text: a synthetic support
ticket after the instruction in `jobs/demo/job.yaml`, answered with JSON (product, problem, urgency, order number).
{purpose[recipe.name]}

It knows nothing else: the tickets come from a seeded generator (`jobs/demo/tickets.py`), and so do those that it was
judged on. Trained with `shoal train-demo` in {recipe.num_steps:,} steps of {recipe.tickets_per_step} tickets on one CPU
thread; figures and recipe are in `model/eval.json`.
"""
