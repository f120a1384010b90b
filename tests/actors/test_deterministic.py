"""Deterministic mode: the same bytes whatever the batch, the order, the cache, the memory, the threads."""

import random
from functools import cache

import pytest
import torch

from actors.config import EngineConfig
from actors.engine import Engine
from actors.requests import Request, SamplingParams

VOCAB = 97

MODELS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int4, as a copy": {"dtype": "bfloat16", "quantization": "int4"},
    "int4, packed": {"dtype": "bfloat16", "quantization": "int4", "linear_compute": "int4"},
    "keys and values in int8": {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
}

SETTINGS = {
    "one at a time": {"max_num_seqs": 1},
    "three at a time": {"max_num_seqs": 3},
    "steps of 7 tokens": {"max_num_batched_tokens": 7},
    "steps of 64 tokens": {"max_num_batched_tokens": 64},
    "few pages": {"num_pages": 16},
    "without prefix cache": {"enable_prefix_caching": False},
    "without prefix groups": {"enable_prefix_groups": False},
    "two threads": {"num_threads": 2},
    "drafts, as many as there are": {"speculative_config": {"method": "combined", "num_speculative_tokens": 6}},
    "drafts in small steps with few pages": {
        "speculative_config": {"method": "combined", "num_speculative_tokens": 9},
        "max_num_batched_tokens": 40,
        "num_pages": 18,
    },
    "drafts that pay": {"speculative_config": {"method": "auto"}},
}
"""What must not change a byte. Every row here is compared with an engine of BASE, and so are other orders."""

BASE = {
    "deterministic": True,
    "page_size": 8,
    "num_pages": 256,
    "num_threads": 1,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 4096,
    "speculative_config": {"method": "none"},
}


@cache
def make_requests(seed=0, count=14):
    """Prompts of 1 to 90 tokens, half with a common beginning; all kinds of sampling."""
    rng = random.Random(seed)
    prefix = [rng.randrange(2, VOCAB) for _ in range(21)]
    kinds = [
        {},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.2},
        {"temperature": 0.7, "min_p": 0.02, "n": 2, "presence_penalty": 0.5},
    ]
    requests = []
    for i in range(count):
        prompt = [rng.randrange(2, VOCAB) for _ in range(rng.choice([1, 5, 20, 50]) + rng.randrange(20))]
        params = SamplingParams(max_tokens=6 + i % 9, ignore_eos=True, logprobs=i % 4, **kinds[i % 4])
        requests.append(Request(f"row-{i}", prefix * (i % 2) + prompt, params, seed=100 + i))
    return requests


def answer(engine, requests):
    """Everything that an engine says of each row, floats by their bits."""
    for request in requests:
        engine.add(request)
    answers = {}
    while engine.has_unfinished():
        for completion in engine.step():
            assert completion.error is None
            answers[completion.request_id] = [
                (
                    output.token_ids,
                    output.text,
                    output.finish_reason,
                    float(output.mean_logprob).hex(),
                    [(t.token_id, t.logprob.hex(), [(i, x.hex()) for i, _, x in t.top]) for t in output.logprobs or ()],
                )
                for output in completion.outputs
            ]
    return answers


def assert_same(actual, expected):
    different = [name for name in expected if actual[name] != expected[name]]
    assert not different, f"{len(different)} of {len(expected)} rows differ, such as {different[0]}"


@pytest.fixture(scope="module")
def make_engine(tiny_llama):
    def make(*, model=tiny_llama, **settings):
        return Engine(EngineConfig(model=str(model), **{**BASE, **settings}))

    return make


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected(make_engine):
    """Of a model, the answers of an engine of BASE."""
    return cache(lambda name: answer(make_engine(**MODELS[name]), make_requests()))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("model", ["float32", "bfloat16"])
def test_every_byte_is_the_same(model, name, make_engine, expected):
    wanted = expected(model)  # before, as an engine sets the threads of the whole process
    engine = make_engine(**MODELS[model], **SETTINGS[name])
    assert_same(answer(engine, make_requests()), wanted)
    if "few pages" in name:
        assert engine.stats.num_preemptions > 0, "this pool was meant to be too small"
    if "as many as there are" in name:
        assert engine.stats.num_verify_steps > 0


@pytest.mark.parametrize("model", [name for name in MODELS if name not in ("float32", "bfloat16")])
def test_other_weights_and_caches_too(model, make_engine, expected):
    settings = {"max_num_seqs": 3, "max_num_batched_tokens": 31, "num_pages": 20}
    wanted = expected(model)
    assert_same(answer(make_engine(**MODELS[model], **settings), make_requests()[::-1]), wanted)


@pytest.mark.parametrize("model", ["float32", "bfloat16"])
def test_in_any_order_alone_and_with_a_warm_cache(model, make_engine, expected):
    engine = make_engine(**MODELS[model])
    shuffled = random.Random(1).sample(make_requests(), len(make_requests()))
    assert_same(answer(engine, shuffled), expected(model))
    assert_same(answer(engine, make_requests()), expected(model))  # each prompt is in the cache now
    for request in make_requests()[:5]:
        assert_same(answer(engine, [request]), {request.request_id: expected(model)[request.request_id]})


def test_without_the_mode_some_byte_differs(make_engine):
    """Else the tests above would show nothing."""
    requests = make_requests(count=40)
    one, other = (
        answer(make_engine(deterministic=False, dtype="float32", **settings), requests)
        for settings in ({}, {"max_num_seqs": 3, "max_num_batched_tokens": 7})
    )
    assert any(one[name] != other[name] for name in one)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_biases_query_norms_and_windows(family, make_engine, model_zoo, tiny_llama):
    settings = {"sliding_window": 24} if family == "mistral" else {}
    path = model_zoo.path(family, **settings)
    tokenizer = {"model": path, "tokenizer": str(tiny_llama)}
    for dtype in ("float32", "bfloat16"):
        whole = answer(make_engine(**tokenizer, dtype=dtype), make_requests())
        cut = make_engine(**tokenizer, dtype=dtype, max_num_seqs=4, max_num_batched_tokens=11, num_pages=20)
        assert_same(answer(cut, make_requests()[::-1]), whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_settings_change_no_byte(seed, make_engine):
    rng = random.Random(seed)
    model, page_size = rng.choice(list(MODELS.values())), rng.choice([1, 7, 16, 64])
    requests = make_requests(seed, 60)
    expected = answer(make_engine(**model, page_size=page_size, num_pages=6000 // page_size), requests)
    for _ in range(4):
        settings = {
            "max_num_seqs": rng.choice([1, 2, 5, 17, 64, 200]),
            "max_num_batched_tokens": rng.choice([1, 7, 40, 64, 300, 4096]),
            "num_pages": rng.choice([200, 400, 6000]) // page_size,
            "enable_prefix_caching": rng.random() < 0.7,
            "enable_prefix_groups": rng.random() < 0.7,
            "num_threads": rng.choice([1, 2]),
        }
        engine = make_engine(**model, page_size=page_size, **settings)
        assert_same(answer(engine, rng.sample(requests, len(requests))), expected)
