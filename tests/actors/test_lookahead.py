"""Steps launched before the tokens of the one before are read answer as steps one after the other do.

A CPU has computed a step when it is launched, so nothing overlaps here; but every decision is made, and every token
goes its way, as on a GPU. What is not tested without one: that nothing waits, and CUDA's own order of copies.
"""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import actors.runner as runner_file
from actors.config import EngineConfig, SpeculativeConfig
from actors.engine import Engine
from actors.lookahead import may_look_ahead
from actors.requests import Completion, Request, SamplingParams
from actors.sampled_tokens import SampledTokens
from actors.scheduler import StepPlan
from actors.structured_outputs import StructuredOutputs
from actors.worker import EngineWorker, TokensEvent

VOCAB = 97
OFF = SpeculativeConfig(method="none")


@pytest.fixture(scope="module")
def make_engine(tiny_llama):
    def make(ahead, **changes):
        defaults = {"dtype": "float32", "page_size": 8, "num_threads": 1, "num_pages": 256, "speculative_config": OFF}
        return Engine(EngineConfig(model=str(tiny_llama), async_scheduling=ahead, **{**defaults, **changes}))

    return make


@pytest.fixture(scope="module")
def in_turn(make_engine):
    return make_engine(False)


@pytest.fixture(scope="module")
def ahead(make_engine):
    return make_engine(True)


def make_prompts(count, seed=1, shared=19):
    rng = random.Random(seed)
    prefix = [rng.randrange(2, VOCAB) for _ in range(shared)]
    return [prefix + [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 20))] for _ in range(count)]


def make_requests(count, sampling, seed=1):
    """sampling: of all, or a list that is gone through again and again."""
    kinds = sampling if isinstance(sampling, list) else [sampling]
    return [
        Request(f"r{i}", prompt, kinds[i % len(kinds)], seed=50 + i)
        for i, prompt in enumerate(make_prompts(count, seed))
    ]


def answer(engine, requests, abort_after=None):
    """Completions by id, after checking the books. abort_after: requests to drop, by the number of steps before."""
    stats = engine.stats
    busy_ns, lost_ns = stats.busy_ns, stats.lost_ns
    done = {}
    for request in requests:
        engine.add(request)
    num_steps = 0
    while engine.has_unfinished():
        for request_id in (abort_after or {}).get(num_steps, ()):
            engine.abort(request_id)
        for completion in engine.step():
            assert completion.request_id not in done
            done[completion.request_id] = completion
        num_steps += 1
    charged_ns = sum(round(completion.usage.device_seconds * 1e9) for completion in done.values())
    assert charged_ns + stats.lost_ns - lost_ns == stats.busy_ns - busy_ns
    assert engine.scheduler.tree.num_available == engine.scheduler.pool.num_pages, "a page was lost"
    assert not engine.scheduler.running and not engine.scheduler.waiting and not engine.scheduler._retired
    return done


def essence(done):
    """All of an answer that must not depend on when steps are launched."""
    return {
        name: (
            completion.error and completion.error.kind,
            completion.usage.prompt_tokens,
            completion.usage.completion_tokens,
            [
                (
                    output.index,
                    output.token_ids,
                    output.text,
                    output.finish_reason,
                    [(logprob.token_id, [token for token, _, _ in logprob.top]) for logprob in output.logprobs or []],
                )
                for output in completion.outputs
            ],
        )
        for name, completion in done.items()
    }


SAMPLING = {
    "greedy": {},
    "drawn": {"temperature": 1.1, "top_p": 0.95},
    "n samples": {"temperature": 1.0, "n": 3},
    "logprobs": {"temperature": 0.7, "logprobs": 4},
    "min tokens": {"temperature": 1.0, "min_tokens": 9, "ignore_eos": False, "stop_token_ids": (5, 9, 30)},
    "stop strings": {"temperature": 1.2, "stop": ("a", "Qz", "7")},
    "stop tokens": {"temperature": 1.2, "stop_token_ids": tuple(range(20, 40))},
    "one token": {"temperature": 1.0, "max_tokens": 1},
    "two tokens": {"max_tokens": 2},
}
READ_FIRST = {
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "a grammar": {"temperature": 1.0, "structured_outputs": StructuredOutputs(regex="[a-f]{3,9}x")},
}


def sampling_of(name):
    return SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **{**SAMPLING, **READ_FIRST}[name]})


@pytest.mark.parametrize("name", SAMPLING)
def test_a_row_is_answered_alike(name, in_turn, ahead):
    requests = make_requests(9, sampling_of(name))
    before = ahead.stats.num_steps_ahead
    assert essence(answer(ahead, requests)) == essence(answer(in_turn, requests))
    if name != "one token":
        assert ahead.stats.num_steps_ahead > before
    assert in_turn.stats.num_steps_ahead == 0


@pytest.mark.parametrize("name", READ_FIRST)
def test_steps_whose_tokens_decide_on_the_next_logits_are_read_first(name, in_turn, ahead):
    requests = make_requests(5, sampling_of(name))
    before = ahead.stats.num_steps_ahead
    assert essence(answer(ahead, requests)) == essence(answer(in_turn, requests))
    assert ahead.stats.num_steps_ahead == before


ENGINES = {
    "few pages": {"num_pages": 16},
    "few places": {"max_num_seqs": 2},
    "small steps": {"max_num_batched_tokens": 7},
    "pages of one token": {"page_size": 1, "num_pages": 400},
    "without prefix cache": {"enable_prefix_caching": False},
    "without prefix groups": {"enable_prefix_groups": False},
    "int8 pages": {"kv_cache_dtype": "int8"},
    "deterministic": {"deterministic": True},
}


@pytest.mark.parametrize("name", ENGINES)
def test_a_mixture_is_answered_alike_by_every_kind_of_engine(name, make_engine):
    requests = make_requests(22, [sampling_of(kind) for kind in [*SAMPLING, *READ_FIRST]], seed=4)
    engine = make_engine(True, **ENGINES[name])
    assert essence(answer(engine, requests)) == essence(answer(make_engine(False, **ENGINES[name]), requests))
    plain = make_requests(12, [sampling_of("greedy"), sampling_of("stop strings")], seed=5)
    assert essence(answer(engine, plain)) == essence(answer(make_engine(False, **ENGINES[name]), plain))
    assert engine.stats.num_steps_ahead > 5
    if name == "few pages":
        assert engine.stats.num_preemptions > 0, "this pool was meant to be too small"


def test_a_cached_prefix_is_found_whole(ahead):
    requests = make_requests(6, sampling_of("greedy"), seed=6)
    answer(ahead, requests)
    again = answer(ahead, requests)
    assert {name: completion.usage.cached_tokens for name, completion in again.items()} == {
        request.request_id: len(request.prompt_token_ids) - 1 for request in requests
    }


def test_a_step_is_launched_for_every_token_but_the_first_of_a_row_alone(make_engine):
    engine = make_engine(True)
    done = answer(engine, make_requests(1, SamplingParams(max_tokens=20, ignore_eos=True)))
    assert done["r0"].usage.completion_tokens == 20
    assert (engine.stats.num_steps, engine.stats.num_steps_ahead) == (20, 19), "the end by length is known before"


def test_an_end_that_is_not_foreseen_costs_its_row_one_step_and_no_token(make_engine, in_turn):
    (request,) = make_requests(1, SamplingParams(max_tokens=20, ignore_eos=True))
    tokens = answer(in_turn, [request])["r0"].outputs[0].token_ids
    stop = tokens[5]
    at = tokens.index(stop)
    engine = make_engine(True)
    sampling = SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=(stop,))
    done = answer(engine, [Request("r0", request.prompt_token_ids, sampling, seed=request.seed)])
    assert done["r0"].outputs[0].token_ids == tokens[: at + 1]
    assert done["r0"].outputs[0].finish_reason == "stop"
    assert engine.stats.num_steps == at + 2
    assert engine.stats.num_decode_tokens == at, "the token that was thrown away is no decoded one"


def test_nobody_is_preempted_for_a_sequence_that_may_have_ended(make_engine, monkeypatch):
    engine = make_engine(True, num_pages=16)
    preempt, tails = engine.scheduler._preempt, []

    def note(sequence):
        tails.append(sequence.token_ids[-1])
        preempt(sequence)

    monkeypatch.setattr(engine.scheduler, "_preempt", note)
    answer(engine, make_requests(8, sampling_of("greedy")))
    assert tails and min(tails) >= 0, "all its tokens are read by then"
    assert engine.stats.num_steps_ahead > 5


@pytest.mark.parametrize("seed", range(3))
def test_rows_dropped_between_steps_take_no_other_with_them(seed, in_turn, ahead):
    requests = make_requests(14, [sampling_of(kind) for kind in [*SAMPLING, *READ_FIRST]], seed=7)
    rng = random.Random(seed)
    dropped = rng.sample([request.request_id for request in requests], 6)
    abort_after = {}
    for name in dropped:
        abort_after.setdefault(rng.randint(0, 14), []).append(name)
    expected = essence(answer(in_turn, requests))
    done = essence(answer(ahead, requests, abort_after))
    assert set(done) >= set(expected) - set(dropped)
    assert all(done[name] == expected[name] for name in done)


def test_a_row_dropped_while_its_last_step_is_on_its_way_is_not_answered(ahead):
    (request,) = make_requests(1, SamplingParams(max_tokens=2, ignore_eos=True))
    ahead.add(request)
    lost_ns = ahead.stats.lost_ns
    assert ahead.step() == []
    ahead.abort("r0")
    assert not ahead.has_unfinished() and ahead.step() == []
    assert ahead.stats.lost_ns > lost_ns
    assert ahead.scheduler.tree.num_available == ahead.scheduler.pool.num_pages


def poisoned(engine, poison):
    """Let a token make its row's logits, keys and values be no numbers, wherever it is the last one."""
    forward = engine.decoder.forward

    @torch.inference_mode()
    def overflow(token_ids, positions, slots, kv, batch, last_rows):
        logits = forward(token_ids, positions, slots, kv, batch, last_rows)
        for row, last in enumerate(last_rows.tolist()):
            if token_ids[last] == poison:
                logits[row] = math.nan
                for k_pages, v_pages in kv:
                    k_pages[slots[last] // 8, :, slots[last] % 8] = math.nan
                    v_pages[slots[last] // 8, :, slots[last] % 8] = math.nan
        return logits

    engine.decoder.forward = overflow
    return engine


def unmet_token(done, requests):
    met = {token for completion in done.values() for output in completion.outputs for token in output.token_ids}
    met |= {token for request in requests for token in request.prompt_token_ids}
    return next(token for token in range(2, VOCAB) if token not in met)


@pytest.mark.parametrize("max_tokens", [1, 12])
def test_rows_whose_logits_are_not_finite_leave_nothing_behind(max_tokens, make_engine, in_turn):
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    requests = make_requests(18, sampling, seed=9)
    expected = answer(in_turn, requests)
    poison = unmet_token(expected, requests)
    engine = poisoned(make_engine(True, num_pages=24), poison)
    bad = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    prefix = requests[0].prompt_token_ids[:19]
    mixed = []
    for i, request in enumerate(requests):
        mixed.append(request)
        if i % 3 == 0:  # behind the prefix of all, so that others copy a part of the page that holds rubbish
            mixed.append(Request(f"bad{i}", [*prefix, 3 + i, poison], bad, seed=i))
    done = answer(engine, mixed)
    assert {name for name, completion in done.items() if completion.error} == {f"bad{i}" for i in range(0, 18, 3)}
    assert {c.error.kind for c in done.values() if c.error} == {"not_finite"}
    assert essence({request.request_id: done[request.request_id] for request in requests}) == essence(expected)
    assert not any(k.isnan().any() or v.isnan().any() for k, v in engine._runner._kv)


def test_rubbish_is_cleared_though_the_next_step_has_copied_from_its_page(make_engine, in_turn):
    prefix = make_prompts(1, shared=20)[0][:20]
    sampling = SamplingParams(max_tokens=1, ignore_eos=True)
    good = Request("good", [*prefix, 5], sampling_of("greedy"))
    expected = essence(answer(in_turn, [good]))
    # It waits for the prefix, of whose last page it takes a part, while nobody knows what the other row comes to.
    engine = poisoned(make_engine(True), poison=90)
    done = answer(engine, [Request("bad", [*prefix, 90], sampling), good])
    assert done.pop("bad").error.kind == "not_finite"
    assert essence(done) == expected and done["good"].usage.cached_tokens == 20
    assert not any(k.isnan().any() or v.isnan().any() for k, v in engine._runner._kv)


def test_rubbish_behind_the_end_of_a_row_is_neither_its_error_nor_left_behind(make_engine, in_turn):
    """The last token of a row makes the next step overflow, which no step after the other would have computed."""
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    requests = make_requests(6, sampling, seed=10)
    tokens = answer(in_turn, requests)["r2"].outputs[0].token_ids
    poison = tokens[4]
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=(poison,))
    requests = [Request(r.request_id, r.prompt_token_ids, sampling, seed=r.seed) for r in requests]
    requests = [r for r in requests if poison not in r.prompt_token_ids]
    expected = essence(answer(in_turn, requests))
    assert expected["r2"][3][0][3] == "stop"
    engine = poisoned(make_engine(True), poison)
    assert essence(answer(engine, requests)) == expected
    assert engine.stats.num_steps_ahead > 0
    assert not any(k.isnan().any() or v.isnan().any() for k, v in engine._runner._kv)


def test_drafts_are_read_first_and_their_pauses_are_not(make_engine):
    requests = make_requests(8, [sampling_of("greedy"), sampling_of("stop strings")], seed=11)
    expected = essence(answer(make_engine(False), requests))
    drafting = make_engine(True, speculative_config=SpeculativeConfig(method="ngram"))
    assert essence(answer(drafting, requests)) == expected
    assert drafting.stats.num_steps_ahead == 0
    auto = make_engine(True, speculative_config=SpeculativeConfig(method="auto"))
    auto.speculation._pause_left = 9
    assert essence(answer(auto, requests)) == expected
    assert 3 < auto.stats.num_steps_ahead < auto.stats.num_steps - 3


class OnDevice(torch.Tensor):
    """A tensor that only SampledTokens.read may bring to the host."""

    may_be_read = False

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert cls.may_be_read or name not in ("tolist", "item", "numpy", "cpu", "__bool__", "__getitem__"), name
        return super().__torch_function__(function, types, args, kwargs or {})


def test_nothing_on_the_host_sees_a_token_before_the_next_step_is_launched(make_engine, monkeypatch):
    engine, order = make_engine(True), []
    launch, sample, read = engine._runner.launch, runner_file.sample, SampledTokens.read

    def sample_on_device(logits, batch):
        result = sample(logits, batch)
        return replace(result, token_ids_B=result.token_ids_B.as_subclass(OnDevice))

    def note_launch(*args):
        order.append("launch")
        return launch(*args)

    def note_read(sampled):
        order.append("read")
        OnDevice.may_be_read = True
        tokens = read(sampled)
        OnDevice.may_be_read = False
        return tokens

    monkeypatch.setattr(runner_file, "sample", sample_on_device)
    monkeypatch.setattr(engine._runner, "launch", note_launch)
    monkeypatch.setattr(SampledTokens, "read", note_read)
    answer(engine, make_requests(3, SamplingParams(max_tokens=6, ignore_eos=True)))
    num_between = engine.stats.num_steps - 1
    assert order == ["launch", *["launch", "read"] * num_between, "read"]


def test_what_may_be_looked_past_is_said_by_the_plan(in_turn):
    sequences = [in_turn._new_sequence(request, 0) for request in make_requests(2, sampling_of("greedy"))]
    assert may_look_ahead(StepPlan(sequences, [len(s.token_ids) for s in sequences]), None)
    assert not may_look_ahead(StepPlan(sequences, [3, 3], drafts={sequences[0]: [5]}), None)
    for name in READ_FIRST:
        decided = in_turn._new_sequence(make_requests(1, sampling_of(name))[0], 0)
        assert not may_look_ahead(StepPlan([decided], [len(decided.token_ids)]), None)
        assert may_look_ahead(StepPlan([decided], [1]), None), "a part of its prompt gets no token yet"


def test_streams_and_calls_of_a_worker_get_the_same(tiny_llama):
    requests = make_requests(7, [sampling_of("stop strings"), sampling_of("logprobs")], seed=12)

    async def stream(worker):
        tokens, texts, done = {}, {}, {}
        async for event in worker.stream(requests):
            if isinstance(event, Completion):
                done[event.request_id] = event
                continue
            assert isinstance(event, TokensEvent)
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
            assert min(event.token_ids) >= 0
            if event.finish_reason is not None:
                texts[event.request_id] = event.text
        assert tokens == {name: completion.outputs[0].token_ids for name, completion in done.items()}
        assert {name: done[name].outputs[0].text for name in texts} == texts
        return done

    answers = []
    for ahead in (False, True):
        config = EngineConfig(
            model=str(tiny_llama),
            dtype="float32",
            page_size=8,
            num_threads=1,
            async_scheduling=ahead,
            speculative_config=OFF,
        )
        worker = EngineWorker(config)
        try:
            called = asyncio.run(worker.generate(requests))
            answers += [essence({c.request_id: c for c in called}), essence(asyncio.run(stream(worker)))]
        finally:
            worker.close()
    assert all(other == answers[0] for other in answers)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_mixture_is_answered_alike(data, make_engine):
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    kinds = [sampling_of(kind) for kind in rng.sample([*SAMPLING] * 2 + [*READ_FIRST], rng.randint(1, 6))]
    requests = make_requests(rng.randint(1, 14), kinds, seed=rng.randrange(100))
    changes = {
        "num_pages": rng.choice([14, 20, 200]),
        "max_num_seqs": rng.choice([1, 3, 64]),
        "max_num_batched_tokens": rng.choice([5, 40, 2000]),
        "speculative_config": SpeculativeConfig(method=rng.choice(["none", "none", "combined", "auto"])),
    }
    dropped = {rng.randint(0, 20): [f"r{rng.randrange(14)}"] for _ in range(rng.randint(0, 3))}
    expected = essence(answer(make_engine(False, **{**changes, "num_pages": 200}), requests))
    engine = make_engine(True, **changes)
    if engine.speculation is not None and rng.random() < 0.7:
        engine.speculation._pause_left = rng.randint(0, 30)
    done = essence(answer(engine, requests, dropped))
    gone = {name for names in dropped.values() for name in names}
    assert set(done) >= set(expected) - gone
    assert all(done[name] == expected[name] for name in done)
