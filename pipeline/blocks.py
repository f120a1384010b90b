"""One row of the dataset: a slice or a ticket on its way to an actor, or an event on its way to the driver."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from pipeline.events import EVENT_TYPES, Event

SLICE, TICKET = "slice", "ticket"


def block(kind: str, fields: Mapping[str, Any] | None = None, payload: bytes | None = None) -> pa.Table:
    """A block of this one row. kind: SLICE, with its bytes; TICKET; or the name of an event."""
    return pa.table({"kind": [kind], "fields": [json.dumps(fields or {})], "payload": pa.array([payload], pa.binary())})


def event_block(event: Event) -> pa.Table:
    return block(type(event).__name__, asdict(event))


def read_event(row: Mapping[str, Any]) -> Event:
    event: Event = EVENT_TYPES[row["kind"]](**json.loads(row["fields"]))
    return event
