"""How good a demo model is: greedy answers to tickets that it has not seen, by transformers.

The reference beside the engine: float32 on the stored weights, and the same with the decoder rounded to int4. Knows
nothing of training. Called by `jobs.demo.train` and the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from jobs.demo.tickets import INSTRUCTION, Ticket

GROUP_SIZE = 32
HELD_OUT_SEED = 424_242
"""Of the tickets that decide what accuracy is reported; no training seed comes near it."""


def encode_prefix(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that every row's prompt starts with: up to and including <|user|>."""
    return tokenizer.encode(f"<|system|>{INSTRUCTION}<|end|><|user|>")


def encode_tickets(tokenizer: PreTrainedTokenizerFast, tickets: Sequence[Ticket]) -> list[tuple[list[int], list[int]]]:
    """Per ticket: the rest of its prompt, up to and including <|assistant|>, and the answer with its <|end|>."""
    prompts = tokenizer([f"{ticket.text}<|end|><|assistant|>" for ticket in tickets])["input_ids"]
    answers = tokenizer([f"{ticket.gold}<|end|>" for ticket in tickets])["input_ids"]
    return list(zip(prompts, answers))


def round_to_int4(weight_NK: Tensor) -> Tensor:
    """Symmetric rounding to nearest: groups of a row share the scale max|w| / 7; returns the values, as floats."""
    groups = weight_NK.view(weight_NK.shape[0], -1, GROUP_SIZE)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 7
    return ((groups / scale).round().clamp(-8, 7) * scale).view_as(weight_NK)


def is_decoder_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def round_decoder_to_int4(model: LlamaForCausalLM) -> None:
    """Replace every decoder linear's weight by its int4 rounding, in place; embedding and tied head stay."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if is_decoder_linear(name):
                weight.copy_(round_to_int4(weight))


@torch.inference_mode()
def answer_tickets(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tickets: Sequence[Ticket], max_tokens: int = 64
) -> list[str]:
    """Greedy answers by transformers, as text, in the order of `tickets`; 64 rows share one encoding of the prefix."""
    rows = [prompt for prompt, _ in encode_tickets(tokenizer, tickets)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    answers = [""] * len(rows)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        for i, text in zip(chosen, _answer_batch(model, tokenizer, [rows[i] for i in chosen], max_tokens)):
            answers[i] = text
    return answers


def _answer_batch(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Sequence[list[int]], max_tokens: int
) -> list[str]:
    prefix = torch.tensor([encode_prefix(tokenizer)])
    cache = DynamicCache()
    model.model(prefix, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(rows))
    length = max(map(len, rows))
    ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    own_mask = (torch.arange(length) >= (length - lengths)[:, None]).long()
    mask = torch.cat((torch.ones(len(rows), prefix.shape[1], dtype=torch.long), own_mask), 1)
    positions = (mask.cumsum(1) - 1)[:, prefix.shape[1] :]
    written: list[Tensor] = []
    finished = torch.zeros(len(rows), dtype=torch.bool)
    while len(written) < max_tokens and not finished.all():
        output = model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        ids = output.logits[:, -1:].argmax(-1).masked_fill(finished[:, None], tokenizer.pad_token_id)
        finished |= ids[:, 0] == tokenizer.eos_token_id
        written.append(ids)
        mask = F.pad(mask, (0, 1), value=1)
        positions = positions[:, -1:] + 1
    return tokenizer.batch_decode(torch.cat(written, 1), skip_special_tokens=True)


def exact_match(answers: Sequence[str], tickets: Sequence[Ticket]) -> float:
    """Share of answers that are the gold text, character for character."""
    return sum(answer == ticket.gold for answer, ticket in zip(answers, tickets)) / len(tickets)


def load_model(directory: Path, int4: bool = False) -> LlamaForCausalLM:
    """The stored bfloat16 weights computing in float32, with or without int4 rounding of the decoder."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if int4:
        round_decoder_to_int4(model)
    return model


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(directory)


@torch.inference_mode()
def draft_agreement(
    draft: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tickets: Sequence[Ticket], answers: Sequence[str]
) -> float:
    """Share of the answers' tokens that the draft model would have written next."""
    num_same = num_tokens = 0
    prefix = encode_prefix(tokenizer)
    answered = [Ticket(ticket.text, answer) for ticket, answer in zip(tickets, answers)]
    for prompt, answer in encode_tickets(tokenizer, answered):
        logits = draft(torch.tensor([prefix + prompt + answer]), logits_to_keep=len(answer) + 1).logits[0, :-1]
        num_same += int((logits.argmax(-1) == torch.tensor(answer)).sum())
        num_tokens += len(answer)
    return num_same / num_tokens
