"""Another order of a slice's rows: whole groups, every row once, only where it is expected to be faster."""

import asyncio
from dataclasses import replace

import numpy as np
from fake_worker import FIRST_CHARACTER, FakeWorkers, LocalGate
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.slice_runner as runner_module
from actors.requests import Completion, Output, Request, SamplingParams, Usage
from actors.scheduler import Scheduler
from actors.sequence import Sequence
from actors.step_times import StepTimes
from pipeline.admission import Admission
from pipeline.job import job_from_dict
from pipeline.mixing import MIXED, AnswerLengths, group_starts, mix_requests, mixed_order
from pipeline.prefix_plan import PlannedRow, Slice, shared_prefix_lengths
from pipeline.price.engine_simulation import EngineShape, RowNumbers
from pipeline.slice_runner import RunSpec, SliceRunner
from pipeline.slices import read_slices
from pipeline.storage import Storage

# Up to 256 tokens a step costs the same, each token more a 256th of it: prompts beside decodes are free.
STEPS = StepTimes((1, 256, 4096), (1.0, 1.0, 16.0))
SHAPE = EngineShape(32, 256, page_size=16, slices_in_flight=1)


def requests_of(kinds):
    """Rows in plan order: `True` is a long prompt with a short answer. First tokens differ, so each is a group."""
    return [
        Request(str(i), [i] * (1500 if is_long else 40), SamplingParams(max_tokens=8 if is_long else 250))
        for i, is_long in enumerate(kinds)
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 900), st.integers(1, 90)), min_size=1, max_size=20))
def test_a_mixed_order_has_every_row_once_and_splits_no_group(groups):
    prompts, outputs = [], []
    for number, (num_rows, num_tokens, num_output) in enumerate(groups):
        prompts += [np.array([7, *[number] * (30 + num_tokens), i], np.int32) for i in range(num_rows)]
        outputs += [num_output] * num_rows
    shared_N = shared_prefix_lengths(prompts).astype(np.int64)
    starts = group_starts(shared_N)
    order = mixed_order(RowNumbers(np.array([len(p) for p in prompts]), shared_N, np.array(outputs)))
    if order is None:
        return
    assert sorted(order) == list(range(len(prompts)))
    group_of = np.searchsorted(starts, order, side="right")
    assert (np.diff(group_of) != 0).sum() == len(starts) - 1, "a group is in one piece"
    assert (np.diff(order)[np.diff(group_of) == 0] == 1).all(), "and in its order"
    assert (order[0], order[-1]) == (0, len(prompts) - 1), "the slices before and after go on at the ends"


def test_rows_of_one_kind_and_orders_that_bring_nothing_are_left_alone():
    lengths = AnswerLengths()
    assert mix_requests(requests_of([True] * 64), lengths, SHAPE, STEPS) is None
    # A step that costs by the token alone: what is beside what makes no difference.
    by_token = StepTimes((1, 4096), (1.0, 4096.0))
    assert mix_requests(requests_of([True] * 32 + [False] * 32), lengths, SHAPE, by_token) is None


def test_the_schedulers_own_steps_are_as_much_faster_as_was_predicted():
    """Step times like a GPU's: reading the weights takes as long as computing 256 tokens."""
    steps = StepTimes((1, 64, 256, 1024, 4096), (0.012, 0.0122, 0.014, 0.035, 0.13), per_read_s=2.5e-8)
    shape = EngineShape(64, 512, page_size=64, num_pages=20_000, slices_in_flight=1)
    requests = requests_of([False] * 128 + [True] * 128)
    order = mix_requests(requests, AnswerLengths(), shape, steps)
    assert order is not None
    # Where a step takes whole prompts, there is as good as nothing to win.
    assert mix_requests(requests, AnswerLengths(), replace(shape, max_num_batched_tokens=2048), steps) is None

    def seconds(requests):
        scheduler, total = Scheduler(20_000, 64, 64, 512), 0.0
        for request in requests:
            scheduler.add(Sequence(request, 0, 4096))
        while scheduler.waiting or scheduler.running:
            plan = scheduler.plan_step()
            wanting = plan.wanting
            num_read = sum(s.num_computed + n for s, n in zip(plan.sequences, plan.num_tokens))
            total += float(steps.seconds(sum(plan.num_tokens), len(plan.sequences), len(wanting), num_read))
            scheduler.commit(plan)
            for sequence in wanting:
                sequence.append(1000, 0.0)
                if len(sequence.token_ids) == sequence.max_len:
                    scheduler.finish(sequence)
        return total

    assert seconds([requests[i] for i in order]) < 0.95 * seconds(requests)


def test_answers_are_expected_to_be_as_long_as_those_seen():
    lengths, requests = AnswerLengths(), requests_of([True, False])
    assert lengths.expected(requests).tolist() == [8, 250]
    output = Output(0, "", [], "stop")
    lengths.observe(requests[1:], [Completion("1", [output], Usage(completion_tokens=25))])
    assert lengths.expected(requests).tolist() == [1, 25]


def test_results_keep_their_order_and_answers_whatever_order_they_are_computed_in(tmp_path, fake_workers, monkeypatch):
    job = job_from_dict(
        {
            "input": {"path": str(tmp_path), "prompt_column": "p"},
            "model": "m",
            "output": {"path": str(tmp_path / "out")},
        }
    )
    rows = [PlannedRow(i, [ord(c) - FIRST_CHARACTER for c in f"row {i}"], None, 0) for i in range(6)]
    slice_ = Slice("a", "etag", 0, 1, rows, plan_id="p")
    order = [0, 4, 2, 3, 1, 5]
    monkeypatch.setattr(runner_module, "mix_requests", lambda requests, *_: order)

    def answer(mixed: bool, out: str):
        workers: FakeWorkers = fake_workers()
        workers.log.unlink(missing_ok=True)
        own = job.model_copy(update={"output": job.output.model_copy(update={"path": str(tmp_path / out)})})

        async def go():
            admission = Admission(window=10)
            await admission.hello("w")
            runner = SliceRunner(RunSpec("r", own, "f" * 64, workers), LocalGate(admission), "w", "node")
            assert runner._engine_shape is None, "without step times the order is the plan's"
            if mixed:
                runner._engine_shape, runner._step_times = SHAPE, STEPS
            return await runner.run(slice_)

        event = asyncio.run(go())
        table, (times,) = read_slices(own.sampling, Storage(own.output.path), [event.path])
        columns = table.select(["row_index", "response", "error", "completion_tokens"]).to_pylist()
        return columns, workers.asked(), event.path, times.notes

    plain, asked_plain, path_plain, notes_plain = answer(False, "plain")
    mixed, asked_mixed, path_mixed, notes_mixed = answer(True, "mixed")
    assert mixed == plain and path_mixed == path_plain
    assert asked_plain == [f"a/{i}" for i in range(6)] and asked_mixed == [f"a/{i}" for i in order]
    assert MIXED in notes_mixed and MIXED not in notes_plain
