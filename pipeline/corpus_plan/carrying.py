"""What was answered by an earlier plan of a corpus, and is still good when that plan does not hold any more.

A row's answer depends on the job, the row and its seed, so a shard that is new, or one that changed, leaves all others'
answers as they are: their slice objects are kept, and only other rows are planned again. Knows no Ray and no engine.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from pipeline.corpus.shared_slices import Kept
from pipeline.corpus_plan.manifest import (
    CORPUS,
    MANIFEST,
    PLANS,
    Carried,
    CarriedSlice,
    CorpusManifest,
    Inheritance,
    PlannedShard,
    read_manifest,
)
from pipeline.results import RESULTS, is_published
from pipeline.shards import Shard, ShardError
from pipeline.storage import Storage


def find_carried(
    storage: Storage, fingerprint: str, listed: Sequence[Shard], to_do: Sequence[Shard], paths: Collection[str]
) -> Carried:
    """The answers to rows of `to_do` in slice objects of the last plan, and in those that it had from plans before.

    listed: all shards that the input has now; to_do: those without results. paths: of the slice objects there are.
    """
    last = max(_plans_of(storage, fingerprint), key=lambda plan: plan.carried.generation, default=None)
    if last is None:
        return Carried()
    fates = _Fates(storage, fingerprint, listed, to_do)
    shards: dict[PlannedShard, int] = {}

    def number(some: Sequence[PlannedShard]) -> tuple[int, ...]:
        return tuple(shards.setdefault(shard, len(shards)) for shard in some)

    slices = []
    for path, own, lost in _slices_of(last):
        if path not in paths:
            continue
        kept = [shard for shard in own if fates.is_kept(shard)]
        if not kept:
            continue
        inherited: list[Inheritance] = [(number(gone), number(heirs)) for gone, heirs in lost]
        if newly := [shard for shard in own if fates.is_lost(shard)]:
            inherited.append((number(newly), number(kept)))
        slices.append(CarriedSlice(path, number(kept), tuple(inherited)))
    return Carried(last.carried.generation + 1, tuple(shards), tuple(slices))


def kept_answers(carried: Carried) -> dict[str, Kept]:
    """What `read_shared_slices` has to know of carried slices, by path."""
    names = carried.names
    return {
        one.path: Kept(frozenset(names(one.shards)), [(names(gone), names(heirs)) for gone, heirs in one.lost])
        for one in carried.slices
    }


_Lost = list[tuple[list[PlannedShard], list[PlannedShard]]]


def _slices_of(plan: CorpusManifest) -> Iterator[tuple[str, list[PlannedShard], _Lost]]:
    """The slice objects of a plan, its own and those that it carries: path, shards, and `CarriedSlice.lost`."""
    for index in range(len(plan.slices)):
        yield plan.slice_name(index).path(CORPUS), [plan.shards[n] for n in plan.slices.shards_of(index)], []
    known = plan.carried.shards
    for one in plan.carried.slices:
        lost = [([known[n] for n in gone], [known[n] for n in heirs]) for gone, heirs in one.lost]
        yield one.path, [known[n] for n in one.shards], lost


def _plans_of(storage: Storage, fingerprint: str) -> Iterator[CorpusManifest]:
    for file in storage.list(PLANS):
        folder, _, name = file.path.rpartition("/")
        if name != MANIFEST:
            continue
        try:
            manifest = read_manifest(storage, folder)
        except ShardError:  # `find_manifest` says so
            continue
        if manifest.fingerprint == fingerprint:
            yield manifest


class _Fates:
    """What has become of shards since they were planned."""

    def __init__(self, storage: Storage, fingerprint: str, listed: Sequence[Shard], to_do: Sequence[Shard]) -> None:
        self._storage = storage
        self._fingerprint = fingerprint
        self._now = {shard.name: shard for shard in listed}
        self._to_do = {shard.name for shard in to_do}
        self._results = {file.path: file for file in storage.list(RESULTS)}
        self._is_lost: dict[PlannedShard, bool] = {}

    def is_kept(self, shard: PlannedShard) -> bool:
        return shard.name in self._to_do and self._is_unchanged(shard)

    def is_lost(self, shard: PlannedShard) -> bool:
        """Whether it changed or went before it had results: on no bill is what it cost then."""
        if shard not in self._is_lost:
            before = Shard(shard.name, "", 0, shard.etag, shard.num_rows)
            self._is_lost[shard] = not self._is_unchanged(shard) and not is_published(
                self._storage, before, self._fingerprint, self._results
            )
        return self._is_lost[shard]

    def _is_unchanged(self, shard: PlannedShard) -> bool:
        return shard.name in self._now and shard.is_still(self._now[shard.name])
