"""The schedule in numbers against engines whose time can be computed, a corpus in numbers against all of it counted,
and an estimate against what is true."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.config import EngineConfig
from actors.requests import Request, SamplingParams
from actors.scheduler import Scheduler
from actors.sequence import Sequence
from actors.step_times import StepTimes
from actors.weights.checkpoint import load_tokenizer
from pipeline.bill.pricing import Price
from pipeline.job import JobError, load_job
from pipeline.prefix_plan import plan_shard
from pipeline.price.corpus_sample import CorpusSample, ShardSample, sample_corpus
from pipeline.price.corpus_totals import totals_of
from pipeline.price.device_profile import DeviceProfile, find_profile, keep_profile, read_profile
from pipeline.price.engine_simulation import Drafting, EngineShape, RowNumbers, simulate
from pipeline.price.estimate import estimate
from pipeline.price.experience import Experience
from pipeline.shards import list_shards
from pipeline.storage import Storage

PER_STEP = StepTimes((1, 2), (1.0, 1.0))
"""A second per step, whatever is in it: seconds count steps."""

PER_TOKEN = StepTimes((1, 1000), (1.0, 1000.0))
"""A second per token: seconds count computed tokens."""

WIDE = EngineShape(max_num_seqs=64, max_num_batched_tokens=10_000)


def rows(*triples: tuple[int, int, int], starts: tuple[int, ...] = (0,)) -> RowNumbers:
    prompt, shared, output = (np.array(column, np.int64) for column in zip(*triples))
    return RowNumbers(prompt, shared, output, starts)


@pytest.mark.parametrize(
    ("what", "engine", "num_steps"),
    [
        (rows((10, 0, 1)), WIDE, 1),
        (rows((10, 0, 8)), WIDE, 8),
        (rows((10, 0, 8), (90, 0, 3)), WIDE, 8),
        (rows((10, 0, 8), (10, 0, 8)), replace(WIDE, max_num_seqs=1), 16),
        (rows((10, 0, 8), (10, 0, 4), (10, 0, 4)), replace(WIDE, max_num_seqs=2), 8),
        (rows((250, 0, 1)), replace(WIDE, max_num_batched_tokens=100), 3),
        (rows((60, 0, 1), (60, 0, 1)), replace(WIDE, max_num_batched_tokens=100), 2),
        (rows((60, 0, 4), (60, 0, 4)), replace(WIDE, num_pages=2, page_size=64), 4),
        (rows((60, 0, 4), (60, 0, 4)), replace(WIDE, num_pages=1, page_size=64), 8),
        (rows((100, 0, 1), (100, 50, 1)), WIDE, 2),
        (rows((100, 0, 1), (100, 10, 1)), WIDE, 1),
        (rows((10, 0, 5), (10, 0, 5), starts=(0, 1)), replace(WIDE, slices_in_flight=1), 10),
        (rows((10, 0, 5), (10, 0, 5), starts=(0, 1)), replace(WIDE, slices_in_flight=2), 5),
    ],
)
def test_the_simulation_takes_the_steps_that_can_be_counted_by_hand(what, engine, num_steps):
    simulation = simulate(what, engine, PER_STEP)
    assert simulation.num_steps == num_steps
    assert simulation.seconds == pytest.approx(num_steps)


def test_every_token_is_computed_once_and_shared_beginnings_are_not():
    what = rows((100, 0, 10), (100, 80, 20), (100, 99, 5), (40, 0, 1))
    simulation = simulate(what, WIDE, PER_TOKEN)
    assert simulation.cached_tokens == 80 + 99
    assert simulation.prefill_s == pytest.approx(100 + 20 + 1 + 40)
    assert simulation.decode_s == pytest.approx(9 + 19 + 4 + 0)


def test_steps_that_are_added_up_take_as_long_as_one_by_one():
    """Reading costs too, and grows from step to step: 1 + (11 + 12 + ... + 19) tokens of context."""
    times = StepTimes((1, 2), (1e-9, 1e-9), per_read_s=1.0)
    assert simulate(rows((10, 0, 10)), WIDE, times).seconds == pytest.approx(10 + sum(range(11, 20)))


def test_accepted_drafts_save_steps_and_cost_tokens():
    plain = simulate(rows((10, 0, 31)), WIDE, PER_STEP)
    drafted = simulate(rows((10, 0, 31)), WIDE, PER_STEP, Drafting(drafted=4, tokens_per_step=3))
    assert (plain.num_steps, drafted.num_steps) == (31, 11)
    assert simulate(rows((10, 0, 31)), WIDE, PER_TOKEN, Drafting(4, 3)).decode_s == pytest.approx(10 * 5)


def test_drafts_are_taken_only_where_they_pay():
    """A token costs nothing up to 64 of them, and then as much as a step: drafts pay for one row and not for 64."""
    times = StepTimes((1, 64, 65, 640), (1.0, 1.0, 2.0, 20.0))
    drafting = Drafting(drafted=9, tokens_per_step=4, must_pay=True)
    assert simulate(rows((10, 0, 41)), WIDE, times, drafting).num_steps == 11
    many = rows(*[(1, 0, 41)] * 64)
    assert simulate(many, WIDE, times, drafting).num_steps == 41
    assert simulate(many, WIDE, times, replace(drafting, must_pay=False)).num_steps == 11


def test_context_shared_by_neighbours_is_read_once():
    times = StepTimes((1, 2), (1e-9, 1e-9), per_read_s=1.0)
    what = rows((129, 0, 2), (129, 128, 2))
    apart = simulate(what, replace(WIDE, has_prefix_groups=False), times).seconds
    assert apart - simulate(what, WIDE, times).seconds == pytest.approx(128)


def test_the_steps_are_those_of_the_real_scheduler():
    """Random rows through `actors.scheduler`, with pages enough for no preemption."""
    rng = np.random.default_rng(7)
    prompts: list[list[int]] = []
    for group in range(12):
        head = rng.integers(0, 50, rng.integers(5, 90)).tolist()
        prompts += sorted([group, *head, *rng.integers(0, 50, rng.integers(2, 40)).tolist()] for _ in range(6))
    outputs = rng.integers(1, 30, len(prompts))
    shared = [0] + [
        next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), min(len(x), len(y)))
        for x, y in itertools.pairwise(prompts)
    ]
    engine = EngineShape(16, 256, page_size=8, num_pages=4096, slices_in_flight=1)
    what = RowNumbers(np.array([len(p) for p in prompts]), np.array(shared), outputs)
    simulation = simulate(what, engine, PER_TOKEN)

    scheduler = Scheduler(4096, 8, 16, 256)
    for number, (prompt, output) in enumerate(zip(prompts, outputs)):
        request = Request(str(number), prompt, SamplingParams(max_tokens=int(output)))
        scheduler.add(Sequence(request, 0, 1000))
    num_steps = num_tokens = num_cached = 0
    while scheduler.waiting or scheduler.running:
        plan = scheduler.plan_step()
        num_steps, num_tokens = num_steps + 1, num_tokens + sum(plan.num_tokens)
        wanting = plan.wanting
        scheduler.commit(plan)
        for sequence in wanting:
            sequence.append(1000 + num_steps, 0.0)
            if sequence.num_generated == sequence.request.sampling.max_tokens:
                num_cached += sequence.num_cached
                scheduler.finish(sequence)
    assert simulation.cached_tokens == pytest.approx(num_cached, rel=0.02)
    assert simulation.seconds == pytest.approx(num_tokens, rel=0.02)
    assert simulation.num_steps == pytest.approx(num_steps, rel=0.03)


DOCUMENT_TOKENS, QUESTION_TOKENS = 60, 12


def documents(num_documents: int, num_questions: int, seed: int = 0) -> list[str]:
    """Questions at the end of documents, scattered."""
    rng = np.random.default_rng(seed)

    def text(length: int) -> str:
        return "".join(chr(code) for code in rng.integers(97, 123, length))

    texts = [text(DOCUMENT_TOKENS) for _ in range(num_documents)]
    prompts = [f"{document}{text(QUESTION_TOKENS)}" for document in texts for _ in range(num_questions)]
    return [prompts[i] for i in rng.permutation(len(prompts))]


@pytest.fixture
def sampled(write_job, small_model):
    """Samples the corpus that lies in `in`."""

    def sample(num_rows: int, **sections) -> tuple[CorpusSample, list]:
        job = load_job(str(write_job(**sections))).resolve()
        shards = list_shards(job).good
        return sample_corpus(job, load_tokenizer(str(small_model)), shards, num_rows, 3), [
            plan_shard(job, shard, load_tokenizer(str(small_model))) for shard in shards
        ]

    return sample


def test_a_small_corpus_is_counted_as_a_run_plans_it(write_corpus, sampled):
    write_corpus({"a": [*documents(5, 4), None, "", "again", "again", "again"], "b": ["again", "x" * 600]})
    sample, plans = sampled(1000)
    totals = totals_of(sample)
    assert sample.is_whole
    assert totals.prompt == sum(p.prompt_tokens for p in plans) + 2 * len("again")
    assert totals.duplicates == sum(p.num_duplicate_rows for p in plans) == 2
    hits = sum(p.achievable_prefix_tokens for p in plans)
    assert totals.distinct_prompt - totals.computed == pytest.approx(hits)
    errors: Counter[str] = sum((shard.errors for shard in sample.shards), Counter())
    assert errors == {"null_prompt": 1, "empty_prompt": 1, "prompt_too_long": 1}
    slices = {plan.shard.name: plan.num_slices for plan in plans}
    assert {s.name: len(s.slice_starts) for s in sample.shards}.keys() == slices.keys()


def test_whole_shards_are_sampled_where_they_fit(write_corpus, sampled):
    write_corpus({f"s{i:02}": documents(5, 4, seed=i) for i in range(20)})
    sample, plans = sampled(120)
    assert len(sample.shards) == 6 and all(shard.is_whole for shard in sample.shards)
    totals = totals_of(sample)
    assert totals.computed == pytest.approx(
        sum(plan.prompt_tokens - plan.achievable_prefix_tokens for plan in plans), rel=0.05
    )


@pytest.mark.parametrize(("num_documents", "num_questions"), [(2000, 1), (400, 5), (100, 20), (2, 1000)])
def test_prefixes_that_a_sample_only_hints_at_are_estimated(num_documents, num_questions, write_corpus, sampled):
    """A tenth of one large shard: its own rows share far less than all rows do."""
    folder = write_corpus({})
    prompts = documents(num_documents, num_questions)
    pq.write_table(pa.table({"prompt": prompts}), folder / "a.parquet", row_group_size=100)
    sample, (plan,) = sampled(len(prompts) // 10)
    assert not sample.is_whole
    truth = plan.prompt_tokens - plan.achievable_prefix_tokens
    assert totals_of(sample).computed == pytest.approx(truth, rel=0.15)


def test_duplicates_of_a_large_shard_are_estimated(write_corpus, sampled):
    words = [f"word {i}" for i in range(500)] * 4
    write_corpus({"a": [words[i] for i in np.random.default_rng(1).permutation(len(words))]})
    sample, (plan,) = sampled(400)
    assert plan.num_duplicate_rows == 1500
    assert totals_of(sample).duplicates == pytest.approx(1500, rel=0.1)


def test_the_same_seed_gives_the_same_sample(write_corpus, sampled):
    write_corpus({"a": documents(200, 2)})
    first, second = sampled(50)[0], sampled(50)[0]
    assert first.shards[0].prompt_N.tolist() == second.shards[0].prompt_N.tolist()


# --- the estimate -------------------------------------------------------------------------------------------------


def shard(name: str, num_rows: int, num_read: int, prompts: np.ndarray) -> ShardSample:
    prompt_N = np.sort(prompts)[:num_read].astype(np.int64) if num_read == num_rows else prompts[:num_read]
    return ShardSample(
        name=name,
        num_rows=num_rows,
        num_read=num_read,
        errors=Counter(),
        prompt_tokens=int(prompt_N.sum()),
        num_duplicates=0,
        expected_duplicates=0.0,
        prompt_N=prompt_N,
        shared_N=np.zeros(num_read, np.int64),
        max_output_N=np.full(num_read, 512),
        num_samples_N=np.ones(num_read, np.int64),
        share_drawn=0.0,
        slice_starts=list(range(0, num_read, 64)),
        computed_share=1.0,
    )


@pytest.fixture
def known(write_corpus, write_job):
    """A job of engines with at most 32 rows, and the profile of a device of known step times."""
    write_corpus({"a": ["x"]})
    job = load_job(str(write_job(engine={"max_num_seqs": 32, "max_num_batched_tokens": 512}))).resolve()
    times = StepTimes((1, 64, 512), (0.01, 0.02, 0.1), per_request_s=1e-4, per_read_s=1e-7)
    return job, DeviceProfile.of_worker(job, "cpu", times, 10_000, 3.0)


def answered(lengths: np.ndarray, busy_s: float | None = None) -> Experience:
    prompt_N = np.full(len(lengths), 50)
    return Experience("a test", len(lengths), lengths, RowNumbers(prompt_N, np.zeros_like(prompt_N), lengths), busy_s)


PRICE = Price(3600.0, "a dollar a second")


def test_the_interval_holds_the_truth_as_often_as_it_says(known):
    """Corpora of known rows and answers on a machine that takes exactly its step times, 40 times."""
    job, profile = known
    times = replace(profile.times, fit_error=0.0)
    profile = replace(profile, times=times)
    num_rows, held = 3000, 0
    errors: list[float] = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        prompts = rng.lognormal(4.5, 0.6, num_rows).astype(np.int64) + 1
        outputs = rng.geometric(1 / 40, num_rows)
        engine = EngineShape(32, 512, page_size=16, num_pages=256)
        starts = list(range(0, num_rows, 64))
        truth = simulate(RowNumbers(prompts, np.zeros_like(prompts), outputs, starts), engine, times).seconds
        pilot = rng.geometric(1 / 40, 64)
        experience = answered(pilot)
        pilot_s = simulate(experience.rows, replace(engine, slices_in_flight=1), times).seconds
        sample = CorpusSample(1, num_rows, [shard("a", num_rows, 500, rng.permutation(prompts))], [])
        found = estimate(job, sample, 1, replace(experience, busy_s=pilot_s), None, profile, PRICE, [], seed)
        assert found.busy_s is not None and found.cost_usd is not None
        held += bool(found.busy_s.holds(truth))
        errors.append(abs(found.busy_s.value / truth - 1))
    assert held >= 36
    assert np.median(errors) < 0.1


def test_rows_beyond_those_simulated_take_the_pace_of_a_full_engine(known):
    job, profile = known
    rng = np.random.default_rng(2)
    prompts, outputs = rng.integers(20, 200, 40_000), rng.integers(1, 60, 40_000)
    engine = EngineShape(32, 512, page_size=16, num_pages=256)
    truth = simulate(
        RowNumbers(prompts, np.zeros_like(prompts), outputs, list(range(0, 40_000, 64))), engine, profile.times
    ).seconds
    sample = CorpusSample(1, 40_000, [shard("a", 40_000, 2000, prompts)], [])
    experience = answered(outputs[:2000])
    busy_s = simulate(experience.rows, replace(engine, slices_in_flight=1), profile.times).seconds
    found = estimate(job, sample, 1, replace(experience, busy_s=busy_s), None, profile, PRICE, [])
    assert found.busy_s is not None
    assert found.busy_s.value == pytest.approx(truth, rel=0.04)


def test_prompts_and_decodes_are_slower_each_by_its_own_factor(known):
    """The pilot's prompts took three times as long as simulated and its decodes twice; the corpus writes far less."""
    job, profile = known
    sample = CorpusSample(1, 500, [shard("a", 500, 500, np.full(500, 400))], [])
    experience = answered(np.full(64, 20))
    engine = EngineShape(32, 512, page_size=16, num_pages=256, slices_in_flight=1)
    pilot = simulate(experience.rows, engine, profile.times)
    taken = replace(experience, busy_s=3 * pilot.prefill_s + 2 * pilot.decode_s, prefill_s=3 * pilot.prefill_s)
    found = estimate(job, sample, 1, taken, 2, profile, PRICE, [])
    exact = estimate(job, sample, 1, replace(experience, busy_s=pilot.seconds), 2, profile, PRICE, [])
    assert found.busy_s and exact.busy_s and exact.prefill_share
    expected = exact.busy_s.value * (3 * exact.prefill_share + 2 * (1 - exact.prefill_share))
    assert found.busy_s.value == pytest.approx(expected)


def test_what_rows_take_beside_the_engine_is_added_once_a_row(known):
    """A run of few rows and one of many are off by the same time per row, not by the same factor."""
    job, profile = known
    sample = CorpusSample(1, 500, [shard("a", 500, 500, np.full(500, 400))], [])
    pilot = answered(np.full(64, 20), busy_s=1.0)
    alone = estimate(job, sample, 1, pilot, 2, profile, PRICE, [])
    beside = estimate(job, sample, 1, replace(pilot, row_s=0.01), 2, profile, PRICE, [])
    assert alone.busy_s and beside.busy_s and beside.busy_s.low and alone.busy_s.low
    assert beside.busy_s.value == pytest.approx(alone.busy_s.value + 5)
    assert beside.busy_s.low > alone.busy_s.low + 3
    assert replace(pilot, row_s=0.01).without_times().row_s == 0


def test_cost_is_the_price_of_all_the_time_that_actors_are_held(known):
    job, profile = known
    sample = CorpusSample(1, 500, [shard("a", 500, 500, np.full(500, 40))], [])
    found = estimate(job, sample, 4, None, 16, profile, PRICE, [])
    assert found.busy_s and found.device_s and found.cost_usd and found.wall_s and found.load_s and found.idle_s
    assert found.load_s == 3.0
    held_s = found.busy_s.value + 4 * (found.load_s + found.idle_s)
    assert found.device_s.value == pytest.approx(held_s)
    assert found.cost_usd.value == pytest.approx(held_s)
    assert found.wall_s.value == pytest.approx(found.busy_s.value / 4 + found.load_s + found.idle_s)
    (four,) = [pool for pool in found.pools if pool.num_actors == 4]
    assert four.cost_usd == pytest.approx(found.cost_usd.value)


def test_what_is_not_known_is_said_and_not_guessed(known):
    job, profile = known
    sample = CorpusSample(1, 500, [shard("a", 500, 500, np.full(500, 40))], [])
    notes: list[str] = []
    nothing = estimate(job, sample, 1, None, None, profile, PRICE, notes)
    assert nothing.completion_tokens is None and nothing.cost_usd is None
    assert any("how long answers are is not known" in note for note in notes)
    tokens_only = estimate(job, sample, 1, None, 16, None, None, notes := [])
    assert tokens_only.completion_tokens is not None and tokens_only.completion_tokens.value == 500 * 16
    assert tokens_only.busy_s is None and any("tokens only" in note for note in notes)
    few = estimate(job, sample, 1, answered(np.array([3, 9])), None, profile, PRICE, notes := [])
    assert few.cost_usd is not None and few.cost_usd.low is None
    assert any("too few for an interval" in note for note in notes)
    tiny = CorpusSample(1, 500, [shard("a", 500, 10, np.full(500, 40))], [])
    wide = estimate(job, tiny, 1, None, 16, profile, PRICE, notes := [])
    assert wide.prompt_tokens.low is None
    assert any("too small a sample for an interval" in note for note in notes)


def test_rows_that_may_write_little_are_not_expected_to_write_much(known):
    job, profile = known
    small = replace(shard("a", 100, 100, np.full(100, 40)), max_output_N=np.repeat([4, 512], 50))
    found = estimate(job, CorpusSample(1, 100, [small], []), 1, None, 16, profile, PRICE, [])
    assert found.completion_tokens is not None and found.completion_tokens.value == 50 * 4 + 50 * 16


# --- profiles -----------------------------------------------------------------------------------------------------


def test_a_profile_is_found_again_by_jobs_that_run_the_same_steps(known, tmp_path):
    job, profile = known
    output = Storage(str(tmp_path / "out"))
    keep_profile(output, profile)
    found = find_profile(job, output)
    assert found is not None and replace(found, source="") == profile
    other = job.model_copy(update={"engine": EngineConfig(model=job.model, kv_cache_dtype="int8", page_size=16)})
    assert find_profile(other, output) is None
    assert any("kv_cache_dtype" in line for line in found.mismatches(other))


@pytest.mark.parametrize(
    ("text", "said"),
    [("{}", "holds no step times"), ("nonsense", "holds no step times"), (json.dumps({"version": 0}), "of version 0")],
)
def test_a_file_that_holds_no_step_times_is_refused(text, said, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(JobError, match=said):
        read_profile(str(path))
    with pytest.raises(JobError, match="cannot be read"):
        read_profile(str(tmp_path / "none.json"))
