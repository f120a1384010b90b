"""How many draft tokens a step verifies, with made-up drafts and step times; and the real drafters in a real engine."""

from __future__ import annotations

import itertools
import operator
import random
from types import SimpleNamespace

import pytest

from actors.config import EngineConfig, SpeculativeConfig
from actors.drafters.drafting import Draft, Speculator
from actors.engine import Engine
from actors.requests import Request, SamplingParams
from actors.scheduler import StepPlan
from actors.sequence import Sequence
from actors.speculation import FEWEST_SEEN, LONGEST_PAUSE, TRIAL_STEPS, Speculation
from actors.step_times import StepTimes

FLAT = StepTimes(curve_tokens=(1, 1000), curve_s=(1e-3, 1.001e-3))  # a token more costs next to nothing
STEEP = StepTimes(curve_tokens=(1, 1000), curve_s=(1e-3, 1.0))  # every token costs what a step of one costs
ROOMY = SimpleNamespace(num_draftable=lambda plan: 500, room_for_draft=lambda sequence, wanted: wanted)
READS = SimpleNamespace(num_read=lambda plan: 100.0)


class Guesser:
    """Drafts `tokens` for every sequence, and pretends to be so sure, so slow and so named."""

    def __init__(self, acceptance, tokens=(7, 7, 7, 7), chance=0.9, name="ngram", slow_ns=0):
        self.name, self.tokens, self.slow_ns = name, list(tokens), slow_ns
        self.chances = acceptance.chances
        self.cell = acceptance.add_cells([chance])
        self.num_asked = 0

    def propose(self, sequences, drafts, limits):
        self.num_asked += 1
        for draft, limit in zip(drafts, limits):
            count = min(limit, len(self.tokens)) - len(draft.token_ids)
            draft.token_ids += self.tokens[:count]
            draft.cells += [self.cell] * count
            draft.chances += [self.chances[self.cell]] * count

    def finish(self, sequence):
        pass


class SlowSpeculator(Speculator):
    """Says that each drafter took as long as it pretends."""

    def propose(self, sequences, limits, ask_expensive=True):
        asked = [drafter.num_asked for drafter in self.drafters]
        before = {name: count.num_ns for name, count in self.counts.items()}
        drafts = super().propose(sequences, limits, ask_expensive)
        for drafter, times in zip(self.drafters, asked):
            is_asked = drafter.num_asked > times
            self.counts[drafter.name].num_ns = before[drafter.name] + (drafter.slow_ns if is_asked else 0)
        return drafts


def make_speculation(times, *guesses, method="auto", **settings):
    speculator = SlowSpeculator(expensive=("draft_model",))
    for guess in guesses or ({},):
        drafter = Guesser(speculator.acceptance, **guess)
        speculator.drafters.append(drafter)
        speculator.counts[drafter.name] = type(next(iter(Speculator([drafter]).counts.values())))()
    notes = []
    config = SpeculativeConfig(method=method, **settings)
    return Speculation(config, speculator, times, 1000, notes.append), notes


def make_plan(count):
    plan = StepPlan()
    for i in range(count):
        sequence = Sequence(Request(f"r{i}", [1, 2, 3], SamplingParams(max_tokens=10_000)), 0, 100_000)
        sequence.append(4, 0.0)
        sequence.num_computed = 3
        plan.sequences.append(sequence)
        plan.num_tokens.append(1)
    return plan


def take_step(speculation, plan, written, seconds=None):
    """Draft, pretend that every sequence wrote `written` as far as its draft allows, and learn."""
    plan.drafts = {}
    speculation.draft(plan, ROOMY, READS)
    for sequence in plan.sequences:
        draft = plan.drafts.get(sequence, [])
        num_right = 0
        while num_right < len(draft) and draft[num_right] == written[num_right]:
            num_right += 1
        for token in written[: num_right + 1]:
            sequence.append(token, 0.0)
        sequence.num_computed = len(sequence.token_ids) - 1
    speculation.learn(plan, seconds or speculation._step.seconds or 1e-3)
    return sum(map(len, plan.drafts.values()))


def test_all_draft_tokens_are_verified_where_a_token_costs_next_to_nothing():
    speculation, _ = make_speculation(FLAT)
    assert take_step(speculation, make_plan(3), [7] * 9) == 12


def test_no_draft_token_is_verified_where_each_costs_as_much_as_it_can_bring():
    speculation, _ = make_speculation(STEEP)
    assert take_step(speculation, make_plan(3), [7] * 9) == 0


def test_fixed_methods_verify_whatever_is_drafted():
    speculation, _ = make_speculation(STEEP, method="combined", num_speculative_tokens=3)
    assert take_step(speculation, make_plan(3), [9] * 9) == 9


def test_of_two_drafts_the_surer_one_is_verified_first_and_further():
    # A step of two takes 2 ms; a third token 1 ms more, a fourth 10: only one draft token can pay.
    times = StepTimes(curve_tokens=(1, 2, 3, 4, 5), curve_s=(1e-3, 2e-3, 2.4e-3, 12e-3, 22e-3))
    speculation, _ = make_speculation(times)
    plan = make_plan(2)
    drafts = [Draft([5], [0], [0.5], [0]), Draft([6, 6], [0, 0], [0.9, 0.4], [0, 0])]
    assert speculation._admit(plan, plan.wanting, drafts, 100, READS) == [0, 1]


def test_the_number_of_verified_tokens_has_the_most_expected_tokens_per_second_of_all():
    """Against trying every number, on step times with jumps, where stopping at the first fall would be wrong."""
    rng = random.Random(3)
    for _ in range(200):
        seconds = [1e-3]
        for _ in range(40):
            seconds.append(seconds[-1] + rng.choice([0, 0, 1e-5, 2e-4, 1.5e-3]))
        times = StepTimes(curve_tokens=tuple(range(1, 42)), curve_s=tuple(seconds))
        speculation, _ = make_speculation(times)
        plan = make_plan(rng.randint(1, 4))
        drafts = []
        for _ in plan.sequences:
            length = rng.randint(0, 8)
            drafts.append(Draft([1] * length, [0] * length, [rng.random() for _ in range(length)], [0] * length))
        counts = speculation._admit(plan, plan.wanting, drafts, 100, READS)
        survivals = [list(itertools.accumulate(draft.chances, operator.mul)) for draft in drafts]
        likeliest = sorted((chance for of_draft in survivals for chance in of_draft), reverse=True)
        rates = [
            (len(drafts) + sum(likeliest[:count])) / times.seconds(len(drafts) + count, 1, 1, 0)
            for count in range(len(likeliest) + 1)
        ]
        expected = len(drafts) + sum(sum(of_draft[:count]) for of_draft, count in zip(survivals, counts))
        assert expected / times.seconds(len(drafts) + sum(counts), 1, 1, 0) == pytest.approx(max(rates))


def test_prompts_in_a_step_do_not_make_drafts_look_cheap():
    # With 96 prompt tokens the step takes 100 ms and a draft token 1 ms more: 1 % of the step, but all of a decode.
    speculation, _ = make_speculation(STEEP)
    plan = make_plan(4)
    prompt = Sequence(Request("p", list(range(200)), SamplingParams()), 0, 1000)
    plan.sequences.append(prompt)
    plan.num_tokens.append(96)
    assert take_step(speculation, plan, [7] * 9) == 0


def test_where_drafts_cost_more_than_they_bring_they_are_asked_for_ever_more_rarely():
    speculation, _ = make_speculation(FLAT, {"chance": 0.5, "slow_ns": 10_000_000})
    (drafter,) = speculation.speculator.drafters
    plan = make_plan(2)
    for _ in range(2000):
        take_step(speculation, plan, [9] * 9)
    assert drafter.num_asked < FEWEST_SEEN + 2000 / LONGEST_PAUSE + 12


def test_drafts_that_pay_again_after_a_pause_are_taken_up_again():
    speculation, _ = make_speculation(FLAT)
    plan = make_plan(2)
    (drafter,) = speculation.speculator.drafters
    drafter.slow_ns = 10_000_000
    for _ in range(100):
        take_step(speculation, plan, [9] * 9)
    drafter.slow_ns = 0
    before = drafter.num_asked
    for _ in range(400):
        take_step(speculation, plan, [7] * 9)
    assert drafter.num_asked - before > 200


def test_a_draft_model_that_takes_longer_than_it_saves_is_off_with_one_note_and_the_others_go_on():
    slow = {"name": "draft_model", "tokens": [8, 8], "slow_ns": 50_000_000}
    speculation, notes = make_speculation(FLAT, {"tokens": [7], "chance": 0.6}, slow)
    cheap, model = speculation.speculator.drafters
    plan = make_plan(2)
    for _ in range(TRIAL_STEPS):
        take_step(speculation, plan, [7] * 9)
    of_model, of_cheap = model.num_asked, cheap.num_asked
    for _ in range(60):
        take_step(speculation, plan, [7] * 9)
    assert of_model > 0
    assert model.num_asked == of_model
    assert cheap.num_asked >= of_cheap + 60
    assert len(notes) == 1
    assert "draft model" in notes[0]


def test_saved_time_is_what_accepted_tokens_would_have_taken_less_what_drafts_took():
    times = StepTimes(curve_tokens=(1, 100), curve_s=(1e-3, 1e-3 + 99e-5))  # 10 us for each further token
    speculation, _ = make_speculation(times, {"tokens": [7, 7, 7], "slow_ns": 20_000})
    take_step(speculation, make_plan(1), [7, 7, 9, 9])
    # Two tokens accepted of three: two steps of 1 ms saved, three tokens of 10 us verified, 20 us for guessing.
    assert speculation.saved_s == pytest.approx(2e-3 - 3e-5 - 2e-5, rel=0.02)
    assert speculation.num_verify_steps == 1
    (stats,) = speculation.drafter_stats()
    assert (stats.drafted_tokens, stats.accepted_tokens) == (3, 2)


METHODS = {
    "auto": {},
    "ngram": {"method": "ngram", "prompt_lookup_min": 1},
    "corpus": {"method": "corpus"},
    "combined": {"method": "combined", "num_speculative_tokens": 7},
}


def make_engine(model, **speculative):
    return Engine(
        EngineConfig(
            model=str(model),
            dtype="float32",
            page_size=8,
            num_threads=1,
            num_pages=256,
            speculative_config=SpeculativeConfig(**speculative),
        )
    )


def answer(engine, requests):
    for request in requests:
        engine.add(request)
    done = {}
    while engine.has_unfinished():
        for completion in engine.step():
            done[completion.request_id] = completion
    return done


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_are_answered_the_same_by_every_method(name, temperature, tiny_llama):
    rng = random.Random(4)
    phrase = [rng.randrange(2, 97) for _ in range(12)]
    sampling = SamplingParams(temperature=temperature, max_tokens=30, ignore_eos=True)
    requests = [
        Request(f"r{i}", [*phrase, *rng.sample(range(2, 97), 5), *phrase], sampling, seed=i // 2) for i in range(12)
    ]
    again = [Request(f"again-{r.request_id}", r.prompt_token_ids, sampling, seed=r.seed) for r in requests]
    expected = answer(make_engine(tiny_llama, method="none"), requests + again)
    speculating = make_engine(tiny_llama, **METHODS[name])
    # Rows that come a second time are drafted from what was answered before.
    found = answer(speculating, requests) | answer(speculating, again)
    assert {i: c.outputs[0].token_ids for i, c in found.items()} == {
        i: c.outputs[0].token_ids for i, c in expected.items()
    }
    usages = [completion.usage for completion in found.values()]
    stats = speculating.drafter_stats()
    assert sum(usage.drafted_tokens for usage in usages) == sum(drafter.drafted_tokens for drafter in stats)
    assert sum(usage.accepted_tokens for usage in usages) == sum(drafter.accepted_tokens for drafter in stats)
    if name in ("corpus", "combined"):
        assert sum(usage.accepted_tokens for usage in usages) > 0


def test_a_drafter_that_fails_is_switched_off_and_rows_are_answered_all_the_same(tiny_llama, monkeypatch, caplog):
    engine = make_engine(tiny_llama)
    corpus = engine.speculation.corpus_index

    def explode(*arguments):
        raise RuntimeError("planted")

    monkeypatch.setattr(corpus, "propose", explode)
    requests = [Request(f"r{i}", [5, 6, 7, 5, 6], SamplingParams(max_tokens=9, ignore_eos=True)) for i in range(4)]
    with caplog.at_level("WARNING"):
        done = answer(engine, requests)
    assert len(done) == 4
    assert all(completion.error is None for completion in done.values())
    assert [stats.failed for stats in engine.drafter_stats()] == ["RuntimeError: planted", ""]
    assert sum("corpus is switched off" in record.message for record in caplog.records) == 1


def test_the_index_of_one_engine_serves_another(tiny_llama):
    requests = [Request(f"r{i}", [5, 6, 7, 8 + i], SamplingParams(max_tokens=20, ignore_eos=True)) for i in range(3)]
    first, second = (make_engine(tiny_llama, method="corpus") for _ in range(2))
    answer(first, requests)
    assert second.load_corpus_index(first.corpus_index())
    steps = second.stats.num_steps
    accepted = sum(c.usage.accepted_tokens for c in answer(second, requests).values())
    assert accepted > 30
    assert second.stats.num_steps - steps < 12
    assert not second.load_corpus_index(b"no index")


def test_the_shipped_draft_model_drafts_for_the_shipped_model():
    from pathlib import Path

    from jobs.demo import evaluate
    from jobs.demo.tickets import make_tickets

    demo = Path(evaluate.__file__).parent
    tokenizer = evaluate.load_tokenizer(demo / "model")
    prefix = evaluate.encode_prefix(tokenizer)
    prompts = [prefix + prompt for prompt, _ in evaluate.encode_tickets(tokenizer, make_tickets(12, seed=5))]
    sampling = SamplingParams(max_tokens=64)

    def answers(**settings):
        config = SpeculativeConfig(**settings)
        # A number of tokens that no measurement chooses: a step that prompts fill has no room for drafts.
        model = EngineConfig(
            model=str(demo / "model"), dtype="float32", max_num_batched_tokens=2048, speculative_config=config
        )
        engine = Engine(model)
        return [c.outputs[0].token_ids for c in engine.generate(prompts, sampling)], engine

    expected, _ = answers(method="none")
    found, engine = answers(method="draft_model", model=str(demo / "draft"), num_speculative_tokens=4)
    assert found == expected
    (stats,) = engine.drafter_stats()
    assert stats.accepted_tokens > 0.5 * stats.drafted_tokens > 100
