"""Settles in which order the fields of a job's prompts stand, and says what that gains before a device is paid for.

Once for an output: the order is learnt from a seeded sample of the corpus, and kept as `field_order.json`, so that
shards which come later are asked as those before were. Called by `jobs.run` and `jobs.plan`, before any prompt is made.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.fields.field_order import FieldOrder, learn_field_order
from pipeline.job import Job, JobError
from pipeline.price.corpus_sample import choose_groups, choose_shards, sample_corpus
from pipeline.price.corpus_totals import totals_of
from pipeline.prompts import field_texts
from pipeline.shards import Shard, ShardError, open_shard
from pipeline.storage import Storage, public_uri

FILE = "field_order.json"
VERSION = 1

LEARNT_ROWS = 50_000
"""Rows that an order is learnt from; a corpus that has no more is read whole. A few seconds and some 50 MB."""

GAIN_ROWS = 2000
"""Rows of which the gain is told before a run."""

_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class FieldGain:
    """Shares of prompt tokens that need not be computed at best, with the fields as written and in the order learnt."""

    as_written: float
    reordered: float

    def describe(self) -> str:
        return (
            f"fields are reordered, row by row: {self.reordered:.1%} of prompt tokens are achievable prefix hits, "
            f"{self.as_written:.1%} in the order of the template"
        )


def settle_field_order(job: Job, shards: Sequence[Shard], output: Storage, *, keep: bool) -> Job:
    """The job with its field order, which the output has already or which is learnt now; as it is without
    `plan.reorder_fields`. keep: leave an order that was learnt in the output.

    ShardError for a file that cannot be read, JobError for a field_order.json that cannot.
    """
    if not job.plan.reorder_fields:
        return job
    order = _kept_order(job, output)
    if order is None:
        order = learn_from_shards(job, shards)
        if keep:
            data = json.dumps({"version": VERSION, **order.model_dump(mode="json")}).encode()
            if not output.create_exclusive(FILE, data):
                order = _kept_order(job, output) or order  # another run was faster, and its order counts
    return _with_order(job, order)


def learn_from_shards(job: Job, shards: Sequence[Shard], num_rows: int = LEARNT_ROWS) -> FieldOrder:
    """Learn from whole shards, drawn with a fixed seed, as many as have about `num_rows`; of larger ones, from some row
    groups."""
    names = job.prompt.template_fields
    rng = random.Random(0)
    texts: dict[str, list[str]] = {name: [] for name in names}
    chosen = choose_shards(shards, num_rows, rng)
    there = max(1, sum(shard.num_rows for shard in chosen))
    for shard in chosen:
        wanted = shard.num_rows if there <= num_rows else max(1, round(num_rows * shard.num_rows / there))
        try:
            with open_shard(shard) as source:
                counts = [source.metadata.row_group(i).num_rows for i in range(source.num_row_groups)]
                groups = choose_groups(counts, wanted, rng)
                for batch in source.iter_batches(_BATCH_ROWS, row_groups=groups, columns=list(names)):
                    taken = batch.slice(0, wanted)
                    wanted -= len(taken)
                    for name in names:
                        texts[name] += field_texts(name, taken.column(name))
                    if wanted <= 0:
                        break
        except (pa.ArrowException, OSError) as error:
            raise ShardError(f"{public_uri(shard.uri)} cannot be read: {error}") from error
    return learn_field_order(texts)


def measure_gain(
    job: Job, tokenizer: Any, shards: Sequence[Shard], num_rows: int = GAIN_ROWS, seed: int = 0
) -> FieldGain:
    """Achievable prefix hits of a sample, shard by shard, both ways; of a job whose template has fields, with or
    without `plan.reorder_fields`."""
    assert job.resolved is not None
    order = job.resolved.field_order or learn_from_shards(job, shards)
    shares = []
    for one in (_with_order(job, None), _with_order(job, order)):
        totals = totals_of(sample_corpus(one, tokenizer, shards, num_rows, seed))
        shares.append(1 - float(totals.computed) / float(totals.distinct_prompt) if totals.distinct_prompt else 0.0)
    return FieldGain(*shares)


def _with_order(job: Job, order: FieldOrder | None) -> Job:
    assert job.resolved is not None
    resolved = job.resolved.model_copy(update={"field_order": order})
    plan = job.plan.model_copy(update={"reorder_fields": order is not None})
    return job.model_copy(update={"resolved": resolved, "plan": plan})


def _kept_order(job: Job, output: Storage) -> FieldOrder | None:
    """That of the output; JobError if it is of other fields, for then the answers there are of another job."""
    try:
        kept = json.loads(output.read_bytes(FILE))
        version = kept.pop("version", None)
        if version != VERSION:
            raise ValueError(f"it is of version {version!r}, this Shoal reads {VERSION}")
        order = FieldOrder.model_validate(kept)
        if order.fields != job.prompt.template_fields:
            raise ValueError(f"it orders the fields {', '.join(order.fields)}")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise JobError(
            f"{FILE} in {public_uri(output.uri)} says how fields of its prompts are ordered, and is of no use here: "
            f"{error}; give another output.path"
        ) from error
    return order
