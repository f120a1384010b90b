"""run.json: which job an output belongs to. An output holds the answers of one job, told by its fingerprint.

Knows no Ray and no engine. Written by `jobs.run`, and anew by `jobs.nightly` when all is to be computed again.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from datetime import UTC, datetime
from typing import Any

from pipeline.job import FingerprintMismatch, Job, diff_fingerprints
from pipeline.storage import Storage, public_uri

FILE = "run.json"
_VERSIONS_OF = ("shoal", "ray", "torch", "transformers", "pyarrow")


def claim_output(output: Storage, job: Job) -> None:
    """Write run.json if there is none; FingerprintMismatch if there is one of another job."""
    if not output.create_exclusive(FILE, _claim_of(job)):
        refuse_other_job(output, job)


def refuse_other_job(
    output: Storage, job: Job, way_out: str = "give another output.path, or set the fields back"
) -> None:
    """FingerprintMismatch if the output is another job's; none of anybody's is fine."""
    theirs = read_claim(output)
    if theirs is None or theirs["fingerprint"] == job.fingerprint():
        return
    differences = "\n".join(f"  {line}" for line in diff_fingerprints(theirs["fields"], job.fingerprint_fields()))
    raise FingerprintMismatch(
        f"{public_uri(output.uri)} holds the answers of another job, and these fields differ:\n{differences}\n{way_out}"
    )


def hand_over(output: Storage, job: Job) -> bool:
    """Make the output this job's, whosever it was; True if it was another's, whose answers then count as old."""
    theirs = read_claim(output)
    if theirs is None or theirs["fingerprint"] == job.fingerprint():
        return False
    output.remove("_SUCCESS")
    output.write_whole(FILE, _claim_of(job))
    return True


def read_claim(output: Storage) -> dict[str, Any] | None:
    try:
        claim: dict[str, Any] = json.loads(output.read_bytes(FILE))
    except FileNotFoundError:
        return None
    return claim


def versions() -> dict[str, str]:
    """What computes here, by distribution."""
    return {name: importlib.metadata.version(name) for name in _VERSIONS_OF}


def _claim_of(job: Job) -> bytes:
    claim = {
        "fingerprint": job.fingerprint(),
        "fields": job.fingerprint_fields(),
        "job": job.model_dump(mode="json"),
        "versions": versions(),
        "python": platform.python_version(),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return json.dumps(claim, indent=2, ensure_ascii=False).encode()
