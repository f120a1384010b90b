"""The pass of CPU tasks over all shards that makes a corpus plan: sort each shard, merge each range, write a manifest.

Polled by the driver, which sees a few numbers per shard and slice; a pass that is stopped leaves no manifest, and the
next run begins it again. Knows how planning is spread over a cluster, and nothing of how it is done.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from pipeline.corpus.shared_slices import answered_rows
from pipeline.corpus_plan.key_ranges import KeyRange, choose_ranges, shards_of
from pipeline.corpus_plan.manifest import (
    NOTHING_CARRIED,
    Carried,
    CorpusManifest,
    plan_folder,
    plan_settings,
    planned_shards,
)
from pipeline.corpus_plan.merging import RangePlan, merge_range
from pipeline.corpus_plan.planning import finish_plan
from pipeline.corpus_plan.sorted_runs import SortedShard, sort_shard
from pipeline.events import CorpusPlanning, Event, ShardFailed
from pipeline.faults import ShardFault
from pipeline.job import JobError
from pipeline.plan_tokenizer import planning_tokenizer
from pipeline.results import passthrough_columns
from pipeline.shards import Shard, open_shard
from pipeline.slice_runner import RunSpec


@ray.remote(max_retries=3)
def sort_task(spec: RunSpec, shard: Shard, folder: str, carried: list[str]) -> SortedShard | ShardFailed:
    """Sort what these slice objects have no answers to of one shard; whatever concerns only this shard is returned, not
    raised."""
    job = spec.job
    try:
        with open_shard(shard) as source:
            passthrough_columns(job, source.schema_arrow, shard.name)
        answered = answered_rows(spec.output, carried, shard.name)
        return sort_shard(job, shard, spec.output, folder, planning_tokenizer(job), answered=answered)
    except ShardFault as error:
        return ShardFailed(shard.name, str(error))


@ray.remote(max_retries=3)
def merge_range_task(spec: RunSpec, folder: str, range_: KeyRange) -> RangePlan:
    return merge_range(spec.output, folder, plan_settings(spec.job.plan), range_)


def _result_of(ref: Any) -> SortedShard | ShardFailed | RangePlan:
    """What a task returned. JobError where a merge found what an earlier task wrote damaged: that is removed then."""
    try:
        result: SortedShard | ShardFailed | RangePlan = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ShardFault):
            raise JobError(f"planning the corpus failed: {error.cause}; run the same command again") from error
        raise
    return result


class CorpusPlanner:
    """Plans these shards as one corpus. `poll()` it until `manifest` is there, or until it `has_ended` without."""

    def __init__(
        self,
        spec: RunSpec,
        spec_ref: Any,
        shards: Sequence[Shard],
        num_tasks: int,
        num_cpus: float,
        carried: Carried = NOTHING_CARRIED,
    ) -> None:
        """num_tasks: at once; num_cpus: that each reserves. carried: what is answered and not to be planned."""
        self._spec = spec
        self._spec_ref = spec_ref
        self._num_tasks = num_tasks
        self._num_cpus = num_cpus
        self._carried, self._carried_paths = carried, carried.paths_by_shard()
        self._folder = plan_folder(spec.fingerprint, plan_settings(spec.job.plan), planned_shards(shards), carried)
        self._num_shards = len(shards)
        self._to_sort = deque(shards)
        self._to_merge: deque[KeyRange] = deque()
        self._num_ranges = 0
        self._running: list[Any] = []
        self._sorted: list[SortedShard] = []
        self._ranges: list[RangePlan] = []
        self._num_failed = 0
        self._spilled_bytes = 0
        self.manifest: CorpusManifest | None = None
        self.has_ended = False
        self._started_at = time.monotonic()
        self.wall_s = 0.0

    def cancel(self) -> None:
        """Begin nothing more; what runs is ended."""
        for ref in self._running:
            ray.cancel(ref, force=True)
        self._running.clear()
        self.has_ended = True

    def poll(self) -> Iterator[Event]:
        """What has happened since; hands out the next tasks."""
        if self.has_ended:
            return
        done, self._running = (
            ray.wait(self._running, num_returns=len(self._running), timeout=0) if self._running else ([], [])
        )
        for ref in done:
            yield from self._note(_result_of(ref))
            if self.has_ended:  # whoever heard of it has cancelled
                return
        if not self._to_sort and not self._running and not self._num_ranges:
            self._choose_ranges()
        while len(self._running) < self._num_tasks and (self._to_sort or self._to_merge):
            self._running.append(self._start_next())
        if not self._running:
            self._finish()

    def _note(self, result: SortedShard | ShardFailed | RangePlan) -> Iterator[Event]:
        if isinstance(result, ShardFailed):
            self._num_failed += 1
            yield result
        elif isinstance(result, SortedShard):
            self._sorted.append(result)
            self._spilled_bytes += sum(run.offsets[-1] for run in result.runs)
        else:
            self._ranges.append(result)
            self._spilled_bytes += int(result.slices.columns["num_bytes"].sum(dtype="int64"))
        yield CorpusPlanning(
            shards_done=len(self._sorted) + self._num_failed,
            num_shards=self._num_shards,
            rows=sum(one.shard.num_rows for one in self._sorted),
            spilled_bytes=self._spilled_bytes,
            ranges_done=len(self._ranges),
            num_ranges=self._num_ranges,
        )

    def _choose_ranges(self) -> None:
        if self._sorted:
            self._to_merge.extend(choose_ranges(self._sorted))
            self._num_ranges = len(self._to_merge)

    def _start_next(self) -> Any:
        if self._to_sort:
            shard = self._to_sort.popleft()
            return sort_task.options(num_cpus=self._num_cpus).remote(
                self._spec_ref, shard, self._folder, self._carried_paths.get(shard.name, [])
            )
        return merge_range_task.options(num_cpus=self._num_cpus).remote(
            self._spec_ref, self._folder, self._to_merge.popleft()
        )

    def _finish(self) -> None:
        self.has_ended = True
        self.wall_s = time.monotonic() - self._started_at
        if self._sorted:
            self.manifest = finish_plan(
                self._spec.output,
                self._folder,
                self._spec.fingerprint,
                plan_settings(self._spec.job.plan),
                shards_of(self._sorted),
                self._ranges,
                self._carried,
                sum(one.num_answered for one in self._sorted),
            )


def share_cpus(num_cpus_left: float, cluster_cpus: float) -> tuple[int, float]:
    """How many planning tasks at once, and the CPUs that each reserves: engines wait for the plan, so all CPUs are
    used, and a pool that has reserved them must not keep planning from starting."""
    num_tasks = max(1, int(cluster_cpus))
    return num_tasks, int(min(1.0, max(0.0, num_cpus_left) / num_tasks) * 1e4) / 1e4
