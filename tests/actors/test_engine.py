"""The engine against a naive loop that computes every token from scratch, with each feature on and off."""

import math
import random

import numpy as np
import pytest
import torch

from actors.config import EngineConfig
from actors.engine import Engine
from actors.requests import Request, SamplingParams

VOCAB = 97


@pytest.fixture(scope="module")
def make_engine(tiny_llama):
    def make(**settings):
        defaults = {"dtype": "float32", "page_size": 8, "num_threads": 1, "num_pages": 256}
        return Engine(EngineConfig(model=str(tiny_llama), **{**defaults, **settings}))

    return make


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine()


@pytest.fixture(scope="module")
def naive(tiny_llama, model_zoo):
    """Greedy tokens by recomputing everything for every token, in transformers."""
    model = model_zoo.reference(tiny_llama)
    known = {}

    @torch.no_grad()
    def generate(prompt, num_tokens):
        key = (tuple(prompt), num_tokens)
        if key not in known:
            tokens = list(prompt)
            for _ in range(num_tokens):
                tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
            known[key] = tokens[len(prompt) :]
        return known[key]

    return generate


def make_prompts(seed, count, shared=0):
    rng = random.Random(seed)
    prefix = [rng.randrange(2, VOCAB) for _ in range(shared)]
    return [prefix + [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 30))] for _ in range(count)]


def keyed_noise(seed, position):
    """Candidate j takes lane j % 4 of Philox-4x32-10 at counter (j // 4, position, 0, 0) under the key of the seed."""
    noise = []
    for block in range(-(-VOCAB // 4)):
        c, k = [block, position, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(high >> 32) ^ c[1] ^ k[0], high & 0xFFFFFFFF, (low >> 32) ^ c[3] ^ k[1], low & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        noise += [-math.log(-math.log1p(-(bits + 0.5) / 2**32)) for bits in c]
    return np.array(noise[:VOCAB], np.float32)


def greedy(**settings):
    return SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **settings})


def tokens_of(completions):
    return [[output.token_ids for output in completion.outputs] for completion in completions]


ENGINES = {
    "defaults": {},
    "without prefix cache": {"enable_prefix_caching": False},
    "without prefix groups": {"enable_prefix_groups": False},
    "small steps": {"max_num_batched_tokens": 7},
    "few places": {"max_num_seqs": 2},
    "few pages": {"num_pages": 16},
    "pages of one token": {"page_size": 1},
    "pages larger than prompts": {"page_size": 64},
}


@pytest.mark.parametrize("name", ENGINES)
def test_greedy_tokens_equal_full_recomputation(name, make_engine, naive):
    prompts = make_prompts(1, 8, shared=21) + make_prompts(2, 6)
    engine = make_engine(**ENGINES[name])
    completions = engine.generate(prompts, greedy())
    assert tokens_of(completions) == [[naive(prompt, 12)] for prompt in prompts]
    # Everything that is not cached is free again: no page is lost.
    assert engine.scheduler.tree.num_available == engine.scheduler.pool.num_pages
    if name == "few pages":
        assert engine.stats.num_preemptions > 0, "this pool was meant to be too small"


def test_a_second_round_hits_the_cache_and_answers_the_same(make_engine, naive):
    engine = make_engine()
    prompts = make_prompts(3, 5, shared=30)
    first, second = engine.generate(prompts, greedy()), engine.generate(prompts, greedy())
    assert tokens_of(first) == tokens_of(second) == [[naive(prompt, 12)] for prompt in prompts]
    assert [c.usage.cached_tokens for c in second] == [len(prompt) - 1 for prompt in prompts]


def test_a_shared_prefix_is_computed_once_even_when_all_rows_arrive_together(make_engine):
    engine = make_engine()
    prompts = make_prompts(4, 10, shared=29)
    completions = engine.generate(prompts, greedy(max_tokens=2))
    assert sum(c.usage.cached_tokens == 0 for c in completions) == 1
    assert sum(c.usage.cached_tokens for c in completions) >= 9 * 29


def test_sharing_is_exact_to_the_token_and_not_to_the_page(make_engine):
    engine = make_engine(page_size=64)
    prompts = make_prompts(5, 4, shared=50)
    completions = engine.generate(prompts, greedy(max_tokens=2))
    assert sorted(c.usage.cached_tokens >= 50 for c in completions) == [False, True, True, True]


def test_a_row_is_sampled_the_same_alone_and_in_a_crowd(make_engine):
    prompts = make_prompts(6, 12, shared=9)
    params = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, max_tokens=15, ignore_eos=True)
    requests = [Request(f"row-{i}", prompt, params, seed=1000 + i) for i, prompt in enumerate(prompts)]

    def run(engine, rows):
        for row in rows:
            engine.add(row)
        answers = {}
        while engine.has_unfinished():
            answers.update({c.request_id: c.outputs[0].token_ids for c in engine.step()})
        return answers

    crowd = run(make_engine(), requests)
    shuffled = run(make_engine(max_num_seqs=3, num_pages=24, enable_prefix_groups=False), requests[::-1])
    alone = {}
    for request in requests:
        alone.update(run(make_engine(), [request]))
    assert crowd == shuffled == alone
    assert len({tuple(tokens) for tokens in crowd.values()}) == 12


def test_sampling_is_the_argmax_of_logits_plus_keyed_noise(engine, model_zoo, tiny_llama):
    prompt, seed = [5, 9, 30, 7], 77
    params = SamplingParams(temperature=0.7, max_tokens=8, ignore_eos=True)
    engine.add(Request("a", prompt, params, seed=seed))
    done = []
    while engine.has_unfinished():
        done += engine.step()
    model, tokens = model_zoo.reference(tiny_llama), list(prompt)
    for _ in range(8):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1].numpy()
        noise = keyed_noise(seed, position=len(tokens))
        tokens.append(int((logits / 0.7 + noise).argmax()))
    assert done[0].outputs[0].token_ids == tokens[len(prompt) :]


def test_samples_of_a_row_share_its_prompt_and_differ(make_engine):
    engine = make_engine(page_size=8)
    prompt = make_prompts(7, 1, shared=40)[0]
    params = SamplingParams(n=5, temperature=1.0, max_tokens=10, ignore_eos=True)
    (completion,) = engine.generate([prompt], params)
    assert [output.index for output in completion.outputs] == [0, 1, 2, 3, 4]
    assert len({tuple(output.token_ids) for output in completion.outputs}) == 5
    assert completion.usage.prompt_tokens == len(prompt)
    assert completion.usage.completion_tokens == 50
    # 5 prompts apart would take 5 * ceil(len / 8) pages at least.
    assert engine.scheduler.peak_pages < 5 * math.ceil(len(prompt) / 8)


def test_generation_stops_at_a_stop_string_and_leaves_it_out(engine):
    (free,) = engine.generate(["hello there"], greedy(max_tokens=30))
    text = free.outputs[0].text
    stop = text[7:10]
    (stopped,) = engine.generate(["hello there"], greedy(max_tokens=30, stop=stop))
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].text == text[: text.find(stop)]
    assert len(stopped.outputs[0].token_ids) == text.find(stop) + 3


def test_generation_stops_at_a_stop_token_but_not_before_min_tokens(engine):
    (free,) = engine.generate(["hello there"], greedy(max_tokens=30))
    token = free.outputs[0].token_ids[4]
    at = free.outputs[0].token_ids.index(token)
    (stopped,) = engine.generate(["hello there"], greedy(max_tokens=30, stop_token_ids=(token,)))
    assert stopped.outputs[0].token_ids == free.outputs[0].token_ids[: at + 1]
    assert stopped.outputs[0].text == free.outputs[0].text[:at]
    (later,) = engine.generate(["hello there"], greedy(max_tokens=30, stop_token_ids=(token,), min_tokens=10))
    assert len(later.outputs[0].token_ids) >= 10
    assert token not in later.outputs[0].token_ids[:10]


def test_logprobs_are_those_of_the_raw_distribution(engine, model_zoo, tiny_llama):
    prompt = [4, 8, 15, 16, 23, 42]
    (completion,) = engine.generate([prompt], greedy(max_tokens=5, logprobs=3))
    output = completion.outputs[0]
    with torch.no_grad():
        logits = model_zoo.reference(tiny_llama)(torch.tensor([prompt + output.token_ids])).logits[0]
    expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    assert output.logprobs is not None and len(output.logprobs) == 5
    for i, entry in enumerate(output.logprobs):
        assert entry.token_id == output.token_ids[i]
        assert entry.logprob == pytest.approx(float(expected[i, entry.token_id]), abs=1e-4)
        assert [token for token, _, _ in entry.top] == expected[i].topk(3).indices.tolist()
    mean = sum(entry.logprob for entry in output.logprobs) / 5
    assert output.mean_logprob == pytest.approx(mean, abs=1e-6)


def test_a_strong_repetition_penalty_leaves_no_token_twice(engine):
    (completion,) = engine.generate([[3, 4, 5]], greedy(max_tokens=20, presence_penalty=2.0, repetition_penalty=90.0))
    tokens = completion.outputs[0].token_ids
    assert len(set(tokens)) == len(tokens)
    assert not set(tokens) & {3, 4, 5}


def test_one_row_with_penalties_does_not_change_its_neighbours(engine, naive):
    prompts = make_prompts(8, 3)
    for i, prompt in enumerate(prompts):
        params = greedy(repetition_penalty=3.0) if i == 1 else greedy()
        engine.add(Request(f"p{i}", prompt, params))
    done = {}
    while engine.has_unfinished():
        done.update({c.request_id: c.outputs[0].token_ids for c in engine.step()})
    assert done["p0"] == naive(prompts[0], 12)
    assert done["p2"] == naive(prompts[2], 12)
    assert done["p1"] != naive(prompts[1], 12)


def test_prompts_that_cannot_be_answered_become_errors_and_the_others_are_answered(make_engine, naive):
    engine = make_engine(num_pages=8)
    fine = [5, 6, 7]
    completions = engine.generate([[], list(range(2, 66)), fine, [3, VOCAB]], greedy(max_tokens=4))
    assert [c.error.kind if c.error else None for c in completions] == [
        "empty_prompt",
        "prompt_too_long",
        None,
        "invalid_text",
    ]
    assert "64 tokens" in completions[1].error.message
    assert completions[2].outputs[0].token_ids == naive(fine, 4)


def test_an_answer_ends_where_the_context_ends(make_engine):
    engine = make_engine(max_model_len=20)
    (completion,) = engine.generate([list(range(2, 17))], greedy(max_tokens=100))
    assert completion.outputs[0].finish_reason == "length"
    assert completion.usage.prompt_tokens + completion.usage.completion_tokens == 20


def test_what_rows_are_charged_sums_exactly_to_the_time_of_the_steps(make_engine):
    engine = make_engine(num_pages=24)
    completions = engine.generate(make_prompts(9, 12, shared=11), greedy(n=2, temperature=0.5))
    charged_ns = sum(round(c.usage.device_seconds * 1e9) for c in completions)
    assert charged_ns == engine.stats.busy_ns
    assert all(c.usage.device_seconds > 0 for c in completions)


def test_an_aborted_row_gives_its_pages_back_and_is_counted_as_lost(make_engine, naive):
    engine = make_engine()
    prompts = make_prompts(10, 2, shared=20)
    for i, prompt in enumerate(prompts):
        engine.add(Request(f"a{i}", prompt, greedy()))
    engine.step()
    engine.abort("a0")
    done = []
    while engine.has_unfinished():
        done += engine.step()
    assert [c.request_id for c in done] == ["a1"]
    assert done[0].outputs[0].token_ids == naive(prompts[1], 12)
    assert engine.stats.lost_ns > 0
    assert engine.scheduler.tree.num_available == engine.scheduler.pool.num_pages


def test_int4_on_the_cpu_answers_as_its_dequantised_weights_do(make_engine):
    packed = make_engine(quantization="int4", linear_compute="int4", dtype="bfloat16")
    dense = make_engine(quantization="int4", linear_compute="dense", dtype="float32")
    assert any("int4" in line for line in packed.decoder.describe())
    prompts = make_prompts(11, 16)
    same = [a == b for a, b in zip(*(tokens_of(e.generate(prompts, greedy(max_tokens=1))) for e in (packed, dense)))]
    assert sum(same) >= 14, "bfloat16 activations may tip a near tie, no more"


def test_a_missing_device_is_a_clear_error(tiny_llama):
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ValueError, match=r"engine\.device is 'cuda'"):
        Engine(EngineConfig(model=str(tiny_llama), device="cuda"))


def test_a_row_whose_logits_are_not_finite_is_an_error_and_leaves_nothing_behind(make_engine, naive):
    engine = make_engine(num_pages=20)
    prompts = make_prompts(12, 6, shared=9)
    forward = engine.decoder.forward
    met = {token for prompt in prompts for token in [prompt[-1], *naive(prompt, 12)]}
    poison = next(token for token in range(2, VOCAB) if token not in met)

    @torch.inference_mode()
    def overflow(token_ids, positions, slots, kv, batch, last_rows):
        logits = forward(token_ids, positions, slots, kv, batch, last_rows)
        for row, last in enumerate(last_rows.tolist()):
            if token_ids[last] == poison:  # as if this token made the row overflow
                logits[row] = float("nan")
                for k_pages, v_pages in kv:
                    k_pages[slots[last] // 8, :, slots[last] % 8] = float("nan")
                    v_pages[slots[last] // 8, :, slots[last] % 8] = float("nan")
        return logits

    engine.decoder.forward = overflow
    completions = engine.generate([*prompts[:3], [4, 5, poison], *prompts[3:]] * 3, greedy())
    kinds = [c.error.kind if c.error else None for c in completions]
    answers = [c.outputs[0].token_ids for c in completions if not c.error]
    assert kinds[3::7] == ["not_finite"] * 3
    assert "not_finite" not in kinds[:3] + kinds[4:7]
    assert answers == [naive(prompt, 12) for prompt in prompts] * 3
    assert engine.scheduler.tree.num_available == engine.scheduler.pool.num_pages
    assert not any(k.isnan().any() or v.isnan().any() for k, v in engine._runner._kv)
