"""The graph of a run, where Ray begins: shards are planned, slices answered, shards merged.

    read task per shard: plan_shard -> one block per slice        (waits at the gate: plans stay just ahead of the pool)
    actor pool:          SliceRunner.run -> slice object          (async; the engine has its own thread)
    merge task:          slices -> results, metrics, errors       (when a shard's last slice is there)

Where all shards are planned as one corpus, `pipeline.corpus.corpus_graph` plans and merges, and tickets stand for
slices. The driver sees events only, a few hundred bytes per slice, so its memory does not grow with the corpus. Knows
no terminal and no exit code: `jobs.run` iterates `Graph.events()`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import queue
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

# When the driver leaves while a dataset is still running, Ray Data's threads must not start another Ray for themselves.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask, TaskPoolStrategy
from ray.data.block import BlockMetadata

from pipeline.admission import Admission, Attempt, CorpusWork, SliceKey, WorkerEnd
from pipeline.blocks import SLICE, TICKET, block, event_block, read_event
from pipeline.corpus.corpus_graph import CorpusRun, TicketSource, find_work, merge_corpus_task
from pipeline.corpus.corpus_planner import share_cpus
from pipeline.corpus_plan.manifest import CORPUS, read_planned
from pipeline.events import Event, ShardDone, ShardFailed, ShardPlanned, SliceDone, SliceFailed, Tick
from pipeline.faults import ShardFault
from pipeline.job import Job, JobError
from pipeline.plan_tokenizer import planning_tokenizer
from pipeline.prefix_plan import Slice, plan_shard
from pipeline.results import ShardMetrics, merge_shard, passthrough_columns
from pipeline.shards import Shard, open_shard
from pipeline.slice_runner import RunSpec, SliceRunner, found_slice, max_actors, min_actors
from pipeline.slices import SliceName, complete_set

MAX_MERGES = 8
MAX_INIT_DEATHS = 3
TICK_S = 0.5
PLANNING_TICK_S = 0.05
GATE_TIMEOUT_S = 30
PLAN_TIMEOUT_S = 300
"""A gate reads the manifest, and the footers of what was answered before."""

LOCAL_OBJECT_STORE_BYTES = 512 * 2**20
"""Slices wait here, some 100 KB each and a few dozen at a time."""

# --- planning: read tasks -----------------------------------------------------------------------------------------


class SliceSource(Datasource):
    """One read task per shard, one block per slice. The order of the shards is the order of reading."""

    def __init__(self, spec: Any, gate: Any, shards: Sequence[Shard], found: Mapping[str, frozenset[str]]) -> None:
        super().__init__()
        self._tasks = [
            ReadTask(
                partial(plan_blocks, spec, gate, shard, found.get(shard.name, frozenset())),
                BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None),
            )
            for shard in shards
        ]

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return self._tasks


def plan_blocks(spec_ref: Any, gate: Any, shard: Shard, found: frozenset[str]) -> Iterable[pa.Table]:
    """Plan a shard, and yield its slices as the gate lets them through.

    found: paths of slices that were published before the run began. Given, and not looked up here: Ray repeats a
    lost task and matches its outputs by number, so the outputs must not depend on what has happened meanwhile.
    """
    spec: RunSpec = ray.get(spec_ref)
    try:
        with open_shard(shard) as source:
            passthrough_columns(spec.job, source.schema_arrow, shard.name)
        plan = plan_shard(spec.job, shard, planning_tokenizer(spec.job))
        names = [SliceName.of(plan, index, spec.fingerprint) for index in range(plan.num_slices)]
        have = [name for name in names if name.path(shard.name) in found]
        yield event_block(ShardPlanned(shard.name, len(names), len(have), plan.prompt_tokens))
        for name in have:
            yield event_block(found_slice(spec.output, shard.name, name))
        for name in names:
            if name.path(shard.name) in found:
                continue
            if not ray.get(gate.admit.remote((shard.name, name.index))):
                return
            yield block(SLICE, payload=plan.slice(name.index).to_bytes())
    except ShardFault as error:
        yield event_block(ShardFailed(shard.name, str(error)))


# --- answering: the actor pool ------------------------------------------------------------------------------------


class SliceActor:
    """What an actor of the pool runs: blocks in, events out. Only awaits: the engine works in its own thread."""

    def __init__(self, spec_ref: Any, admission: Any) -> None:
        context = ray.get_runtime_context()
        spec: RunSpec = ray.get(spec_ref)
        self._worker = context.get_actor_id()
        self._admission = admission
        self._output = spec.output
        self._holding: set[int] = set()
        lost_before_s = ray.get(admission.hello.remote(self._worker))
        gate = _RemoteGate(admission, self._worker)
        self._runner = SliceRunner(spec, gate, self._worker, context.get_node_id(), lost_before_s)

    async def __call__(self, block: pa.Table) -> pa.Table:
        kind = block["kind"][0].as_py()
        if kind == SLICE:
            return event_block(await self._runner.run(Slice.from_bytes(block["payload"][0].as_py())))
        if kind == TICKET:
            return event_block(await self._use_ticket(json.loads(block["fields"][0].as_py())["ticket"]))
        return block

    async def _use_ticket(self, ticket: int) -> Event:
        """Answer the slice that the ticket turns out to mean. Its rows come from storage, where planning left them, and
        not through the object store."""
        ref = await self._admission.slice_for.remote(ticket, self._worker, sorted(self._holding))
        if ref is None:
            return Tick()
        self._holding.add(ref.index)
        try:
            try:
                slice_ = await asyncio.to_thread(read_planned, self._output, ref)
            except ShardFault as error:
                await self._runner.leave((CORPUS, ref.index))
                return SliceFailed(ref.index, list(ref.shards), str(error))
            return await self._runner.run(slice_)
        finally:
            self._holding.discard(ref.index)


@dataclass(frozen=True, slots=True)
class _RemoteGate:
    """`slice_runner.Gate`, by calls to the process that keeps the run's Admission."""

    admission: Any
    worker: str

    async def begin(self, key: SliceKey) -> Attempt:
        attempt: Attempt = await self.admission.begin.remote(key, self.worker)
        return attempt

    async def try_rows(self, key: SliceKey, rows: frozenset[int]) -> None:
        await self.admission.try_rows.remote(key, rows)

    async def finish(self, key: SliceKey, unanswered_s: float) -> None:
        await self.admission.finish.remote(key, self.worker, unanswered_s)


# --- merging ------------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0, max_retries=2)  # mostly storage; 0 so that a pool that takes every CPU does not block it
def merge_task(spec: RunSpec, shards: list[Shard], paths: list[str]) -> list[ShardMetrics | ShardFailed]:
    """Publish the one shard from its slices; whatever concerns only this shard is returned, not raised."""
    (shard,) = shards
    try:
        return [merge_shard(spec.job, shard, spec.output, paths, spec.fingerprint)]
    except ShardFault as error:
        return [ShardFailed(shard.name, str(error))]


@ray.remote(num_cpus=0, max_retries=0)
def warm_up_merging() -> None:
    """Do nothing, in a process that has now imported what a merge needs: that takes a second or two of a core, which is
    better spent while the model loads than while the engine runs."""


# --- the driver's side --------------------------------------------------------------------------------------------


class Graph:
    """A run's shards on their way through the cluster. Iterate `events()` to the end, or `stop()` and then to the end.

    shards: those that are not published yet, in the order to do them. slices: what `list_slices` found before.
    corpus_of: all shards of the input, to plan `shards` as one corpus; None to plan each by itself.
    """

    def __init__(
        self,
        spec: RunSpec,
        shards: Sequence[Shard],
        slices: Mapping[str, Mapping[str, SliceName]],
        corpus_of: Sequence[Shard] | None = None,
    ) -> None:
        self._spec = spec
        self._shards = {shard.name: shard for shard in shards}
        self._slices = slices
        self._corpus = (
            CorpusRun(spec, corpus_of, shards, slices.get(CORPUS, {})) if corpus_of is not None and shards else None
        )
        self._paths: dict[str, dict[int, str]] = {}
        self._ready: deque[tuple[Any, ...]] = deque()  # what a merge task takes besides the spec
        self._merging: set[Any] = set()
        self._inbox: queue.Queue[Event | BaseException | None] = queue.Queue()
        self._spec_ref = ray.put(spec)
        self._gate: Any = None
        self._worker_ends: list[WorkerEnd] | None = None
        self._is_generating = False
        self._warm: list[Any] = []
        self._max_merges = max(1, min(MAX_MERGES, int(ray.cluster_resources().get("CPU", 1)) // 2))
        self.usd_per_device_hour = spec.job.pricing.usd_per_device_hour or 0.0
        self.recomputed_tokens = 0
        """Prompt tokens that workers computed again for each other; of a corpus, where it is known."""

    def events(self) -> Iterator[Event]:
        """Everything that happens, until all shards are done, failed, or left over by a stop."""
        if self._corpus is not None:
            yield from self._begin_corpus(self._corpus)
        elif to_plan := [shard for shard in self._shards.values() if not self._is_ready(shard)]:
            self._start_shards(to_plan)
        while self._is_generating or self._ready or self._merging:
            self._start_merges()
            yield from self._finished_merges()
            if self._corpus is not None:
                yield from self._plan_corpus(self._corpus)
            event = self._next_event()
            if event is None:
                self._is_generating = False  # the actors are gone, and merges are no time of theirs
                self._worker_ends = self.close_accounts()
                yield from self._end_corpus()
                continue
            yield from self._note(event)
        if self._corpus is not None:
            self._corpus.close()

    def stop(self) -> None:
        """Begin no slice any more; those in flight are finished and published."""
        if self._corpus is not None:
            self._corpus.stop()
        if self._gate is not None:
            ray.get(self._gate.stop.remote(), timeout=GATE_TIMEOUT_S)

    def close_accounts(self) -> list[WorkerEnd]:
        """The workers' time since their last slices, until now or until the last of them went."""
        if self._worker_ends is not None or self._gate is None:
            return self._worker_ends or []
        return list(ray.get(self._gate.close_accounts.remote(), timeout=GATE_TIMEOUT_S))

    def _begin_corpus(self, corpus: CorpusRun) -> Iterator[Event]:
        """Start from the plan that is saved, with a pool only if slices are missing; else plan while the pool loads."""
        if corpus.manifest is None:
            pool = self._spec.job.pool
            cpus = ray.cluster_resources().get("CPU", 1)
            corpus.start_planning(self._spec_ref, *share_cpus(cpus - max_actors(self._spec.job) * pool.num_cpus, cpus))
            self._start_corpus(corpus)
            return
        yield corpus.adopt_plan()
        if corpus.to_answer():
            self._start_corpus(corpus)
        yield from corpus.tell_found()
        self._take_ready(corpus)

    def _plan_corpus(self, corpus: CorpusRun) -> Iterator[Event]:
        if not corpus.is_planning:
            return
        yield from corpus.plan()
        if corpus.is_planning:
            return
        if corpus.manifest is None:  # no shard could be read, or the run is stopped
            ray.get(self._gate.stop.remote(), timeout=GATE_TIMEOUT_S)
            return
        yield corpus.adopt_plan()
        ray.get(self._gate.open_corpus.remote(corpus.work()), timeout=PLAN_TIMEOUT_S)
        yield from corpus.tell_found()
        self._take_ready(corpus)

    def _end_corpus(self) -> Iterator[Event]:
        if self._corpus is None:
            return
        self.recomputed_tokens = ray.get(self._gate.recomputed_tokens.remote(), timeout=GATE_TIMEOUT_S)
        yield from self._corpus.reconcile()
        self._take_ready(self._corpus)

    def _take_ready(self, corpus: CorpusRun) -> None:
        self._ready.extend(corpus.take_ready(self._max_merges))

    def _is_ready(self, shard: Shard) -> bool:
        """Whether only the merge is missing. Finding that out needs no plan, so no model is loaded for it."""
        paths = (
            [] if shard.num_rows == 0 else complete_set(self._current_slices(shard), self._spec.fingerprint, shard.etag)
        )
        if paths is None:
            return False
        self._ready.append(([shard], paths))
        return True

    def _current_slices(self, shard: Shard) -> Mapping[str, SliceName]:
        return self._slices.get(shard.name, {})

    def _start_shards(self, shards: Sequence[Shard]) -> None:
        found = {
            shard.name: frozenset(
                path
                for path, name in self._current_slices(shard).items()
                if name.belongs_to(self._spec.fingerprint, shard.etag)
            )
            for shard in shards
        }
        self._start_pool(lambda gate: build_dataset(self._spec, self._spec_ref, gate, shards, found))

    def _start_corpus(self, corpus: CorpusRun) -> None:
        find = partial(find_work, self._spec, corpus.listed, corpus.to_do)
        self._start_pool(lambda gate: build_corpus_dataset(self._spec, self._spec_ref, gate), find)

    def _start_pool(
        self, build: Callable[[Any], Any], find_work: Callable[[], CorpusWork | None] = lambda: None
    ) -> None:
        """Iterate the dataset that `build` makes, given the gate. find_work: of `Admission`."""
        pool = self._spec.job.pool
        # Twice what the pool holds: a slice waits at the actor when another ends, and Ray Data's loop, which takes
        # 0.1-0.5 s per round, is hidden.
        window = 2 * max_actors(self._spec.job) * pool.max_slices_in_flight + 2
        # In a process of its own, restarted if its node goes: then only the counts are lost.
        self._gate = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1000)(
            Admission
        ).remote(window, find_work)
        dataset = build(self._gate)
        self._is_generating = True
        self._warm = [warm_up_merging.remote() for _ in range(self._max_merges)]
        # A thread, because the main one has to see signals and clocks while Ray Data waits.
        threading.Thread(target=self._consume, args=(dataset,), daemon=True, name="dataset").start()

    def _consume(self, dataset: Any) -> None:
        try:
            for row in dataset.iter_rows():
                self._inbox.put(read_event(row))
            self._inbox.put(None)
        except BaseException as error:
            self._inbox.put(error)

    def _next_event(self) -> Event | None:
        """The next event; None when the dataset is done."""
        if not self._is_generating:
            ray.wait(list(self._merging), num_returns=1, timeout=TICK_S)
            return Tick()
        try:
            item = self._inbox.get(timeout=PLANNING_TICK_S if self._corpus and self._corpus.is_planning else TICK_S)
        except queue.Empty:
            return Tick()
        if isinstance(item, BaseException):
            raise item
        return item

    def _note(self, event: Event) -> Iterator[Event]:
        """Act upon an event, and pass on what the run is to hear of it."""
        if isinstance(event, SliceDone) and event.is_new:
            self.usd_per_device_hour = event.usd_per_device_hour
        if self._corpus is not None:
            yield from self._corpus.note(event)
            self._take_ready(self._corpus)
            return
        if isinstance(event, SliceDone):
            paths = self._paths.setdefault(event.shard, {})
            paths[event.index] = event.path
            if len(paths) == event.num_slices:
                ordered = [paths[index] for index in range(event.num_slices)]
                self._ready.append(([self._shards[event.shard]], ordered))
                del self._paths[event.shard]
        yield event

    def _start_merges(self) -> None:
        while self._ready and len(self._merging) < self._max_merges:
            task = merge_task if self._corpus is None else merge_corpus_task
            self._merging.add(task.remote(self._spec_ref, *self._ready.popleft()))

    def _finished_merges(self) -> Iterator[Event]:
        done, _ = (
            ray.wait(list(self._merging), num_returns=len(self._merging), timeout=0) if self._merging else ([], [])
        )
        for ref in done:
            self._merging.discard(ref)
            for result in ray.get(ref):
                if self._corpus is not None:
                    yield self._corpus.finish_shard(result)
                else:
                    yield result if isinstance(result, ShardFailed) else ShardDone(result)


def build_corpus_dataset(spec: RunSpec, spec_ref: Any, gate: Any) -> Any:
    """The Ray Data graph of a corpus: tickets for whichever actor is free."""
    _set_data_context()
    tickets = ray.data.read_datasource(
        TicketSource(gate),
        override_num_blocks=1,
        compute=TaskPoolStrategy(size=1),
        num_cpus=0,  # it only waits, and the tasks that it waits for need the CPUs
    )
    return _answer_blocks(spec, spec_ref, gate, tickets)


def build_dataset(
    spec: RunSpec, spec_ref: Any, gate: Any, shards: Sequence[Shard], found: Mapping[str, frozenset[str]]
) -> Any:
    """The Ray Data graph; nothing runs before it is iterated."""
    job = spec.job
    _set_data_context()
    num_cpus_left = ray.cluster_resources().get("CPU", 1) - max_actors(job) * job.pool.num_cpus
    num_planners = max(1, min(8, int(num_cpus_left), math.ceil(max_actors(job) / 4)))
    slices = ray.data.read_datasource(
        SliceSource(spec_ref, gate, shards, found),
        override_num_blocks=len(shards),  # else Ray splits the outputs of few tasks
        compute=TaskPoolStrategy(size=num_planners),
        num_cpus=min(1, max(0, num_cpus_left)),  # a pool that takes every CPU must not keep planning from starting
    )
    return _answer_blocks(spec, spec_ref, gate, slices)


def _answer_blocks(spec: RunSpec, spec_ref: Any, gate: Any, blocks: Any) -> Any:
    job = spec.job
    return blocks.map_batches(
        SliceActor,
        fn_constructor_args=(spec_ref, gate),
        batch_size=1,  # one slice per call; anything larger would merge slices of different shards
        batch_format="pyarrow",
        compute=_actor_pool(job),
        num_cpus=job.pool.num_cpus,
        num_gpus=gpus_per_actor(job) or None,
    )


def _actor_pool(job: Job) -> ActorPoolStrategy:
    in_flight = job.pool.max_slices_in_flight
    low, high = min_actors(job), max_actors(job)
    return ActorPoolStrategy(
        min_size=low,
        max_size=high,
        initial_size=low,
        # With 1 the engine drains at each slice's border: 6.1 s against 2.1 s with 3, measured.
        max_concurrent_calls_per_actor=in_flight,
        max_tasks_in_flight_per_actor=2 * in_flight,
    )


def _set_data_context() -> None:
    context = DataContext.get_current()
    # 1 byte: every slice leaves its read task as a block of its own. With None they would come as one block per
    # shard, in one actor's one call.
    context.target_max_block_size = 1
    # A slice may take longer than Ray's 30 minutes without progress.
    context.execution_no_progress_timeout_s = -1
    # By default the first death in __init__ (a node that goes while the model loads) fails the job.
    context.max_consecutive_actor_init_deaths = MAX_INIT_DEATHS
    # An exception in our classes is a bug: fail, do not drop the block or repeat it for ever. Deaths of processes
    # are retried by Ray (max_restarts and max_task_retries are -1 for pools); Admission counts and ends that.
    context.max_errored_blocks = 0
    context.actor_task_retry_on_errors = False
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def gpus_per_actor(job: Job) -> float:
    """GPUs that an actor reserves: as the job says, else one where the engine will run on CUDA."""
    if job.pool.num_gpus is not None:
        return job.pool.num_gpus
    if job.engine.device == "cpu":
        return 0.0
    return 1.0 if job.engine.device.startswith("cuda") or ray.cluster_resources().get("GPU", 0) > 0 else 0.0


# --- Ray itself ---------------------------------------------------------------------------------------------------


def start_ray() -> bool:
    """Connect to the cluster that RAY_ADDRESS names, else start one on this machine; False if there was one already.

    Its log goes to Ray's own files: what a user has to know comes through events.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # On few cores Ray ends every task's process that idles for a second, and each new one imports for seconds.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    # An engine on a CPU shares it with planning. Threads of OpenMP that spin while they wait for one that has no core
    # made a step three times as long there (217 ms against 74); with a short spin it is 150, and alone still 74.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Below fatal, Ray warns about every pool that its actors cannot be restarted should their arguments be lost.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    with _stderr_held_back():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            ray.init(address="local", include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE_BYTES, **quiet)
    return True


@contextmanager
def _stderr_held_back() -> Iterator[None]:
    """Keep what Ray's C++ side writes while it starts (the log level that it was told) for the case that it fails."""
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def close_ray() -> None:
    """Leave the cluster; one that `start_ray` started ends with all its processes."""
    ray.shutdown()


def check_pool_fits(job: Job) -> None:
    """JobError if the cluster that is there can never hold the smallest pool; Ray would wait for ever."""
    low = job.pool.num_actors if isinstance(job.pool.num_actors, int) else job.pool.num_actors[0]
    if os.environ.get("RAY_ADDRESS"):
        return  # such a cluster may grow
    for name, key, per_actor in (("CPU", "num_cpus", job.pool.num_cpus), ("GPU", "num_gpus", gpus_per_actor(job))):
        have = ray.cluster_resources().get(name, 0)
        if low * per_actor > have:
            raise JobError(
                f"pool: {low} actors with {key}={per_actor:g} need {low * per_actor:g} {name}s and there are {have:g}; "
                f"lower pool.num_actors or pool.{key}"
            )
