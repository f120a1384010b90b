"""Answers one slice after the other, or several at once: what an actor of the pool does, without the actor.

Requests in, a published slice object and its event out; what comes back from workers that break or die is decided
here with `answering` and `admission`. Knows no Ray: the graph wraps it, tests call it.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pyarrow as pa

from actors.config import EngineConfig
from actors.requests import Completion, Request, RowError, Usage
from actors.scheduler import WORTH_WAITING_TOKENS
from actors.step_times import StepTimes
from pipeline.admission import Attempt
from pipeline.answering import Answerer, Worker, poisonous
from pipeline.bill.pricing import price_of
from pipeline.corpus.shared_slices import publish_shared_slice
from pipeline.drafts import DraftCounts, failures_of
from pipeline.events import SliceDone, SliceDropped
from pipeline.job import Job
from pipeline.mixing import MIXED, AnswerLengths, mix_requests
from pipeline.parquet import read_metadata
from pipeline.prefix_plan import ROW_BITS, Slice
from pipeline.price.device_profile import DeviceProfile, keep_profile
from pipeline.price.engine_simulation import EngineShape
from pipeline.saved_index import SavedIndex
from pipeline.shards import ShardError
from pipeline.slices import SliceName, SliceTimes, publish_slice, slice_table
from pipeline.storage import FileInfo, Storage, StorageError

_SUMS = (
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "drafted_tokens",
    "accepted_tokens",
    "device_seconds",
    "num_preemptions",
    "evicted_tokens",
)

MAX_SAVE_WAIT_S = 5.0
"""How long a slice's event waits for the drafters' index to be saved: after a run's last event its workers are gone."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What every process of a run needs to know. `new_worker` replaces `actors.worker.EngineWorker`, for tests."""

    run: str
    job: Job
    fingerprint: str
    new_worker: Callable[[EngineConfig], Worker] | None = None

    @property
    def output(self) -> Storage:
        return Storage(self.job.output.path)


class Gate(Protocol):
    """A worker's side of `Admission`."""

    async def begin(self, key: tuple[str, int]) -> Attempt: ...

    async def try_rows(self, key: tuple[str, int], rows: frozenset[int]) -> None: ...

    async def finish(self, key: tuple[str, int], unanswered_s: float) -> None: ...


class SliceRunner:
    """One worker and the slices that it has in flight.

    Several slices are in flight at once, so that the engine's batch never drains at a slice's border. Everything
    that takes time is awaited: the engine works in its own thread, storage is written in others.
    """

    def __init__(self, spec: RunSpec, gate: Gate, worker: str, node: str, lost_before_s: float = 0.0) -> None:
        """worker, node: names for the record. lost_before_s: device time of a forerunner that died."""
        self._spec = spec
        self._gate = gate
        self._output = spec.output
        self._name, self._node = worker, node
        self._meter = _Meter(lost_before_s)
        self._index = SavedIndex(self._output, spec.run, worker, spec.job.engine.speculative_config)
        self._saving: asyncio.Task[None] | None = None
        self._num_in_flight = 0
        self._lengths = AnswerLengths()
        self._step_times: StepTimes | None = None
        self._engine_shape: EngineShape | None = None
        self._answerer = Answerer(self._new_worker)
        self._device = device_name(str(self._answerer.worker.stats().device))
        self._price = price_of(self._device, spec.job.pricing.usd_per_device_hour)
        self._notes = self._keep_profile()

    def _keep_profile(self) -> list[str]:
        """Leave the device's step times in the output, for plans; a note if that is not possible."""
        worker = self._answerer.worker
        times = worker.step_times()
        if times is None:
            return []
        stats = worker.stats()
        profile = DeviceProfile.of_worker(self._spec.job, self._device, times, stats.num_pages, stats.load_s)
        from pipeline.price.estimate import engine_shape  # which asks this module what a device is called

        self._step_times, self._engine_shape = times, engine_shape(self._spec.job, profile)
        try:
            keep_profile(self._output, profile)
        except (StorageError, OSError) as error:
            return [f"the step times of this run's device could not be kept for plans: {error}"]
        return []

    async def run(self, slice_: Slice) -> SliceDone | SliceDropped:
        """Answer and publish a slice, unless the run is being stopped."""
        key = (slice_.shard, slice_.index)
        attempt = await self._gate.begin(key)
        if attempt.action == "stop":
            return SliceDropped(*key)
        name = SliceName.of(slice_, slice_.index, self._spec.fingerprint)
        self._num_in_flight += 1
        event = await asyncio.to_thread(self._find, slice_.shard, name) if attempt.number > 1 else None
        if event is None:
            event = await self._run(slice_, name, attempt)
        await self._gate.finish(key, self._answerer.unanswered_s)
        self._num_in_flight -= 1
        await self._save_index()
        return event

    async def leave(self, key: tuple[str, int]) -> None:
        """This slice cannot be answered: it is not this worker's any more."""
        await self._gate.finish(key, self._answerer.unanswered_s)

    async def _save_index(self) -> None:
        """Save what drafters have learnt, if it is time to; wait for it only when there is nothing else to do."""
        is_idle = self._num_in_flight == 0
        if self._saving is None and self._index.is_due(is_idle=is_idle):
            self._saving = asyncio.create_task(asyncio.to_thread(self._index.save_from, self._answerer.worker))
            self._saving.add_done_callback(self._note_saved)
        if is_idle and self._saving is not None:
            await asyncio.wait({self._saving}, timeout=MAX_SAVE_WAIT_S)

    def _note_saved(self, task: asyncio.Task[None]) -> None:
        self._saving = None

    def _find(self, shard: str, name: SliceName) -> SliceDone | None:
        """A worker that died after publishing, and before anybody heard of it, has left the slice behind."""
        return found_slice(self._output, shard, name) if self._output.exists(name.path(shard)) else None

    async def _run(self, slice_: Slice, name: SliceName, attempt: Attempt) -> SliceDone:
        started_at = time.time()
        completions = await self._answer(slice_, attempt)
        table = await asyncio.to_thread(slice_table, self._spec.job.answer_shape, slice_.rows, completions, self._price)
        times = self._times(slice_, attempt, started_at, lost_prefix_tokens(slice_, completions))
        summary = _summarise(slice_, completions, times, self._answerer.num_rebuilds, self._price.cost_usd(1.0))
        started_writing = time.perf_counter()
        written = await asyncio.to_thread(_publish, self._output, slice_, name, table, times, summary)
        self._meter.add_write(time.perf_counter() - started_writing)
        return SliceDone(
            shard=slice_.shard,
            is_new=True,
            path=name.path(slice_.shard),
            index=name.index,
            num_slices=name.num_slices,
            size_bytes=written.size_bytes,
            **summary,
        )

    async def _answer(self, slice_: Slice, attempt: Attempt) -> list[Completion]:
        """One completion per planned row, in order; rows that were found bad in planning never see the engine."""
        requests: dict[int, list[Request]] = {}
        # A row's key says which of its slice's shards it is of: in a corpus another slice has the same keys.
        prefix = f"{slice_.shard}/{slice_.index}" if slice_.shards else slice_.shard
        for request in slice_.requests(self._spec.job.sampling):
            named = replace(request, request_id=f"{prefix}/{request.request_id}")
            requests.setdefault(_row_of(request), []).append(named)
        answers = {row.key: Completion("", error=row.error) for row in slice_.rows if row.error is not None}
        answers.update((row, poisonous(requests.pop(row)[0])) for row in attempt.poison)
        if attempt.action == "give_up":
            answers.update((row, _given_up(several[0], attempt.number)) for row, several in requests.items())
            requests = {}
        completions = iter(await self._send(slice_, [one for several in requests.values() for one in several], attempt))
        answers.update((row, _join([next(completions) for _ in several])) for row, several in requests.items())
        return [answers[row.key] for row in slice_.rows]

    async def _send(self, slice_: Slice, requests: list[Request], attempt: Attempt) -> list[Completion]:
        if not requests:
            return []
        if attempt.action == "answer":
            return await self._answer_mixed(requests)

        async def try_rows(rows: Sequence[Request]) -> None:
            await self._gate.try_rows((slice_.shard, slice_.index), frozenset(_row_of(request) for request in rows))

        suspects = frozenset(request.request_id for request in requests if _row_of(request) in attempt.suspects)
        return await self._answerer.answer_carefully(requests, suspects, try_rows)

    async def _answer_mixed(self, requests: list[Request]) -> list[Completion]:
        """Completions in the order of `requests`, whatever order they are answered in."""
        order: Sequence[int] | None = None
        if self._engine_shape is not None and self._step_times is not None and self._spec.job.plan.mix == "auto":
            order = await asyncio.to_thread(mix_requests, requests, self._lengths, self._engine_shape, self._step_times)
        if order is None:
            completions = await self._answerer.answer(requests)
        else:
            if MIXED not in self._notes:
                self._notes.append(MIXED)
            found = dict(zip(order, await self._answerer.answer([requests[i] for i in order])))
            completions = [found[i] for i in range(len(requests))]
        self._lengths.observe(requests, completions)
        return completions

    def _times(
        self, slice_: Slice, attempt: Attempt, started_at: float, lost_prefixes: Mapping[str, int]
    ) -> SliceTimes:
        stats = self._answerer.worker.stats()
        measured: dict[str, Any] = {**lost_prefixes, **self._meter.take(self._answerer)}
        return SliceTimes(
            run=self._spec.run,
            worker=self._name,
            node=self._node,
            device=self._device,
            attempts=attempt.number,
            started_at=started_at,
            finished_at=time.time(),
            peak_pages=stats.peak_pages,
            usd_per_device_hour=self._price.usd_per_device_hour,
            price_source=self._price.source,
            achievable_prefix_tokens=slice_.achievable_prefix_tokens,
            notes=[*stats.notes, *failures_of(stats), *self._index.notes, *self._notes],
            drafts=self._meter.take_drafts(self._answerer),
            **measured,
        )

    def _new_worker(self) -> Worker:
        config = self._spec.job.engine
        if config.num_threads is None:
            # Ray sets OMP_NUM_THREADS to the CPUs that an actor reserves; on a CPU the engine is to have the machine.
            config = config.model_copy(update={"num_threads": threads_per_actor(self._spec.job)})
        if self._spec.new_worker is not None:
            worker = self._spec.new_worker(config)
        else:
            from actors.worker import EngineWorker

            worker = EngineWorker(config)
        self._index.load_into(worker)
        return worker


def lost_prefix_tokens(slice_: Slice, completions: Sequence[Completion]) -> dict[str, int]:
    """Prompt tokens that a row shares with the one before in the plan and that were computed again, by why: fields of
    `SliceTimes`. One that a row's engine had not computed was another's at a slice's border; within the slice, where
    few enough, not worth waiting for. The rest has no field."""
    lost = {"evicted_prefix_tokens": 0, "border_prefix_tokens": 0, "short_prefix_tokens": 0}
    for number, (row, completion) in enumerate(zip(slice_.rows, completions)):
        usage = completion.usage
        lost["evicted_prefix_tokens"] += usage.evicted_tokens
        again = row.shared_prefix_tokens - usage.cached_tokens - usage.evicted_tokens
        if completion.error is not None or again <= 0:
            continue
        if number == 0:
            lost["border_prefix_tokens"] += again
        elif again < WORTH_WAITING_TOKENS:
            lost["short_prefix_tokens"] += again
    return lost


def _row_of(request: Request) -> int:
    """The key of a request's row: its id is that, with the shard before and the number of a further prompt behind."""
    return int(request.request_id.rpartition("/")[2].partition(".")[0])


def _join(completions: Sequence[Completion]) -> Completion:
    """One completion of a row's prompts; an error if any of them is one."""
    first, *more = completions
    if not more:
        return first
    usages = [completion.usage for completion in completions]
    usage = Usage(
        **{name: sum(getattr(one, name) for one in usages) for name in _SUMS},
        time_to_first_token_s=first.usage.time_to_first_token_s,
        inter_token_s=first.usage.inter_token_s,
    )
    error = next((completion.error for completion in completions if completion.error is not None), None)
    outputs = [] if error else [output for completion in completions for output in completion.outputs]
    numbered = [replace(output, index=index) for index, output in enumerate(outputs)]
    return Completion(first.request_id, numbered, usage, error)


class _Meter:
    """Splits the time that a worker is held, and its drafts, into what each published slice shows of them, without gap
    or overlap."""

    def __init__(self, lost_before_s: float) -> None:
        self._mark = time.perf_counter()
        self._seen: dict[str, float] = {}
        self._write_s = 0.0
        self._lost_before_s = lost_before_s
        self._seen_drafts = DraftCounts()

    def add_write(self, seconds: float) -> None:
        self._write_s += seconds

    def take(self, answerer: Answerer) -> dict[str, float]:
        """Seconds since the last call: loading, lost, prefilling, decoding, writing, and idle for the rest.

        Time in which the engine was busy is not here: it is on the rows.
        """
        now = time.perf_counter()
        totals = {**answerer.times(), "lost_s": answerer.lost_s + self._lost_before_s, "write_s": self._write_s}
        since = {name: total - self._seen.get(name, 0.0) for name, total in totals.items()}
        since["idle_s"] = now - self._mark - since["load_s"] - since.pop("busy_s")
        self._mark, self._seen = now, totals
        return since

    def take_drafts(self, answerer: Answerer) -> DraftCounts:
        """What drafters did since the last call."""
        before, self._seen_drafts = self._seen_drafts, answerer.drafts()
        return self._seen_drafts.since(before)


def _publish(
    output: Storage, slice_: Slice, name: SliceName, table: pa.Table, times: SliceTimes, summary: Mapping[str, Any]
) -> FileInfo:
    if slice_.shards:
        return publish_shared_slice(output, slice_, name, table, times, summary)
    return publish_slice(output, slice_.shard, name, table, times, summary)


def _summarise(
    slice_: Slice, completions: Sequence[Completion], times: SliceTimes, num_rebuilds: int, usd_per_second: float
) -> dict[str, Any]:
    """What the driver hears of a slice; kept in its object too, for a run that finds it there."""
    usages = [completion.usage for completion in completions]
    by_shard = _count_by_shard(slice_, completions) if slice_.shards else {}
    device_seconds = math.fsum(usage.device_seconds for usage in usages)
    return {
        "rows": sum(1 + len(row.duplicates) for row in slice_.rows),
        "rows_error": sum(1 + len(row.duplicates) for row, c in zip(slice_.rows, completions) if c.error),
        "rows_duplicate": sum(len(row.duplicates) for row in slice_.rows),
        "prompt_tokens": sum(usage.prompt_tokens for usage in usages),
        "cached_tokens": sum(usage.cached_tokens for usage in usages),
        "completion_tokens": sum(usage.completion_tokens for usage in usages),
        "drafted_tokens": times.drafts.drafted_tokens,
        "accepted_tokens": times.drafts.accepted_tokens,
        "num_verify_steps": times.drafts.num_verify_steps,
        "device_seconds": device_seconds,
        "cost_usd": device_seconds * usd_per_second,
        "overhead_s": times.load_s + times.idle_s + times.lost_s,
        "wall_s": times.finished_at - times.started_at,
        "usd_per_device_hour": times.usd_per_device_hour,
        "num_engine_rebuilds": num_rebuilds,
        "notes": times.notes,
        **({"by_shard": by_shard} if by_shard else {}),
    }


def _count_by_shard(slice_: Slice, completions: Sequence[Completion]) -> dict[str, list[int]]:
    """Rows and error rows that each shard of the slice has in it, folded ones included."""
    counts = {shard: [0, 0] for shard in slice_.shards}
    for row, completion in zip(slice_.rows, completions):
        for key in (row.key, *row.duplicates):
            count = counts[slice_.shards[key >> ROW_BITS]]
            count[0] += 1
            count[1] += completion.error is not None
    return counts


def _given_up(request: Request, num_attempts: int) -> Completion:
    message = f"the worker died {num_attempts - 1} times while this row's slice was being answered"
    return Completion(request.request_id, error=RowError("engine_error", message))


def device_name(device: str) -> str:
    """What a device is called where prices are: `cpu`, or a GPU's full name."""
    if not device.startswith("cuda"):
        return device
    import torch

    return str(torch.cuda.get_device_name(device))


def threads_per_actor(job: Job) -> int:
    """Threads for an engine on a CPU of this machine, if the pool's actors were all here that fit."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_actors = max_actors(job)
    fit_here = int(cpus // job.pool.num_cpus) if job.pool.num_cpus else num_actors
    return max(1, cpus // max(1, min(num_actors, fit_here)))


def min_actors(job: Job) -> int:
    return job.pool.num_actors if isinstance(job.pool.num_actors, int) else job.pool.num_actors[0]


def max_actors(job: Job) -> int:
    return job.pool.num_actors if isinstance(job.pool.num_actors, int) else job.pool.num_actors[1]


def found_slice(output: Storage, shard: str, name: SliceName) -> SliceDone:
    """The event of a slice that an earlier run, or a worker that died since, has published."""
    path = name.path(shard)
    info = output.info(path)
    summary = read_metadata(output, info).get("summary") if info is not None else None
    if info is None or summary is None:
        raise ShardError(f"the slice {path} cannot be read; remove it and run the same command again")
    return SliceDone(
        shard=shard,
        is_new=False,
        path=path,
        index=name.index,
        num_slices=name.num_slices,
        size_bytes=info.size_bytes,
        **summary,
    )
