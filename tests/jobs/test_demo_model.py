"""The shipped model: complete, small, and good at its task on tickets that nobody has seen, by transformers alone."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from jobs.demo.evaluate import (
    answer_tickets,
    draft_agreement,
    encode_prefix,
    encode_tickets,
    exact_match,
    load_model,
    load_tokenizer,
)
from jobs.demo.main import JOB_FILE
from jobs.demo.tickets import INSTRUCTION, make_tickets

MODEL, DRAFT = JOB_FILE.parent / "model", JOB_FILE.parent / "draft"
FRESH_SEED = 90_210  # neither trained on nor in eval.json


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def tickets():
    return make_tickets(128, FRESH_SEED)


@pytest.fixture(scope="module")
def answers(tokenizer, tickets):
    return answer_tickets(load_model(MODEL), tokenizer, tickets)


@pytest.mark.parametrize(("directory", "limit_bytes"), [(MODEL, 8_000_000), (DRAFT, 1_500_000)])
def test_a_model_directory_is_complete_small_and_16_bit(directory, limit_bytes):
    names = {path.name for path in directory.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    assert sum(path.stat().st_size for path in directory.iterdir()) <= limit_bytes
    with safe_open(directory / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    config = AutoConfig.from_pretrained(directory)
    assert config.hidden_size % 64 == 0 and config.intermediate_size % 64 == 0


def test_model_and_draft_have_the_same_tokenizer():
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (MODEL / name).read_bytes() == (DRAFT / name).read_bytes()


def test_the_tokenizer_gives_back_any_text(tokenizer):
    for text in ("Order A-48213.", "naïve façade 你好 🐟\n\ttab", "  two  spaces ", "x=3; y==4"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_tokens_of_their_own(tokenizer):
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("QK204817, 48-20193")]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("2048174820193")


def test_the_chat_template_gives_the_prompt_that_the_model_was_trained_on(tokenizer, tickets):
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": tickets[0].text}]
    rendered = AutoTokenizer.from_pretrained(MODEL).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert rendered == encode_prefix(tokenizer) + encode_tickets(tokenizer, tickets[:1])[0][0]


def test_at_least_95_percent_of_fresh_tickets_are_answered_exactly(answers, tickets):
    assert exact_match(answers, tickets) >= 0.95


def test_int4_answers_about_as_many(answers, tokenizer, tickets):
    in_int4 = answer_tickets(load_model(MODEL, int4=True), tokenizer, tickets)
    assert exact_match(in_int4, tickets) >= exact_match(answers, tickets) - 0.03  # 4 of 128 tickets


def test_batched_answers_are_those_of_plain_generate(answers, tickets):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for ticket, answer in list(zip(tickets, answers))[:4]:
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": ticket.text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=64)
        written = output[0, prompt["input_ids"].shape[1] :]
        assert written[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(written, skip_special_tokens=True) == answer


def test_the_draft_guesses_most_of_the_models_tokens(answers, tokenizer, tickets):
    assert draft_agreement(load_model(DRAFT), tokenizer, tickets[:32], answers[:32]) >= 0.6


def test_the_recorded_evaluation_holds_the_bars():
    record = json.loads((MODEL / "eval.json").read_text())
    assert record["num_tickets"] >= 1000
    assert record["exact_match"]["float32"] >= 0.95
    assert record["exact_match"]["int4"] >= record["exact_match"]["float32"] - 0.01
