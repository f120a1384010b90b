"""Deterministic attention on a CPU: exact, and a token's bits are those of its context, however it came about."""

import random

import pytest
import torch
from attention_cases import CASES, make_case, reference

from kernels import fixed_order_attention
from kernels.attention_batch import AttentionBatch
from kernels.backend import check_fixed_order_attention, paged_attention
from kernels.fixed_order_attention import ROW_TILES, agreeing_row_tiles, fixed_order_attention_cpu
from kernels.fixed_order_linear import with_threads

LENGTH = 130
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_float64(name):
    q, k, v, batch = make_case(1, **CASES[name])
    actual = paged_attention(q, k, v, batch, 0.25, deterministic=True)
    torch.testing.assert_close(actual.double(), reference(q, k, v, batch, 0.25), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("window", [1, 7, 16, 100])
def test_a_sliding_window_hides_what_is_older(window):
    q, k, v, batch = make_case(3, [(1, 20), (39, 60), (5, 5)], scattered=True)
    actual = fixed_order_attention_cpu(q, k, v, batch, 0.25, window)
    torch.testing.assert_close(actual.double(), reference(q, k, v, batch, 0.25, window), atol=2e-6, rtol=2e-5)


def test_more_tiles_than_fit_one_call_are_attended_in_several(monkeypatch):
    monkeypatch.setattr(fixed_order_attention, "GATHERED_BYTES", 1)
    q, k, v, batch = make_case(4, [(30, 60), (1, 44), (50, 50)])
    actual = fixed_order_attention_cpu(q, k, v, batch, 0.25)
    torch.testing.assert_close(actual.double(), reference(q, k, v, batch, 0.25), atol=2e-6, rtol=2e-5)


class Sequence:
    """LENGTH tokens of a request, and attending to them in any pieces, on any pages, beside any other requests."""

    def __init__(self, dtype, heads, head_dim, page_size):
        generator = torch.Generator().manual_seed(5)
        self.num_pages = -(-LENGTH // page_size)
        self.page_size = page_size
        self.q = torch.randn(LENGTH, heads[0], head_dim, generator=generator).to(dtype)
        self.k, self.v = (torch.randn(LENGTH, heads[1], head_dim, generator=generator).to(dtype) for _ in range(2))

    def attend(self, pieces, seed, window=None, num_threads=1):
        """Tokens piece by piece; what is not yet written holds leftovers."""
        rng = random.Random(seed)
        size, total = self.page_size, 3 * self.num_pages
        pages = list(range(total))
        rng.shuffle(pages)
        table, others = pages[: self.num_pages], pages[self.num_pages :]
        generator = torch.Generator().manual_seed(seed)
        shape = (self.k.shape[1], total, size, self.k.shape[2])
        k_pages, v_pages = (torch.randn(shape, generator=generator).to(self.k.dtype).transpose(0, 1) for _ in range(2))
        outputs, start = [], 0
        for count in pieces:
            positions = torch.arange(start, start + count)
            slots = (torch.tensor(table)[positions // size], slice(None), positions % size)
            k_pages[slots], v_pages[slots] = self.k[positions], self.v[positions]
            start += count
            # Up to three other requests before and behind it.
            beside = [
                (rng.choice([1, 1, 3, 17]), rng.randint(17, len(others) * size)) for _ in range(rng.randint(0, 3))
            ]
            place = rng.randint(0, len(beside))
            lengths = [*beside[:place], (count, start), *beside[place:]]
            tables = [others] * place + [table] + [others] * (len(beside) - place)
            batch = AttentionBatch([n for n, _ in lengths], [c for _, c in lengths], tables, size)
            q = torch.randn(batch.num_tokens, *self.q.shape[1:], generator=generator).to(self.q.dtype)
            first = sum(n for n, _ in lengths[:place])
            q[first : first + count] = self.q[start - count : start]
            attended = with_threads(
                num_threads,
                lambda q=q, batch=batch: paged_attention(q, k_pages, v_pages, batch, 0.2, window, deterministic=True),
            )
            outputs.append(attended[first : first + count])
        return torch.cat(outputs)


PIECES = {
    "two chunks": [57, 73],
    "chunks of seven": [7] * 18 + [4],
    "a prompt, then tokens": [100] + [1] * 30,
    "tokens from the start": [1] * LENGTH,
    "verified by five": [40] + [5] * 18,
    "of all lengths": [1, 2, 3, 4, 6, 8, 9, 12, 17, 20, 31, 17],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "window"),
    [((4, 2), 64, 64, None), ((6, 2), 16, 8, None), ((3, 1), 80, 16, 30), ((2, 2), 24, 7, None), ((20, 1), 16, 32, 50)],
)
def test_a_tokens_bits_are_the_same_in_any_step_on_any_pages_beside_anyone(heads, head_dim, page_size, window, dtype):
    sequence = Sequence(dtype, heads, head_dim, page_size)
    expected = sequence.attend([LENGTH], 0, window)
    assert expected.isfinite().all()
    for seed, (name, pieces) in enumerate(PIECES.items(), start=1):
        assert sum(pieces) == LENGTH
        actual = sequence.attend(pieces, seed, window, num_threads=2 if name == "chunks of seven" else 1)
        assert torch.equal(actual, expected), name


def test_a_row_tile_that_gives_other_bits_is_not_used(monkeypatch):
    agreeing_row_tiles.cache_clear()
    flash = fixed_order_attention._flash

    def faulty(q, k, v, **settings):
        output, lse = flash(q, k, v, **settings)
        return (output, lse + 1e-6 if q.shape[2] == 8 else lse)

    monkeypatch.setattr(fixed_order_attention, "_flash", faulty)
    assert agreeing_row_tiles(16, 8, torch.float32, 1) == ROW_TILES[1:]
    monkeypatch.setattr(
        fixed_order_attention, "_flash", lambda *x, **y: (flash(*x, **y)[0].cumsum(2), flash(*x, **y)[1])
    )
    agreeing_row_tiles.cache_clear()
    with pytest.raises(ValueError, match=r"head dimension of 16 and pages of 8.*deterministic to false"):
        check_fixed_order_attention(16, 8, torch.float32, torch.device("cpu"))
    agreeing_row_tiles.cache_clear()
