"""The row-wise operations of deterministic mode: a row's bits do not depend on how many rows are beside it."""

import math

import pytest
import torch

from kernels.backend import add_rms_norm, sample, silu_mul
from kernels.fixed_order_linear import with_threads
from kernels.rms_norm import rms_norm_cpu
from kernels.rope import rope_cpu
from kernels.sampling import SamplingBatch, likeliest, likeliest_on_device

DTYPES = [torch.float32, torch.bfloat16]
NUM_ROWS = 700


def assert_rows_stay(compute):
    """`compute(rows)` gives the results of these rows, computed together."""
    expected = with_threads(1, lambda: compute(torch.arange(NUM_ROWS)))
    for num_threads in (1, 2):
        for num_rows in (*range(1, 131), 257, 600) if num_threads == 1 else (1, 2, 37, 600):
            rows = torch.randperm(NUM_ROWS)[:num_rows]
            actual = with_threads(num_threads, lambda rows=rows: compute(rows))
            assert torch.equal(actual, expected[rows]), f"{num_rows} rows, {num_threads} threads"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 64, 577])
def test_norms(width, dtype):
    torch.manual_seed(width)
    x, residual, weight = (torch.randn(*shape, width).to(dtype) for shape in ((NUM_ROWS,), (NUM_ROWS,), ()))
    assert_rows_stay(lambda rows: rms_norm_cpu(x[rows], weight, 1e-5))
    assert_rows_stay(lambda rows: add_rms_norm(x[rows], residual[rows], weight, 1e-5))
    # Heads of a fused projection: rows that do not lie side by side.
    heads = torch.randn(NUM_ROWS, 5, width).to(dtype)
    assert_rows_stay(lambda rows: rms_norm_cpu(heads[rows][:, 1:4], weight, 1e-5).flatten(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "half", "head_dim"), [(4, 32, 64), (1, 8, 16), (3, 5, 16)])
def test_rotations(num_heads, half, head_dim, dtype):
    torch.manual_seed(half)
    qk = torch.randn(NUM_ROWS, num_heads + 2, head_dim).to(dtype)
    cos, sin = torch.randn(NUM_ROWS, half), torch.randn(NUM_ROWS, half)

    def rotate(rows):
        rotated = qk[rows]
        rope_cpu(rotated[:, :num_heads], rotated[:, num_heads:], rows, cos, sin)
        return rotated.flatten(1)

    assert_rows_stay(rotate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 47, 96])
def test_the_activation(width, dtype):
    torch.manual_seed(width)
    gate_up = (torch.randn(NUM_ROWS, 2 * width) * 5).to(dtype)
    assert_rows_stay(lambda rows: silu_mul(gate_up[rows], deterministic=True))


def test_the_activation_is_the_same_at_each_place_of_long_and_short_tensors():
    """torch's own silu is not: some of these values differ where a vector is not filled."""
    torch.manual_seed(0)
    gate = torch.randn(200_000) * 4
    expected = silu_mul(torch.stack((gate, torch.ones_like(gate)), 1).view(-1, 2), deterministic=True)
    wide = silu_mul(torch.cat((gate.view(40, 5000), torch.ones(40, 5000)), 1), deterministic=True)
    assert torch.equal(wide.flatten(), expected.flatten())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_activation_is_silu_of_the_gate_times_up(dtype):
    gate_up = torch.cat((torch.linspace(-100, 100, 401), torch.ones(401))).view(1, -1).to(dtype)
    expected = torch.nn.functional.silu(gate_up[:, :401].double())
    torch.testing.assert_close(silu_mul(gate_up, deterministic=True).double(), expected, rtol=1e-2, atol=1e-6)
    if dtype == torch.float32:
        torch.testing.assert_close(silu_mul(gate_up, deterministic=True).double(), expected, rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("vocab_size", [97, 33000])
def test_sampling_and_logprobs(vocab_size):
    torch.manual_seed(vocab_size)
    num_rows = 40
    logits = (torch.randn(num_rows, vocab_size) * 4).bfloat16().float()
    temperature, top_p = torch.rand(num_rows), torch.rand(num_rows) / 2 + 0.5

    def draw(rows, num_top):
        plain = torch.zeros(len(rows))
        batch = SamplingBatch(
            temperature[rows], plain.long(), top_p[rows], plain, rows + 7, rows + 100, num_top_logprobs=num_top
        )
        return sample(logits[rows], batch)

    whole = with_threads(1, lambda: draw(torch.arange(num_rows), 20))
    for num_threads in (1, 2):
        for count in (1, 2, 3, 17, 39):
            rows = torch.randperm(num_rows)[:count]
            part = with_threads(num_threads, lambda rows=rows, count=count: draw(rows, 1 + count % 20))
            assert torch.equal(part.token_ids_B, whole.token_ids_B[rows])
            assert torch.equal(part.logprobs_B, whole.logprobs_B[rows])
            assert torch.equal(part.top_ids_BL, whole.top_ids_BL[rows, : 1 + count % 20])
            assert torch.equal(part.top_logprobs_BL, whole.top_logprobs_BL[rows, : 1 + count % 20])


@pytest.mark.parametrize("likeliest", [likeliest, likeliest_on_device])
def test_of_equal_logits_the_smaller_id_comes_first_whatever_is_asked_beside(likeliest):
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, -0.0, 0.0, 2.0], [float("nan")] * 7, [0.0] * 6 + [float("inf")]])
    for count in range(1, 8):
        values, ids = likeliest(logits, count)
        assert ids[0].tolist() == [1, 3, 2, 6, 0, 4, 5][:count]
        assert ids[2].tolist() == [6, 0, 1, 2, 3, 4, 5][:count]
        assert values[0].tolist() == [3.0, 3.0, 2.0, 2.0, 1.0, 0.0, 0.0][:count]


def test_both_ways_find_the_same_likeliest_tokens_among_many_ties():
    generator = torch.Generator().manual_seed(1)
    for vocab_size in (1, 2, 97, 1000):
        for num_values in (2, 7, 10**6):
            logits = torch.randint(0, num_values, (5, vocab_size), generator=generator) / 3
            logits[1, : vocab_size - 1] = -math.inf
            for count in {1, min(5, vocab_size), min(20, vocab_size)}:
                for found, expected in zip(likeliest_on_device(logits, count), likeliest(logits, count)):
                    assert torch.equal(found, expected)
