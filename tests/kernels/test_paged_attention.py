"""The attention kernel against float64: any mixture of decode, verification, chunks, groups, windows and layouts."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch

import kernels.paged_attention as file
from kernels import attention_plan
from kernels.attention_batch import AttentionBatch, PrefixGroup, new_kv_pages
from kernels.compare import compare
from kernels.paged_attention import paged_attention_reference, paged_attention_triton

pytestmark = pytest.mark.usefixtures("guarded")


@dataclass(frozen=True)
class Case:
    lengths: tuple[tuple[int, int], ...]  # (query tokens, context) of each request
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    page_size: int = 16
    window: int | None = None
    shared: tuple[tuple[int, int, int], ...] = ()  # (first request, requests, shared pages) of each group
    cpu_layout: bool = False
    dtype: torch.dtype = torch.float32
    split: int = 32


@dataclass
class Inputs:
    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    batch: AttentionBatch
    scale: float
    window: int | None = field(default=None)

    def attend(self, **changes):
        batch = replace(self.batch, cache={}, **changes)
        return paged_attention_triton(self.q, self.k_pages, self.v_pages, batch, self.scale, self.window)


@pytest.fixture
def small_splits(monkeypatch):
    """Contexts of tens of tokens are split as thousands are in earnest."""

    def set_sizes(split):
        monkeypatch.setattr(attention_plan, "SMALL_SPLIT", split)
        monkeypatch.setattr(attention_plan, "LARGE_SPLIT", 2 * split)
        monkeypatch.setattr(file, "KEYS_PER_TILE", 16)

    return set_sizes


def make_inputs(case, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = case.heads
    num_pages = sum(-(-context // case.page_size) for _, context in case.lengths) + 1
    order = torch.randperm(num_pages, generator=generator).tolist()
    layout = torch.device("cpu") if case.cpu_layout else torch.device("meta")
    k_pages, v_pages = new_kv_pages(num_pages, num_kv_heads, case.page_size, case.head_dim, case.dtype, layout)
    k_pages = torch.empty_strided(k_pages.shape, k_pages.stride(), dtype=case.dtype, device=device).fill_(math.nan)
    v_pages = torch.empty_strided(v_pages.shape, v_pages.stride(), dtype=case.dtype, device=device).fill_(math.nan)
    groups = [PrefixGroup(first, count, [order.pop() for _ in range(pages)]) for first, count, pages in case.shared]
    prefixes = {
        first + i: group.page_ids for (first, count, _), group in zip(case.shared, groups) for i in range(count)
    }
    page_ids = []
    for request, (_, context) in enumerate(case.lengths):
        own = -(-context // case.page_size) - len(prefixes.get(request, []))
        page_ids.append([*prefixes.get(request, []), *(order.pop() for _ in range(own))])
        for i, page in enumerate(page_ids[-1]):
            filled = min(case.page_size, context - i * case.page_size)
            for pages in (k_pages, v_pages):
                if not pages[page, 0, 0].isnan().any():
                    continue  # a shared page, filled already; what stays NaN must not be read into a result
                values = torch.randn(num_kv_heads, filled, case.head_dim, generator=generator)
                pages[page, :, :filled] = values.to(device, case.dtype)
    num_tokens = sum(queries for queries, _ in case.lengths)
    fused = torch.randn(num_tokens, num_heads + 2, case.head_dim, generator=generator).to(device, case.dtype)
    queries, contexts = ([int(length[i]) for length in case.lengths] for i in range(2))
    batch = AttentionBatch(queries, contexts, page_ids, case.page_size, groups)
    return Inputs(fused[:, :num_heads], k_pages, v_pages, batch, case.head_dim**-0.5, case.window)


def assert_in_budget(result, inputs):
    arguments = (inputs.q, inputs.k_pages, inputs.v_pages, inputs.batch, inputs.scale, inputs.window)
    in_dtype = paged_attention_reference(*arguments, dtype=inputs.q.dtype)
    report = compare(result.flatten(1), in_dtype.flatten(1), paged_attention_reference(*arguments).flatten(1))
    assert report.holds, report


CASES = {
    "decode": Case(((1, 1), (1, 17), (1, 40))),
    "decode over several splits": Case(((1, 64), (1, 65), (1, 100)), split=32),
    "verification of drafts": Case(((3, 9), (8, 70), (1, 5)), split=32),
    "prefill from nothing": Case(
        ((33, 33), (5, 5)),
    ),
    "prefill chunk after context": Case(
        ((40, 75), (1, 3)),
    ),
    "one query head per key head": Case(((1, 20), (20, 20)), heads=(2, 2)),
    "three query heads per key head": Case(((1, 20), (30, 41)), heads=(6, 2)),
    "sixteen query heads on one": Case(((1, 20), (5, 9)), heads=(16, 1)),
    "head dimension 8": Case(((1, 20), (18, 18)), head_dim=8),
    "head dimension 80": Case(((1, 20), (9, 18)), head_dim=80),
    "head dimension 96": Case(((1, 40),), head_dim=96),
    "head dimension 256": Case(((1, 40), (9, 9)), head_dim=256, heads=(2, 1)),
    "pages of one slot": Case(((1, 7), (9, 9)), page_size=1),
    "pages of five slots": Case(((1, 33), (9, 12)), page_size=5),
    "pages larger than a tile": Case(((1, 70), (9, 12)), page_size=64),
    "window in decode": Case(tuple((1 + i % 3, 5 + 9 * i) for i in range(12)), window=20, split=32),
    "window in a chunk": Case(((40, 75), (20, 20)), window=7),
    "window of one": Case(((1, 5), (18, 18)), window=1),
    "group in decode": Case(((1, 40), (1, 35), (1, 50)), shared=((0, 3, 2),)),
    "groups beside others": Case(
        ((1, 9), (1, 40), (1, 35), (20, 20), (3, 70), (20, 70)), shared=((1, 2, 1), (4, 2, 3)), split=32
    ),
    "group with a window": Case(((1, 40), (1, 100), (9, 50)), shared=((0, 3, 2),), window=24, split=32),
    "group of many rows": Case(tuple((1, 33 + i) for i in range(40)), shared=((0, 40, 2),), split=16),
    "layout of a CPU": Case(((1, 40), (20, 30)), cpu_layout=True),
    "float16": Case(((1, 40), (20, 30)), dtype=torch.float16, shared=((0, 2, 1),)),
    "bfloat16": Case(((1, 40), (20, 30)), dtype=torch.bfloat16, head_dim=32),
    "bfloat16 group": Case(((1, 70), (1, 80)), dtype=torch.bfloat16, shared=((0, 2, 3),), split=16),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_is_as_exact_as_torch(name, device, small_splits):
    case = CASES[name]
    small_splits(case.split)
    inputs = make_inputs(case, device)
    assert_in_budget(inputs.attend(), inputs)


def test_attention_is_exact_at_the_sizes_used_in_earnest(device):
    inputs = make_inputs(Case(((1, 600), (70, 150)), head_dim=64, heads=(2, 1)), device)
    assert_in_budget(inputs.attend(), inputs)


def nest(inputs, first, count, num_outer):
    """Make the pages behind the first `num_outer` of the one group a group of `count` requests from `first` on."""
    (group,) = inputs.batch.groups
    outer = replace(group, page_ids=group.page_ids[:num_outer])
    inner = PrefixGroup(first, count, group.page_ids[num_outer:], num_outer)
    return [outer, inner]


@pytest.mark.parametrize("window", [None, 24])
def test_a_group_inside_of_a_group_attends_behind_it(window, device, small_splits):
    small_splits(16)
    case = Case(((1, 90), (1, 70), (4, 80), (20, 90), (1, 60)), shared=((0, 5, 3),), window=window)
    inputs = make_inputs(case, device)
    assert_in_budget(inputs.attend(groups=nest(inputs, 1, 3, 1)), inputs)
    assert_in_budget(inputs.attend(groups=nest(inputs, 0, 5, 2)), inputs)


@pytest.mark.parametrize("name", ["decode", "verification of drafts", "groups beside others", "group of many rows"])
def test_a_padded_plan_in_buffers_that_stay_gives_the_same_bits(name, device, small_splits):
    case = replace(CASES[name], split=16)
    small_splits(case.split)
    inputs = make_inputs(case, device)
    num_tokens, heads_per_kv = inputs.batch.num_tokens, case.heads[0] // case.heads[1]
    room = attention_plan.PlanRoom(num_tokens + 5, 200, 64, 300, 800)
    buffers = attention_plan.PlanBuffers(replace(room, num_tokens=200, num_small=300), device)
    other = make_inputs(CASES["decode over several splits"], device).batch
    buffers.load(attention_plan.lay_out_plan(other, heads_per_kv, None), room)  # leftovers
    arrays = attention_plan.lay_out_plan(inputs.batch, heads_per_kv, case.window)
    assert room.holds(arrays)
    buffers.load(arrays, room)
    # Rows behind the step's belong to nobody: they may hold anything, and nothing is written to their places.
    q = torch.cat((inputs.q, torch.full_like(inputs.q[:1], math.nan).expand(5, -1, -1)))
    stand_in = AttentionBatch([1] * (num_tokens + 5), [1] * (num_tokens + 5), [[0]] * (num_tokens + 5), case.page_size)
    stand_in.cache["triton_attention", heads_per_kv, case.window, False] = buffers.plan(room)
    out = paged_attention_triton(q, inputs.k_pages, inputs.v_pages, stand_in, inputs.scale, case.window)
    assert torch.equal(out[:num_tokens], inputs.attend())


def test_a_plan_that_is_larger_than_the_room_is_seen(device):
    batch = make_inputs(CASES["groups beside others"], device).batch
    arrays = attention_plan.lay_out_plan(batch, 2, None)
    parts = len(arrays.small_parts), len(arrays.large_parts)
    sizes = [batch.num_tokens, *parts, arrays.num_slots, len(arrays.page_ids)]
    assert attention_plan.PlanRoom(*sizes).holds(arrays)
    for i in range(len(sizes)):
        assert not attention_plan.PlanRoom(*(size - (place == i) for place, size in enumerate(sizes))).holds(arrays)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attending_to_shared_pages_once_changes_nothing_beyond_rounding(dtype, device, small_splits):
    small_splits(16)
    case = Case(((1, 70), (1, 49), (4, 80), (20, 90)), shared=((0, 4, 3),), dtype=dtype)
    inputs = make_inputs(case, device)
    grouped, alone = inputs.attend(), inputs.attend(groups=[])
    assert_in_budget(grouped, inputs)
    assert_in_budget(alone, inputs)
    assert not torch.equal(grouped, alone)  # both ways were taken


def test_a_rows_result_is_the_same_bits_in_any_batch(device, small_splits):
    small_splits(32)
    case = Case(((1, 70), (1, 20), (3, 50), (1, 33), (30, 40)), dtype=torch.bfloat16, head_dim=32)
    inputs = make_inputs(case, device)
    together = inputs.attend()
    first = 0
    for request, num_queries in enumerate(inputs.batch.query_lens):
        alone = AttentionBatch(
            [num_queries], [inputs.batch.context_lens[request]], [inputs.batch.page_ids[request]], case.page_size
        )
        q = inputs.q[first : first + num_queries]
        out = paged_attention_triton(q, inputs.k_pages, inputs.v_pages, alone, inputs.scale)
        assert torch.equal(out, together[first : first + num_queries])
        first += num_queries


def test_a_step_is_planned_once_for_all_layers(device):
    inputs = make_inputs(CASES["decode"], device)
    paged_attention_triton(inputs.q, inputs.k_pages, inputs.v_pages, inputs.batch, inputs.scale)
    plans = dict(inputs.batch.cache)
    paged_attention_triton(inputs.q, inputs.k_pages, inputs.v_pages, inputs.batch, inputs.scale)
    assert plans == inputs.batch.cache
    assert len(plans) == 1


def test_parts_outside_of_the_window_are_not_launched(device):
    inputs = make_inputs(Case(((1, 2000),), page_size=64), device)
    plan = attention_plan.plan_attention(inputs.batch, 2, window=100, device=device)
    assert [row[3:5] for row in plan.small_parts.tolist()] == [[1536, 2000]]


BAD = {
    "context beyond its pages": ({"context_lens": [99]}, "pages for 16"),
    "queries beyond the context": ({"context_lens": [0]}, "1 <= queries <= context"),
    "another page size": ({"page_size": 8}, "page_size=8"),
    "another number of tokens": ({"query_lens": [2]}, "sum to 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_contradicting_batch_is_refused(name, device):
    changes, message = BAD[name]
    inputs = make_inputs(Case(((1, 9),)), device)
    with pytest.raises(ValueError, match=message):
        inputs.attend(**changes)


def test_shapes_that_do_not_fit_are_refused(device):
    inputs = make_inputs(Case(((1, 9),), heads=(4, 2)), device)
    with pytest.raises(ValueError, match="3 query heads on 2"):
        replace(inputs, q=inputs.q[:, :3]).attend()
    with pytest.raises(ValueError, match="float64"):
        replace(inputs, q=inputs.q.double()).attend()
    with pytest.raises(ValueError, match="window is 0"):
        replace(inputs, window=0).attend()
    with pytest.raises(ValueError, match="contiguous per head"):
        swapped = inputs.k_pages.transpose(2, 3).contiguous().transpose(2, 3)
        replace(inputs, k_pages=swapped).attend()
