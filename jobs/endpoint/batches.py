"""/v1/batches: what was asked for and how far it is. Objects in a storage folder, no database.

Each batch is a folder, `batches/<id>/`:

    batch.json      what was asked, written once
    state.json      how far it is; written by the one replica that works on it (`batch_runner`)
    cancel.json     that somebody wants it to stop, and since when
    parts/*.jsonl   answered lines, each part whole or not there: what a restart does not answer again
    done.json       the end; takes the place of state.json

Blocking: call it in a thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from jobs.endpoint.files import FileStore, is_id, new_id, page, read_json
from pipeline.openai_api.batch_lines import URLS
from pipeline.openai_api.errors import ApiError
from pipeline.storage import Storage

BATCHES = "batches"
WINDOW, WINDOW_S = "24h", 86400
MAX_METADATA = 16

_TIMES = (
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


class BatchStore:
    """The batches below a storage folder, and the files that they read and write."""

    def __init__(self, files: FileStore, model: str, *, keep_s: float, clock: Callable[[], float] = time.time) -> None:
        self.files = files
        self.model = model
        self._keep_s = keep_s
        self.clock = clock

    @property
    def storage(self) -> Storage:
        return self.files.storage

    def create(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Keep a batch to be worked on; ApiError for what is wrong with it before its lines are read.

        asked: `input_file_id`, `endpoint`, `completion_window`, `metadata`, `output_expires_after`."""
        if asked["completion_window"] != WINDOW:
            raise ApiError(
                400, f"completion_window: should be {WINDOW}", param="completion_window", code="invalid_value"
            )
        if asked["endpoint"] not in URLS:
            text = f"endpoint: should be {' or '.join(URLS)}"
            raise ApiError(400, text, param="endpoint", code="invalid_value")
        _check_metadata(asked.get("metadata"))
        purpose = self.files.get(asked["input_file_id"], "input_file_id")["purpose"]
        if purpose != "batch":
            text = f"input_file_id: the file was uploaded with the purpose {purpose}, should be batch"
            raise ApiError(400, text, param="input_file_id", code="invalid_value")
        created = int(self.clock())
        record = {
            "id": new_id("batch_", created),
            "created_at": created,
            "expires_at": created + WINDOW_S,
            **{key: asked.get(key) for key in ("input_file_id", "endpoint", "completion_window", "metadata")},
            "output_expires_after_s": asked.get("output_expires_after_s"),
            # Known before there is anything to put into them, so that a restart at the end writes the same files.
            "output_file_id": new_id("file-", created),
            "error_file_id": new_id("file-", created),
        }
        self.storage.write_whole(f"{BATCHES}/{record['id']}/batch.json", json.dumps(record).encode())
        return self.describe(record, None, None)

    def get(self, batch_id: str) -> dict[str, Any]:
        """A batch's object; ApiError 404 if there is none."""
        record = self.record(batch_id)
        if record is None:
            raise ApiError(404, "there is no batch with this id", param="id", code="batch_not_found")
        return self.describe(record, self.state(batch_id), self.cancelled_at(batch_id))

    def cancel(self, batch_id: str) -> dict[str, Any]:
        """Ask for the end of a batch, and return its object; ApiError if it has ended already."""
        status = self.get(batch_id)["status"]
        if status in ("completed", "failed", "expired", "cancelled"):
            raise ApiError(409, f"the batch is {status}, so it cannot be cancelled", code="batch_ended")
        if status != "cancelling":
            at = json.dumps({"cancelling_at": int(self.clock())}).encode()
            self.storage.create_exclusive(f"{BATCHES}/{batch_id}/cancel.json", at)
        return self.get(batch_id)

    def list(self, *, after: str | None, limit: int) -> dict[str, Any]:
        """One page of batches, the newest first."""
        return page(list(self._names()), self._get_or_none, after=after, limit=limit, is_newest_first=True)

    def unfinished(self) -> Any:
        """Ids of the batches that have not come to their end, oldest first."""
        return [one for one, names in sorted(self._names().items()) if "done.json" not in names]

    def record(self, batch_id: str) -> dict[str, Any] | None:
        return read_json(self.storage, f"{BATCHES}/{batch_id}/batch.json") if is_id("batch_", batch_id) else None

    def state(self, batch_id: str) -> dict[str, Any] | None:
        done = read_json(self.storage, f"{BATCHES}/{batch_id}/done.json")
        return done or read_json(self.storage, f"{BATCHES}/{batch_id}/state.json")

    def cancelled_at(self, batch_id: str) -> int | None:
        found = read_json(self.storage, f"{BATCHES}/{batch_id}/cancel.json")
        return None if found is None else int(found["cancelling_at"])

    def describe(
        self, record: dict[str, Any], state: dict[str, Any] | None, cancelling_at: int | None
    ) -> dict[str, Any]:
        """OpenAI's batch object. `state` is what the runner has written, none before it has begun."""
        state = state or {"status": "validating"}
        times = {**dict.fromkeys(_TIMES), **{key: state[key] for key in _TIMES if key in state}}
        status = state["status"]
        if cancelling_at is not None and (status == "cancelled" or status in ("validating", "in_progress")):
            times["cancelling_at"] = cancelling_at
            status = "cancelled" if status == "cancelled" else "cancelling"
        return {
            "id": record["id"],
            "object": "batch",
            "endpoint": record["endpoint"],
            "model": self.model,
            "errors": state.get("errors"),
            "input_file_id": record["input_file_id"],
            "completion_window": record["completion_window"],
            "status": status,
            "output_file_id": state.get("output_file_id"),
            "error_file_id": state.get("error_file_id"),
            "created_at": record["created_at"],
            "expires_at": record["expires_at"],
            **times,
            "request_counts": state.get("request_counts", {"total": 0, "completed": 0, "failed": 0}),
            "usage": state.get("usage"),
            "metadata": record["metadata"],
        }

    def remove_expired(self) -> None:
        """Remove the batches that ended long ago."""
        for batch_id, names in self._names().items():
            record = self.record(batch_id) if "done.json" in names else None
            if record is not None and record["expires_at"] + self._keep_s <= self.clock():
                self.storage.remove(f"{BATCHES}/{batch_id}/batch.json")
                self.storage.remove_tree(f"{BATCHES}/{batch_id}")

    def _get_or_none(self, batch_id: str) -> dict[str, Any] | None:
        record = self.record(batch_id)
        return record and self.describe(record, self.state(batch_id), self.cancelled_at(batch_id))

    def _names(self) -> dict[str, set[str]]:
        """The names in each batch's folder, of those that are there."""
        found: dict[str, set[str]] = {}
        for file in self.storage.list(BATCHES):
            _, batch_id, name = file.path.split("/", 2)
            found.setdefault(batch_id, set()).add(name)
        return {batch_id: names for batch_id, names in found.items() if "batch.json" in names}


def _check_metadata(metadata: dict[str, str] | None) -> None:
    pairs = (metadata or {}).items()
    if len(pairs) > MAX_METADATA or any(len(key) > 64 or len(value) > 512 for key, value in pairs):
        text = f"metadata: at most {MAX_METADATA} pairs, of keys of 64 characters and values of 512"
        raise ApiError(400, text, param="metadata", code="invalid_value")
