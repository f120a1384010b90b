"""Trees of drafts and attention sinks, on every way to attend, against float64: also mixed with groups and windows."""

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from attention_cases import make_case, random_parents, reference

from kernels import attention_plan, backend
from kernels import paged_attention as triton_file
from kernels.cpu_attention import paged_attention_cpu
from kernels.draft_tree import check_trees, depths, tree_mask
from kernels.fixed_order_attention import fixed_order_attention_cpu
from kernels.paged_attention import paged_attention_reference, paged_attention_triton

SCALE = 0.25
LENGTHS = [(5, 30), (1, 25), (12, 44), (3, 17), (8, 9), (6, 6), (1, 40)]
"""Query tokens and context of each request."""
TREES = (0, 2, 3, 5)
"""Whose drafts are a tree: those with several query tokens, but for one."""
SHARED = [(0, 3, 2)]
FEW_LENGTHS = [(3, 20), (1, 25), (7, 9)]

WAYS = {
    "triton": paged_attention_triton,
    "triton deterministic": partial(paged_attention_triton, deterministic=True),
    "cpu": paged_attention_cpu,
    "cpu deterministic": fixed_order_attention_cpu,
    "reference": paged_attention_reference,
}


@pytest.fixture
def attend(request, monkeypatch, device):
    """One of WAYS; contexts of tens of tokens are split as thousands are in earnest."""
    monkeypatch.setattr(attention_plan, "SMALL_SPLIT", 16)
    monkeypatch.setattr(attention_plan, "LARGE_SPLIT", 32)
    monkeypatch.setattr(triton_file, "KEYS_PER_TILE", 16)
    way = WAYS[request.param]
    if not request.param.startswith("triton"):
        return way
    request.getfixturevalue("guarded")

    def on_device(q, k, v, *others, sinks_N=None):
        tensors = [x.to(device).contiguous() for x in (q, k, v)]
        return way(*tensors, *others, sinks_N=None if sinks_N is None else sinks_N.to(device)).cpu()

    return on_device


every_way = pytest.mark.parametrize("attend", WAYS, indirect=True)


def make_tree_case(seed=1, lengths=LENGTHS, trees=TREES, **case):
    rng = random.Random(seed)
    q, k, v, batch = make_case(seed, lengths, scattered=True, **case)
    parents = {request: random_parents(rng, lengths[request][0]) for request in trees}
    batch.trees = {request: tree_mask(parents[request]) for request in trees}
    return q, k, v, batch, parents


def make_sinks(num_heads):
    """Of all sizes: some count for nothing, some for all there is."""
    return torch.tensor([0.0, 3.0, -200.0, 1.5, 200.0, -2.0] * 3)[:num_heads].clone()


def assert_close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, atol=3e-6, rtol=2e-5)


@every_way
@pytest.mark.parametrize("shared", [[], SHARED])
@pytest.mark.parametrize("window", [None, 1, 5, 19])
def test_a_token_of_a_tree_sees_its_ancestors_and_the_context(window, shared, attend):
    q, k, v, batch, parents = make_tree_case(shared=shared)
    assert_close(attend(q, k, v, batch, SCALE, window), reference(q, k, v, batch, SCALE, window, parents=parents))


@every_way
@pytest.mark.filterwarnings("ignore:overflow encountered")  # of exp2(sink), which is then all there is
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (16, 1)])
def test_a_sink_counts_once_for_each_token_and_head(heads, attend):
    q, k, v, batch = make_case(2, LENGTHS, shared=SHARED, heads=heads, head_dim=24)
    sinks = make_sinks(heads[0])
    assert_close(attend(q, k, v, batch, SCALE, sinks_N=sinks), reference(q, k, v, batch, SCALE, sinks=sinks))


@every_way
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("window", [None, 6])
def test_trees_and_sinks_and_windows_and_groups_together(window, attend):
    q, k, v, batch, parents = make_tree_case(3, shared=SHARED)
    sinks = make_sinks(6)
    expected = reference(q, k, v, batch, SCALE, window, sinks, parents)
    assert_close(attend(q, k, v, batch, SCALE, window, sinks_N=sinks), expected)


@every_way
def test_the_largest_tree_fills_the_mask(attend):
    q, k, v, batch, parents = make_tree_case(4, [(64, 70)], (0,), heads=(2, 1))
    assert_close(attend(q, k, v, batch, SCALE), reference(q, k, v, batch, SCALE, parents=parents))


@every_way
def test_a_tree_that_is_a_sequence_is_causal_to_the_bit(attend):
    q, k, v, batch = make_case(5, FEW_LENGTHS, shared=[(0, 2, 1)])
    chains = {request: np.tri(FEW_LENGTHS[request][0], dtype=np.bool_) for request in (0, 2)}
    for window in (None, 11):
        causal = attend(q, k, v, replace(batch, cache={}), SCALE, window)
        as_trees = attend(q, k, v, replace(batch, cache={}, trees=chains), SCALE, window)
        assert torch.equal(as_trees, causal)


@every_way
def test_sinks_of_minus_infinity_are_none(attend):
    q, k, v, batch = make_case(6, FEW_LENGTHS, shared=[(0, 2, 1)])
    none = torch.full((6,), -torch.inf)
    for window in (None, 11):
        plain = attend(q, k, v, replace(batch, cache={}), SCALE, window)
        assert torch.equal(attend(q, k, v, replace(batch, cache={}), SCALE, window, sinks_N=none), plain)


@pytest.mark.parametrize("attend", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_close_as_its_rounding(dtype, attend):
    q, k, v, batch, parents = make_tree_case(7, shared=SHARED, dtype=dtype, heads=(4, 2))
    sinks = make_sinks(4)
    actual = attend(q, k, v, batch, SCALE, 19, sinks_N=sinks)
    expected = reference(q, k, v, batch, SCALE, 19, sinks, parents)
    torch.testing.assert_close(actual.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("attend", ["cpu", "cpu deterministic"], indirect=True)
def test_trees_beside_chunks_of_prompts(attend):
    lengths = [(40, 48), (40, 60), (33, 33), (64, 64), (36, 40)]
    q, k, v, batch, parents = make_tree_case(10, lengths, (1, 3), shared=[(0, 2, 1)])
    assert_close(attend(q, k, v, batch, SCALE), reference(q, k, v, batch, SCALE, parents=parents))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_attends_to_converted_pages_with_trees_and_sinks(dtype, deterministic, monkeypatch):
    monkeypatch.setattr("kernels.quantized_kv.DENSE_BYTES", 1)  # each request alone
    q, k, v, batch, parents = make_tree_case(8, dtype=torch.bfloat16)
    sinks = make_sinks(6)
    actual = backend.paged_attention(q.to(dtype), k, v, batch, SCALE, None, deterministic, sinks)
    expected = reference(q, k, v, batch, SCALE, None, sinks, parents)
    close = {"atol": 3e-6, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(actual.double(), expected, **close)


def test_positions_are_depths_behind_the_context():
    assert depths(tree_mask([-1, 0, 0, 1, 2, 4, -1])).tolist() == [0, 1, 1, 2, 2, 3, 0]
    with pytest.raises(ValueError, match="token 1 has parent 1"):
        tree_mask([-1, 1])


def test_a_captured_graph_has_no_room_for_trees():
    *_, batch, _ = make_tree_case()
    arrays = attention_plan.lay_out_plan(batch, 3, None)
    room = attention_plan.PlanRoom(1000, 1000, 1000, 10000, 10000)
    assert not room.holds(arrays)
    assert room.holds(attention_plan.lay_out_plan(replace(batch, trees={}, cache={}), 3, None))


BAD_TREES = {
    "of no request": ({2: np.eye(2, dtype=np.bool_)}, "request 2; the step has 2 requests"),
    "of another length": ({1: np.eye(2, dtype=np.bool_)}, r"bool \(2, 2\); it must be .* \[3, 3\]"),
    "of another dtype": ({1: np.eye(3)}, "float64"),
    "that is a list": ({1: [[True]]}, "is list"),
    "that is a tensor": ({1: torch.ones(3, 3, dtype=torch.bool)}, "torch.bool"),
    "who does not see itself": ({1: np.zeros((3, 3), np.bool_)}, "is no tree"),
    "who sees what follows": ({1: np.ones((3, 3), np.bool_)}, "is no tree"),
    "who does not see its parent's parent": ({1: np.eye(3, dtype=np.bool_) | np.eye(3, k=-1, dtype=np.bool_)}, "tree"),
    "of too many tokens": ({0: np.tri(65, dtype=np.bool_)}, "65 query tokens; a tree has at most 64"),
}


@pytest.mark.parametrize("name", BAD_TREES)
def test_masks_that_are_no_trees_are_refused(name):
    trees, message = BAD_TREES[name]
    with pytest.raises(ValueError, match=message):
        check_trees(trees, [65, 3])


every_real_way = pytest.mark.parametrize("attend", [way for way in WAYS if way != "reference"], indirect=True)


@every_real_way
@pytest.mark.parametrize("window", [None, 4])
def test_a_mask_that_is_no_tree_is_refused_wherever_it_is_read(window, attend):
    q, k, v, batch = make_case(9, [(3, 12)])
    batch.trees = {0: np.ones((3, 3), np.bool_)}
    with pytest.raises(ValueError, match="is no tree"):
        attend(q, k, v, batch, SCALE, window)


@every_real_way
@pytest.mark.parametrize("sinks", [torch.zeros(5), torch.zeros(6, 1), torch.zeros(6).double()])
def test_sinks_that_are_not_one_float32_per_head_are_refused(sinks, attend):
    q, k, v, batch = make_case(9, [(3, 12)])
    with pytest.raises(ValueError, match=r"sinks are .*; they must be float32 \[6\] on"):
        attend(q, k, v, batch, SCALE, sinks_N=sinks)


def test_sinks_on_another_device_or_with_gaps_are_refused():
    q, k, v, batch = make_case(9, [(3, 12)])
    with pytest.raises(ValueError, match="on meta; they must be"):
        backend.paged_attention(q, k, v, batch, SCALE, sinks_N=torch.zeros(6, device="meta"))
    with pytest.raises(ValueError, match=r"strides \(2,\)"):
        backend.paged_attention(q, k, v, batch, SCALE, sinks_N=torch.zeros(12)[::2])
