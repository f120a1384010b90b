"""The engine with its keys and values in other dtypes than its activations: the same engine, a little less exact."""

import random
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from actors.config import EngineConfig
from actors.decoder import load_decoder
from actors.engine import Engine
from actors.quality import compare_models, summarise
from actors.requests import SamplingParams

VOCAB = 97
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def make_engine(tiny_llama):
    def make(**settings):
        defaults = {"dtype": "float32", "page_size": 8, "num_threads": 1, "num_pages": 256, "kv_cache_dtype": "int8"}
        return Engine(EngineConfig(model=str(tiny_llama), **{**defaults, **settings}))

    return make


def make_prompts(seed, count, shared=0):
    rng = random.Random(seed)
    prefix = [rng.randrange(2, VOCAB) for _ in range(shared)]
    return [prefix + [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 30))] for _ in range(count)]


PROMPTS = make_prompts(1, 8, shared=21) + make_prompts(2, 6)


@pytest.fixture(scope="module")
def plainly(make_engine):
    """Answers of int8 pages one prompt at a time, each in an engine that shares nothing."""
    engine = make_engine(enable_prefix_caching=False, enable_prefix_groups=False)
    return [engine.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]


ENGINES = {
    "all together": {},
    "without prefix cache": {"enable_prefix_caching": False},
    "small steps": {"max_num_batched_tokens": 7},
    "few pages": {"num_pages": 16},
    "pages of one token": {"page_size": 1},
    "pages larger than prompts": {"page_size": 64},
}


@pytest.mark.parametrize("name", ENGINES)
def test_int8_pages_answer_the_same_however_rows_share_and_are_cut(name, make_engine, plainly):
    engine = make_engine(**ENGINES[name])
    completions = engine.generate(PROMPTS, GREEDY)
    assert [c.outputs[0].token_ids for c in completions] == plainly
    if name == "few pages":
        assert engine.stats.num_preemptions > 0, "this pool was meant to be too small"
    if name == "pages larger than prompts":
        assert sum(c.usage.cached_tokens for c in completions) > 0, "copies of pages begun were meant to be used"


def test_each_token_is_written_once_so_a_second_round_answers_the_same(make_engine):
    engine = make_engine()
    first, second = engine.generate(PROMPTS, GREEDY), engine.generate(PROMPTS, GREEDY)
    assert [c.outputs[0].token_ids for c in first] == [c.outputs[0].token_ids for c in second]
    assert [c.usage.cached_tokens for c in second] == [len(prompt) - 1 for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_deterministic_engines_give_the_same_bits_from_quantised_pages_in_any_batch(name, make_engine):
    crowd = make_engine(deterministic=True, kv_cache_dtype=name).generate(PROMPTS, GREEDY)
    small = make_engine(deterministic=True, kv_cache_dtype=name, max_num_batched_tokens=7, enable_prefix_caching=False)
    apart = [small.generate([prompt], GREEDY)[0] for prompt in PROMPTS[:4]]
    for one, other in zip(apart, crowd):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].mean_logprob == other.outputs[0].mean_logprob


def test_int8_differs_from_float32_a_little_and_bf16_less_and_fp8_more(make_engine):
    reference = make_engine(kv_cache_dtype="auto")
    kl = {
        name: summarise(compare_models(reference, make_engine(kv_cache_dtype=name), PROMPTS, GREEDY), "all").kl_mean
        for name in ("bf16", "int8", "fp8")
    }
    assert 1e-9 < kl["bf16"].value < kl["int8"].value < kl["fp8"].value < 0.01


def test_a_token_takes_a_byte_per_number_and_a_scale_per_head(make_engine, tiny_llama):
    engines = {name: make_engine(kv_cache_dtype=name) for name in ("auto", "bf16", "int8", "fp8")}
    layers, heads, head_dim = 3, 2, 16
    wanted = {"auto": 4 * head_dim, "bf16": 2 * head_dim, "int8": head_dim + 4, "fp8": head_dim + 4}
    for name, engine in engines.items():
        assert engine.decoder.kv_bytes_per_token == 2 * layers * heads * wanted[name]
        pages = engine.decoder.new_kv(5, 8)
        size = sum(
            t.nbytes
            for pair in pages
            for x in pair
            for t in ([x] if isinstance(x, torch.Tensor) else [x.values, x.scales_PKS])
        )
        assert size == 5 * 8 * engine.decoder.kv_bytes_per_token
    bounded = {
        name: make_engine(kv_cache_dtype=name, num_pages=None, kv_cache_bytes=1 << 18).scheduler.pool.num_pages
        for name in ("auto", "int8")
    }
    assert bounded["int8"] == (1 << 18) // (8 * 240) > 3 * bounded["auto"]


def test_fp8_pages_answer_the_same_however_rows_share_and_are_cut(make_engine):
    plain = make_engine(kv_cache_dtype="fp8", enable_prefix_caching=False, enable_prefix_groups=False)
    plainly = [plain.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]
    for name in ("all together", "small steps", "few pages", "pages larger than prompts"):
        completions = make_engine(kv_cache_dtype="fp8", **ENGINES[name]).generate(PROMPTS, GREEDY)
        assert [c.outputs[0].token_ids for c in completions] == plainly, name


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValidationError, match="'int8' or 'fp8'"):
        EngineConfig(model="x", kv_cache_dtype="fp4")


def test_fp8_on_a_gpu_without_it_is_refused_before_the_weights_are_read(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A40")
    nothing = SimpleNamespace(architecture=None)
    with pytest.raises(ValueError, match=r"A40 has compute capability 8\.6"):
        load_decoder(nothing, EngineConfig(model="x", kv_cache_dtype="fp8"), torch.device("cuda", 0), torch.bfloat16)
