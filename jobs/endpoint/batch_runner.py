"""Works on batches, one after the other, with what this replica's engine has to spare.

Of several replicas one does, under a lease. A line is answered by the same code as a request, and its answer goes into
a part of some dozens of lines; when all parts are there they become the output file and the error file. Whoever comes
after a replica that was ended answers only what no part has. No line is ever logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import secrets
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, Protocol, cast

from actors.requests import Request
from jobs.endpoint.batches import BATCHES, BatchStore
from jobs.endpoint.desk import Desk
from jobs.endpoint.files import FILES
from pipeline.batch.batch_jsonl import RawLine, read_lines
from pipeline.lease import LeaseHeld, acquire
from pipeline.openai_api.answers import ChatAnswer, TextAnswer
from pipeline.openai_api.batch_lines import (
    BatchLine,
    answer_line,
    check_line,
    load_line,
    read_body,
    repeated_custom_id,
    to_jsonl,
    unanswered_line,
)
from pipeline.openai_api.errors import ApiError
from pipeline.openai_api.fields import ChatRequest, CompletionRequest
from pipeline.storage import Storage, StorageError

logger = logging.getLogger("shoal.endpoint")

PART_LINES = 64
MAX_SHOWN_ERRORS = 100
CARELESS_STARTS = 2
"""After so many starts that ended neither with the batch nor because the replica was told to, lines are answered one at
a time: one of them may be what breaks the engine or ends the process."""

POLL_S = 2.0
"""Between two looks whether a batch was cancelled by way of another replica."""

SWEEP_S = 600.0
LEASE_S = 30.0

_WHY_UNANSWERED = {
    "cancelled": "the batch was cancelled before this request was answered",
    "expired": "the batch's 24 hours were over before this request was answered",
}

_USAGE = ("prompt_tokens", "completion_tokens", "cached_tokens")


class Answers(Protocol):
    """What a runner needs of `jobs.endpoint.endpoint.Endpoint`."""

    desk: Desk

    async def read(self, body: ChatRequest | CompletionRequest) -> list[Request]: ...

    def new_answer(self, body: ChatRequest | CompletionRequest) -> ChatAnswer | TextAnswer: ...


@dataclass(slots=True)
class _Part:
    """Answered lines: their numbers among the file's lines, and their lines for the two files by number."""

    answered: dict[int, bytes] = field(default_factory=dict)
    failed: dict[int, bytes] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_USAGE, 0))

    def __len__(self) -> int:
        return len(self.answered) + len(self.failed)

    def to_bytes(self) -> bytes:
        head = {"answered": sorted(self.answered), "failed": sorted(self.failed), "usage": self.usage}
        lines = [*(self.answered[n] for n in sorted(self.answered)), *(self.failed[n] for n in sorted(self.failed))]
        return json.dumps(head).encode() + b"\n" + b"".join(lines)

    @classmethod
    def from_bytes(cls, data: bytes) -> _Part:
        first, *lines = data.splitlines(keepends=True)
        head = json.loads(first)
        answered = dict(zip(head["answered"], lines))
        return cls(answered, dict(zip(head["failed"], lines[len(answered) :])), head["usage"])


class BatchRunner:
    """Works until `stop`. `wake` tells it that there is something new."""

    def __init__(self, store: BatchStore, answers: Answers, *, max_requests: int, lease_s: float = LEASE_S) -> None:
        self._store = store
        self._answers = answers
        self._max_requests = max_requests
        self._lease_s = lease_s
        self._news = asyncio.Event()
        self._is_stopping = False
        self._task: asyncio.Task[None] | None = None
        self._swept_at = 0.0

    def start(self) -> None:
        """Begin, in the running event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End soon; what is answered and not in a part yet is lost, and answered again by whoever comes next."""
        self._is_stopping = True
        self._news.set()
        if self._task is not None:
            await asyncio.wait({self._task})

    def wake(self) -> None:
        self._news.set()

    async def _run(self) -> None:
        while not self._is_stopping:
            try:
                await self._work_off()
            except (StorageError, OSError) as error:
                logger.error("the batches' storage failed, and is tried again: %s", error)
            except LeaseHeld:
                pass  # another replica is at it, or was until it died
            except Exception:
                logger.exception("a batch could not go on; it is tried again")
            if not self._is_stopping:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), self._lease_s / 4)
                self._news.clear()

    async def _work_off(self) -> None:
        """Take the lease if there is work, and do it."""
        if self._answers.desk.trouble is not None:
            return
        ids = await asyncio.to_thread(self._store.unfinished)
        if not ids and self._store.clock() < self._swept_at + SWEEP_S:
            return
        lease = await asyncio.to_thread(acquire, self._store.storage, "batches", ttl_s=self._lease_s)
        await asyncio.to_thread(lease.__enter__)
        try:
            while ids and not self._is_stopping and not lease.is_lost:
                await self._watch(_Work(self._store, self._answers, ids[0], self._max_requests), lease)
                ids = await asyncio.to_thread(self._store.unfinished)
                if self._answers.desk.trouble is not None:
                    return
            if self._store.clock() >= self._swept_at + SWEEP_S:
                await asyncio.to_thread(self._store.files.remove_expired)
                await asyncio.to_thread(self._store.remove_expired)
                self._swept_at = self._store.clock()
        finally:
            await asyncio.to_thread(lease.__exit__, None, None, None)

    async def _watch(self, work: _Work, lease: Any) -> None:
        """See a batch through, unless it is cancelled, expires, or somebody else is to do it."""
        task = asyncio.create_task(work.run())
        try:
            while not task.done():
                news = asyncio.create_task(self._news.wait())
                await asyncio.wait({task, news}, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
                self._news.clear()
                if self._is_stopping or lease.is_lost:
                    return
                why = await asyncio.to_thread(work.find_end)
                if why is not None and not task.done():
                    task.cancel()
                    await asyncio.wait({task})
                    await work.end_early(why)
                    return
            try:
                task.result()
            except (StorageError, OSError):
                await asyncio.to_thread(work.forgive)
                raise
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
                await asyncio.to_thread(work.forgive)


class _Work:
    """One batch, from wherever it is to its end."""

    def __init__(self, store: BatchStore, answers: Answers, batch_id: str, max_requests: int) -> None:
        self._store = store
        self._storage: Storage = store.storage
        self._answers = answers
        self._folder = f"{BATCHES}/{batch_id}"
        self._max_requests = max_requests
        self._record: dict[str, Any] = store.record(batch_id) or {}
        self._batch_id = batch_id
        self._state: dict[str, Any] = store.state(batch_id) or {"status": "validating"}
        self._done: dict[int, bool] = {}  # by line: whether it was answered well
        self._usage = dict.fromkeys(_USAGE, 0)
        self._open_parts: dict[int, _Part] = {}
        self._input: BinaryIO | None = None
        self._is_open = self._is_ending = False
        self._lock = threading.RLock()

    @property
    def _max_open_parts(self) -> int:
        """Parts that are worked on at once, so that all places for batches are taken at the end of one too."""
        return 1 + -(-self._answers.desk.max_background // PART_LINES)

    def forgive(self) -> None:
        """Note that it was nobody's fault that this start has not come to the end."""
        with self._lock:
            if self._is_open and not self._is_ending:
                self._state["num_starts"] -= 1
                self._state.pop("trying", None)
                self._save()

    def find_end(self) -> str | None:
        """Why it should end before it is done: cancelled, or expired."""
        if self._is_ending or not self._is_open:
            return None  # too late, for the files are being written; or too soon
        if self._store.cancelled_at(self._batch_id) is not None:
            return "cancelled"
        return "expired" if self._store.clock() >= self._record["expires_at"] else None

    async def run(self) -> None:
        """All of it. Cancelling loses nothing that a part holds; `end_early` needs this to be over."""
        if not await asyncio.to_thread(self._open):
            return
        self._is_open = True
        await self._answer_all()
        self._is_ending = True
        await asyncio.to_thread(self._finish, "completed")

    async def end_early(self, why: str) -> None:
        """Publish what is answered, and end; the other lines go into the error file with the reason."""
        self._is_ending = True
        await asyncio.to_thread(self._end_early, why)

    def _end_early(self, why: str) -> None:
        with self._lock:  # a thread may still be publishing a part for a task that was cancelled
            for first, part in list(self._open_parts.items()):
                if len(part):
                    self._publish(first)
            for first, chunk in self._missing():
                part = self._open_parts[first] = _Part()
                for number, raw in chunk:
                    custom_id = check_line(load_line(raw.data)).custom_id
                    line = unanswered_line(_line_id(), custom_id, f"batch_{why}", _WHY_UNANSWERED[why])
                    part.failed[number] = to_jsonl(line)
                self._publish(first)
            self._finish(why)

    # --- the input ----------------------------------------------------------------------------------------------------

    def _open(self) -> bool:
        """Copy the input here, check its lines, and see what is answered already. False if the batch has failed."""
        self._input = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  (closed with this object)
        try:
            with self._storage.open_input(f"{FILES}/{self._record['input_file_id']}/content") as source:
                while chunk := source.read(1 << 20):
                    self._input.write(chunk)
        except FileNotFoundError:
            self._fail(
                [{"code": "file_not_found", "message": "the input file was deleted", "param": None, "line": None}]
            )
            return False
        errors, num_lines = self._find_mistakes()
        if errors:
            self._fail(errors)
            return False
        for file in self._storage.list(f"{self._folder}/parts"):
            self._note(_Part.from_bytes(self._storage.read_bytes(file.path)))
        self._state.setdefault("in_progress_at", int(self._store.clock()))
        self._state["num_starts"] = self._state.get("num_starts", 0) + 1
        self._state |= {"status": "in_progress", "num_lines": num_lines}
        self._save()
        return True

    def _lines(self) -> Iterator[tuple[int, RawLine]]:
        assert self._input is not None
        self._input.seek(0)
        return enumerate(read_lines(self._input))

    def _find_mistakes(self) -> tuple[list[dict[str, Any]], int]:
        errors: list[dict[str, Any]] = []
        seen: dict[str, int] = {}
        num_lines = 0
        for _, raw in self._lines():
            num_lines += 1
            if num_lines > self._max_requests:
                text = f"the file has more than {self._max_requests} lines"
                return [{"code": "too_many_requests", "message": text, "param": None, "line": raw.number}], 0
            try:
                self._check(raw, seen)
            except ApiError as error:
                errors.append({"code": error.code, "message": str(error), "param": error.param, "line": raw.number})
            if len(errors) == MAX_SHOWN_ERRORS:
                break
        if not num_lines:
            errors = [{"code": "empty_file", "message": "the file has no lines", "param": None, "line": None}]
        return errors, num_lines

    def _check(self, raw: RawLine, seen: dict[str, int]) -> None:
        line = check_line(load_line(raw.data))
        if line.custom_id in seen:
            raise repeated_custom_id(seen[line.custom_id])
        seen[line.custom_id] = raw.number
        if line.url != self._record["endpoint"]:
            text = f"url: should be {self._record['endpoint']}, as the batch's endpoint"
            raise ApiError(400, text, param="url", code="mismatched_url")
        if line.body.get("model") != self._store.model:
            text = f"model: there is no such model here, only {self._store.model}"
            raise ApiError(404, text, param="body.model", code="model_not_found")

    def _missing(self, size: int = PART_LINES) -> Iterator[tuple[int, list[tuple[int, RawLine]]]]:
        """The lines that no part has, some at a time, by the number of the first."""
        wanted = (item for item in self._lines() if item[0] not in self._done)
        while chunk := list(itertools.islice(wanted, size)):
            yield chunk[0][0], chunk

    def _take(self, missing: Iterator[tuple[int, list[tuple[int, RawLine]]]]) -> Any:
        with self._lock:  # the file has one place to read at
            return None if self._is_ending else next(missing, None)

    # --- answering ----------------------------------------------------------------------------------------------------

    async def _answer_all(self) -> None:
        await self._answer_carefully()
        tasks: set[asyncio.Task[None]] = set()
        missing = self._missing()
        try:
            while (chunk := await asyncio.to_thread(self._take, missing)) is not None:
                tasks.add(asyncio.create_task(self._answer_part(*chunk)))
                while len(tasks) >= self._max_open_parts:
                    tasks = await _any_done(tasks)
            while tasks:
                tasks = await _any_done(tasks)
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def _answer_carefully(self) -> None:
        """If starts ended badly: answer the next lines one by one, and give up the one that a start died on. What was
        in the engine when it broke is among them, for parts are begun in their order."""
        if self._state["num_starts"] <= CARELESS_STARTS:
            return
        tried = self._state.get("trying")
        num_lines = self._max_open_parts * PART_LINES
        chunks = await asyncio.to_thread(lambda: list(itertools.islice(self._missing(1), num_lines)))
        for first, chunk in chunks:
            if first == tried:
                error = ApiError(500, "the server broke down while it answered this request", code="engine_error")
                part = self._open_parts[first] = _Part()
                part.failed[first] = to_jsonl(_refusal(check_line(load_line(chunk[0][1].data)), error))
                await asyncio.to_thread(self._publish, first)
                continue
            self._state["trying"] = first
            await asyncio.to_thread(self._save)
            await self._answer_part(first, chunk)
        self._state["num_starts"] = 1
        self._state.pop("trying", None)

    async def _answer_part(self, first: int, chunk: Iterable[tuple[int, RawLine]]) -> None:
        """Answer these lines and publish them; ApiError 503 if the engine broke."""
        part = self._open_parts[first] = _Part()
        async with asyncio.TaskGroup() as group:
            for number, raw in chunk:
                line = check_line(load_line(raw.data))
                try:
                    body = read_body(line, self._store.model)
                    requests = await self._answers.read(body)
                except ApiError as error:
                    part.failed[number] = to_jsonl(_refusal(line, error))
                    continue
                num_places = await self._answers.desk.enter_background(requests)
                task = group.create_task(self._answer_one(part, number, line, body, requests))
                # Not in the task: one that is cancelled before it has begun would keep its places.
                task.add_done_callback(partial(_give_back, self._answers.desk, num_places))
        await asyncio.to_thread(self._publish, first)

    async def _answer_one(
        self,
        part: _Part,
        number: int,
        line: BatchLine,
        body: ChatRequest | CompletionRequest,
        requests: list[Request],
    ) -> None:
        try:
            completions = await self._answers.desk.answer_in_background(requests)
        except ApiError as error:
            if error.status == 503:
                raise
            part.failed[number] = to_jsonl(_refusal(line, error))
            return
        answer = self._answers.new_answer(body).whole(completions)
        part.answered[number] = to_jsonl(answer_line(_line_id(), line.custom_id, 200, answer))
        usage = answer["usage"]
        for name in ("prompt_tokens", "completion_tokens"):
            part.usage[name] += usage[name]
        part.usage["cached_tokens"] += usage["prompt_tokens_details"]["cached_tokens"]

    # --- what is kept -------------------------------------------------------------------------------------------------

    def _publish(self, first: int) -> None:
        """Write the open part that begins with this line, unless that has been done."""
        with self._lock:
            part = self._open_parts.pop(first, None)
            if part is None:
                return
            self._storage.write_whole(f"{self._folder}/parts/{first:08d}.jsonl", part.to_bytes())
            self._note(part)
            self._save()

    def _note(self, part: _Part) -> None:
        self._done |= {**dict.fromkeys(part.answered, True), **dict.fromkeys(part.failed, False)}
        for name, number in part.usage.items():
            self._usage[name] += number

    def _finish(self, how: str) -> None:
        """Write the files of all parts, and the end."""
        self._state |= {"status": "finalizing", "finalizing_at": int(self._store.clock())}
        self._save()
        parts = [
            _Part.from_bytes(self._storage.read_bytes(file.path))
            for file in self._storage.list(f"{self._folder}/parts")
        ]
        lines = {number: (True, data) for part in parts for number, data in part.answered.items()}
        lines |= {number: (False, data) for part in parts for number, data in part.failed.items()}
        if len(lines) != self._state["num_lines"]:
            raise StorageError(f"{self._batch_id}: {self._state['num_lines']} lines, and {len(lines)} in its parts")
        for key, wanted, suffix in (("output_file_id", True, "output"), ("error_file_id", False, "error")):
            data = b"".join(line for _, (is_good, line) in sorted(lines.items()) if is_good is wanted)
            if data:
                name = f"{self._batch_id}_{suffix}.jsonl"
                keep_s = self._record["output_expires_after_s"]
                self._store.files.add(data, name, "batch_output", keep_s, file_id=self._record[key])
                self._state[key] = self._record[key]
        self._state |= {"status": how, f"{how}_at": int(self._store.clock())}
        self._end()

    def _fail(self, errors: list[dict[str, Any]]) -> None:
        self._is_ending = True
        self._state |= {
            "status": "failed",
            "failed_at": int(self._store.clock()),
            "errors": {"object": "list", "data": errors},
        }
        self._end()

    def _end(self) -> None:
        self._count()
        self._storage.write_whole(f"{self._folder}/done.json", json.dumps(self._state).encode())
        self._storage.remove_tree(f"{self._folder}/parts")

    def _save(self) -> None:
        self._count()
        self._storage.write_whole(f"{self._folder}/state.json", json.dumps(self._state).encode())

    def _count(self) -> None:
        num_good = sum(list(self._done.values()))
        num_all = self._state.get("num_lines", 0)
        counts = {"total": num_all, "completed": num_good, "failed": len(self._done) - num_good}
        usage = self._usage
        self._state["request_counts"] = counts
        self._state["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": usage["cached_tokens"]},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
        }


def _give_back(desk: Desk, num_places: int, task: asyncio.Task[None]) -> None:
    desk.leave_background(num_places)


async def _any_done(tasks: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Wait for one of them, raise what it raised, and return the others."""
    done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return rest


def _refusal(line: BatchLine, error: ApiError) -> dict[str, Any]:
    return answer_line(_line_id(), line.custom_id, error.status, error.body)


def _line_id() -> str:
    return secrets.token_hex(12)
