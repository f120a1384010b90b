"""A corpus plan from beginning to end: shards are sorted, ranges merged, and the manifest written.

The steps are plain functions of a few small arguments, so that whoever has many processes can spread them:
`sort_shard` once per shard, `choose_ranges` once, `merge_range` once per range, `finish_plan` once. Knows no Ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.corpus.shared_slices import answered_rows
from pipeline.corpus_plan.key_ranges import RANGE_WEIGHT, choose_ranges, shards_of
from pipeline.corpus_plan.manifest import (
    CORPUS,
    NOTHING_CARRIED,
    PLANS,
    Carried,
    CorpusManifest,
    PlannedShard,
    PlanTotals,
    SliceTable,
    corpus_etag,
    plan_folder,
    plan_settings,
    planned_shards,
)
from pipeline.corpus_plan.merging import RangePlan, merge_range
from pipeline.corpus_plan.sorted_runs import RUN_WEIGHT, count_shared, sort_shard
from pipeline.job import Job
from pipeline.shards import Shard
from pipeline.slices import SLICES, list_slices
from pipeline.storage import Storage


def plan_corpus(
    job: Job,
    fingerprint: str,
    shards: Sequence[Shard],
    storage: Storage,
    tokenizer: Any,
    run_weight: int = RUN_WEIGHT,
    range_weight: int = RANGE_WEIGHT,
    carried: Carried = NOTHING_CARRIED,
) -> CorpusManifest:
    """Plan these shards in this process, one step after the other. ShardError for a file that cannot be read.

    job: resolved. run_weight, range_weight: what to hold in memory at once, in tokens and rows' weights. carried: of
    `find_carried`; rows that it answers are not planned.
    """
    settings = plan_settings(job.plan)
    folder = plan_folder(fingerprint, settings, planned_shards(shards), carried)
    paths = carried.paths_by_shard()
    sorted_shards = [
        sort_shard(
            job,
            shard,
            storage,
            folder,
            tokenizer,
            run_weight,
            answered_rows(storage, paths.get(shard.name, []), shard.name),
        )
        for shard in shards
    ]
    ranges = choose_ranges(sorted_shards, range_weight)
    plans = [merge_range(storage, folder, settings, range_) for range_ in ranges]
    num_carried = sum(one.num_answered for one in sorted_shards)
    return finish_plan(storage, folder, fingerprint, settings, shards_of(sorted_shards), plans, carried, num_carried)


def finish_plan(
    storage: Storage,
    folder: str,
    fingerprint: str,
    settings: dict[str, int],
    shards: Sequence[PlannedShard],
    plans: Sequence[RangePlan],
    carried: Carried = NOTHING_CARRIED,
    num_rows_carried: int = 0,
) -> CorpusManifest:
    """Put ranges together, write the manifest, and then remove the sorted runs. shards: of `shards_of`.

    carried: answers of earlier plans, to so many of the shards' rows; these are in no range.
    """
    totals, tables = PlanTotals(num_rows_carried=num_rows_carried), []
    digest = hashlib.blake2b(f"{fingerprint}\x1f{corpus_etag(shards)}".encode(), digest_size=16)
    last_order: bytes | None = None
    for plan in sorted(plans, key=lambda plan: plan.index):
        totals += plan.totals
        digest.update(plan.digest)
        if plan.first_order is None:
            continue
        # An engine has to compute a prompt's last token to answer it, so that one is never shared.
        length = len(plan.first_order) // 4
        shared = 0 if last_order is None else max(0, min(count_shared(last_order, plan.first_order), length - 1))
        totals = replace(totals, achievable_prefix_tokens=totals.achievable_prefix_tokens + shared)
        tables.append(_continued(plan.slices, shared))
        last_order = plan.last_order
    expected = sum(shard.num_rows for shard in shards) - num_rows_carried
    assert totals.num_rows == expected, f"{totals.num_rows} rows were planned, and {expected} are to be answered"
    manifest = CorpusManifest(
        fingerprint=fingerprint,
        etag=corpus_etag(shards),
        plan_id=digest.hexdigest(),
        folder=folder,
        settings=settings,
        shards=list(shards),
        totals=totals,
        slices=SliceTable.concatenate(tables),
        carried=carried,
    )
    manifest.write(storage)
    storage.remove_tree(f"{folder}/sorted")
    return manifest


def remove_other_plans(storage: Storage, manifest: CorpusManifest) -> None:
    """Remove plans that do not hold any more, and slice objects that answer them and are not carried."""
    for folder in {"/".join(file.path.split("/")[:2]) for file in storage.list(PLANS)} - {manifest.folder}:
        storage.remove_tree(folder)
    carried = {one.path for one in manifest.carried.slices}
    for path, name in list_slices(storage, CORPUS).get(CORPUS, {}).items():
        if not manifest.owns(name) and path not in carried:
            storage.remove(path)


def remove_plans(storage: Storage) -> None:
    """Remove all that a corpus plan left beside the results. For when every shard has its own."""
    storage.remove_tree(PLANS)
    storage.remove_tree(f"{SLICES}/{CORPUS}")


def _continued(slices: SliceTable, shared: int) -> SliceTable:
    """A range's slices, the first of which has `shared` tokens in common with what comes before."""
    columns = {name: column.copy() for name, column in slices.columns.items()}
    columns["shared_with_previous"][0] = shared
    columns["computed_tokens"][0] -= shared
    columns["shared_within"][0] = min(shared, int(columns["shared_within"][0]))
    return SliceTable(slices.paths, columns, slices.shard_offsets, np.asarray(slices.shards))
