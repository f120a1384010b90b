"""The chooser, and what every operation refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import backend
from kernels.int4_linear import QuantizedWeight
from kernels.rope import rope_cpu
from kernels.sampling import SamplingBatch

REPOSITORY = Path(__file__).resolve().parents[2]

USE_EVERY_OPERATION = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("triton is blocked here")

sys.meta_path.insert(0, Refuse())
import torch
from kernels import backend
from kernels.attention_batch import AttentionBatch, new_kv_pages
from kernels.sampling import SamplingBatch

x, weight = torch.randn(3, 8), torch.ones(8)
backend.add_rms_norm(x, x.clone(), weight, 1e-5)
backend.silu_mul(x)
backend.embed_rms_norm(torch.arange(3), x, weight, 1e-5)
qkv = torch.randn(3, 4, 16)
q, k = qkv[:, :2], qkv[:, 2:3]
pages = new_kv_pages(2, 1, 4, 16, torch.float32, torch.device("cpu"))
backend.write_kv(k, k, *pages, torch.arange(3))
turns = torch.arange(3), torch.ones(3, 8), torch.zeros(3, 8)
backend.norm_rope_write_kv(qkv, (torch.ones(16),) * 2, 1e-5, *turns, *pages, torch.arange(3))
backend.paged_attention(q, *pages, AttentionBatch([3], [3], [[0]], 4), 0.25)
backend.prepare_linear(torch.randn(4, 8), None, dtype=torch.float32, device=torch.device("cpu"))(x)
ones, zeros = torch.ones(3), torch.zeros(3, dtype=torch.int64)
backend.sample(x, SamplingBatch(ones, zeros, ones, torch.zeros(3), zeros, zeros))
assert "triton" not in sys.modules
"""


def test_every_operation_runs_on_a_cpu_without_triton():
    subprocess.run([sys.executable, "-c", USE_EVERY_OPERATION], cwd=REPOSITORY, check=True)


def test_a_device_without_a_version_is_refused_and_not_served_by_another():
    x = torch.zeros(2, 8, device="meta")
    with pytest.raises(ValueError, match="add_rms_norm: no version for device meta; use cpu or cuda"):
        backend.add_rms_norm(x, x, torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="prepare_linear: no version for device meta"):
        backend.prepare_linear(x, None, dtype=torch.float32, device=torch.device("meta"))


def test_a_way_of_the_cpu_is_refused_on_cuda():
    with pytest.raises(ValueError, match="compute='int8' is for a CPU"):
        backend.prepare_linear(
            torch.zeros(2, 8), None, dtype=torch.float16, device=torch.device("cuda"), compute="int8"
        )


def test_an_int4_weight_is_prepared_on_a_cpu():
    q = torch.randint(0, 16, (16, 64), dtype=torch.uint8)
    layer = backend.prepare_linear(
        QuantizedWeight(q, torch.ones(16, 2), 32), None, dtype=torch.float32, device=torch.device("cpu")
    )
    assert layer(torch.zeros(3, 64)).shape == (3, 16)
    assert layer.describe()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_gated_layer_on_a_cpu_is_the_layer_and_then_the_activation(packed, deterministic):
    torch.manual_seed(0)
    weight = torch.randn(26, 64)
    if packed:
        weight = QuantizedWeight(torch.randint(0, 16, (26, 64), dtype=torch.uint8), torch.rand(26, 2) * 0.1, 32)
    bias, x = torch.randn(26), torch.randn(5, 64)
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), "compute": "float32" if not packed else "auto"}
    plain, gated = (
        backend.prepare_linear(weight, bias, **settings, deterministic=deterministic, gated=gated)
        for gated in (False, True)
    )
    assert gated(x).shape == (5, 13)
    assert torch.equal(gated(x), backend.silu_mul(plain(x), deterministic))
    assert gated.describe() == plain.describe()


def rope_arguments(**changes):
    defaults = {
        "q_TND": torch.zeros(2, 4, 8),
        "k_TKD": torch.zeros(2, 2, 8),
        "positions_T": torch.arange(2),
        "cos_LR": torch.zeros(9, 4),
        "sin_LR": torch.zeros(9, 4),
    }
    return {**defaults, **changes}


def write_arguments(**changes):
    defaults = {
        "k_TKD": torch.zeros(2, 2, 8),
        "v_TKD": torch.zeros(2, 2, 8),
        "k_pages_PKSD": torch.zeros(3, 2, 4, 8),
        "v_pages_PKSD": torch.zeros(3, 2, 4, 8),
        "slots_T": torch.arange(2),
    }
    return {**defaults, **changes}


def add_norm(x, weight, eps):
    return backend.add_rms_norm(x, x.clone(), weight, eps)


REFUSED = [
    ("weight (9,) does not fit x (2, 8)", lambda: add_norm(torch.zeros(2, 8), torch.ones(9), 1e-5)),
    ("x is torch.float64", lambda: add_norm(torch.zeros(2, 8).double(), torch.ones(8), 1e-5)),
    ("weight is torch.float16", lambda: add_norm(torch.zeros(2, 8), torch.ones(8).half(), 1e-5)),
    ("1 to 65536", lambda: add_norm(torch.zeros(1, 65537), torch.ones(65537), 1e-5)),
    (
        "both must be alike",
        lambda: backend.add_rms_norm(torch.zeros(2, 8), torch.zeros(3, 8), torch.ones(8), 1e-5),
    ),
    (
        "token ids are torch.float32 (2,)",
        lambda: backend.embed_rms_norm(torch.zeros(2), torch.zeros(9, 8), torch.ones(8), 1e-5),
    ),
    (
        "with contiguous rows",
        lambda: backend.embed_rms_norm(torch.arange(2), torch.zeros(8, 9).t(), torch.ones(8), 1e-5),
    ),
    ("an even number", lambda: backend.silu_mul(torch.zeros(2, 7))),
    ("input is torch.int64", lambda: backend.silu_mul(torch.zeros(2, 8, dtype=torch.int64))),
    ("tables are 5 wide", lambda: rope_cpu(**rope_arguments(cos_LR=torch.zeros(9, 5), sin_LR=torch.zeros(9, 5)))),
    ("both must be float32", lambda: rope_cpu(**rope_arguments(cos_LR=torch.zeros(9, 4).half()))),
    ("positions are torch.int64 (3,)", lambda: rope_cpu(**rope_arguments(positions_T=torch.arange(3)))),
    ("must be the same", lambda: rope_cpu(**rope_arguments(k_TKD=torch.zeros(2, 2, 6)))),
    (
        "must be contiguous",
        lambda: rope_cpu(**rope_arguments(q_TND=torch.zeros(2, 8, 4).transpose(1, 2))),
    ),
    ("slots are torch.float32", lambda: backend.write_kv(**write_arguments(slots_T=torch.zeros(2)))),
    ("pages are (3, 1, 4, 8)", lambda: backend.write_kv(**write_arguments(k_pages_PKSD=torch.zeros(3, 1, 4, 8)))),
    (
        "slots must be contiguous per head",
        lambda: backend.write_kv(**write_arguments(v_pages_PKSD=torch.zeros(3, 2, 8, 4).transpose(2, 3))),
    ),
    (
        "pages are torch.float16",
        lambda: backend.write_kv(**write_arguments(k_pages_PKSD=torch.zeros(3, 2, 4, 8).half())),
    ),
    (
        "logits are torch.float64",
        lambda: backend.sample(torch.zeros(1, 4).double(), SamplingBatch(*[torch.zeros(1)] * 6)),
    ),
]


@pytest.mark.parametrize("message, call", REFUSED, ids=[message for message, _ in REFUSED])
def test_what_does_not_fit_is_refused_with_its_value(message, call):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
