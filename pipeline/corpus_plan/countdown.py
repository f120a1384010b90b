"""Which shards of a planned corpus have all their slices, and which slice objects nobody needs any more.

A slice answers rows of several shards and a shard has rows in many slices: this counts both down. Held by the driver: 8
bytes per slice and shard. Knows no Ray and no files.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from pipeline.corpus_plan.manifest import CorpusManifest


class Countdown:
    """The slices and shards of a plan that are still to be done. published: names of shards that have their results."""

    def __init__(self, manifest: CorpusManifest, published: Collection[str] = ()) -> None:
        self._manifest = manifest
        slices = manifest.slices
        self._number = {shard.name: number for number, shard in enumerate(manifest.shards)}
        self._slices_left = np.bincount(slices.shards, minlength=len(manifest.shards))
        self._shards_left = np.diff(slices.shard_offsets)
        self._is_published = np.zeros(len(manifest.shards), bool)
        self._is_done = np.zeros(len(slices), bool)
        for name in published:
            if name in self._number:
                self.publish(name)

    def is_needed(self, index: int) -> bool:
        """Whether the slice has rows of a shard that is not published."""
        return bool(self._shards_left[index] > 0)

    def slices_to_do(self) -> list[int]:
        """The slices that are needed and not done, in prefix order."""
        return [int(index) for index in np.flatnonzero((self._shards_left > 0) & ~self._is_done)]

    def finish(self, index: int) -> list[str]:
        """A slice object is there: the shards that now have all their slices and no results. Once per slice counts."""
        if self._is_done[index]:
            return []
        self._is_done[index] = True
        shards = self._manifest.slices.shards_of(index)
        self._slices_left[shards] -= 1
        complete = shards[(self._slices_left[shards] == 0) & ~self._is_published[shards]]
        return [self._manifest.shards[number].name for number in complete]

    def empty_shards(self) -> list[str]:
        """Shards without rows, and so without slices: they have all they need from the beginning."""
        numbers = np.flatnonzero(np.bincount(self._manifest.slices.shards, minlength=len(self._number)) == 0)
        return [self._manifest.shards[number].name for number in numbers if not self._is_published[number]]

    def slices_of(self, shard: str) -> list[int]:
        """The slices that answer rows of this shard, in prefix order."""
        return self._manifest.slices.slices_of(self._number[shard]).tolist()

    def publish(self, shard: str) -> list[int]:
        """A shard has its results: the slices that no other shard waits for. Their objects may go."""
        number = self._number[shard]
        if self._is_published[number]:
            return []
        self._is_published[number] = True
        slices = self._manifest.slices.slices_of(number)
        self._shards_left[slices] -= 1
        return slices[self._shards_left[slices] == 0].tolist()
