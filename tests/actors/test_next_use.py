"""Eviction by next use: as many prefix hits as the best eviction there is, and more than by recency alone."""

import random
from functools import cache
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.next_use import MAX_TAILS
from actors.requests import Request, SamplingParams
from actors.scheduler import Scheduler
from actors.sequence import Sequence


def make_scheduler(num_pages, page_size=1, max_num_seqs=1, is_lru=False):
    scheduler = Scheduler(num_pages, page_size, max_num_seqs, 4096)
    if is_lru:
        scheduler.tree._future = None
    return scheduler


def add_batch(scheduler, prompts, max_tokens=1):
    """Queue a slice's prompts, as the worker does; returns their sequences."""
    sequences = []
    for i, prompt in enumerate(prompts):
        sequences.append(Sequence(Request(str(i), prompt, SamplingParams(max_tokens=max_tokens)), 0, 1 << 20))
        scheduler.add(sequences[-1])
    scheduler.expect_more()
    return sequences


def drive(scheduler, rng=None):
    """Run all that waits to its end, with made-up tokens that no prompt has."""
    rng = rng or random.Random(0)
    while scheduler.waiting or scheduler.running:
        plan = scheduler.plan_step()
        wanting = plan.wanting
        scheduler.commit(plan)
        for sequence in wanting:
            sequence.append(10_000_000 + rng.randrange(1 << 30), 0.0)
            if len(sequence.token_ids) >= sequence.max_len:
                scheduler.finish(sequence)


def hits(prompts, **settings):
    scheduler = make_scheduler(**settings)
    sequences = add_batch(scheduler, prompts)
    drive(scheduler)
    return sum(sequence.num_cached for sequence in sequences)


def most_hits(prompts, num_pages):
    """By trying every choice of what to keep: pages of one token, one prompt at a time."""

    @cache
    def best(i, kept):
        if i == len(prompts):
            return 0
        own = {prompts[i][:n] for n in range(1, len(prompts[i]) + 1)}
        found = len(own & kept)
        others = sorted(kept - own)
        room = min(len(others), num_pages - len(own))
        return found + max(
            best(i + 1, frozenset(own.union(choice)))
            for choice in combinations(others, room)
            if all(len(node) == 1 or node[:-1] in own or node[:-1] in choice for node in choice)
        )

    return best(0, frozenset())


bodies = st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=1, max_size=4).map(sorted)


@settings(max_examples=80, deadline=None)
@given(st.lists(bodies, min_size=1, max_size=3), st.integers(5, 8))
def test_no_eviction_has_more_hits_when_all_prompts_wait(slices, num_pages):
    # The last token of each is its own: it is computed in any case, and of no use to others.
    prompts = [(*body, 100 + i) for i, body in enumerate(body for slice_ in slices for body in slice_)]
    assert hits(prompts, num_pages=num_pages) == most_hits(prompts, num_pages)


def documents(rng, num_documents, num_questions, document_tokens=40, question_tokens=6):
    """Prompts of each document together, each with a question of its own; first tokens differ."""
    groups = []
    for first in rng.sample(range(1000), num_documents):
        head = [first, *(rng.randrange(1000) for _ in range(document_tokens - 1))]
        firsts = rng.sample(range(1000), num_questions)
        questions = [[first, *(rng.randrange(1000) for _ in range(question_tokens - 1))] for first in firsts]
        groups.append(sorted(head + question for question in questions))
    return groups


def interleaved(groups, num_rows):
    """Slices of so many rows, of one group after the other, again and again."""
    return [
        row
        for start in range(0, len(groups[0]), num_rows)
        for group in groups
        for row in group[start : start + num_rows]
    ]


@pytest.mark.parametrize("page_size", [1, 4, 8])
@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_groups_that_take_turns_are_not_all_evicted_before_their_next_turn(page_size, max_num_seqs):
    groups = documents(random.Random(1), num_documents=6, num_questions=8)
    prompts = interleaved(groups, num_rows=2)
    room = {"num_pages": 240 // page_size, "page_size": page_size, "max_num_seqs": max_num_seqs}
    achievable = 6 * 7 * 40  # each document but once
    by_recency, by_next_use = hits(prompts, **room, is_lru=True), hits(prompts, **room)
    assert by_recency < 0.65 * achievable, "the least recently used document is the one that is next"
    assert by_next_use > 0.8 * achievable


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_what_was_generated_goes_before_what_is_read_again(page_size):
    """Long answers fill the pages; what all prompts begin with must outlive them while it is nobody's for a moment."""
    rng = random.Random(2)
    shared = [documents(rng, 1, 1, document_tokens=48)[0][0][:48] for _ in range(3)]
    prompts = [shared[i % 3] + [1000 + i] for i in range(12)]

    def lost(is_lru):
        scheduler = make_scheduler(480 // page_size, page_size, is_lru=is_lru)
        sequences = add_batch(scheduler, prompts, max_tokens=200)
        drive(scheduler)
        return 9 * 48 - sum(sequence.num_cached for sequence in sequences)

    assert lost(is_lru=False) == 0
    assert lost(is_lru=True) > 4 * 48


@pytest.mark.parametrize("is_lru", [False, True])
def test_the_last_prompt_of_a_slice_is_kept_for_the_slice_that_goes_on_with_it(is_lru):
    (document, *others) = documents(random.Random(3), num_documents=5, num_questions=4)
    scheduler = make_scheduler(num_pages=110, is_lru=is_lru)
    add_batch(scheduler, document[:2])
    drive(scheduler)
    add_batch(scheduler, [group[0] for group in others])  # a slice of another shard, meanwhile
    drive(scheduler)
    (first, *_) = add_batch(scheduler, document[2:])
    drive(scheduler)
    assert (first.num_cached >= 40) != is_lru
    for group in documents(random.Random(4), num_documents=MAX_TAILS + 1, num_questions=1):
        add_batch(scheduler, group)
        drive(scheduler)
    assert len(scheduler._future._tails) == MAX_TAILS


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 4, 16]), st.integers(1, 6))
def test_every_prompt_token_is_cached_or_was_evicted_or_is_new(seed, page_size, max_num_seqs):
    rng = random.Random(seed)
    groups = documents(rng, num_documents=5, num_questions=6, document_tokens=30, question_tokens=5)
    room = 8 * 36 // page_size + 8 * max_num_seqs
    prompts = interleaved(groups, num_rows=2)
    seen, new = set(), 0
    for prompt in prompts:
        prefixes = {tuple(prompt[:n]) for n in range(1, len(prompt) + 1)}
        new += len(prefixes - seen)
        seen |= prefixes
    scheduler = make_scheduler(room, page_size, max_num_seqs)
    sequences = add_batch(scheduler, prompts, max_tokens=rng.choice([1, 10]))
    drive(scheduler, rng)
    assert not any(sequence.num_preemptions for sequence in sequences), "what they lost is computed by others"
    cached = sum(sequence.num_cached for sequence in sequences)
    evicted = sum(sequence.num_evicted for sequence in sequences)
    assert cached + evicted + new == sum(map(len, prompts))


def test_with_room_for_all_nothing_is_hashed_and_nothing_is_lost():
    scheduler = make_scheduler(num_pages=4000)
    sequences = add_batch(scheduler, [row for group in documents(random.Random(5), 4, 4) for row in group])
    drive(scheduler)
    assert sum(sequence.num_evicted for sequence in sequences) == 0
    assert not scheduler._future._readers and sequences[0].path is None


def test_the_books_are_empty_when_nobody_waits_whoever_left_how():
    rng = random.Random(6)
    scheduler = make_scheduler(num_pages=90, max_num_seqs=3)
    sequences = add_batch(scheduler, interleaved(documents(rng, 6, 6), 2), max_tokens=20)
    scheduler.plan_step()
    for sequence in rng.sample(sequences, 12):  # clients that go away
        scheduler.finish(sequence)
    drive(scheduler)
    future, tree = scheduler._future, scheduler.tree
    assert future._readers == future._goers == future._waiting == {}
    assert all(turn in future._tails for turn in tree._needed_by)
