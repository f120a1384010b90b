"""A corpus on its way through the graph: planned by CPU tasks, given out for tickets, merged shard by shard.

    task per shard: sort_shard, then task per range of keys: merge_range -> the plan, in the output's storage
    read task:      numbered tickets      (wait until the corpus is planned, then stay just ahead of the pool)
    actor pool:     ticket -> slice_for -> read_planned -> SliceRunner.run -> slice object
    merge task:     slices -> results of several shards   (when the last slice with rows of theirs is there)

Ray Data sees tickets, which are numbers: its backpressure, autoscaling and retry stay as they are, while Admission says
which slice a ticket means. The model is loaded while the corpus is planned. Used by `pipeline.graph`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipeline.admission import CorpusWork
from pipeline.blocks import TICKET, block, event_block
from pipeline.corpus.corpus_planner import CorpusPlanner
from pipeline.corpus.dispatch import Dispatch
from pipeline.corpus.shared_slices import Kept, read_shared_slices
from pipeline.corpus.slice_load import slice_loads, token_prices
from pipeline.corpus.slice_objects import SliceObjects
from pipeline.corpus_plan.carrying import find_carried, kept_answers
from pipeline.corpus_plan.countdown import Countdown
from pipeline.corpus_plan.manifest import CORPUS, CarriedSlice, CorpusManifest, find_manifest
from pipeline.corpus_plan.planning import remove_other_plans, remove_plans
from pipeline.events import CorpusPlanned, Event, ShardDone, ShardFailed, SliceDone, SliceFailed, Tick
from pipeline.faults import ShardFault
from pipeline.price.device_profile import find_profile
from pipeline.results import ShardMetrics, publish_answers
from pipeline.shards import Shard
from pipeline.slice_runner import RunSpec, found_slice, min_actors
from pipeline.slices import SliceName, list_slices

MERGE_ROWS = 100_000
"""Shards that are complete at the same time are put together from their slices at once, up to so many rows: each has
rows in most slices."""

PASS_ROWS = 2_000_000
"""So many rows, at most, are merged in one task, which asks the store for each slice once."""

FOUND_AT_ONCE = 64
"""Footers of slices that were published before are read so many at a time; then signals and clocks are seen."""


class TicketSource(Datasource):
    """One read task whose blocks are tickets."""

    def __init__(self, gate: Any) -> None:
        super().__init__()
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        self._task = ReadTask(partial(ticket_blocks, gate), metadata)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return [self._task]


def ticket_blocks(gate: Any) -> Iterable[pa.Table]:
    """Tickets as the gate lets them through. Ray repeats a lost task and matches its outputs by number: they are the
    same, as a ticket says nothing but its number."""
    yield event_block(Tick())  # a read task without outputs is none
    ticket = 0
    while ray.get(gate.admit_ticket.remote(ticket)):
        yield block(TICKET, {"ticket": ticket})
        ticket += 1


def find_work(spec: RunSpec, listed: Sequence[Shard], to_do: Sequence[Shard]) -> CorpusWork | None:
    """What a run that is planned already has yet to do; for an Admission, also one that is started anew in mid-run."""
    manifest, _ = find_manifest(spec.output, spec.fingerprint, spec.job.plan, listed, to_do)
    if manifest is None:
        return None
    slices = list_slices(spec.output, CORPUS).get(CORPUS, {})
    return _work_of(spec, manifest, _to_answer(manifest, _published(manifest, to_do), slices))


def _work_of(spec: RunSpec, manifest: CorpusManifest, to_answer: Sequence[int]) -> CorpusWork:
    profile = find_profile(spec.job, spec.output)
    prices = token_prices(spec.job, profile.times if profile else None)
    done = sorted(set(range(len(manifest.slices))).difference(to_answer))
    shared = manifest.slices.columns["shared_with_previous"]
    loads = slice_loads(spec.job, manifest, prices)
    return CorpusWork(Dispatch(loads, shared, prices.prompt, min_actors(spec.job), done), manifest.ref)


def _to_answer(manifest: CorpusManifest, published: Sequence[str], slices: Mapping[str, SliceName]) -> list[int]:
    needed = Countdown(manifest, published).slices_to_do()
    return [index for index in needed if slice_path(manifest, index) not in slices]


def slice_path(manifest: CorpusManifest, index: int) -> str:
    """Where the answers of a slice of the plan are, or will be."""
    return manifest.slice_name(index).path(CORPUS)


def _published(manifest: CorpusManifest, to_do: Sequence[Shard]) -> list[str]:
    names = {shard.name for shard in to_do}
    return [shard.name for shard in manifest.shards if shard.name not in names]


@ray.remote(num_cpus=0, max_retries=2)
def merge_corpus_task(
    spec: RunSpec, shards: list[Shard], sizes: dict[str, int], kept: dict[str, Kept]
) -> list[ShardMetrics | ShardFailed]:
    """Publish these shards from all slices with rows of theirs; what concerns some only is returned, not raised.

    sizes: of the slices' objects, by path, in order. kept: of `read_shared_slices`.
    """
    groups = group_by_rows(shards, MERGE_ROWS)
    with SliceObjects(spec.output, sizes, are_read_again=len(groups) > 1) as objects:
        return [done for group in groups for done in _merge_group(spec, group, objects, list(sizes), kept)]


def _merge_group(
    spec: RunSpec, shards: list[Shard], objects: SliceObjects, paths: list[str], kept: dict[str, Kept]
) -> list[ShardMetrics | ShardFailed]:
    started = time.perf_counter()
    try:
        names = [shard.name for shard in shards]
        answers = read_shared_slices(spec.job.answer_shape, spec.output, paths, names, kept, objects)
    except ShardFault as error:
        return [ShardFailed(shard.name, str(error)) for shard in shards]
    done: list[ShardMetrics | ShardFailed] = []
    for shard in shards:
        try:
            table, times = answers.pop(shard.name)
            done.append(publish_answers(spec.job, shard, spec.output, table, times, spec.fingerprint, started))
        except ShardFault as error:
            done.append(ShardFailed(shard.name, str(error)))
        started = time.perf_counter()
    return done


def group_by_rows(shards: Iterable[Shard], max_rows: int) -> list[list[Shard]]:
    """Shards in groups of at most so many rows together, in order; one that has more is a group of its own."""
    groups: list[list[Shard]] = []
    num_rows = 0
    for shard in shards:
        if not groups or num_rows + shard.num_rows > max_rows:
            groups.append([])
            num_rows = 0
        groups[-1].append(shard)
        num_rows += shard.num_rows
    return groups


class CorpusRun:
    """The driver's side of a corpus: its plan, as soon as there is one, and what of it is there.

    listed: all shards of the input; to_do: those without results. slices: the slice objects found before, by path.
    """

    def __init__(
        self, spec: RunSpec, listed: Sequence[Shard], to_do: Sequence[Shard], slices: Mapping[str, SliceName]
    ) -> None:
        self._spec = spec
        self._to_do = {shard.name: shard for shard in to_do}
        self._slices = slices
        self._failed: set[str] = set()
        self._num_published = 0
        self._found: list[int] = []
        self._heard = np.zeros(0, bool)
        self._num_bytes = np.zeros(0, np.int64)
        self._carried_bytes: dict[str, int] = {}
        self._countdown: Countdown | None = None
        self._planner: CorpusPlanner | None = None
        self._ready: deque[Shard] = deque()
        self._removing = ThreadPoolExecutor(1, thread_name_prefix="remove")
        self.manifest, self.notes = find_manifest(spec.output, spec.fingerprint, spec.job.plan, listed, to_do)
        self._carried = (
            find_carried(spec.output, spec.fingerprint, listed, to_do, slices)
            if self.manifest is None
            else self.manifest.carried
        )
        self._carried_paths = self._carried.paths_by_shard()
        self.listed = list(listed)
        self.has_stopped = False
        self._kept = kept_answers(self._carried)

    @property
    def to_do(self) -> list[Shard]:
        return list(self._to_do.values())

    @property
    def is_planning(self) -> bool:
        return self._planner is not None and not self._planner.has_ended

    def start_planning(self, spec_ref: Any, num_tasks: int, num_cpus: float) -> None:
        self._planner = CorpusPlanner(self._spec, spec_ref, self.to_do, num_tasks, num_cpus, self._carried)

    def plan(self) -> Iterator[Event]:
        """What planning has done since; when it is done, `manifest` is there."""
        if self._planner is None or self._planner.has_ended:
            return
        for event in self._planner.poll():
            if isinstance(event, ShardFailed):
                self._failed.add(event.shard)
            yield event
        self.manifest = self._planner.manifest

    def stop(self) -> None:
        self.has_stopped = True
        if self._planner is not None:
            self._planner.cancel()

    def adopt_plan(self) -> CorpusPlanned:
        """The corpus is planned: count what is to be done, and what of it is there."""
        manifest = self.manifest
        assert manifest is not None
        is_new = self._planner is not None
        if is_new:
            remove_other_plans(self._spec.output, manifest)
        self._countdown = Countdown(manifest, _published(manifest, self.to_do))
        self._heard = np.zeros(len(manifest.slices), bool)
        self._num_bytes = np.zeros(len(manifest.slices), np.int64)
        self._ready.extend(self._to_do[name] for name in self._countdown.empty_shards())
        needed = self._countdown.slices_to_do()
        self._found = [index for index in needed if slice_path(manifest, index) in self._slices]
        return CorpusPlanned(
            is_new=is_new,
            num_slices=len(needed) + len(self._carried_to_do()),
            num_found=len(self._found) + len(self._carried_to_do()),
            prompt_tokens=manifest.totals.prompt_tokens,
            achievable_prefix_tokens=manifest.totals.achievable_prefix_tokens,
            num_duplicates_across=manifest.totals.num_duplicates_across,
            wall_s=self._planner.wall_s if self._planner is not None else 0.0,
        )

    def _carried_to_do(self) -> list[CarriedSlice]:
        """The slices of earlier plans with rows of shards that have no results."""
        carried = self._carried
        return [one for one in carried.slices if not self._to_do.keys().isdisjoint(carried.names(one.shards))]

    def tell_found(self) -> Iterator[Event]:
        """The events of slices that were published before, by this plan or one before it."""
        assert self.manifest is not None
        names = [self.manifest.slice_name(index) for index in self._found]
        with ThreadPoolExecutor(FOUND_AT_ONCE) as pool:
            carried = self._carried_to_do()
            for start in range(0, len(carried), FOUND_AT_ONCE):
                for event in pool.map(self._found_carried, carried[start : start + FOUND_AT_ONCE]):
                    self._carried_bytes[event.path] = event.size_bytes
                    yield event
            for start in range(0, len(names), FOUND_AT_ONCE):
                part = names[start : start + FOUND_AT_ONCE]
                for event in pool.map(partial(found_slice, self._spec.output, CORPUS), part):
                    yield event
                    self._hear(event)

    def _found_carried(self, one: CarriedSlice) -> SliceDone:
        """The event of a slice of an earlier plan, as if it had no rows of shards that changed since."""
        name = SliceName.parse(one.path.rpartition("/")[2])
        assert name is not None, one.path
        event = found_slice(self._spec.output, CORPUS, name)
        kept = set(self._carried.names(one.shards))
        return replace(event, by_shard={shard: rows for shard, rows in event.by_shard.items() if shard in kept})

    def work(self) -> CorpusWork:
        """What is to be answered, for the Admission."""
        assert self.manifest is not None
        return _work_of(self._spec, self.manifest, self.to_answer())

    def to_answer(self) -> list[int]:
        """The slices that are needed and not there."""
        assert self._countdown is not None
        return sorted(set(self._countdown.slices_to_do()).difference(self._found))

    def note(self, event: Event) -> Iterator[Event]:
        """Count an event, and pass on what is new of it. Ray repeats calls whose results were lost, and an Admission
        that forgot gives a slice out a second time: the second event of a slice is none."""
        if isinstance(event, SliceFailed):
            yield from self._fail(event.shards, event.reason)
        elif isinstance(event, SliceDone):
            if not self._heard[event.index]:
                yield event
                self._hear(event)
        else:
            yield event

    def take_ready(self, num_tasks: int) -> Iterator[tuple[list[Shard], dict[str, int], dict[str, Kept]]]:
        """Shards that have all their slices: what each `merge_corpus_task` takes, of which `num_tasks` run at once."""
        shards, self._ready = list(self._ready), deque()
        even = -(-sum(shard.num_rows for shard in shards) // num_tasks)
        for together in group_by_rows(shards, min(PASS_ROWS, max(MERGE_ROWS, even))):
            assert self._countdown is not None and self.manifest is not None
            indices = sorted({index for shard in together for index in self._countdown.slices_of(shard.name)})
            before = sorted({path for shard in together for path in self._carried_paths.get(shard.name, [])})
            sizes = {path: self._carried_bytes.get(path, 0) for path in before}
            sizes |= {slice_path(self.manifest, index): int(self._num_bytes[index]) for index in indices}
            yield together, sizes, {path: self._kept[path] for path in before}

    def finish_shard(self, done: ShardMetrics | ShardFailed) -> Event:
        """A shard was merged: slices that no other shard waits for may go."""
        if isinstance(done, ShardFailed):
            self._failed.add(done.shard)
            return done
        assert self._countdown is not None and self.manifest is not None
        self._num_published += 1
        for index in self._countdown.publish(done.shard):
            self._removing.submit(self._spec.output.remove, slice_path(self.manifest, index))
        return ShardDone(done)

    def reconcile(self) -> Iterator[Event]:
        """After the last event of a run that was not stopped: slices that are there though nobody told of them, which
        happens when a worker and the Admission are lost together; shards that miss one have failed."""
        if self.has_stopped or self._countdown is None or self.manifest is None:
            return
        missing = []
        assert self._found == [] or self._heard[self._found].all()
        for index in self.to_answer():
            name = self.manifest.slice_name(index)
            if self._spec.output.exists(name.path(CORPUS)):
                found = found_slice(self._spec.output, CORPUS, name)
                yield found
                self._hear(found)
            else:
                missing.append(index)
        for index in missing:
            shards = [self.manifest.shards[number].name for number in self.manifest.slices.shards_of(index)]
            reason = f"slice {index} of the corpus was lost with its worker; run the same command again to compute it"
            yield from self._fail(shards, reason)

    def close(self) -> None:
        """Remove the plan and what is left of its slices if every shard has its results."""
        self._removing.shutdown()
        if self._num_published == len(self._to_do):
            remove_plans(self._spec.output)

    def _hear(self, event: SliceDone) -> None:
        assert self._countdown is not None
        self._heard[event.index] = True
        self._num_bytes[event.index] = event.size_bytes
        complete = self._countdown.finish(event.index)
        self._ready.extend(self._to_do[name] for name in complete if name not in self._failed)

    def _fail(self, shards: Sequence[str], reason: str) -> Iterator[Event]:
        for shard in shards:
            if shard in self._to_do and shard not in self._failed:
                self._failed.add(shard)
                yield ShardFailed(shard, reason)
