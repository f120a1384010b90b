"""Priorities: who waits, who gives way, and that neither changes an answer."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.config import EngineConfig
from actors.engine import Engine
from actors.requests import MAX_PRIORITY, Request, SamplingParams
from actors.scheduler import Scheduler
from actors.sequence import Sequence


def sequence_of(name, num_prompt, max_tokens, priority=0, first=0):
    """A prompt like no other's, unless `first` is the same."""
    start = 1000 * (first or 10 + int(name.encode().hex(), 16))
    prompt = [start + i for i in range(num_prompt)]
    request = Request(name, prompt, SamplingParams(max_tokens=max_tokens), priority=priority)
    return Sequence(request, 0, 10_000)


def step(scheduler):
    """One step with made-up tokens: the names in it, with their numbers of tokens, and the names that finished."""
    plan = scheduler.plan_step()
    wanting = plan.wanting
    scheduler.commit(plan)
    finished = []
    for sequence in wanting:
        sequence.append(7, 0.0)
        if len(sequence.token_ids) >= sequence.max_len:
            scheduler.finish(sequence)
            finished.append(sequence.request.request_id)
    return {s.request.request_id: n for s, n in zip(plan.sequences, plan.num_tokens)}, finished


def test_who_has_a_better_priority_is_admitted_first_and_equals_as_they_came():
    scheduler = Scheduler(64, 4, 1, 100)
    for name, priority in (("a1", 1), ("b0", 0), ("c1", 1), ("d-2", -2), ("e0", 0)):
        scheduler.add(sequence_of(name, 5, 1, priority))
    assert [next(iter(step(scheduler)[0])) for _ in range(5)] == ["d-2", "b0", "e0", "a1", "c1"]


def test_a_place_is_taken_from_the_worst_priority_and_there_from_the_last():
    scheduler = Scheduler(64, 4, 3, 100)
    for name, priority in (("a2", 2), ("b1", 1), ("c2", 2)):
        scheduler.add(sequence_of(name, 5, 50, priority))
    step(scheduler)
    scheduler.add(sequence_of("x0", 5, 2, 0))
    assert set(step(scheduler)[0]) == {"a2", "b1", "x0"}, "at once, and c2 gave way"
    scheduler.add(sequence_of("y1", 5, 2, 1))
    assert set(step(scheduler)[0]) == {"x0", "b1", "y1"}, "x0 writes its last token, a2 gave way"
    scheduler.add(sequence_of("z2", 5, 2, 2))
    names, _ = step(scheduler)
    assert set(names) == {"b1", "y1", "a2"}, "who gave way comes before others of its priority"
    assert names["a2"] == 1, "its finished pages were kept, but for the last token"
    assert [sequence.num_preemptions for sequence in scheduler.running if sequence.request.request_id == "a2"] == [1]


def test_nobody_gives_way_to_an_equal():
    scheduler = Scheduler(64, 4, 2, 100)
    for name in "ab":
        scheduler.add(sequence_of(name, 5, 9, 3))
    step(scheduler)
    scheduler.add(sequence_of("c", 5, 9, 3))
    assert set(step(scheduler)[0]) == {"a", "b"}


def test_pages_are_taken_from_worse_priorities_until_there_are_enough():
    scheduler = Scheduler(32, 4, 8, 1000)
    for name in ("a1", "b1", "c1"):
        scheduler.add(sequence_of(name, 36, 4, 1))  # nine pages each, and one to write in
    step(scheduler)
    scheduler.add(sequence_of("x0", 60, 2, 0))  # fifteen
    names, _ = step(scheduler)
    assert set(names) == {"a1", "x0"}
    assert [sequence.request.request_id for sequence in scheduler.waiting] == ["b1", "c1"]


def test_when_an_answer_needs_a_page_the_worst_priority_gives_way_and_not_who_came_last():
    scheduler = Scheduler(4, 4, 8, 1000)
    scheduler.add(sequence_of("a1", 7, 8, 1))
    step(scheduler)
    scheduler.add(sequence_of("x0", 8, 8, 0))
    assert set(step(scheduler)[0]) == {"a1", "x0"}
    for _ in range(2):
        names, _ = step(scheduler)
    assert set(names) == {"x0"}
    assert [sequence.request.request_id for sequence in scheduler.waiting] == ["a1"]


def test_a_prompt_that_is_begun_leaves_the_tokens_of_a_step_to_a_better_one():
    scheduler = Scheduler(256, 4, 8, 100)
    scheduler.add(sequence_of("long", 500, 2, 1))
    assert step(scheduler)[0] == {"long": 100}
    scheduler.add(sequence_of("x", 30, 2, 0))
    names, _ = step(scheduler)
    assert names == {"x": 30, "long": 70}
    assert step(scheduler)[0] == {"x": 1, "long": 99}


def test_a_beginning_that_a_worse_priority_computes_is_not_waited_for():
    scheduler = Scheduler(256, 4, 8, 100)
    scheduler.add(sequence_of("long", 500, 2, 1, first=9))
    step(scheduler)
    better = sequence_of("x", 210, 2, 0, first=9)
    scheduler.add(better)
    num_steps = 0
    while better.num_generated == 0:
        names, _ = step(scheduler)
        assert names["x"] + names.get("long", 0) <= 100
        num_steps += 1
    assert num_steps == 2, "100 tokens were there already"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.sampled_from([1, 4, 16]), st.integers(60, 200))
def test_while_one_waits_nobody_of_a_worse_priority_runs(seed, num_places, page_size, budget):
    rng = random.Random(seed)
    scheduler = Scheduler(1000, page_size, num_places, budget, enable_prefix_caching=False)
    for number in range(40):
        if rng.random() < 0.7:
            scheduler.add(sequence_of(str(number), rng.randint(1, 40), rng.randint(1, 9), rng.randint(-1, 1)))
        names, finished = step(scheduler)
        has_tokens_left = sum(names.values()) <= budget - 40  # all prompts are as short
        if scheduler.waiting and has_tokens_left and not finished:
            assert len(scheduler.running) == num_places
            assert max(s.request.priority for s in scheduler.running) <= scheduler.waiting[0].request.priority
    while scheduler.waiting or scheduler.running:
        step(scheduler)
    assert scheduler.tree.num_available == 1000
    assert scheduler._future._waiting == {}


def test_turns_of_many_priorities_stay_in_order_when_pages_run_out():
    rng = random.Random(3)
    scheduler = Scheduler(40, 2, 3, 64)
    sequences = [
        sequence_of(str(i), rng.randint(4, 24), rng.randint(1, 20), rng.choice([-MAX_PRIORITY, 0, 1, MAX_PRIORITY]), 1)
        for i in range(60)
    ]
    coming = iter(sequences)
    while True:
        for sequence in (next(coming, None) for _ in range(rng.randint(0, 4))):
            if sequence is not None:
                scheduler.add(sequence)
                scheduler.expect_more()
        for turns in scheduler._future._readers.values():
            assert isinstance(turns, int) or list(turns) == sorted(turns)
        step(scheduler)
        if not scheduler.waiting and not scheduler.running and sequences[-1].num_generated:
            break
    assert any(sequence.num_preemptions for sequence in sequences)
    assert scheduler._future._readers == scheduler._future._goers == scheduler._future._waiting == {}


def test_a_priority_beyond_the_range_is_refused():
    with pytest.raises(ValueError, match="priority=16385"):
        Request("r", [1], SamplingParams(), priority=MAX_PRIORITY + 1)


def test_giving_way_changes_no_answer(tiny_llama):
    config = EngineConfig(model=str(tiny_llama), dtype="float32", page_size=8, num_threads=1, num_pages=64)
    rng = random.Random(5)
    prompts = [[rng.randrange(2, 97) for _ in range(rng.randint(3, 40))] for _ in range(12)]

    def sampling(number):
        return SamplingParams(max_tokens=20, temperature=1.0 if number % 2 else 0.0, ignore_eos=True)

    alone = Engine(config)
    wanted = []
    for number, prompt in enumerate(prompts):
        alone.add(Request("r", prompt, sampling(number), seed=number))
        answers = []
        while alone.has_unfinished():
            answers += alone.step()
        wanted.append(answers[0].outputs[0].token_ids)
    engine = Engine(config.model_copy(update={"max_num_seqs": 3}))
    got, first_at = {}, {}
    for number, prompt in enumerate(prompts[:6]):
        engine.add(Request(str(number), prompt, sampling(number), seed=number, priority=1))
    num_steps = 0
    while engine.has_unfinished():
        if num_steps in (4, 6, 8, 10, 12, 14):
            number = 6 + (num_steps - 4) // 2
            engine.add(Request(str(number), prompts[number], sampling(number), seed=number))
        for completion in engine.step():
            got[int(completion.request_id)] = completion.outputs[0].token_ids
        for name, row in engine._rows.items():
            if row.sequences[0].num_generated:
                first_at.setdefault(int(name), num_steps)
        num_steps += 1
    assert [got[number] for number in range(12)] == wanted
    assert [first_at[number] for number in (6, 7, 8)] == [4, 6, 8], "in the step after they came: batches gave way"
    assert engine.stats.num_preemptions >= 3
    assert engine.scheduler.tree.num_available == engine.scheduler.pool.num_pages
