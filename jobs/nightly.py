"""`shoal nightly JOB`: a run for every night. Answers what is new or changed since the last success, under a lease.

One output grows: a results file per shard, current with its input. Around the run of `jobs.run`: the lease, so that two
nights never overlap; what a killed night left; a row of history; and a warning when tonight is not as usual. A night
that finds nothing new imports neither torch nor Ray.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING, Any

from jobs.cli import EXIT_BUG, EXIT_USAGE, is_users_mistake
from jobs.named_models import named_models
from jobs.nightly_report import describe_work, history_table, print_warnings
from pipeline.bill.ledger import RunRecord
from pipeline.bill.progress import new_console
from pipeline.claim import hand_over, refuse_other_job, versions
from pipeline.events import Event
from pipeline.job import Job, load_job
from pipeline.lease import Lease, LeaseHeld, acquire, clock
from pipeline.night.history import (
    FAILED,
    LEASE_LOST,
    LIMIT,
    NOTHING_NEW,
    STOPPED,
    SUCCESS,
    Night,
    mark_killed,
    night_name,
    read_nights,
    write_night,
)
from pipeline.night.leftovers import find_vanished, remove_leftovers, remove_results
from pipeline.night.usual import find_differences
from pipeline.results import RESULTS, published_shards
from pipeline.shards import Shard, ShardList, list_shards
from pipeline.storage import Storage, StorageError

if TYPE_CHECKING:
    from actors.config import EngineConfig
    from jobs.run import Stop
    from pipeline.answering import Worker

logger = logging.getLogger(__name__)

EXIT_HELD, EXIT_UNUSUAL = 6, 7
WRITE_EVERY_S = 60.0
NIGHTS_READ = 400

_WAY_OUT = (
    "set the fields back, give another output.path (and keep both), or answer the whole corpus again here, once, "
    "with --recompute"
)


@dataclass(frozen=True, slots=True)
class NightlySettings:
    """What `shoal nightly` was asked for besides the job. wait_s: for another night that holds the lease."""

    wait_s: float = 0.0
    recompute: bool = False
    remove_vanished: bool = False
    strict: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What a night finds: shards to answer, new or changed ones; those that are done; results without an input."""

    new: list[Shard]
    changed: list[Shard]
    published: set[str]
    vanished: list[str]
    bad: list[tuple[str, str]]

    @property
    def todo(self) -> list[Shard]:
        return self.new + self.changed

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.todo)


def nightly(
    job_path: str,
    overrides: Sequence[str],
    settings: NightlySettings = NightlySettings(),
    *,
    new_worker: Callable[[EngineConfig], Worker] | None = None,
) -> int:
    """Answer what is new and return the exit code: that of a run, EXIT_HELD while another night is at work, or with
    `strict` EXIT_UNUSUAL. ValueError for a mistake in what was asked, FingerprintMismatch for another job's output.
    """
    console = new_console()

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    job = load_job(job_path, overrides).resolve(named_models())
    output = Storage(job.output.path)
    if not settings.recompute:
        refuse_other_job(output, job, _WAY_OUT)
    with _sigterm_as_exit():
        try:
            lease = acquire(output, f"shoal nightly {job_path}", wait_s=settings.wait_s, say=say)
        except LeaseHeld as held:
            print(f"shoal: {held}", file=sys.stderr)
            return EXIT_HELD
        with lease:
            started_at = datetime.now(UTC)
            night = Night(
                night=night_name(started_at, uuid.uuid4().hex[:6]),
                date=f"{started_at:%Y-%m-%d}",
                started_at=started_at,
                host=socket.gethostname(),
                fingerprint=job.fingerprint(),
                versions=versions(),
            )
            return _Nightly(job_path, overrides, settings, job, output, lease, night, say, new_worker).work()


def show_history(job_path: str, overrides: Sequence[str], last: int) -> int:
    """Print the last nights of a job's output, the oldest first, and return 0."""
    job = load_job(job_path, overrides).resolve(named_models())
    output = Storage(job.output.path)
    new_console().print(history_table(read_nights(output, last), output), highlight=False)
    return 0


def foretell(job_path: str, overrides: Sequence[str]) -> int:
    """Print what a night would do now and what that would cost, writing nothing, and return 0."""
    from jobs.nightly_report import print_price

    console = new_console()
    job = load_job(job_path, overrides).resolve(named_models())
    output = Storage(job.output.path)
    refuse_other_job(output, job, _WAY_OUT)
    work = find_work(job, output, list_shards(job))
    for line in describe_work(work.new, work.changed, work.published, work.vanished, work.bad):
        console.print(line, highlight=False, soft_wrap=True)
    if work.todo:
        print_price(console, job, output, work.todo)
    return 0


def find_work(job: Job, output: Storage, shards: ShardList) -> Work:
    """What of a job's input has no current results in the output, by one listing and a footer per shard."""
    published = published_shards(output, shards.good, job.fingerprint())
    has_results = {file.path for file in output.list(RESULTS)}
    todo = [shard for shard in shards.good if shard.name not in published]
    changed = [shard for shard in todo if f"{RESULTS}/{shard.name}.parquet" in has_results]
    present = {shard.name for shard in shards.good} | {name for name, _ in shards.bad}
    return Work(
        [shard for shard in todo if shard not in changed],
        changed,
        published,
        find_vanished(output, present),
        shards.bad,
    )


@dataclass(slots=True)
class _Nightly:
    """One night's work, from the lease to the row of history."""

    job_path: str
    overrides: Sequence[str]
    settings: NightlySettings
    job: Job
    output: Storage
    lease: Lease
    night: Night
    say: Callable[[str], None]
    new_worker: Callable[[EngineConfig], Worker] | None

    def work(self) -> int:
        nights = read_nights(self.output, NIGHTS_READ)
        for killed in mark_killed(self.output, nights):
            self._note(f"the night of {killed.started_at:%Y-%m-%d %H:%M} UTC on {killed.host} was killed; continuing")
        try:
            exit_code = self._answer_what_is_new(nights)
        except BaseException as error:
            self._end_broken(error)
            raise
        self.night.exit_code = exit_code
        differences = find_differences(self.night, nights)
        self.night.warnings = [difference.text for difference in differences]
        self._end()
        print_warnings(self.night.warnings)
        return EXIT_UNUSUAL if differences and self.settings.strict and exit_code == 0 else exit_code

    def _answer_what_is_new(self, nights: Sequence[Night]) -> int:
        shards = list_shards(self.job)
        if self.settings.recompute and hand_over(self.output, self.job):
            self._note("the job has changed: everything is answered again")
        work = find_work(self.job, self.output, shards)
        self._describe(work)
        self._clean_up(work, shards)
        if not work.todo and not work.bad and self.output.exists("_SUCCESS"):
            self.night.outcome, self.night.reason = NOTHING_NEW, "all shards are answered"
            last = next((night for night in reversed(nights) if night.outcome == SUCCESS), None)
            since = f"; last success {last.started_at:%Y-%m-%d %H:%M} UTC" if last is not None else ""
            self.say(f"nothing new{since}")
            return 0
        write_night(self.output, self.night)
        return self._run(work)

    def _run(self, work: Work) -> int:
        from jobs.run import run

        attendant = _Attendant(self.night, self.lease, self.output)
        exit_code = run(self.job_path, self.overrides, new_worker=self.new_worker, onlooker=attendant)
        self.night.outcome = _outcome(exit_code, has_work=bool(work.todo))
        self.night.reason = attendant.reason
        if self.job.quality is not None:
            self._add_quality()
        return exit_code

    def _describe(self, work: Work) -> None:
        night = self.night
        night.shards_new, night.shards_changed = len(work.new), len(work.changed)
        night.shards_vanished, night.rows_due = len(work.vanished), work.num_rows
        for line in describe_work(work.new, work.changed, work.published, work.vanished, work.bad):
            self.say(line)

    def _clean_up(self, work: Work, shards: ShardList) -> None:
        unreadable = [name for name, _ in shards.bad]
        removed = remove_leftovers(self.output, shards.good, work.published, self.job.fingerprint(), unreadable)
        if removed:
            self._note(f"removed {removed}")
        if self.settings.remove_vanished and work.vanished:
            for shard in work.vanished:
                remove_results(self.output, shard)
            self._note(f"removed the results of shards whose input is gone: {len(work.vanished)}")

    def _add_quality(self) -> None:
        """What the run's own check has measured, tonight or when the job was new."""
        from pipeline.quality.quality_gate import FILE

        measured = json.loads(self.output.read_bytes(FILE))["quality"]
        self.night.quality_kl = measured["kl_mean"]["value"]
        self.night.quality_top1 = measured["top1_agreement"]["value"]
        self.night.quality_exact_match = measured["exact_match"]["value"]

    def _note(self, text: str) -> None:
        self.night.notes.append(text)
        self.say(text)

    def _end(self) -> None:
        self.night.finished_at = datetime.now(UTC)
        write_night(self.output, self.night)

    def _end_broken(self, error: BaseException) -> None:
        """Write the row of a night that ends with an error, if that is possible; the error is what has to be seen."""
        night = self.night
        if isinstance(error, SystemExit | KeyboardInterrupt):
            night.outcome = STOPPED
            night.exit_code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 130
        else:
            night.outcome, night.exit_code = FAILED, EXIT_USAGE if is_users_mistake(error) else EXIT_BUG
        night.reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        try:
            self._end()
        except Exception as also:
            error.add_note(f"the night's row of history could not be written either: {also}")


class _Attendant:
    """`jobs.run.Onlooker` of a night: counts for the history, and ends a run that has lost its lease."""

    def __init__(self, night: Night, lease: Lease, output: Storage) -> None:
        self.reason = ""
        self._night, self._lease, self._output = night, lease, output
        self._written_at = clock()

    def note(self, event: Event) -> None:
        self._night.add(event)
        if clock() - self._written_at < WRITE_EVERY_S:
            return
        self._written_at = clock()
        try:
            write_night(self._output, self._night)
        except (StorageError, OSError) as error:  # the next minute's will say the same and more
            logger.warning("the night's row of history could not be written: %s", error)

    def find_stop(self) -> Stop | None:
        if not self._lease.is_lost:
            return None
        from jobs.run import Stop

        reason = f"the lease on the output was lost: not renewed for {self._lease.holder.ttl_s:g} s, or taken over"
        return Stop(EXIT_HELD, reason, drop_at=time.monotonic())  # what is in flight may be another's by now

    def close(self, record: RunRecord) -> None:
        self._night.add_end(record)
        self.reason = record.outcome


def _outcome(exit_code: int, *, has_work: bool) -> str:
    if exit_code == 0:
        return SUCCESS if has_work else NOTHING_NEW
    if exit_code > 128:
        return STOPPED
    return {4: LIMIT, EXIT_HELD: LEASE_LOST}.get(exit_code, FAILED)


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """SIGTERM ends a night as an exception does, so that the lease is released; within a run, the run drains."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> Any:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
