"""A worker that answers at once, from the prompt alone, writes down what it was asked, and breaks or dies on demand.

It has EngineWorker's interface. Its module is pickled by value, so Ray's processes need not find it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from actors.config import EngineConfig
from actors.requests import Completion, DrafterStats, EngineError, Output, Request, Usage
from pipeline.admission import Admission, Attempt

FIRST_CHARACTER = 30
"""The test tokenizer's token ids are ASCII codes less this."""

DRAFTED = {"corpus": 6, "ngram": 4}
ACCEPTED = {"corpus": 5, "ngram": 1}
INDEX_WORD = "fake-index"


@dataclass(slots=True)
class FakeStats:
    load_s: float = 0.0
    busy_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    num_verify_steps: int = 0
    saved_by_speculation_s: float = 0.0
    drafters: tuple[DrafterStats, ...] = ()
    peak_pages: int = 3
    device: str = "cpu"
    notes: tuple[str, ...] = ("fake",)


@dataclass(frozen=True, slots=True)
class FakeWorkers:
    """Makes workers. `log` gets a line `pid row-id` per request that enters an engine.

    A prompt with BREAK in it breaks the engine, one with KILL kills the process; `load_s` and `delay_s` are waited.
    With `drafts`, its drafters guess DRAFTED tokens for each row and ACCEPTED of them are right, in one step; one with
    FAIL in it makes the drafter "corpus" fail.
    """

    log: Path
    delay_s: float = 0.0
    load_s: float = 0.0
    drafts: bool = False

    def __call__(self, config: EngineConfig) -> FakeWorker:
        return FakeWorker(self)

    @property
    def drafted_log(self) -> Path:
        return self.log.with_suffix(".drafted")

    def num_drafted(self) -> int:
        """Rows that drafts were made for, answered or not, over all processes."""
        return len(self.drafted_log.read_text().splitlines())

    def asked(self) -> list[str]:
        """Row ids in the order of asking, over all processes."""
        return [line.split()[1] for line in self.lines()]

    def pids(self) -> list[int]:
        return list(dict.fromkeys(int(line.split()[0]) for line in self.lines()))

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@dataclass(slots=True)
class FakeWorker:
    settings: FakeWorkers
    is_broken: bool = False
    has_failed: bool = False
    learnt: set[str] = field(default_factory=set)
    stats_: FakeStats = field(default_factory=FakeStats)

    def __post_init__(self) -> None:
        started = time.perf_counter()
        time.sleep(self.settings.load_s)
        self.stats_.load_s = time.perf_counter() - started

    async def generate(self, requests: list[Request]) -> list[Completion]:
        with self.settings.log.open("a") as log:
            log.write("".join(f"{os.getpid()} {request.request_id}\n" for request in requests))
        await asyncio.sleep(self.settings.delay_s)
        texts = [prompt_of(request) for request in requests]
        if any("KILL" in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.settings.drafts and not self.is_broken:
            self._draft(texts)
        self.is_broken |= any("BREAK" in text for text in texts)
        if self.is_broken:
            raise EngineError("the fake engine is broken")
        self.learnt.update(word for text in texts for word in text.split())
        return [self._answer(request) for request in requests]

    def stats(self) -> FakeStats:
        return FakeStats(**{name: getattr(self.stats_, name) for name in FakeStats.__slots__})

    def step_times(self) -> None:
        """It takes no steps."""

    def export_corpus_index(self) -> bytes | None:
        """The fake index: a word that says what it is, and the words of all answered prompts."""
        if not self.settings.drafts:
            return None
        return " ".join([INDEX_WORD, *sorted(self.learnt)]).encode()

    def import_corpus_index(self, data: bytes) -> bool:
        words = data.decode().split()
        if words[:1] != [INDEX_WORD]:
            return False
        self.learnt.update(words[1:])
        return True

    def close(self) -> None:
        self.is_broken = True

    def _draft(self, prompts: list[str]) -> None:
        """Count drafts for these rows, before it is known whether the engine breaks on them."""
        with self.settings.drafted_log.open("a") as log:
            log.write("row\n" * len(prompts))
        stats = self.stats_
        stats.num_verify_steps += len(prompts)
        stats.saved_by_speculation_s += 0.25 * len(prompts)
        self.has_failed |= any("FAIL" in prompt for prompt in prompts)
        seen = {drafter.name: drafter for drafter in stats.drafters}
        stats.drafters = tuple(
            DrafterStats(
                name,
                len(prompts) * DRAFTED[name] + (seen[name].drafted_tokens if seen else 0),
                len(prompts) * ACCEPTED[name] + (seen[name].accepted_tokens if seen else 0),
                proposing_s=0.0,
                failed="out of luck" if name == "corpus" and self.has_failed else "",
            )
            for name in DRAFTED
        )

    def _answer(self, request: Request) -> Completion:
        num_tokens, seconds = len(request.prompt_token_ids), 1e-6
        self.stats_.busy_s += seconds
        self.stats_.decode_s += seconds
        usage = Usage(prompt_tokens=num_tokens, completion_tokens=5, device_seconds=seconds, time_to_first_token_s=0.1)
        if self.settings.drafts:
            usage.drafted_tokens, usage.accepted_tokens = sum(DRAFTED.values()), sum(ACCEPTED.values())
        outputs = [
            Output(i, f"{answer_to(prompt_of(request))}{f' {i}' if i else ''}", [1, 2, 3, 4, 5], "stop", -0.5)
            for i in range(request.sampling.n)
        ]
        return Completion(request.request_id, outputs, usage)


def prompt_of(request: Request) -> str:
    return "".join(chr(token + FIRST_CHARACTER) for token in request.prompt_token_ids)


def answer_to(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:12]


class LocalGate:
    """A worker's side of an Admission in the same process."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission

    async def begin(self, key: tuple[str, int]) -> Attempt:
        return await self.admission.begin(key, "w")

    async def try_rows(self, key: tuple[str, int], rows: frozenset[int]) -> None:
        await self.admission.try_rows(key, rows)

    async def finish(self, key: tuple[str, int], unanswered_s: float) -> None:
        await self.admission.finish(key, "w", unanswered_s)
