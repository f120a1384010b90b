"""A long load: streams, whole answers and clients that leave, at the highest rate that is held, then at ten times it.

Requests come at random moments whatever became of those before them (an open loop), as people do. A rate is held when
at most one request in a hundred is refused. The highest one is found first, in short trials and then in longer ones,
and the half of the soak that is offered it has to confirm it. In both halves every request must end as an answer, a 429
with Retry-After, or the client's own leaving; memory and KV pages must be where they were; and at ten times the rate,
the first token may take those who get in three times as long.
"""

from __future__ import annotations

import asyncio
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from jobs.bench.online.client import Connection, Reply, write_request
from jobs.bench.online.deployment import HOST, Deployment, deployed
from jobs.bench.result import Bar
from jobs.demo.tickets import make_tickets

MAX_REFUSED = 0.01
"""Of the requests, at a rate that is held."""

MAX_REFUSED_IN_TRIAL = 0.005
"""Crowds come at random: of a rate at the very edge every other trial would be passed."""

NUM_SHORT_TRIALS = 3
STEP_UP, STEP_DOWN = 1.15, 0.97

OVERLOAD = 10
SHARE_STREAMED, SHARE_LEAVING = 0.5, 0.1
MAX_FIRST_TOKEN_RATIO = 3.0
MAX_GROWTH = 0.05
"""Of resident memory from the first tenth of the soak to its end."""

_NUM_PROMPTS = 2000
_PATIENCE_S = 120.0
_MAX_CONNECTIONS = 2000
_SAMPLE_S = 5.0

SETTINGS: dict[str, Any] = {
    "model": "demo",
    "served_model_name": "bench",
    "engine": {"device": "cpu", "num_threads": 1, "max_num_seqs": 16},
    "limits": {"max_choices": 16},
}
"""Who may wait is as by default."""


@dataclass(slots=True)
class Phase:
    """What happened at one rate."""

    name: str
    rate: float
    outcomes: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    rss: dict[str, list[int]] = field(default_factory=dict)
    cores: dict[str, float] = field(default_factory=dict)  # seconds of CPU per second
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def p99_s(self) -> float:
        return percentile(self.first_s, 0.99)

    @property
    def share_refused(self) -> float:
        return self.outcomes["429"] / max(1, sum(self.outcomes.values()))

    def growth(self, role: str) -> float:
        """Of resident memory: the mean of the last fifth over that of the second, as a share."""
        samples = self.rss[role]
        fifth = max(1, len(samples) // 5)
        early, late = samples[fifth : 2 * fifth] or samples, samples[-fifth:]
        return (sum(late) / len(late)) / (sum(early) / len(early)) - 1


def measure_soak(minutes: float, console: Console) -> tuple[bool, list[Bar], dict[str, Any]]:
    """Half of the time at the rate that is held, half at ten times it."""
    with tempfile.TemporaryDirectory() as name, deployed(SETTINGS, Path(name)) as deployment:
        return uvloop.run(_soak(deployment, minutes, console))


async def _soak(deployment: Deployment, minutes: float, console: Console) -> tuple[bool, list[Bar], dict[str, Any]]:
    requests = _Requests()
    fullest = await _fullest_rate(deployment, requests, seconds=min(30.0, 6 * minutes))
    console.print(f"at its fullest {fullest:.1f} answers per second")
    held, trials = await _highest_rate_held(deployment, requests, fullest, minutes, console)
    console.print(f"{held:.1f} requests per second are offered, then {OVERLOAD * held:.0f}")
    phases = []
    for phase in (Phase("capacity", held), Phase("overload", OVERLOAD * held)):
        await _offer(deployment, requests, phase, 30 * minutes)
        phases.append(phase)
        console.print(
            f"{phase.name}: {dict(phase.outcomes)}; first token p50 {percentile(phase.first_s, 0.5):.3f} s, "
            f"p99 {phase.p99_s:.3f} s; cores "
            + ", ".join(f"{role} {share:.2f}" for role, share in phase.cores.items())
            + "; memory "
            + ", ".join(
                f"{role} {samples[-1] >> 20} MiB ({phase.growth(role):+.1%})" for role, samples in phase.rss.items()
            )
        )
    rest = await _wait_until_empty(deployment)
    capacity, overload = phases
    wrong = [text for phase in phases for text in phase.wrong]
    for text in wrong[:10]:
        console.print(f"wrong: {text}")
    asked = sum(sum(phase.outcomes.values()) for phase in phases)
    bars = [
        Bar("requests without an answer, a 429 or the client's leaving", len(wrong), 0, at_least=False),
        Bar("requests", asked, None),
        Bar("rate held", held, None, unit="requests/s"),
        Bar("refused at the rate held", capacity.share_refused, MAX_REFUSED, at_least=False),
        Bar(f"refused at {OVERLOAD} times it", overload.share_refused, 0.5),
        Bar("first token p99 at the rate held", capacity.p99_s, None, unit="s"),
        Bar(f"first token p99 at {OVERLOAD} times it", overload.p99_s, None, unit="s"),
        Bar("ratio of the two", overload.p99_s / capacity.p99_s, MAX_FIRST_TOKEN_RATIO, at_least=False, unit="x"),
        *(
            Bar(f"growth of the {role}'s memory, {phase.name}", phase.growth(role), MAX_GROWTH, at_least=False)
            for phase in phases
            for role in ("replica", "proxy")
        ),
        Bar("KV pages in use afterwards", rest, 0, at_least=False),
    ]
    config = {
        "minutes": minutes,
        "settings": SETTINGS,
        "fullest_answers_per_s": round(fullest, 2),
        "share_streamed": SHARE_STREAMED,
        "share_leaving": SHARE_LEAVING,
        "trials": [
            {"offered_per_s": round(trial.rate, 2), "seconds": round(trial.seconds, 1), "refused": trial.share_refused}
            for trial in trials
        ],
        "phases": {
            phase.name: {
                "offered_per_s": round(phase.rate, 2),
                "sent_per_s": round(sum(phase.outcomes.values()) / phase.seconds, 2),
                "outcomes": dict(phase.outcomes),
                "first_token_s": {p: round(percentile(phase.first_s, p / 100), 4) for p in (50, 90, 99)},
                "cores": {role: round(share, 3) for role, share in phase.cores.items()},
                "rss_mib": {
                    role: [samples[0] >> 20, max(samples) >> 20, samples[-1] >> 20]
                    for role, samples in phase.rss.items()
                },
            }
            for phase in phases
        },
    }
    return not wrong and rest == 0, bars, config


class _Requests:
    """Requests drawn at random, from a seed."""

    def __init__(self) -> None:
        self._rng = random.Random(11)
        self._texts = [ticket.text for ticket in make_tickets(_NUM_PROMPTS, seed=5)]

    def draw(self) -> tuple[bytes, bool, float | None]:
        """The bytes, whether it is a stream, and after how many seconds the client leaves."""
        rng = self._rng
        stream = rng.random() < SHARE_STREAMED
        leaves = rng.random() < SHARE_LEAVING
        body = {
            "model": "bench",
            "messages": [{"role": "user", "content": rng.choice(self._texts)}],
            "max_tokens": rng.randint(16, 96),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": rng.getrandbits(40),
            "ignore_eos": True,
            "stream": stream,
        }
        return write_request("/v1/chat/completions", body), stream, rng.uniform(0.0, 1.0) if leaves else None


async def _fullest_rate(deployment: Deployment, requests: _Requests, seconds: float) -> float:
    """Answers per second while as many clients as may run ask again and again; the first third is for warming up."""
    num_clients = SETTINGS["engine"]["max_num_seqs"]
    ended: list[float] = []
    stop_at = time.perf_counter() + seconds

    async def ask_again() -> None:
        connection = await Connection.open(HOST, deployment.port)
        while time.perf_counter() < stop_at:
            request, _, _ = requests.draw()
            reply = await connection.ask(request)
            if reply.status != 200 or not reply.is_whole:
                raise RuntimeError(f"a request failed while nothing was too much: {reply.status} {reply.body[:200]!r}")
            ended.append(reply.ended_at)
        connection.cut()

    await asyncio.gather(*(ask_again() for _ in range(num_clients)))
    counted = [at for at in ended if stop_at - 2 / 3 * seconds <= at <= stop_at]
    return len(counted) / (2 / 3 * seconds)


async def _highest_rate_held(
    deployment: Deployment, requests: _Requests, fullest: float, minutes: float, console: Console
) -> tuple[float, list[Phase]]:
    """The highest rate at which nearly nobody is refused, and the trials that say so: going up in short ones and then
    halving the interval, then going down in long ones until one is passed with room to spare. It is a step below that
    one, for a soak of many minutes meets larger crowds than a trial."""
    trials: list[Phase] = []

    async def is_held(rate: float, seconds: float) -> bool:
        trial = Phase("trial", rate)
        most = MAX_REFUSED_IN_TRIAL * rate * seconds
        await _offer(deployment, requests, trial, seconds, max_refused=most)
        if trial.wrong:
            raise RuntimeError(f"a request failed in a trial: {trial.wrong[0]}")
        trials.append(trial)
        console.print(f"trial: {rate:.1f} per second for {trial.seconds:.0f} s, {trial.outcomes['429']} refused")
        return trial.outcomes["429"] <= most

    short_s = min(30.0, 6 * minutes)
    low, high = 0.5 * fullest, fullest
    # Some leave early, so that more than the fullest may be held.
    while await is_held(high, short_s):
        low, high = high, STEP_UP * high
    for _ in range(NUM_SHORT_TRIALS):
        rate = (low + high) / 2
        low, high = (rate, high) if await is_held(rate, short_s) else (low, rate)
    while not await is_held(low, min(150.0, 20 * minutes)):
        low *= STEP_DOWN
    return low * STEP_DOWN, trials


async def _offer(
    deployment: Deployment, requests: _Requests, phase: Phase, seconds: float, max_refused: float = math.inf
) -> None:
    """Send at random moments, `phase.rate` per second on average, until more are refused than that; wait for the last
    answer."""
    rng = random.Random(12)
    idle: list[Connection] = []
    open_tasks: set[asyncio.Task[None]] = set()
    started = due = time.perf_counter()
    before = await asyncio.to_thread(deployment.usages)
    watching = asyncio.ensure_future(_watch(deployment, phase))
    while due < started + seconds and phase.outcomes["429"] <= max_refused:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if len(open_tasks) < _MAX_CONNECTIONS:
            task = asyncio.ensure_future(_ask_once(deployment, requests, phase, idle))
            open_tasks.add(task)
            task.add_done_callback(open_tasks.discard)
        due += rng.expovariate(phase.rate)
    phase.seconds = time.perf_counter() - started
    after = await asyncio.to_thread(deployment.usages)
    phase.cores = {role: (after[role].cpu_s - usage.cpu_s) / phase.seconds for role, usage in before.items()}
    if open_tasks:
        _, late = await asyncio.wait(open_tasks, timeout=_PATIENCE_S)
        phase.wrong += [f"{phase.name}: no answer within {_PATIENCE_S:g} s"] * len(late)
        for task in late:
            task.cancel()
    watching.cancel()
    for connection in idle:
        connection.cut()


async def _ask_once(deployment: Deployment, requests: _Requests, phase: Phase, idle: list[Connection]) -> None:
    request, stream, leave_after_s = requests.draw()
    try:
        connection = idle.pop() if idle else await Connection.open(HOST, deployment.port)
        while not connection.is_open:
            connection = idle.pop() if idle else await Connection.open(HOST, deployment.port)
        reply = await connection.ask(request, leave_after_s=leave_after_s)
    except OSError as error:
        phase.outcomes["error"] += 1
        phase.wrong.append(f"{phase.name}: {type(error).__name__}: {error}")
        return
    outcome = judge(reply, stream=stream, left=leave_after_s is not None)
    phase.outcomes[outcome] += 1
    if outcome == "wrong":
        phase.wrong.append(f"{phase.name}: {reply.status}, whole {reply.is_whole}: {reply.body[-200:]!r}")
    if reply.status == 200 and stream and reply.first_at:
        phase.first_s.append(reply.first_at - reply.sent_at)
    if connection.is_open:
        idle.append(connection)


def judge(reply: Reply, *, stream: bool, left: bool) -> str:
    """What a request came to: answered, 429, left, or wrong."""
    if reply.status == 429 and reply.is_whole and "retry-after" in reply.headers:
        return "429"
    if reply.status == 200 and reply.is_whole:
        is_whole = reply.events[-1] == b"[DONE]" if stream else bool(reply.json["choices"])
        return "answered" if is_whole else "wrong"
    # Whoever leaves may do so between the head of an answer, or of a refusal, and its end.
    return "left" if left and reply.status in (0, 200, 429) else "wrong"


async def _watch(deployment: Deployment, phase: Phase) -> None:
    while True:
        for role, usage in (await asyncio.to_thread(deployment.usages)).items():
            phase.rss.setdefault(role, []).append(usage.rss_bytes)
        await asyncio.sleep(_SAMPLE_S)


async def _wait_until_empty(deployment: Deployment) -> float:
    """Pages that are still in use when nobody asks, after up to ten seconds."""
    pages = 0.0
    for _ in range(50):
        values = await deployment.metrics()
        pages = values["shoal_pages_in_use"] + values["shoal_sequences_running"] + values["shoal_sequences_waiting"]
        if not pages:
            break
        await asyncio.sleep(0.2)
    return pages


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; 0 of nothing."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0
