"""Captured steps answer as launched ones do.

Without a GPU nothing is captured: the step is kept and run again, with Triton in the interpreter. So all but
CUDA's own capture is tested here: buffers that stay, padding, plans, and which steps have a graph.
"""

import random
from functools import partial

import pytest
from interpreted_triton import DEVICE, HAS_TRITON

import actors.decoder as decoder_file
import actors.step_graphs as file
from actors.config import EngineConfig, SpeculativeConfig
from actors.engine import Engine
from actors.requests import Request, SamplingParams
from kernels.paged_attention import paged_attention_triton
from kernels.qkv import norm_rope_write_kv_triton
from kernels.quantized_kv import new_quantized_pages

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here (it is on Linux)")


def keep(step):
    step()
    return step


def go_through_triton(monkeypatch):
    """Let decoders on a CPU take the kernels of a GPU wherever a plan or a slot is read."""
    if DEVICE.type == "cuda":
        return
    attend_on_cpu, write_on_cpu = decoder_file.paged_attention, decoder_file.norm_rope_write_kv

    # Prompts stay with the CPU's versions: they are no captured steps, and slow in the interpreter.
    def is_captured(cache):
        return any(key[0] == "triton_attention" for key in cache)

    def attend(q, k, v, batch, *others):
        return (paged_attention_triton if is_captured(batch.cache) else attend_on_cpu)(q, k, v, batch, *others)

    def norm_rope_write(qkv, norms, eps, positions, cos, sin, k_pages, v_pages, slots, cache):
        if not is_captured(cache):
            return write_on_cpu(qkv, norms, eps, positions, cos, sin, k_pages, v_pages, slots, cache)
        return norm_rope_write_kv_triton(qkv, norms, eps, positions, cos, sin, k_pages, v_pages, slots)

    monkeypatch.setattr(decoder_file, "paged_attention", attend)
    monkeypatch.setattr(decoder_file, "norm_rope_write_kv", norm_rope_write)
    monkeypatch.setattr(decoder_file, "new_quantized_pages", partial(new_quantized_pages, in_pairs=True))


def assert_captured_steps_answer_alike(model, tokenizer, monkeypatch, max_tokens, **settings):
    """Compare an engine that launches with one that replays; returns the latter's graphs."""
    monkeypatch.setattr(file, "MAX_GRAPH_TOKENS", max_tokens)
    monkeypatch.setattr(file, "PARTS_PER_TOKEN", (1, 2))
    settings = {"max_num_seqs": 5, "num_pages": 40, "page_size": 8, **settings}
    config = EngineConfig(
        model=str(model), tokenizer=str(tokenizer), device=DEVICE.type, dtype="float32", enforce_eager=True, **settings
    )
    expected = answer(Engine(config))
    go_through_triton(monkeypatch)
    engine = Engine(config)
    engine._runner.capture_graphs(config.max_num_seqs, file.capture_cuda_graph() if DEVICE.type == "cuda" else keep)
    assert answer(engine) == expected
    return engine._runner._graphs


def make_requests():
    rng = random.Random(1)
    shared = [rng.randrange(2, 97) for _ in range(20)]
    requests = []
    for i in range(5):
        pattern = [rng.randrange(2, 97) for _ in range(3)]
        prompt = (shared if i % 2 else []) + pattern * 3
        temperature = 0.0 if i < 3 else 1.0
        sampling = SamplingParams(temperature=temperature, max_tokens=3 + i, ignore_eos=True, logprobs=1)
        requests.append(Request(f"r{i}", prompt, sampling, seed=i))
    return requests


def answer(engine):
    for request in make_requests():
        engine.add(request)
    done = {}
    while engine.has_unfinished():
        done.update({completion.request_id: completion for completion in engine.step()})
    return {key: done[key].outputs[0].token_ids for key in sorted(done)}


SETTINGS = {
    "decode": {"speculative_config": SpeculativeConfig(method="none")},
    "looking ahead": {"speculative_config": SpeculativeConfig(method="none"), "async_scheduling": True},
    "verification": {"speculative_config": SpeculativeConfig(method="ngram", num_speculative_tokens=2)},
    "int8 pages": {"speculative_config": SpeculativeConfig(method="none"), "kv_cache_dtype": "int8"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_captured_steps_answer_as_launched_ones(name, tiny_llama, monkeypatch):
    graphs = assert_captured_steps_answer_alike(tiny_llama, tiny_llama, monkeypatch, 8, **SETTINGS[name])
    assert graphs.num_replayed > 3
    assert "CUDA graphs for steps of up to 8 tokens" in graphs.describe()


def test_a_sliding_window_has_plans_of_its_own(model_zoo, tiny_llama, monkeypatch):
    model = model_zoo.path("mistral", num_hidden_layers=2, sliding_window=16)
    assert assert_captured_steps_answer_alike(model, tiny_llama, monkeypatch, 8, **SETTINGS["decode"]).num_replayed > 3


def test_a_step_beyond_the_largest_graph_is_launched_and_counted(tiny_llama, monkeypatch):
    graphs = assert_captured_steps_answer_alike(tiny_llama, tiny_llama, monkeypatch, 2, **SETTINGS["decode"])
    assert graphs.num_without > 0 and graphs.num_replayed > 0


def test_padding_adds_at_most_a_quarter_from_sixteen_tokens_on():
    for most in (1, 3, 16, 100, 512):
        sizes = file.bucket_sizes(most)
        assert sizes[-1] == most and sizes == sorted(set(sizes))
        for num_tokens in range(16, most + 1):
            assert min(size for size in sizes if size >= num_tokens) <= num_tokens * 5 / 4
