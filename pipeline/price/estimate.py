"""What a run would take, before it: tokens, time and cost, each with an interval. Numbers in, numbers out.

Rows, prompts and shared prefixes are those of `corpus_sample`; answers are as long as `experience` has seen; time is
`engine_simulation` over the sampled rows, times the factor by which an engine really took longer than its simulation.
The interval: sampled shards, rows and answers are drawn again many times, and the time of each draw is scaled by what
prefill and decode are of the whole, and by the error of the model. Called by `jobs.plan`; knows no files.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from actors.engine import MAX_NUM_BATCHED_TOKENS
from pipeline.bill.pricing import Price
from pipeline.job import Job
from pipeline.price.corpus_sample import CorpusSample, ShardSample
from pipeline.price.corpus_totals import Totals, draw_totals, totals_of
from pipeline.price.device_profile import DeviceProfile
from pipeline.price.engine_simulation import NO_DRAFTS, EngineShape, RowNumbers, Simulation, simulate
from pipeline.price.experience import Experience, with_samples
from pipeline.price.plan_file import Estimate, Figure, Pool

MAX_SIMULATED_ROWS = 4096
"""Rows of one actor that are simulated; what comes after takes as long as these took while the engine was full."""

MIN_SIMULATED_BATCHES = 8
"""At least so many times `max_num_seqs`, so that filling and draining the engine are little of it."""

NUM_DRAWS = 500
INTERVAL = 0.95

MIN_ANSWERS, MIN_ROWS = 8, 30
"""Fewer of these in a sample, and there is no interval."""

MODEL_ERROR = 0.1
"""Relative standard error of a time that was calibrated on answered rows: 0.09 in the twenty runs of
`experience.BESIDE_ROW_S`, 0.07 over engines without Ray (seven jobs, one thread, CPU time)."""

MODEL_ERROR_UNCALIBRATED = 0.2

SLOWER_THAN_STEPS = 1.25
"""What an engine takes over the steps of its model, where no rows were answered to tell: planning steps, text, Ray."""

MIN_PART = 0.1
"""Prompts and decodes are judged apart if each is at least so much of the answered rows' time."""

IDLE_S = 1.6
"""Seconds that an actor is held besides loading and computing: imports, waiting for the first slice, the last files.
Twenty runs of one actor on two cores with little else to do: 1.6 to 1.85, and once 2.0 and 2.9."""

IDLE_ERROR = 0.2
"""Relative standard error of IDLE_S, and of what loading takes: that of the same runs was 16 % and 9 %."""

Floats = NDArray[np.float64]


def estimate(
    job: Job,
    sample: CorpusSample,
    num_actors: int,
    experience: Experience | None,
    output_tokens: int | None,
    profile: DeviceProfile | None,
    price: Price | None,
    notes: list[str],
    seed: int = 0,
    waiting_s: float = 0.0,
) -> Estimate:
    """Put together what is known; what is not known is None, and a note is added that says so.

    output_tokens: of every answer, instead of what experience says. price: of the profile's device. waiting_s: of each
    actor, for the plan of the corpus.
    """
    rng = np.random.default_rng(seed)
    totals, draws = totals_of(sample), draw_totals(sample, NUM_DRAWS, rng)
    is_large_enough = sample.is_whole or sample.num_read >= MIN_ROWS
    if not is_large_enough:
        notes.append(f"{sample.num_read} rows are too small a sample for an interval: read {MIN_ROWS} or more")
    tokens = _describe_corpus(sample, totals, draws if is_large_enough else None, notes)
    answers = _answer_lengths(experience, output_tokens)
    if answers is None:
        notes.append("how long answers are is not known, and so no time: run a pilot, or give --output-tokens")
        return tokens
    has_interval = is_large_enough and (output_tokens is not None or len(answers) >= MIN_ANSWERS)
    if is_large_enough and not has_interval:
        notes.append(f"{len(answers)} answers are too few for an interval: raise --pilot-rows to {MIN_ANSWERS} or more")
    answered = _Answered(sample, totals, draws, answers, _draw_mean_ratios(answers, totals.completions, rng))
    expected = totals.completions * _over(totals.good_rows, totals.distinct_rows) * _mean_output(sample, answers)
    tokens = replace(tokens, completion_tokens=_figure(expected, expected * answered.output_ratios, has_interval))
    if profile is None:
        notes.append("no step times of the pool's device are known, so these are tokens only: see --step-times")
        return tokens
    usd_per_s = price.cost_usd(1.0) if price else 0.0
    return _add_times(job, tokens, answered, num_actors, experience, profile, usd_per_s, has_interval, rng, waiting_s)


@dataclass(frozen=True, slots=True)
class _Answered:
    """A corpus with its answers: their lengths as far as seen, and per draw the mean of all over that of those seen."""

    sample: CorpusSample
    totals: Totals
    draws: Totals
    lengths: Floats
    output_ratios: Floats


def _add_times(
    job: Job,
    tokens: Estimate,
    corpus: _Answered,
    num_actors: int,
    experience: Experience | None,
    profile: DeviceProfile,
    usd_per_s: float,
    has_interval: bool,
    rng: np.random.Generator,
    waiting_s: float,
) -> Estimate:
    """Busy time is simulated for one actor; each draw scales its prompts and its decodes apart."""
    totals, draws, sample = corpus.totals, corpus.draws, corpus.sample
    engine = engine_shape(job, profile)
    share_drawn = _over(sum(s.share_drawn * s.num_read for s in sample.shards), sample.num_read)
    slower = _slower_than_steps(experience, engine, profile, share_drawn, tokens.notes)
    rows = rows_of_actor(job, sample, totals, num_actors, corpus.lengths, engine, rng)
    drafting = experience.drafting if experience else NO_DRAFTS
    simulation = simulate(rows, engine, profile.times, drafting, share_drawn=share_drawn)
    prefill_s, decode_s = slower.prompts * simulation.prefill_s, slower.decodes * simulation.decode_s
    factor, prefill_share = _over(prefill_s + decode_s, simulation.seconds), _over(prefill_s, prefill_s + decode_s)
    engine_s = factor * num_actors * _extrapolate(simulation, len(rows), totals.completions / num_actors)
    beside_s = experience.row_s * sample.num_rows if experience else 0.0
    prompts = prefill_share * draws.computed / max(1e-9, totals.computed)
    decodes = (1 - prefill_share) * draws.completions / max(1e-9, totals.completions) * corpus.output_ratios
    off = rng.lognormal(0, math.hypot(slower.error, profile.times.fit_error), NUM_DRAWS)
    busy_s, busy = engine_s + beside_s, (engine_s * (prompts + decodes) + beside_s) * off
    load_s = profile.load_s if experience is None or experience.load_s is None else experience.load_s
    # What earlier runs of the output were idle, they were waiting for their plan too.
    idle_s = IDLE_S + waiting_s if experience is None or experience.idle_s is None else experience.idle_s
    overhead_s = load_s + idle_s
    overhead = overhead_s * rng.lognormal(0, IDLE_ERROR, NUM_DRAWS)
    device_s, device = busy_s + num_actors * overhead_s, busy + num_actors * overhead
    return replace(
        tokens,
        achieved_hit_rate=_over(simulation.cached_tokens, float(rows.prompt_N.sum())),
        busy_s=_figure(busy_s, busy, has_interval),
        device_s=_figure(device_s, device, has_interval),
        wall_s=_figure(busy_s / num_actors + overhead_s, busy / num_actors + overhead, has_interval),
        cost_usd=_figure(device_s * usd_per_s, device * usd_per_s, has_interval),
        prefill_share=prefill_share,
        load_s=load_s,
        idle_s=idle_s,
        slower_than_steps=factor,
        pools=[
            Pool(n, busy_s / n + overhead_s, (busy_s + n * overhead_s) * usd_per_s)
            for n in sorted({1, 2, 4, 8, 16, 32, num_actors})
        ],
    )


def engine_shape(job: Job, profile: DeviceProfile, slices_in_flight: int | None = None) -> EngineShape:
    """The engine that a job has on a device."""
    config = job.engine
    return EngineShape(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens
        or profile.times.best_num_batched_tokens(MAX_NUM_BATCHED_TOKENS),
        page_size=config.page_size,
        num_pages=config.num_pages or profile.num_pages,
        slices_in_flight=slices_in_flight or job.pool.max_slices_in_flight,
        has_prefix_groups=config.enable_prefix_groups,
    )


def _describe_corpus(sample: CorpusSample, totals: Totals, draws: Totals | None, notes: list[str]) -> Estimate:
    kinds: Counter[str] = sum((shard.errors for shard in sample.shards), Counter())
    num_errors = sum(kinds.values())

    def figure(name: str) -> Figure:
        value = float(getattr(totals, name))
        if sample.is_whole:
            return Figure(value, value, value)
        return Figure(value) if draws is None else _figure(value, getattr(draws, name))

    return Estimate(
        num_rows=sample.num_rows,
        num_error_rows=figure("errors"),
        errors={kind: float(totals.errors) * count / num_errors for kind, count in sorted(kinds.items())},
        num_duplicates=figure("duplicates"),
        prompt_tokens=figure("prompt"),
        computed_prompt_tokens=figure("computed"),
        achievable_hit_rate=1 - totals.computed / totals.distinct_prompt if totals.distinct_prompt else None,
        notes=notes,
    )


def _answer_lengths(experience: Experience | None, output_tokens: int | None) -> Floats | None:
    if output_tokens is not None:
        return np.array([float(output_tokens)])
    if experience is None or len(experience.lengths_N) == 0:
        return None
    return experience.lengths_N.astype(np.float64)


def _mean_output(sample: CorpusSample, answers: Floats) -> float:
    """Of an answer in the corpus, as rows may not be able to write as many."""
    caps = np.concatenate([shard.max_output_N for shard in sample.shards]) if sample.shards else np.zeros(0)
    if len(caps) == 0:
        return 0.0
    limits, counts = np.unique(caps, return_counts=True)
    means = np.array([np.minimum(answers, limit).mean() for limit in limits])
    return float((means * counts).sum() / counts.sum())


def _draw_mean_ratios(answers: Floats, num_completions: float, rng: np.random.Generator) -> Floats:
    """The mean of all answers over the mean of those seen: which ones were seen, and chance in those to come."""
    if len(answers) == 1:
        return np.ones(NUM_DRAWS)
    seen = rng.choice(answers, (NUM_DRAWS, min(len(answers), 1000))).mean(axis=1)
    seen = answers.mean() + (seen - answers.mean()) * math.sqrt(min(len(answers), 1000) / len(answers))
    to_come = answers.std() / math.sqrt(max(1.0, num_completions)) * rng.standard_normal(NUM_DRAWS)
    return np.maximum(1e-3, (seen + to_come) / answers.mean())


def rows_of_actor(
    job: Job,
    sample: CorpusSample,
    totals: Totals,
    num_actors: int,
    answers: Floats,
    engine: EngineShape,
    rng: np.random.Generator,
) -> RowNumbers:
    """The rows that one of the actors would get, slice by slice; of many, the first of them. A sample that is shorter
    is repeated."""
    slices = [(shard, start, end) for shard in sample.shards for start, end in _bounds(shard)][
        :: num_actors if sample.is_whole else 1
    ]
    wanted = totals.distinct_rows / num_actors
    limit = max(MAX_SIMULATED_ROWS, MIN_SIMULATED_BATCHES * engine.max_num_seqs)
    parts: list[RowNumbers] = []
    num_samples: list[NDArray[np.int64]] = []
    num_rows, starts = 0, []
    last: tuple[str, int] = ("", 0)
    for shard, start, end in itertools.cycle(slices) if not sample.is_whole else slices:
        if num_rows >= min(wanted, limit):
            break
        all_shared = shard.expected_shared if job.engine.enable_prefix_caching else np.zeros_like(shard.prompt_N)
        shared_N = all_shared[start:end].copy()
        # With the actor's own row before, which is not the plan's where another actor had the slice between.
        shared_N[0] = all_shared[last[1] : start + 1].min() if last[0] == shard.name and last[1] <= start else 0
        last = shard.name, end
        caps = shard.max_output_N[start:end]
        parts.append(RowNumbers(shard.prompt_N[start:end], shared_N, caps))
        num_samples.append(shard.num_samples_N[start:end])
        starts.append(num_rows)
        num_rows += end - start
    if not parts:
        return RowNumbers(*(np.zeros(0, np.int64),) * 3)
    shared_N = np.concatenate([part.shared_N for part in parts])
    rows = RowNumbers(
        np.concatenate([part.prompt_N for part in parts]),
        shared_N,
        np.concatenate([part.output_N for part in parts]),
        starts,
    )
    rows = with_samples(rows, np.concatenate(num_samples))
    # Every length as often as it was seen, in no order: fewer accidents than by drawing.
    places = (rng.permutation(len(rows)) + 0.5) / len(rows)
    lengths = np.quantile(answers, places, method="inverted_cdf")
    return replace(rows, output_N=np.maximum(1, np.minimum(lengths, rows.output_N)).astype(np.int64))


def _bounds(shard: ShardSample) -> list[tuple[int, int]]:
    ends = [*shard.slice_starts[1:], len(shard.prompt_N)]
    return [(start, end) for start, end in zip(shard.slice_starts, ends) if end > start]


@dataclass(frozen=True, slots=True)
class _Slower:
    """By what factor prompts and decodes really take longer than simulated, and the relative error of it."""

    prompts: float
    decodes: float
    error: float


def _slower_than_steps(
    experience: Experience | None, engine: EngineShape, profile: DeviceProfile, share_drawn: float, notes: list[str]
) -> _Slower:
    if experience is None or not experience.busy_s or len(experience.rows) == 0:
        notes.append("no answered rows tell how far these step times hold, so the interval is wide")
        return _Slower(SLOWER_THAN_STEPS, SLOWER_THAN_STEPS, MODEL_ERROR_UNCALIBRATED)
    shape = replace(engine, slices_in_flight=experience.slices_in_flight or engine.slices_in_flight)
    simulated = simulate(experience.rows, shape, profile.times, experience.drafting, share_drawn=share_drawn)
    whole = experience.busy_s / simulated.seconds
    if min(simulated.prefill_s, simulated.decode_s) < MIN_PART * simulated.seconds or not experience.prefill_s:
        return _Slower(whole, whole, MODEL_ERROR)
    decode_s = experience.busy_s - experience.prefill_s
    return _Slower(experience.prefill_s / simulated.prefill_s, decode_s / simulated.decode_s, MODEL_ERROR)


def _extrapolate(simulation: Simulation, num_simulated: int, num_rows: float) -> float:
    """Seconds for `num_rows` of which the first were simulated."""
    if num_simulated == 0:
        return 0.0
    if num_rows <= num_simulated:
        return simulation.seconds * num_rows / num_simulated
    pace = simulation.steady_s / max(1e-9, simulation.steady_share)
    return simulation.seconds + pace * (num_rows - num_simulated) / num_simulated


def _figure(value: float, drawn: Floats, has_interval: bool = True) -> Figure:
    if not has_interval:
        return Figure(float(value))
    tail = 100 * (1 - INTERVAL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Figure(float(value), min(float(low), float(value)), max(float(high), float(value)))


def _over(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
