"""How many pages the KV memory has, without the memory, and what CUDA graphs need beside it."""

from types import SimpleNamespace

import pytest
import torch

import actors.step_graphs as step_graphs
from actors.config import EngineConfig
from actors.engine import Engine
from actors.kv_memory import choose_num_pages
from actors.weights.checkpoint import open_checkpoint


def decoder_on(device):
    return SimpleNamespace(device=torch.device(device), kv_bytes_per_token=1000, max_model_len=4096)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 10 GB of which 8 GB are free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 10**9, 10 * 10**9))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def choose(device, draft_bytes=0, reserved_bytes=0, **settings):
    settings = {"max_num_seqs": 4096, **settings}
    config = EngineConfig(model="model", page_size=100, gpu_memory_utilization=0.75, **settings)
    return choose_num_pages(config, decoder_on(device), draft_bytes, reserved_bytes)


def test_pages_leave_room_for_what_comes_after_them(gpu):
    assert choose("cuda") == (8 * 10**9 - 25 * 10**8) // 100_000
    assert choose("cuda", reserved_bytes=10**9) == choose("cuda") - 10**4
    assert choose("cuda", draft_bytes=1000) == choose("cuda") // 2


def test_a_gpu_without_room_is_a_clear_error(gpu):
    with pytest.raises(ValueError, match="at least 2 are needed"):
        choose("cuda", reserved_bytes=55 * 10**8)


def test_there_are_no_more_pages_than_all_rows_could_fill(gpu):
    assert choose("cuda", max_num_seqs=3) == 3 * 41


def test_what_the_user_says_is_taken():
    assert choose("cpu", num_pages=7) == 7
    assert choose("cpu", kv_cache_bytes=500_000, reserved_bytes=10**9) == 5


@pytest.mark.parametrize("max_tokens", [2, 8])
def test_the_bytes_of_graphs_buffers_are_known_before_they_are_made(max_tokens, model_zoo, tiny_llama, monkeypatch):
    monkeypatch.setattr(step_graphs, "MAX_GRAPH_TOKENS", max_tokens)
    model = model_zoo.path("mistral", num_hidden_layers=2, sliding_window=16)
    engine = Engine(EngineConfig(model=str(model), tokenizer=str(tiny_llama), device="cpu", num_pages=8, num_threads=1))
    # Buffers are made, and the steps that would be captured are never run.
    graphs = engine._runner.capture_graphs(5, capture=lambda step: step)
    tensors = [graphs._inputs_3T, graphs._logits_TV, graphs._rows_T]
    tensors += [part for buffers in graphs._buffers.values() for part in buffers._devices]
    assert graphs.buffer_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert f"CUDA graphs for steps of up to {max_tokens} tokens" in graphs.describe()


def test_memory_is_kept_free_for_graphs_buffers_and_for_what_their_largest_step_makes(tiny_llama, monkeypatch):
    architecture = open_checkpoint(str(tiny_llama)).architecture
    expected = step_graphs.expected_graph_bytes(architecture, 256, torch.bfloat16, 16, 64)
    buffers = step_graphs.graph_buffer_bytes(step_graphs.graph_rooms(97, 256, 16, 64), 97, num_windows=1)
    # 512 tokens of two hidden states, of what gate and up give, and of logits in bfloat16 and in float32.
    assert expected > buffers + 512 * (2 * 64 * 2 + 2 * 96 * 2 + 97 * (2 + 4))
    assert expected < buffers + (16 << 20)
    monkeypatch.setattr(step_graphs, "MAX_GRAPH_TOKENS", 64)
    assert step_graphs.expected_graph_bytes(architecture, 256, torch.bfloat16, 16, 64) < expected
