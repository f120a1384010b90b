"""`shoal status OUTPUT`: how far a run is and what it cost, from the files that it has published."""

from __future__ import annotations

import json

from jobs.predicted import print_predicted
from pipeline.bill.ledger import InProgress, read_bill, read_in_progress
from pipeline.bill.progress import bill_table, new_console
from pipeline.corpus_plan.manifest import CORPUS
from pipeline.storage import Storage, StorageError, public_uri


def status(output: str) -> int:
    """Print the bill of an output, finished or not; StorageError if it is no output of a run."""
    storage = Storage(output)
    place = public_uri(storage.uri)
    try:
        started = json.loads(storage.read_bytes("run.json"))
    except FileNotFoundError as error:
        raise StorageError(f"{place} has no run.json, so no run has begun there; give the job's output.path") from error
    in_progress = read_in_progress(storage)
    console = new_console()
    console.print(
        _describe(started["fingerprint"], storage.exists("_SUCCESS"), in_progress), highlight=False, soft_wrap=True
    )
    bill = read_bill(storage)
    console.print(bill_table(bill, place, in_progress), highlight=False)
    print_predicted(console, storage, bill, started["fingerprint"])
    return 0


def _describe(fingerprint: str, is_done: bool, in_progress: InProgress) -> str:
    state = "complete" if is_done else "not complete: run the same command again to continue"
    lines = [f"job {fingerprint[:12]}, {state}"]
    for shard, (num_done, num_slices) in sorted(in_progress.slices_by_shard.items()):
        what = "all shards, planned as one corpus" if shard == CORPUS else f"shard {shard}"
        lines.append(f"  {what}: {num_done} of {num_slices} slices")
    return "\n".join(lines)
