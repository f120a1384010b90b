"""What is known of a job's answers before all of them are there: from a pilot, or from results of the same output.

A pilot is some of the sampled rows through a real engine on this machine. How long the rows took, against what the
simulation says of the same rows, is the factor by which an engine here is slower than its model's steps.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from actors.engine import Engine
from actors.requests import Completion, Request, SamplingParams
from actors.step_measurement import MAX_KEPT_ERROR, MIN_OWN_SHARE
from pipeline.bill.ledger import read_metrics, read_runs
from pipeline.job import Job
from pipeline.prefix_plan import PackedRow, PlannedRow, shared_prefix_lengths
from pipeline.price.corpus_sample import NUM_SINGLES
from pipeline.price.device_profile import DeviceProfile
from pipeline.price.engine_simulation import NO_DRAFTS, Drafting, RowNumbers
from pipeline.results import RESULTS
from pipeline.slice_runner import device_name, max_actors, threads_per_actor
from pipeline.storage import Storage

FIRST_ROWS = NUM_SINGLES
"""Rows of a pilot that are answered before any is timed, if more follow."""

MAX_SHARDS = 8
"""Results of so many shards are looked at."""

COLD_LOAD_S = 1.0
"""What loading takes longer in a new process, where the first tokenizer imports its library: 0.8 to 1.3, in the median
0.97, in twenty runs of `shoal bench plan` on two cores."""

BESIDE_ROW_S = 1.1e-3
"""What a row takes of a CPU worker's time that no pilot sees: planning, Ray and publishing run on the worker's own
cores. Fitted to twenty runs of `shoal bench plan` on two cores, of 80 to 3,000 rows: busy time = 0.995 of what is
simulated and 1.08 ms a row, root mean square error 9 %. A GPU's worker waits for none of it."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Experience:
    """`num_rows` that were tried. lengths_N: tokens of all their completions. rows, busy_s: completions that were
    timed, and the time that they took, prefill_s of it for prompts; None when that says nothing about the pool.
    own_share: what others left of the time, which alone is in busy_s. row_s: what a row takes in a run that busy_s has
    not. slices_in_flight: how many of the rows' slices were in the engine at once; None: as many as in a run. idle_s,
    load_s: of an actor besides."""

    source: str
    num_rows: int
    lengths_N: Ints
    rows: RowNumbers
    busy_s: float | None
    prefill_s: float = 0.0
    drafting: Drafting = NO_DRAFTS
    errors: Counter[str] = field(default_factory=Counter)
    own_share: float = 1.0
    row_s: float = 0.0
    slices_in_flight: int | None = None
    idle_s: float | None = None
    load_s: float | None = None

    def without_times(self) -> Experience:
        """Only what says nothing about a device."""
        return replace(self, busy_s=None, row_s=0.0, idle_s=None, load_s=None)


def runs_here(job: Job) -> bool:
    """Whether a run started here has its engines on this machine, and the device that they need is there."""
    if os.environ.get("RAY_ADDRESS"):
        return False
    needs_gpu = job.engine.device.startswith("cuda") or bool(job.pool.num_gpus)
    return torch.cuda.is_available() or not needs_gpu


def run_pilot(
    job: Job, prompts: Sequence[PackedRow], seconds: float | None = None
) -> tuple[Experience, DeviceProfile | None]:
    """Answer rows by an engine of the job's settings, on this machine. `prompts`: as a CorpusSample has them.

    seconds: answer FIRST_ROWS, and then in waves as many more as take about so long, for a full engine has another pace
    than a few rows have, and drafts are better when something was answered before; only these are timed then. None:
    all, at once. The profile is that of this machine's device; None if the pool's devices are elsewhere. ValueError if
    the engine cannot be made.
    """
    is_here = runs_here(job)
    config = job.engine.model_copy(update={"num_threads": job.engine.num_threads or threads_per_actor(job)})
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        config = config.model_copy(update={"device": "auto"})
    engine = Engine(config)
    _warm_up(engine, prompts[0])
    waves = [_answer(engine, job, prompts if seconds is None else prompts[:FIRST_ROWS])]
    if seconds is not None:
        waves += _answer_in_waves(engine, job, prompts[FIRST_ROWS:], seconds, waves[0].pace_s)
    timed = waves[1:] or waves
    # On a CPU this thread works or spins all the time; where it did not, others had its core.
    own_share = sum(wave.own_s for wave in timed) / sum(wave.wall_s for wave in timed)
    if engine.device.type == "cuda" or own_share > MIN_OWN_SHARE:
        own_share = 1.0
    rows = _concatenate(
        [_rows_of(job, [wave.prompts[int(c.request_id)] for c in wave.good], wave.good) for wave in timed]
    )
    good = [completion for wave in timed for completion in wave.good]
    num_rows = sum(len(wave.prompts) for wave in waves)
    experience = Experience(
        source=f"a pilot of {num_rows:,} rows on this machine",
        rows=rows,
        lengths_N=np.array([len(o.token_ids) for wave in waves for c in wave.good for o in c.outputs], np.int64),
        busy_s=own_share * sum(wave.busy_s for wave in timed) if is_here else None,
        prefill_s=own_share * sum(wave.prefill_s for wave in timed),
        own_share=own_share,
        row_s=BESIDE_ROW_S if is_here and engine.device.type == "cpu" else 0.0,
        slices_in_flight=1,
        drafting=_drafting(
            job, rows, sum(c.usage.drafted_tokens for c in good), sum(c.usage.accepted_tokens for c in good)
        ),
        errors=Counter(c.error.kind for wave in waves for c in wave.completions if c.error is not None),
        num_rows=num_rows,
    )
    if not is_here:
        return experience, None
    # An actor finds what was measured here, if it was good enough to be kept; and imports what is imported here.
    load_s = COLD_LOAD_S + engine.load_s - (engine.measuring_s if engine.step_times.fit_error <= MAX_KEPT_ERROR else 0)
    num_pages = engine.scheduler.pool.num_pages
    profile = DeviceProfile.of_worker(job, device_name(str(engine.device)), engine.step_times, num_pages, load_s)
    return experience, replace(profile, source="measured on this machine")


@dataclass(frozen=True, slots=True)
class _Wave:
    """Rows that an engine answered at once, in the order of a plan; `completions` in that order too, their ids are the
    places of the rows. own_s: of wall_s, what the engine's thread had a core for."""

    prompts: list[PackedRow]
    completions: list[Completion]
    wall_s: float
    own_s: float
    busy_s: float
    prefill_s: float

    @property
    def pace_s(self) -> float:
        """Seconds a row."""
        return self.wall_s / len(self.prompts)

    @property
    def good(self) -> list[Completion]:
        return [completion for completion in self.completions if completion.error is None]


def _answer_in_waves(
    engine: Engine, job: Job, prompts: Sequence[PackedRow], seconds: float, pace_s: float
) -> list[_Wave]:
    """So many of the rows as about fit into the time, at the pace of the wave before: the first waves are slower."""
    waves: list[_Wave] = []
    while (num_rows := min(len(prompts), int(seconds / pace_s))) >= FIRST_ROWS:
        waves.append(_answer(engine, job, prompts[:num_rows]))
        prompts, seconds, pace_s = prompts[num_rows:], seconds - waves[-1].wall_s, waves[-1].pace_s
    return waves


def _answer(engine: Engine, job: Job, prompts: Sequence[PackedRow]) -> _Wave:
    ordered = sorted(prompts, key=lambda row: row.order)
    busy_ns, prefill_ns = engine.stats.busy_ns, engine.stats.prefill_ns
    for number, row in enumerate(ordered):
        planned = PlannedRow(row.row_index, row.token_ids.tolist(), row.overrides, row.seed)
        engine.add(Request(str(number), planned.prompt_token_ids, planned.sampling(job.sampling), row.seed))
    done: list[Completion] = []
    started, started_own = time.perf_counter(), time.thread_time()
    while engine.has_unfinished():
        done += engine.step()
    wall_s, own_s = time.perf_counter() - started, time.thread_time() - started_own
    done.sort(key=lambda completion: int(completion.request_id))
    busy_s, prefill_s = (
        (now - before) / 1e9 for now, before in ((engine.stats.busy_ns, busy_ns), (engine.stats.prefill_ns, prefill_ns))
    )
    return _Wave(ordered, done, wall_s, own_s, busy_s, prefill_s)


def _warm_up(engine: Engine, row: PackedRow) -> None:
    """Take the first steps, which are slower; backwards, so that nothing of it is cached for the pilot."""
    ids = row.token_ids[::-1].tolist()
    engine.add(Request("warm-up", ids, SamplingParams(max_tokens=4, ignore_eos=True)))
    while engine.has_unfinished():
        engine.step()


def read_experience(job: Job, output: Storage, shards: Sequence[str]) -> Experience | None:
    """What the published `shards` of an output tell; None if there is no answer among them."""
    names = sorted(shards)[:MAX_SHARDS]
    if not names:
        return None
    columns = ["prompt_tokens", "cached_tokens", "completion_tokens", "device_seconds", "error"]
    tables = []
    for name in names:
        with output.open_input(f"{RESULTS}/{name}.parquet") as source:
            tables.append(pq.ParquetFile(source).read(columns=columns))
    table = pa.concat_tables(tables)
    errors = Counter(error["kind"] for error in table["error"].to_pylist() if error)
    values = {key: np.array(table[key].to_numpy(), np.float64) for key in columns[:-1]}
    is_computed = (values["device_seconds"] > 0) & (values["completion_tokens"] > 0)
    if not is_computed.any():
        return None
    prompt_N, cached_N, completion_N = (values[key][is_computed].astype(np.int64) for key in columns[:3])
    output_N = np.maximum(1, np.rint(completion_N / job.sampling.n)).astype(np.int64)
    num_samples_N = np.full(len(prompt_N), job.sampling.n)
    starts = list(range(0, len(prompt_N), job.plan.max_rows_per_slice))
    rows = with_samples(RowNumbers(prompt_N, cached_N, output_N, starts), num_samples_N)
    metrics = read_metrics(output)
    mine = [row for row in metrics if row["shard"] in set(names)]
    runs = read_runs(output)
    num_starts = max(1, len(runs)) * max_actors(job)
    after_s = math.fsum(run.after_slices.idle_s for run in runs)
    return Experience(
        source=f"{len(prompt_N):,} rows of this output that are answered",
        rows=rows,
        lengths_N=rows.output_N,
        busy_s=math.fsum(values["device_seconds"][is_computed]),
        prefill_s=math.fsum(row["prefill_seconds"] for row in mine),
        drafting=_drafting(
            job, rows, sum(row["drafted_tokens"] for row in mine), sum(row["accepted_tokens"] for row in mine)
        ),
        errors=errors,
        num_rows=len(table),
        idle_s=(math.fsum(row["idle_seconds"] for row in metrics) + after_s) / num_starts,
        load_s=math.fsum(row["load_seconds"] for row in metrics) / num_starts,
    )


def with_samples(rows: RowNumbers, num_samples_N: Ints) -> RowNumbers:
    """A row that asks for n completions is n rows of the engine; all but the first find the whole prompt cached."""
    if len(rows) == 0 or num_samples_N.max() == 1:
        return rows
    ends = np.cumsum(num_samples_N)
    first = np.zeros(int(ends[-1]), bool)
    first[ends - num_samples_N] = True
    prompt_X, shared_X = np.repeat(rows.prompt_N, num_samples_N), np.repeat(rows.shared_N, num_samples_N)
    starts = (ends - num_samples_N)[np.asarray(rows.slice_starts, np.int64)].tolist()
    return RowNumbers(
        prompt_X, np.where(first, shared_X, prompt_X - 1), np.repeat(rows.output_N, num_samples_N), starts
    )


def _concatenate(waves: Sequence[RowNumbers]) -> RowNumbers:
    """Each as a slice."""
    starts = np.cumsum([0, *(len(rows) for rows in waves[:-1])]).tolist()
    return RowNumbers(
        np.concatenate([rows.prompt_N for rows in waves]),
        np.concatenate([rows.shared_N for rows in waves]),
        np.concatenate([rows.output_N for rows in waves]),
        starts,
    )


def _rows_of(job: Job, prompts: Sequence[PackedRow], completions: Sequence[Completion]) -> RowNumbers:
    """Answered rows in the order of a plan, one per completion."""
    prompt_N = np.array([len(row.token_ids) for row in prompts], np.int64)
    shared_N = shared_prefix_lengths([row.token_ids for row in prompts]).astype(np.int64)
    if not job.engine.enable_prefix_caching:
        shared_N[:] = 0
    num_samples_N = np.array([len(completion.outputs) for completion in completions], np.int64)
    expanded = with_samples(RowNumbers(prompt_N, shared_N, np.ones_like(prompt_N)), num_samples_N)
    output_X = np.array(
        [len(output.token_ids) for completion in completions for output in completion.outputs], np.int64
    )
    return RowNumbers(expanded.prompt_N, expanded.shared_N, output_X)


def _drafting(job: Job, rows: RowNumbers, num_drafted: int, num_accepted: int) -> Drafting:
    """A completion's first token comes with its prompt, each later one from a step of its own or from a draft."""
    num_later = int(rows.output_N.sum()) - len(rows)
    num_steps = num_later - num_accepted
    if num_drafted == 0 or num_steps <= 0:
        return NO_DRAFTS
    must_pay = job.engine.speculative_config.method == "auto"
    return Drafting(num_drafted / num_steps, num_later / num_steps, must_pay)
