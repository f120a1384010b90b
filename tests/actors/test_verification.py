"""Draft tokens in the forward pass: whatever is drafted, the tokens are those that are sampled without drafts."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors.config import EngineConfig, SpeculativeConfig
from actors.engine import Engine
from actors.requests import Request, SamplingParams

VOCAB = 97


class Planted:
    """Drafts what it was told will be answered, with some of the tokens made wrong; as many as there is room for."""

    def __init__(self, answers, share_wrong=0.0, longest=6, lengths=None, seed=0):
        self.answers = answers  # (request id, index) -> tokens
        self.share_wrong = share_wrong
        self.lengths = lengths or range(longest + 1)
        self.rng = random.Random(seed)
        self.num_accepted = self.num_drafted = 0
        self.num_verify_steps, self.saved_s = 0, 0.0

    def draft(self, plan, scheduler, reads):
        assert reads.num_read(plan) > 0
        room = scheduler.num_draftable(plan)
        for sequence in plan.wanting:
            known = self.answers.get((sequence.request.request_id, sequence.index), [])[sequence.num_generated :]
            limit = min(room, self.rng.choice(self.lengths))
            count = min(len(known), scheduler.room_for_draft(sequence, limit)) if limit else 0
            tokens = [
                self.rng.randrange(VOCAB) if self.rng.random() < self.share_wrong else token for token in known[:count]
            ]
            if tokens:
                plan.drafts[sequence] = tokens
                room -= len(tokens)
        self.before = {sequence: len(sequence.token_ids) for sequence in plan.drafts}

    def learn(self, plan, actual_s):
        for sequence, draft in plan.drafts.items():
            new_tokens = sequence.token_ids[self.before[sequence] :]
            self.num_drafted += len(draft)
            self.num_accepted += sum(guess == token for guess, token in zip(draft, new_tokens))

    def finish(self, sequence):
        pass


@pytest.fixture(scope="module")
def make_engine(tiny_llama):
    def make(**changes):
        defaults = {"dtype": "float32", "page_size": 8, "num_threads": 1, "num_pages": 256}
        off = SpeculativeConfig(method="none")
        return Engine(EngineConfig(model=str(tiny_llama), speculative_config=off, **{**defaults, **changes}))

    return make


@pytest.fixture(scope="module")
def plain(make_engine):
    return make_engine()


@pytest.fixture(scope="module")
def speculating(make_engine):
    return make_engine(num_pages=64)


def answer(engine, requests, planted=None):
    engine.speculation = planted
    done = {}
    for request in requests:
        engine.add(request)
    while engine.has_unfinished():
        for completion in engine.step():
            done[completion.request_id] = completion
    engine.speculation = None
    assert engine.scheduler.tree.num_available == engine.scheduler.pool.num_pages, "a page was lost"
    return done


def tokens_of(done):
    return {(name, output.index): output.token_ids for name, c in done.items() for output in c.outputs}


def essence(done):
    """All of an answer that must not depend on drafts; logprobs up to the rounding of float32 sums."""
    return {
        (name, output.index): (
            output.token_ids,
            output.text,
            output.finish_reason,
            [(logprob.token_id, [token for token, _, _ in logprob.top]) for logprob in output.logprobs or []],
        )
        for name, completion in done.items()
        for output in completion.outputs
    }


def make_requests(count, sampling, seed=1):
    rng = random.Random(seed)
    shared = [rng.randrange(2, VOCAB) for _ in range(19)]
    return [
        Request(f"r{i}", shared + [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 20))], sampling, seed=50 + i)
        for i in range(count)
    ]


SAMPLING = {
    "greedy": {},
    "temperature": {"temperature": 1.3},
    "top-p and top-k": {"temperature": 0.8, "top_p": 0.9, "top_k": 30},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "n samples": {"temperature": 1.0, "n": 3},
    "logprobs": {"temperature": 0.7, "logprobs": 4},
    "min tokens": {"temperature": 1.0, "min_tokens": 9, "ignore_eos": False, "stop_token_ids": (5, 9, 30)},
    "stop strings": {"temperature": 1.2, "stop": ("a", "Qz", "7")},
}


@pytest.mark.parametrize("share_wrong", [0.0, 0.3])
@pytest.mark.parametrize("name", SAMPLING)
def test_drafts_never_change_an_answer(name, share_wrong, plain, speculating):
    requests = make_requests(9, SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **SAMPLING[name]}))
    expected = answer(plain, requests)
    planted = Planted(tokens_of(expected), share_wrong)
    found = answer(speculating, requests, planted)
    assert essence(found) == essence(expected)
    assert planted.num_accepted > 0
    assert (planted.num_accepted == planted.num_drafted) == (share_wrong == 0)


def test_right_drafts_make_fewer_steps(plain, speculating):
    requests = make_requests(4, SamplingParams(max_tokens=30, ignore_eos=True))
    steps = plain.stats.num_steps
    expected = answer(plain, requests)
    num_plain = plain.stats.num_steps - steps
    steps = speculating.stats.num_steps
    answer(speculating, requests, Planted(tokens_of(expected), longest=9))
    assert speculating.stats.num_steps - steps < num_plain / 2


def test_an_answer_ends_at_its_limit_even_in_the_middle_of_a_draft(plain, speculating):
    long = answer(plain, make_requests(3, SamplingParams(max_tokens=40, ignore_eos=True)))
    for limit in (1, 2, 7):
        short = answer(
            speculating,
            make_requests(3, SamplingParams(max_tokens=limit, ignore_eos=True)),
            Planted(tokens_of(long), longest=20),
        )
        assert tokens_of(short) == {key: tokens[:limit] for key, tokens in tokens_of(long).items()}


def test_drafts_take_free_pages_and_preempt_nobody(make_engine, plain):
    requests = make_requests(10, SamplingParams(max_tokens=40, ignore_eos=True))
    expected = answer(plain, requests)
    tight = make_engine(num_pages=24)
    without = answer(tight, requests)
    preemptions = tight.stats.num_preemptions
    assert preemptions > 0, "this pool was meant to be too small"
    found = answer(tight, requests, Planted(tokens_of(expected), 0.2, longest=16))
    assert essence(found) == essence(without) == essence(expected)


def test_a_draft_that_overflows_the_model_leaves_nothing_behind(plain, speculating, monkeypatch):
    """Keys of a rejected token may be infinite; masked or not, infinity times zero would be NaN."""
    requests = make_requests(2, SamplingParams(max_tokens=12, ignore_eos=True))
    expected = answer(plain, requests)
    decoder, poison = speculating.decoder, VOCAB - 1
    forward = type(decoder).forward

    @torch.inference_mode()
    def poisoned(token_ids, positions, slots, kv, batch, rows):
        logits = forward(decoder, token_ids, positions, slots, kv, batch, rows)
        bad = token_ids == poison
        for k_pages, _ in kv:
            size = k_pages.shape[2]
            for slot in slots[bad].tolist():
                k_pages[slot // size, :, slot % size] = float("inf")
        logits[bad[rows]] = float("nan")
        return logits

    monkeypatch.setattr(decoder, "forward", poisoned)
    assert poison not in [token for tokens in tokens_of(expected).values() for token in tokens]
    wrong = {key: [*tokens[:3], *[poison] * 20] for key, tokens in tokens_of(expected).items()}
    found = answer(speculating, requests, Planted(wrong, lengths=(0, 3)))
    assert essence(found) == essence(expected)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_mixture_of_requests_and_settings_is_answered_the_same(data, plain, speculating):
    rng = random.Random(data.draw(st.integers(0, 10**9)))
    requests = []
    for i in range(data.draw(st.integers(1, 6))):
        sampling = SamplingParams(
            temperature=data.draw(st.sampled_from([0.0, 0.6, 1.5])),
            top_p=data.draw(st.sampled_from([1.0, 0.8])),
            top_k=data.draw(st.sampled_from([-1, 5])),
            min_p=data.draw(st.sampled_from([0.0, 0.05])),
            repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
            frequency_penalty=data.draw(st.sampled_from([0.0, 0.7])),
            n=data.draw(st.sampled_from([1, 1, 2])),
            stop=data.draw(st.sampled_from([(), ("e",), ("xy", "0")])),
            min_tokens=data.draw(st.sampled_from([0, 4])),
            max_tokens=data.draw(st.integers(4, 20)),
            logprobs=data.draw(st.sampled_from([None, 2])),
        )
        prompt = [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 40))]
        requests.append(Request(f"r{i}", prompt, sampling, seed=rng.getrandbits(60)))
    expected = answer(plain, requests)
    planted = Planted(tokens_of(expected), share_wrong=rng.choice([0.0, 0.2, 0.9]), longest=rng.randint(1, 12))
    assert essence(answer(speculating, requests, planted)) == essence(expected)


def test_tokens_come_from_the_models_own_distribution_with_drafts(make_engine, model_zoo, tiny_llama):
    """Two tokens of 3,000 rows of one prompt, all with the likeliest ones as their draft, in a chi-squared test against
    the model's probabilities."""
    engine = make_engine(max_num_batched_tokens=4096)
    prompt = [5, 17, 33, 60]
    sampling = SamplingParams(temperature=1.0, max_tokens=2, ignore_eos=True)
    requests = [Request(f"r{i}", prompt, sampling, seed=9_000 + i) for i in range(3000)]
    model = model_zoo.reference(tiny_llama)
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        likeliest = int(first.argmax())
        second = model(torch.tensor([[*prompt, likeliest]])).logits[0, -1].softmax(-1)
    guess = int(second.argmax())
    planted = Planted({(request.request_id, 0): [likeliest, guess] for request in requests}, longest=2)
    done = answer(engine, requests, planted)
    assert 0 < planted.num_accepted < planted.num_drafted
    tokens = torch.tensor([completion.outputs[0].token_ids for completion in done.values()])
    assert chi_squared(tokens[:, 0], first) < 3.5
    assert chi_squared(tokens[tokens[:, 0] == likeliest, 1], second) < 3.5


def chi_squared(tokens, probabilities):
    """How many standard deviations chi-squared lies above what is expected; rare tokens are one class."""
    expected = probabilities.double() * len(tokens)
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    common = expected >= 5
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum() - freedom) / (2 * freedom) ** 0.5)
