"""What a step launches on a GPU, seen in Triton's interpreter: nine kernels a layer, and the logits of a CPU."""

import pytest
import torch
from interpreted_triton import DEVICE, HAS_TRITON

from actors.config import EngineConfig
from actors.decoder import load_decoder
from actors.weights.checkpoint import open_checkpoint
from kernels import backend
from kernels.attention_batch import AttentionBatch

pytestmark = pytest.mark.skipif(
    not HAS_TRITON or DEVICE.type == "cuda", reason="launches are counted in Triton's interpreter, without a GPU"
)

LAYER = [
    "int4_linear_kernel",
    "norm_rope_write_kernel",
    "attend_kernel",
    "merge_kernel",
    "int4_linear_kernel",
    "add_rms_norm_kernel",
    "int4_linear_kernel",
    "int4_linear_kernel",
    "add_rms_norm_kernel",
]


def load(path, **settings):
    config = EngineConfig(model=str(path), quantization="int4", group_size=32, **settings)
    return load_decoder(open_checkpoint(str(path)), config, torch.device("cpu"), torch.float16)


def decode(decoder):
    """A step of two requests whose earlier tokens are zeros in the pages; one is long enough to be split and merged."""
    kv = [(k.contiguous(), v.contiguous()) for k, v in decoder.new_kv(34, 16)]
    batch = AttentionBatch([1, 1], [3, 520], [[0], list(range(1, 34))], 16)
    slots, rows = torch.tensor([2, 33 * 16 + 7]), torch.arange(2)
    return decoder.forward(torch.tensor([5, 90]), torch.tensor([2, 519]), slots, kv, batch, rows)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layer_is_nine_launches_and_gives_the_logits_of_a_cpu(family, model_zoo, monkeypatch):
    import triton.runtime.interpreter as interpreter

    path = model_zoo.path(family, num_hidden_layers=2, max_position_embeddings=600)
    expected = decode(load(path, linear_compute="dense"))  # "int4" rounds scales to bfloat16

    launched = []
    execute = interpreter.GridExecutor.__call__

    def count(self, *args, **kwargs):
        launched.append(self.fn.__name__.strip("_"))
        return execute(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", count)
    monkeypatch.setattr(backend, "is_cuda", lambda operation, x: True)
    logits = decode(load(path))
    assert launched == ["embed_rms_norm_kernel", *LAYER, *LAYER]
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)
