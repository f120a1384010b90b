"""The prefix tree, the page pool and the scheduler: no tensors, only invariants."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.pages import PagePool
from actors.prefix_groups import group_by_prefix
from actors.prefix_tree import PrefixTree
from actors.requests import Request, SamplingParams
from actors.scheduler import Scheduler
from actors.sequence import Sequence


def drive(scheduler, sequences, rng, abort_share=0.0):
    """Run sequences to their end with made-up tokens, checking after every step that no page has two owners."""
    coming = list(reversed(sequences))
    steps = 0
    while coming or scheduler.waiting or scheduler.running:
        for _ in range(rng.randint(0 if scheduler.waiting or scheduler.running else 1, 5)):
            if coming:
                scheduler.add(coming.pop())
        plan = scheduler.plan_step()
        assert plan.sequences, "somebody can always go on"
        assert len(set(plan.sequences)) == len(plan.sequences) <= len(scheduler.running)
        assert sum(plan.num_tokens) <= scheduler._max_num_batched_tokens
        assert all(sequence.nodes and sequence in scheduler.running for sequence in plan.sequences)
        turns = [sequence.turn for sequence in scheduler.waiting]
        assert turns == sorted(turns)
        wanting = plan.wanting
        num_drafts = {sequence: scheduler.room_for_draft(sequence, rng.randrange(5)) for sequence in wanting}
        check_owners(scheduler)
        scheduler.commit(plan)
        for sequence in wanting:
            num_accepted = rng.randint(0, num_drafts[sequence])
            for _ in range(1 + num_accepted):
                sequence.append(rng.randrange(3), 0.0)
            sequence.num_computed += num_accepted
            assert len(sequence.token_ids) <= sequence.max_len, "a draft went beyond the sequence's end"
            if len(sequence.token_ids) >= sequence.max_len:
                scheduler.finish(sequence)
        if abort_share and scheduler.running and rng.random() < abort_share:
            scheduler.finish(rng.choice(scheduler.running))
        steps += 1
        assert steps < 10_000
    return steps


def check_owners(scheduler):
    tree, pool = scheduler.tree, scheduler.pool
    owned, stack = {}, [child for siblings in tree._root.children.values() for child in siblings]
    num_unused = 0
    while stack:
        node = stack.pop()
        owned[node.page] = node
        num_unused += node.num_refs == 0
        assert node.in_tree and node.num_computed <= len(node.tokens)
        stack += [child for siblings in node.children.values() for child in siblings]
    for sequence in scheduler.running:
        for node in sequence.nodes:
            assert owned.setdefault(node.page, node) is node, f"page {node.page} has two owners"
            assert node.num_refs > 0
    assert pool.num_free == pool.num_pages - len(owned)
    assert tree.num_unused == num_unused


def make_sequence(tokens, max_tokens, name="s", priority=0):
    return Sequence(Request(name, tokens, SamplingParams(max_tokens=max_tokens), priority=priority), 0, 1000)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 40), st.booleans(), st.integers(1, 3))
def test_no_page_is_lost_or_owned_twice_whatever_happens(seed, page_size, budget, caching, num_priorities):
    rng = random.Random(seed)
    scheduler = Scheduler(max(8, 60 // page_size), page_size, rng.randint(1, 8), budget, caching)
    room = scheduler.pool.num_pages * page_size
    sequences = []
    for _ in range(15):
        prompt = [rng.randrange(3) for _ in range(rng.randint(1, room // 3))]
        sequences.append(make_sequence(prompt, rng.randint(1, room // 3), priority=rng.randrange(num_priorities)))
    drive(scheduler, sequences, rng, abort_share=0.1)
    assert scheduler.tree.num_available == scheduler.pool.num_pages
    check_owners(scheduler)


def test_what_is_evicted_is_what_was_used_longest_ago():
    pool = PagePool(4)
    tree = PrefixTree(pool, 2)
    chains = []
    for tokens in ([1, 1], [2, 2], [3, 3], [4, 4]):
        (node,) = tree.new_nodes(None, tokens, 1)
        tree.settle([node], 0, tokens, 2)
        tree.release([node])
        chains.append(node)
    tree.acquire([chains[0]])
    tree.release([chains[0]])
    tree.new_nodes(None, [9, 9], 1)
    assert [node.in_tree for node in chains] == [True, False, True, True]


def test_a_parent_is_never_evicted_before_its_children():
    pool = PagePool(3)
    tree = PrefixTree(pool, 2)
    nodes = tree.new_nodes(None, [1, 2, 3, 4, 5, 6], 3)
    tree.settle(nodes, 0, [1, 2, 3, 4, 5, 6], 6)
    tree.release(nodes)
    (other,) = tree.new_nodes(None, [7, 7], 1)
    assert [node.in_tree for node in nodes] == [True, True, False]
    assert len(tree.match([1, 2, 3, 4, 5, 6], 6).nodes) == 2
    tree.release([other])


def test_a_prompt_waits_for_a_beginning_that_is_being_computed():
    scheduler = Scheduler(64, 8, 8, 100)
    prefix = list(range(40))
    for i in range(4):
        scheduler.add(make_sequence([*prefix, 50 + i], 2, f"s{i}"))
    scheduler.add(make_sequence([60, 61, 62], 2, "other"))
    first = scheduler.plan_step()
    assert [s.request.request_id for s in first.sequences] == ["s0", "other"]
    scheduler.commit(first)
    second = scheduler.plan_step()
    assert sum(second.num_tokens) == 3, "one token of its own each"


def test_a_freed_page_cannot_be_freed_again():
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    pool.free(page)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(page)


def test_groups_take_the_level_that_saves_most():
    system, doc_a, doc_b = [1], [10, 11, 12, 13], [20, 21, 22]
    tables = [system + doc_a + [30], system + doc_b + [31], system + doc_a + [32], system + doc_b + [33], [40]]
    order, groups = group_by_prefix(tables, [len(t) - 1 for t in tables])
    members = [sorted(order[g.first_request : g.first_request + g.num_requests]) for g in groups]
    assert members == [[0, 2], [1, 3]]
    assert [list(g.page_ids) for g in groups] == [system + doc_a, system + doc_b]


def test_one_large_group_wins_over_small_ones_when_it_saves_more():
    tables = [[1, 2, 3, 4, i % 4 + 5] for i in range(8)]
    _, groups = group_by_prefix(tables, [5] * 8)
    assert [(g.num_requests, len(g.page_ids)) for g in groups] == [(8, 4)]


def test_documents_below_a_long_system_prompt_are_groups_in_a_group():
    system, documents = list(range(30)), [list(range(100 + 20 * i, 120 + 20 * i)) for i in range(3)]
    tables = [[*system, *documents[i % 3], 900 + i] for i in range(6)]
    order, groups = group_by_prefix(tables, [50] * 6)
    assert [order[group.first_request] % 3 for group in groups[1:]] == [0, 1, 2]
    assert [(g.num_requests, g.first_page, list(g.page_ids)) for g in groups] == [
        (6, 0, system),
        *((2, 30, document) for document in documents),
    ]


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=12), st.integers(1, 12), st.data())
def test_groups_are_nested_or_disjoint_and_really_share_their_pages(tables, repeats, data):
    tables = [[page for page in table for _ in range(repeats)] for table in tables]
    counts = [data.draw(st.integers(0, len(table))) for table in tables]
    order, groups = group_by_prefix(tables, counts)
    assert sorted(order) == list(range(len(tables)))
    num_taken = [0] * len(tables)
    for before, group in zip([None, *groups], groups):
        members = range(group.first_request, group.first_request + group.num_requests)
        assert group.num_requests >= 2 and group.page_ids
        assert before is None or before.first_request <= group.first_request
        end = group.first_page + len(group.page_ids)
        for place in members:
            # An inner group goes on where the one around it ends.
            assert num_taken[place] == group.first_page
            num_taken[place] = end
            assert tables[order[place]][group.first_page : end] == list(group.page_ids)
            assert counts[order[place]] >= end
