"""Step times: fitted to machines whose true cost is known, and measured on a real engine."""

import json
import logging
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from actors import step_measurement
from actors.config import EngineConfig
from actors.engine import Engine
from actors.requests import SamplingParams
from actors.step_measurement import (
    Limits,
    RunnerTimer,
    StepShape,
    cache_folder,
    load_or_measure_step_times,
    measure_step_times,
    shapes_to_measure,
)
from actors.step_times import MeasuredStep, StepTimes, StepTimesTracker, fit_step_times
from actors.weights.checkpoint import open_checkpoint

LIMITS = Limits(num_pages=8192, page_size=64, max_num_seqs=256, max_num_batched_tokens=4096, max_model_len=2048)
FIGURES = ("num_tokens", "num_requests", "num_logit_rows", "num_read", "num_drawn", "num_chunks")
TIMES = StepTimes((1, 4, 5, 64), (0.002, 0.003, 0.006, 0.01), 1e-5, 3e-5, 2e-5, 4e-5, 1e-7, 1e-8, 5e-5, 0.0, 0.03)


class Machine:
    """A machine of known speed. Some of its steps are held up."""

    def __init__(self, scale=1.0, held_up=0.0):
        self.scale, self.held_up = scale, held_up
        self.rng = random.Random(1)
        self.worked_s = 0.0
        self.shapes = []

    def seconds(self, shape):
        """Packed int4 up to 4 tokens, a dense copy above, then arithmetic; drafts take a call each."""
        step = shape.measured(0.0)
        dense = 0.002 if step.num_tokens <= 4 else 0.0032
        linear = dense + 2e-5 * max(0, step.num_tokens - 64) + 4e-6 * step.num_tokens
        rows = 3e-5 * step.num_logit_rows + 6e-5 * step.num_drawn
        attention = (
            2e-7 * step.num_read + 1e-5 * step.num_requests + 5e-5 * min(step.num_requests, 4) + 4e-5 * step.num_chunks
        )
        return self.scale * (linear + rows + attention + 0.003 * step.is_first)

    def __call__(self, shape):
        self.shapes.append(shape)
        seconds = self.seconds(shape) * (3 if self.rng.random() < self.held_up else 1)
        self.worked_s += seconds
        return seconds

    def measure(self, limits=LIMITS, budget_s=3.0):
        return measure_step_times(self, limits, budget_s)


def predict(times, shape):
    step = shape.measured(0.0)
    return times.seconds(*(getattr(step, figure) for figure in FIGURES))


def shapes_off_the_grid(count):
    rng = random.Random(3)
    for _ in range(count):
        num_drafts = rng.choice([0, 0, 1, 2, 5, 9])
        yield StepShape(rng.randint(1, 90), 1, rng.randint(10, 900), num_drafts, is_drawn=rng.random() < 0.3)
        yield StepShape(rng.randint(1, 5), rng.randint(20, 300), is_first=True)


@pytest.mark.parametrize(("held_up", "error"), [(0.0, 0.02), (0.2, 0.15)])
def test_the_fit_recovers_what_a_machine_takes_though_some_steps_are_held_up(held_up, error):
    machine = Machine(held_up=held_up)
    times = machine.measure()
    for shape in shapes_off_the_grid(100):
        assert predict(times, shape) == pytest.approx(machine.seconds(shape), rel=error), shape
    assert times.per_drawn_s == pytest.approx(6e-5, rel=0.1)
    assert times.per_chunk_s == pytest.approx(4e-5, rel=0.1)


def test_the_step_where_another_product_begins_is_kept():
    times = Machine().measure()
    at = times.seconds(np.arange(1, 9), 1, 8, 100, num_chunks=0)
    assert at[4] - at[3] > 1e-3
    assert max(at[3] - at[0], at[7] - at[4]) < 1e-4


def test_decodes_drafts_and_prompts_of_as_many_tokens_differ():
    machine = Machine()
    times = machine.measure()
    decodes, drafts, prompt = StepShape(64, 1, 500), StepShape(16, 1, 500, 3), StepShape(1, 64, 0)
    assert predict(times, decodes) > predict(times, drafts)
    first = StepShape(1, 64, 0, is_first=True)
    assert predict(times, first) - 0.003 == pytest.approx(machine.seconds(prompt), rel=0.05)
    # Not told how many sequences have drafts, it supposes as many as there can be.
    step = drafts.measured(0.0)
    untold = times.seconds(step.num_tokens, step.num_requests, step.num_logit_rows, step.num_read)
    assert untold == pytest.approx(predict(times, drafts))


def test_seconds_never_fall_with_more_tokens_rows_or_reads():
    rng = random.Random(2)
    steps = [shape.measured(rng.uniform(0.001, 0.1)) for shape in shapes_off_the_grid(60)]
    times = fit_step_times(steps)  # nothing but noise
    assert min(times.curve_s) > 0
    assert np.all(np.diff(times.seconds(np.arange(1, 9000), 1, 1, 1000)) >= 0)
    assert np.all(np.diff(times.seconds(100, 1, np.arange(100), 1000)) >= 0)
    assert np.all(np.diff(times.seconds(100, 1, 1, np.arange(0, 9000, 100))) >= 0)


def test_arrays_give_what_numbers_give():
    tokens = np.array([1, 3, 4, 5, 60, 64, 65, 300])
    requests, rows, read = np.array([1, 1, 2, 5, 7, 64, 65, 2]), tokens, tokens * 50
    expected = [float(TIMES.seconds(*map(int, step), 3)) for step in zip(tokens, requests, rows, read)]
    assert TIMES.seconds(tokens, requests, rows, read, 3).tolist() == pytest.approx(expected, rel=1e-12)
    assert TIMES.seconds(tokens, 1, tokens, 500).shape == tokens.shape
    grid = TIMES.seconds(tokens[:, None], np.arange(1, 4), 1, 500)
    assert grid.shape == (8, 3)
    assert grid[4, 2] == pytest.approx(TIMES.seconds(60, 3, 1, 500))


def test_each_term_is_counted_once():
    base = TIMES.seconds(4, 4, 4, 400)
    assert base == pytest.approx(0.003 + 4 * 1e-5 + 4 * 2e-5 + 400 * (1e-7 + 1e-8) + 4 * 5e-5)
    assert TIMES.seconds(5, 5, 5, 400) - TIMES.seconds(5, 4, 5, 400, num_chunks=0) == pytest.approx(
        1e-5 - 400 * 1e-8 / 4
    )
    assert TIMES.seconds(4, 4, 4, 400, num_drawn=2) - base == pytest.approx(2 * 4e-5)
    verify = TIMES.seconds(4, 2, 4, 400, num_chunks=1)
    assert verify == pytest.approx(0.003 + 2 * 5e-5 + 2e-5 + 8e-5 + 400 * 1e-7 + 800 * 1e-8 + 3e-5)
    # Beyond the last measured number of tokens it goes on as steeply as from a quarter of it.
    assert TIMES.seconds(112, 112, 0, 0) - TIMES.seconds(64, 112, 0, 0, num_chunks=0) == pytest.approx(
        0.01 - (0.006 + 0.004 * 11 / 59), rel=1e-6
    )


def test_the_weights_of_a_step_sum_to_what_it_takes():
    # Decodes, so that all terms are linear in the sequences.
    weights = TIMES.weigh_step([1, 1, 1, 1, 1], [10, 20, 30, 40, 500])
    assert sum(weights) == pytest.approx(TIMES.seconds(5, 5, 5, 600))
    assert weights[4] - weights[0] == pytest.approx(490 * 1.1e-7)
    prompt, decode = TIMES.weigh_step([60, 1], [60, 100])
    assert prompt > 50 * decode


def test_json_gives_back_what_it_took():
    assert StepTimes.from_json(TIMES.to_json()) == TIMES
    assert StepTimes.from_json(TIMES.to_json()).seconds(7, 2, 7, 90) == TIMES.seconds(7, 2, 7, 90)


@pytest.mark.parametrize(
    "wrong",
    [
        {"curve_s": [0.003, 0.002, 0.004, 0.005]},
        {"curve_s": [0.003]},
        {"curve_tokens": [1, 4, 4, 64]},
        {"curve_tokens": []},
        {"curve_tokens": "1"},
        {"per_read_s": -1.0},
        {"per_read_s": math.inf},
        {"per_read_s": "much"},
        {"unknown": 1.0},
    ],
    ids=str,
)
def test_what_are_no_step_times_is_refused(wrong):
    with pytest.raises(ValueError):
        StepTimes.from_json(json.dumps({**json.loads(TIMES.to_json()), **wrong}))
    for text in ("", "[]", "{}", "null"):
        with pytest.raises(ValueError):
            StepTimes.from_json(text)


def test_measuring_a_slow_machine_stays_within_bounds():
    machine = Machine(scale=200)  # half a second for one token, 17 for 4,096
    times = machine.measure()
    assert machine.worked_s < 8
    assert max(shape.num_tokens for shape in machine.shapes) < 512
    assert predict(times, StepShape(1, 1, 96)) == pytest.approx(machine.seconds(StepShape(1, 1, 96)), rel=0.2)


def test_measuring_a_fast_machine_ends_within_its_budget():
    machine = Machine()
    machine.measure(budget_s=1.0)
    assert machine.worked_s < 2.1
    machine = Machine(scale=0.01)
    machine.measure()
    assert len(machine.shapes) < 600


@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,
        replace(LIMITS, num_pages=2, page_size=1, max_model_len=2),
        replace(LIMITS, num_pages=40, page_size=8, max_model_len=256, max_num_seqs=2),
        replace(LIMITS, max_num_batched_tokens=1),
        replace(LIMITS, max_num_batched_tokens=7, max_num_seqs=1),
    ],
    ids=str,
)
def test_what_is_measured_fits_the_engine(limits):
    machine = Machine()
    times = machine.measure(limits)
    assert machine.shapes
    for shape in machine.shapes:
        assert shape.num_tokens <= limits.max_num_batched_tokens
        assert shape.num_requests <= limits.max_num_seqs
        assert shape.num_context <= limits.max_model_len
        assert shape.num_requests * -(-shape.num_context // limits.page_size) <= limits.num_pages
    assert times.seconds(1, 1, 1, 1) == pytest.approx(0.002, rel=0.5)


def test_the_shapes_tell_all_terms_apart():
    steps = [shape.measured(1.0) for tier in shapes_to_measure(LIMITS) for shape in tier]
    columns = np.array([[getattr(step, figure) for figure in FIGURES] for step in steps], float)
    assert np.linalg.matrix_rank(columns / columns.max(axis=0)) == len(FIGURES)


def test_the_best_number_of_tokens_is_the_largest_of_those_that_are_as_good():
    # 10 ms of weights to read, then 0.1 ms of arithmetic for each token beyond 100: all rates from there are alike.
    tokens = (1, 100, 200, 400, 800, 1600, 3200, 6400)
    times = StepTimes(tokens, tuple(0.01 + 1e-4 * max(0, n - 100) for n in tokens))
    assert times.best_num_batched_tokens(8192) == 8192
    assert times.best_num_batched_tokens(50) == 50
    # Beyond 800 tokens something overflows, and each takes twice as long.
    overflowing = StepTimes(tokens, tuple(0.05 + 1e-4 * n + 1e-4 * max(0, n - 800) for n in tokens))
    assert overflowing.best_num_batched_tokens(8192) == 800
    # A measurement that says that 100 tokens are best was disturbed.
    disturbed = StepTimes(tokens, (0.01, 0.011, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2))
    assert disturbed.best_num_batched_tokens(8192) >= 512


def test_the_tracker_follows_a_machine_that_becomes_busy():
    tracker = StepTimesTracker()
    assert tracker.ratio == 1.0
    tracker.observe(0.01, 0.5)
    assert tracker.ratio < 1.06, "one step that was held up is no busy machine"
    for _ in range(400):
        tracker.observe(0.01, 0.02)
    assert tracker.ratio == pytest.approx(2.0, rel=0.01)
    for _ in range(800):
        tracker.observe(0.01, 0.01)
    assert tracker.ratio == pytest.approx(1.0, rel=0.01)


def test_the_description_names_the_figures_in_units_for_people():
    text = TIMES.describe()
    assert text.startswith("a step takes 2 ms for 1 token, 6.75 ms for 16, 10 ms for 64; and 10 us per request, ")
    assert "40 us per row drawn, 110 us per 1,000 tokens read" in text and "\n" not in text


@pytest.fixture(scope="module")
def make_engine(tiny_llama):
    def make():
        config = EngineConfig(
            model=str(tiny_llama), dtype="float32", page_size=8, num_pages=256, num_threads=1, max_num_batched_tokens=64
        )
        return Engine(config)

    return make


@pytest.fixture
def load(tmp_path, monkeypatch, make_engine):
    """Load step times of a tiny engine, from a cache of this test alone; and how often they were measured."""
    measured = []
    busy = {"error": 0.0}

    def measure(timer, limits, budget_s):
        measured.append(limits)
        return replace(TIMES, fit_error=len(measured) / 100 + busy["error"])

    monkeypatch.setattr(step_measurement, "measure_step_times", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "engine"))
    engine = make_engine()
    architecture = open_checkpoint(engine.config.model).architecture
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "test"))
    measured.clear()

    def load(**settings):
        force = settings.pop("force", False)
        busy["error"] = settings.pop("fit_error", 0.0)
        config = engine.config.model_copy(update=settings)
        limits = Limits(256, 8, config.max_num_seqs, 64, engine.max_model_len)
        times = load_or_measure_step_times(engine._runner, engine.decoder, architecture, config, limits, force=force)
        return times, len(measured)

    return load


def test_a_second_engine_reads_what_the_first_measured(load):
    first, num_measured = load()
    assert num_measured == 1
    assert load() == (first, 1)
    assert [path.suffix for path in cache_folder().iterdir()] == [".json"], "nothing unfinished stays"
    again, num_measured = load(force=True)
    assert num_measured == 2
    assert load() == (again, 2), "what was forced is kept"


def test_another_engine_is_measured_for_itself(load):
    load()
    assert load(max_num_seqs=3)[1] == 2
    assert load(deterministic=True)[1] == 3
    assert load()[1] == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"key": {}, "step_times": {}}', "half"])
def test_a_broken_cache_file_is_measured_anew_with_a_warning(content, load, caplog):
    load()
    (path,) = cache_folder().iterdir()
    path.write_text(path.read_text()[:200] if content == "half" else content)
    with caplog.at_level(logging.WARNING):
        assert load()[1] == 2
    assert str(path) in caplog.text
    caplog.clear()
    assert load()[1] == 2, "and written anew"
    assert not caplog.text


def test_what_was_measured_on_a_busy_machine_is_not_kept(load, caplog):
    with caplog.at_level(logging.WARNING):
        assert load(fit_error=0.2)[1] == 1
    assert "measured again at the next start" in caplog.text
    assert load()[1] == 2
    assert load()[1] == 2


def test_without_a_cache_folder_it_measures_every_time_and_says_so(load, caplog, tmp_path):
    (tmp_path / "test").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert load()[1] == 1
        assert load()[1] == 2
    assert "cannot be written" in caplog.text


def test_a_real_engine_is_measured_and_answers_as_before(make_engine, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(step_measurement, "BUDGET_S", 0.3)
    rng = random.Random(4)
    prompts = [[rng.randrange(2, 97) for _ in range(rng.randint(1, 40))] for _ in range(12)]
    sampling = SamplingParams(max_tokens=20, temperature=0.8, ignore_eos=True)
    plain, engine = make_engine(), make_engine()
    expected = [c.outputs[0].token_ids for c in plain.generate(prompts, sampling)]

    limits = Limits(256, 8, 256, 64, engine.max_model_len)
    architecture = open_checkpoint(engine.config.model).architecture
    times = load_or_measure_step_times(engine._runner, engine.decoder, architecture, engine.config, limits, force=True)

    assert times.curve_tokens[0] == 1 and times.curve_tokens[-1] == 64
    seconds = times.seconds(np.arange(1, 65), 1, 1, 10)
    assert np.all(seconds > 1e-5) and np.all(seconds < 1.0)
    assert all(not pages.any() for layer in engine._runner._kv for pages in layer)
    assert [c.outputs[0].token_ids for c in engine.generate(prompts, sampling)] == expected


def test_a_timed_step_does_what_its_shape_says(make_engine, monkeypatch):
    engine = make_engine()
    plans = []

    def run(plan, costs, run=engine._runner.run):
        plans.append((plan, run(plan, costs)[0]))
        return plans[-1][1], []

    monkeypatch.setattr(engine._runner, "run", run)
    timer = RunnerTimer(engine._runner, engine.decoder, 8)
    shapes = [StepShape(3, 1, 20, 2), StepShape(2, 12), StepShape(1, 1, 9, is_drawn=True)]
    assert timer(*shapes) > 0
    ((plan, tokens),) = plans
    steps = [shape.measured(0.0) for shape in shapes]
    assert sum(plan.num_tokens) + sum(map(len, plan.drafts.values())) == sum(s.num_tokens for s in steps) == 34
    assert sum(map(len, tokens.values())) == sum(s.num_logit_rows for s in steps) == 12
    assert sum(s.num_read for s in steps) == 3 * 23 + 2 * 12 + 10
    assert [s.num_chunks for s in steps] == [3, 0, 0]
    assert [s.num_drawn for s in steps] == [0, 0, 1]
    pages = [page for sequence in plan.sequences for page in sequence.pages]
    assert len(set(pages)) == len(pages), "every sequence has pages of its own"


def test_measured_steps_are_plain_numbers():
    step = StepShape(4, 1, 100, 3).measured(0.5)
    assert step == MeasuredStep(16, 4, 16, 416, 0, 4, False, 0.5)
