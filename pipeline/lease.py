"""A lease on an output: of many programs that want to work on it, one does, and the others can say who.

A lease is a numbered term, `_lease/<term>.json`; the highest term holds. To take over is to create the next term, and a
store creates an object for one of many only (`Storage.create_exclusive`), so that no two can win. The holder writes its
term again every few seconds; one that has not been written for its time to live may be taken over. Ages are
differences of the store's own times of writing, so that no clocks have to agree.

Guards money, not rows: slices and results are named by what they hold, so that two at work on one output write the
same. Knows no job. Used by `jobs.nightly`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from pipeline.storage import Storage, StorageError, public_uri

logger = logging.getLogger(__name__)

FOLDER = "_lease"
TTL_S = 120.0
RENEWALS_PER_TTL = 8
WAIT_STEP_S = 5.0
MAX_ATTEMPTS = 100
"""To lose so many races in a row takes a store that lies."""

_TERM = re.compile(rf"{FOLDER}/(\d{{8}})\.json")


class LeaseHeld(ValueError):  # noqa: N818  (it is what happened)
    """Somebody else works on this output; the message says who and since when."""


@dataclass(frozen=True, slots=True)
class Holder:
    """What a term says. `token` tells this holder from all others; `ttl_s` is how long it counts without a renewal."""

    token: str
    owner: str
    host: str
    pid: int
    started_at: str
    ttl_s: float
    renewed_at: str
    released: bool = False

    def __str__(self) -> str:
        return f"{self.owner} on {self.host} (process {self.pid}), since {self.started_at}"


class Lease:
    """A term that this process holds, renewed by a thread. A context manager: leaving it releases the term.

    `is_lost` is for whoever works under the lease to ask again and again: once it is true, the output may be another's.
    """

    def __init__(
        self, output: Storage, term: int, holder: Holder, taken_from: Holder | None, written_at: float
    ) -> None:
        """written_at: on `clock`, before the term was written. taken_from: who held it and never released it."""
        self.term = term
        self.holder = holder
        self.taken_from = taken_from
        self._output = output
        self._renewed_at = written_at
        self._has_lost = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_lost(self) -> bool:
        """Whether another has taken over, or may have: a process that slept longer than its term lasts cannot know."""
        return self._has_lost or clock() - self._renewed_at >= self.holder.ttl_s

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._keep_renewing, daemon=True, name="lease")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.release()

    def renew(self) -> None:
        """Say that the holder lives, and look whether it still holds; StorageError if that cannot be found out."""
        if self.is_lost:
            self._has_lost = True
            return
        before = clock()
        mine = _read(self._output, self.term)
        if mine is None or mine.token != self.holder.token:  # the second where a store let two create it
            self._has_lost = True
            return
        self.holder = replace(self.holder, renewed_at=datetime.now(UTC).isoformat())
        # First write, then look. A taker looks after it has created its term (`_take`): one of the two sees the other.
        self._output.write_whole(_path(self.term), _to_bytes(self.holder))
        if _highest(self._output) != self.term:
            self._has_lost = True
        else:
            self._renewed_at = before

    def release(self) -> None:
        """Let the next one take it at once. The term stays, as the mark that its number was used."""
        if self.is_lost:
            return
        try:
            self._output.write_whole(_path(self.term), _to_bytes(replace(self.holder, released=True)))
        except (StorageError, OSError) as error:
            logger.warning("the lease on %s was not released and runs out by itself: %s", self._place, error)

    @property
    def _place(self) -> str:
        return public_uri(self._output.uri)

    def _keep_renewing(self) -> None:
        while not self._stop.wait(self.holder.ttl_s / RENEWALS_PER_TTL) and not self._has_lost:
            try:
                self.renew()
            except (StorageError, OSError) as error:  # a store that is away for a moment; is_lost has the last word
                logger.warning("the lease on %s could not be renewed, and will be tried again: %s", self._place, error)


def acquire(
    output: Storage,
    owner: str,
    *,
    ttl_s: float = TTL_S,
    wait_s: float = 0.0,
    say: Callable[[str], None] = lambda text: None,
) -> Lease:
    """Take the lease, at once or within `wait_s`; LeaseHeld if somebody else holds it. To be entered by `with`.

    owner: who this is, for the others' messages. say: is told once whom it waits for.
    """
    deadline = clock() + wait_s
    is_told = False
    while True:
        try:
            return _try_acquire(output, owner, ttl_s)
        except LeaseHeld as held:
            left_s = deadline - clock()
            if left_s <= 0:
                raise
            if not is_told:
                say(f"waiting for at most {wait_s:g} s: {held}")
                is_told = True
            time.sleep(min(WAIT_STEP_S, left_s))


def read_holder(output: Storage) -> Holder | None:
    """Who holds the lease; None for nobody. One that has not been renewed in time is nobody."""
    for _ in range(MAX_ATTEMPTS):
        term = _highest(output)
        holder = _read(output, term) if term else None
        if holder is None or holder.released:
            return None
        age_s = _age_s(output, term)
        if age_s is not None:  # else it went while it was looked at
            return holder if age_s < holder.ttl_s else None
    return None


def clock() -> float:
    """Seconds that go on while a machine sleeps, where the system counts such."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _try_acquire(output: Storage, owner: str, ttl_s: float) -> Lease:
    for _ in range(MAX_ATTEMPTS):
        last = _highest(output)
        before = output.info(_path(last)) if last else None
        holder = _read(output, last) if last else None
        if last and (holder is None or before is None):
            continue  # a term that went while it was looked at: there is a higher one now
        age_s = math.inf if holder is None or holder.released else _age_s(output, last)
        if age_s is None:
            continue
        if holder is not None and age_s < holder.ttl_s:
            raise LeaseHeld(
                f"{public_uri(output.uri)} is being worked on by {holder}; wait for it (--wait), or end it there. "
                f"Should it be dead, its lease runs out {holder.ttl_s:g} s after it was last renewed"
            )
        lease = _take(output, owner, ttl_s, last, None if holder is None or holder.released else holder)
        if lease is not None:
            return lease
    raise StorageError(
        f"{public_uri(output.uri)}: lost {MAX_ATTEMPTS} races for the lease in a row; does it keep what is written?"
    )


def _take(output: Storage, owner: str, ttl_s: float, last: int, dead: Holder | None) -> Lease | None:
    """Create the term after `last` for this process; None if that has come to nothing, and a new look is due."""
    seen = output.info(_path(last)) if dead is not None else None
    if dead is not None:
        age_s = _age_s(output, last)
        if seen is None or age_s is None or age_s < dead.ttl_s:
            return None
    term, written_at = last + 1, clock()
    holder = Holder(uuid.uuid4().hex, owner, socket.gethostname(), os.getpid(), _now(), ttl_s, _now())
    if not output.create_exclusive(_path(term), _to_bytes(holder)):
        return None
    # A slow taker may create a number that was used and removed; then a higher one is there. And a holder that was
    # thought dead may have renewed between the look and the taking: it is left in its place.
    has_come_back = dead is not None and output.info(_path(last)) != seen
    if has_come_back or _highest(output) != term:
        output.remove(_path(term))
        return None
    for older in _terms(output):
        if older < term:
            output.remove(_path(older))
    return Lease(output, term, holder, dead, written_at)


def _age_s(output: Storage, term: int) -> float | None:
    """Seconds by the store's clock since the term was last written; None if it has gone: then there is a higher one."""
    written_at = output.modified_at(_path(term))
    probe = f"{FOLDER}/clock-{uuid.uuid4().hex}"
    output.write_whole(probe, b"")
    now = output.modified_at(probe)
    output.remove(probe)
    return None if written_at is None or now is None else now - written_at


def _terms(output: Storage) -> list[int]:
    found = (_TERM.fullmatch(file.path) for file in output.list(FOLDER))
    return sorted(int(match[1]) for match in found if match)


def _highest(output: Storage) -> int:
    return max(_terms(output), default=0)


def _path(term: int) -> str:
    return f"{FOLDER}/{term:08d}.json"


def _read(output: Storage, term: int) -> Holder | None:
    try:
        data = output.read_bytes(_path(term))
    except FileNotFoundError:
        return None
    try:
        return Holder(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise StorageError(f"{public_uri(output.uri_of(_path(term)))} is no lease ({error}); remove it") from error


def _to_bytes(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=2).encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
