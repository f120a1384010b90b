"""Cases of attention over pages, and what it is in float64: for the tests of the CPU's two ways to attend."""

import random

import torch

from kernels.attention_batch import AttentionBatch, PrefixGroup, new_kv_pages


def reference(q, k_pages, v_pages, batch, scale, window=None, sinks=None, parents=None):
    """float64, one request and one query at a time. `parents` of each request whose query tokens are a tree: the keys
    that such a token sees are put together one by one, up from it to the root."""
    outputs, row = [], 0
    num_grouped = q.shape[1] // k_pages.shape[1]
    for request, num_queries in enumerate(batch.query_lens):
        num_context = batch.context_lens[request]
        pages = torch.tensor(list(batch.page_ids[request]))
        k = k_pages[pages].double().transpose(1, 2).flatten(0, 1)[:num_context].repeat_interleave(num_grouped, 1)
        v = v_pages[pages].double().transpose(1, 2).flatten(0, 1)[:num_context].repeat_interleave(num_grouped, 1)
        for i in range(num_queries):
            num_before = num_context - num_queries
            path = [num_before + token for token in ancestry(i, (parents or {}).get(request))]
            seen = [*range(num_before), *path][-(window or num_context) :]
            scores = torch.einsum("nd,cnd->nc", q[row].double(), k[seen]) * scale
            if sinks is not None:
                scores = torch.cat((scores, sinks.double()[:, None]), 1)
            outputs.append(torch.einsum("nc,cnd->nd", scores.softmax(-1)[:, : len(seen)], v[seen]))
            row += 1
    return torch.stack(outputs)


def ancestry(token, parents):
    """The token's path from the root, itself last; without parents each token follows the one before."""
    path = []
    while token >= 0:
        path.insert(0, token)
        token = token - 1 if parents is None else parents[token]
    return path


def random_parents(rng, count):
    """A tree of `count` tokens: mostly one that all follow the first."""
    return [rng.randint(-1 if rng.random() < 0.1 else 0, i - 1) if i else -1 for i in range(count)]


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
