"""The CPU's paged attention against float64, over mixtures of decode, chunks, groups and scattered pages."""

import random

import pytest
import torch

from kernels.attention_batch import AttentionBatch, PrefixGroup, new_kv_pages
from kernels.cpu_attention import paged_attention_cpu


def reference(q, k_pages, v_pages, batch, scale, window=None):
    """float64, one request and one query at a time."""
    outputs, row = [], 0
    num_grouped = q.shape[1] // k_pages.shape[1]
    for request, num_queries in enumerate(batch.query_lens):
        num_context = batch.context_lens[request]
        pages = torch.tensor(list(batch.page_ids[request]))
        k = k_pages[pages].double().transpose(1, 2).flatten(0, 1)[:num_context].repeat_interleave(num_grouped, 1)
        v = v_pages[pages].double().transpose(1, 2).flatten(0, 1)[:num_context].repeat_interleave(num_grouped, 1)
        for i in range(num_queries):
            last = num_context - num_queries + i
            first = 0 if window is None else max(0, last - window + 1)
            scores = torch.einsum("nd,cnd->nc", q[row].double(), k[first : last + 1]) * scale
            outputs.append(torch.einsum("nc,cnd->nd", scores.softmax(-1), v[first : last + 1]))
            row += 1
    return torch.stack(outputs)


def make_case(
    seed, lengths, *, heads=(6, 2), head_dim=16, page_size=8, shared=(), scattered=False, dtype=torch.float32
):
    """`lengths` are (query tokens, context); `shared` are (first request, number of requests, shared pages)."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    num_pages = sum(-(-context // page_size) for _, context in lengths) + 8
    free = list(range(num_pages))
    if scattered:
        rng.shuffle(free)
    free.reverse()
    groups, prefix_of = [], {}
    for first, count, pages in shared:
        group = PrefixGroup(first, count, [free.pop() for _ in range(pages)])
        groups.append(group)
        prefix_of.update(dict.fromkeys(range(first, first + count), group.page_ids))
    tables = []
    for request, (_, context) in enumerate(lengths):
        prefix = list(prefix_of.get(request, []))
        tables.append(prefix + [free.pop() for _ in range(-(-context // page_size) - len(prefix))])
    k, v = new_kv_pages(num_pages, num_kv_heads, page_size, head_dim, dtype, torch.device("cpu"))
    # What is not written is NaN: a kernel that reads it shows.
    k.fill_(float("nan"))
    v.fill_(float("nan"))
    for (_, context), table in zip(lengths, tables):
        for position in range(context):
            for pages in (k, v):
                slot = pages[table[position // page_size], :, position % page_size]
                if slot.isnan().any():
                    slot.copy_(torch.randn(num_kv_heads, head_dim, generator=generator))
    # The masked slots of a page are multiplied by a weight of zero, which leaves a NaN a NaN; real pages hold
    # finite leftovers there, so leftovers it is.
    k.nan_to_num_(nan=1e4)
    v.nan_to_num_(nan=1e4)
    q = torch.randn(sum(n for n, _ in lengths), num_heads, head_dim, generator=generator).to(dtype)
    batch = AttentionBatch([n for n, _ in lengths], [c for _, c in lengths], tables, page_size, groups)
    return q, k, v, batch


CASES = {
    "one decode": dict(lengths=[(1, 1)]),
    "decodes of odd lengths": dict(lengths=[(1, 5), (1, 17), (1, 8), (1, 33)]),
    "one prompt": dict(lengths=[(21, 21)]),
    "a prompt in its second chunk": dict(lengths=[(9, 30)]),
    "chunks of many lengths": dict(lengths=[(2, 2), (3, 20), (16, 16), (17, 40), (1, 9)]),
    "scattered pages": dict(lengths=[(1, 30), (7, 33), (1, 12)], scattered=True),
    "a group of decodes": dict(lengths=[(1, 20), (1, 25), (1, 17), (1, 9)], shared=[(0, 3, 2)]),
    "a group of decodes and chunks": dict(lengths=[(5, 21), (1, 25), (9, 40), (4, 4)], shared=[(0, 3, 2)]),
    "two groups, scattered": dict(
        lengths=[(1, 20), (3, 25), (1, 9), (1, 30), (2, 26)], shared=[(0, 2, 1), (3, 2, 3)], scattered=True
    ),
    "multi-query heads": dict(lengths=[(1, 20), (6, 25)], heads=(4, 1)),
    "multi-head": dict(lengths=[(1, 20), (6, 25)], heads=(3, 3), head_dim=80),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_float64(name):
    q, k, v, batch = make_case(1, **CASES[name])
    expected = reference(q, k, v, batch, 0.25)
    actual = paged_attention_cpu(q, k, v, batch, 0.25)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=2e-5)


def test_bfloat16_is_as_close_as_its_rounding():
    q, k, v, batch = make_case(2, **CASES["a group of decodes and chunks"], dtype=torch.bfloat16)
    expected = reference(q, k, v, batch, 0.25)
    actual = paged_attention_cpu(q, k, v, batch, 0.25)
    torch.testing.assert_close(actual.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("window", [1, 7, 16])
def test_a_sliding_window_hides_what_is_older(window):
    q, k, v, batch = make_case(3, [(1, 20), (9, 30), (5, 5)], scattered=True)
    expected = reference(q, k, v, batch, 0.25, window)
    actual = paged_attention_cpu(q, k, v, batch, 0.25, window)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=2e-5)


def test_random_mixtures_equal_float64():
    rng = random.Random(0)
    for seed in range(40):
        lengths = []
        for _ in range(rng.randint(1, 7)):
            queries = rng.choice([1, 1, 1, 2, 5, 12])
            lengths.append((queries, queries + rng.randint(0, 40)))
        shared, first = [], 0
        while first + 1 < len(lengths):
            count = rng.randint(2, 3)
            members = lengths[first : first + count]
            pages = min((context - queries) // 8 for queries, context in members)
            if pages and len(members) > 1:
                shared.append((first, len(members), rng.randint(1, pages)))
            first += count
        q, k, v, batch = make_case(seed, lengths, shared=shared, scattered=rng.random() < 0.5)
        torch.testing.assert_close(
            paged_attention_cpu(q, k, v, batch, 0.25).double(),
            reference(q, k, v, batch, 0.25),
            atol=3e-6,
            rtol=2e-5,
        )
