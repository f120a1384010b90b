"""What a night that was killed leaves in an output, found and removed by the next one; what can be continued stays.

Stays: slices of the current job and input (the next run continues with them), `_plan/`, `_drafts/`, `_runs/`, and
whatever Shoal does not know. Knows no Ray. For the holder of the lease; a `shoal run` at the same time loses nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipeline.batch.batch_output import BATCH_OUTPUT, FAILED_LINES
from pipeline.claim import FILE as CLAIM
from pipeline.corpus_plan.manifest import CORPUS
from pipeline.lease import FOLDER as LEASE_FOLDER
from pipeline.results import ERRORS, METRICS, RESULTS
from pipeline.shards import Shard
from pipeline.slices import list_slices
from pipeline.storage import Storage

MIN_AGE_S = 3600.0
"""A half-written file is removed once it is this old: before, its writer may live."""

_PROBE = re.compile(
    rf"({re.escape(CLAIM)}|{LEASE_FOLDER}/\d+\.json)\.probe-[0-9a-f]{{32}}|{LEASE_FOLDER}/clock-[0-9a-f]{{32}}"
)


@dataclass(frozen=True, slots=True)
class Removed:
    """How many of each kind were removed."""

    slices: int = 0
    probes: int = 0
    unfinished: int = 0

    def __str__(self) -> str:
        parts = {
            "slices of an older input or job, or of finished shards": self.slices,
            "probes of the store": self.probes,
            "half-written files": self.unfinished,
        }
        return ", ".join(f"{number} {name}" for name, number in parts.items() if number)

    def __bool__(self) -> bool:
        return bool(self.slices or self.probes or self.unfinished)


def remove_leftovers(
    output: Storage, shards: Sequence[Shard], published: Collection[str], fingerprint: str, keep: Collection[str] = ()
) -> Removed:
    """Remove what nothing will use. shards: the current input; published: names of those that are done.

    keep: shards whose file cannot be read now and may be readable tomorrow.
    """
    etags = {shard.name: shard.etag for shard in shards if shard.name not in published}
    num_slices = 0
    for shard, slices in list_slices(output).items():
        for path, name in slices.items():
            if shard == CORPUS:  # rows of many shards: which inputs they were, only their plan knows
                is_usable = name.job == fingerprint[:12] and bool(etags or keep)
            else:
                is_usable = shard in keep or (shard in etags and name.belongs_to(fingerprint, etags[shard]))
            if not is_usable:
                output.remove(path)
                num_slices += 1
    candidates = [*output.glob(f"{CLAIM}.probe-*"), *output.list(LEASE_FOLDER)]
    probes = [file.path for file in candidates if _PROBE.fullmatch(file.path)]
    for path in probes:
        output.remove(path)
    return Removed(num_slices, len(probes), output.remove_unfinished(MIN_AGE_S))


def find_vanished(output: Storage, present: Collection[str]) -> list[str]:
    """Names of the shards that have results and no input any more."""
    names = (file.path.removeprefix(f"{RESULTS}/").removesuffix(".parquet") for file in output.list(RESULTS))
    return sorted(name for name in names if name not in present)


def remove_results(output: Storage, shard: str) -> None:
    """Remove all that was published of a shard; the results first, so that no half is taken for the whole."""
    for folder in (RESULTS, ERRORS, METRICS):
        output.remove(f"{folder}/{shard}.parquet")
    for path in (f"{BATCH_OUTPUT}/{shard}", f"{BATCH_OUTPUT}/{shard}_errors", f"{FAILED_LINES}/{shard}"):
        output.remove(f"{path}.jsonl")
    output.remove("_SUCCESS")  # its sums have the shard
