"""What HTTP and Serve cost: tokens per second of the endpoint and of the bare engine, same requests.

A fixed number of requests is always in flight (a closed loop), for both. The engine computes on one thread, in a
process of its own, for both: that is how Serve runs it (a replica has one CPU unless the settings say otherwise), and
on two cores it leaves one for the proxy and the load, as a host with a GPU has cores beside it. Drafts are off, so
that every token is a step, and a piece of a stream, of its own; with drafts there are fewer of both.

The bar is for the shape of 135 million parameters, whose steps take tens of ms, as those of models that are served do.
The demo's take some 5 ms for 16 tokens; its figures stand beside, without a bar.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import random
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import uvloop
from rich.console import Console

from actors.engine import Engine
from actors.weights.checkpoint import load_tokenizer
from jobs.bench.engine import VOCAB, make_model
from jobs.bench.online.client import Connection, Reply, write_request
from jobs.bench.online.deployment import HOST, Deployment, deployed
from jobs.bench.result import Bar
from jobs.demo.tickets import make_tickets
from jobs.endpoint.config import EndpointConfig
from jobs.run import named_models
from pipeline.openai_api.fields import CompletionRequest
from pipeline.openai_api.reading import RequestReader

NUM_IN_FLIGHT = 16
NUM_NEW = 64
NUM_ROUNDS = 3
MAX_OVERHEAD = 0.15
NUM_COMPARED = 32
MIN_SHARE_OF_EQUAL = 0.9
"""Of answers that begin with the same 32 characters: arithmetic is bfloat16, so another batch tips a near tie once in a
while, and from there on an answer goes its own way."""

Bodies = list[dict[str, Any]]


@dataclass(slots=True)
class Case:
    """A model and the requests to it. `note`: what stands beside its figures."""

    name: str
    model: str
    bodies: Bodies
    has_bar: bool
    bare: list[float] = field(default_factory=list)  # output tokens per second, per round
    whole: list[float] = field(default_factory=list)
    streamed: list[float] = field(default_factory=list)
    bare_texts: list[str] = field(default_factory=list)
    share_equal: float = 0.0
    step_ms: float = 0.0
    cpu_per_second: dict[str, float] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "served_model_name": "bench",
            "engine": {"device": "cpu", "num_threads": 1, "speculative_config": {"method": "none"}},
        }


def measure_overhead(console: Console) -> tuple[bool, list[Bar], dict[str, Any]]:
    """Whether the answers are right, the bars, and how it was done. Takes about five minutes on two cores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [
            Case("demo, 3.4M", named_models()["demo"], demo_bodies(16 * NUM_IN_FLIGHT), has_bar=False),
            Case("135M shape", make_model(folder), token_bodies(6 * NUM_IN_FLIGHT), has_bar=True),
        ]
        for case in cases:
            _measure(case, folder, console)
    bars = [bar for case in cases for bar in _bars_of(case)]
    config = {
        "haproxy": os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1",
        "in_flight": NUM_IN_FLIGHT,
        "new_tokens": NUM_NEW,
        "engine": cases[0].settings["engine"],
        "cases": {
            case.name: {
                "requests": len(case.bodies),
                "bare_tokens_per_s": [round(x, 1) for x in case.bare],
                "whole_tokens_per_s": [round(x, 1) for x in case.whole],
                "streamed_tokens_per_s": [round(x, 1) for x in case.streamed],
                "cpu_seconds_per_second_of_streaming": {k: round(v, 3) for k, v in case.cpu_per_second.items()},
            }
            for case in cases
        },
    }
    return all(case.share_equal >= MIN_SHARE_OF_EQUAL for case in cases), bars, config


def demo_bodies(count: int) -> Bodies:
    """Requests of different tickets, sent as text."""
    return [{"model": "bench", "prompt": ticket.text, **_sampling()} for ticket in make_tickets(count, seed=3)]


def token_bodies(count: int) -> Bodies:
    """Requests of 64 random tokens each."""
    rng = random.Random(7)
    return [
        {"model": "bench", "prompt": [rng.randrange(VOCAB) for _ in range(64)], **_sampling()} for _ in range(count)
    ]


def _sampling() -> dict[str, Any]:
    return {"max_tokens": NUM_NEW, "temperature": 0.0, "ignore_eos": True}


def _measure(case: Case, folder: Path, console: Console) -> None:
    """Rounds of bare engine, whole answers and streams in turn, against one engine and one endpoint."""
    with BareEngine(case.settings, case.bodies) as bare, deployed(case.settings, folder) as deployment:
        for number in range(NUM_ROUNDS + 1):
            bare_s, texts, step_ms = bare.answer_all()
            whole_s, whole = uvloop.run(answer_all(deployment, case.bodies, stream=False))
            before, started = deployment.usages(), time.perf_counter()
            own = psutil.Process().cpu_times()
            streamed_s, streamed = uvloop.run(answer_all(deployment, case.bodies, stream=True))
            took_s = time.perf_counter() - started
            if number == 0:  # its prompts are in the prefix caches from here on, of both
                case.bare_texts = texts
                answers = [reply.json["choices"][0]["text"] for reply in whole]
                pieces = ["".join(text_of(event) for event in reply.events[:-1]) for reply in streamed]
                pairs = [*zip(texts, answers), *zip(texts, pieces)]
                case.share_equal = sum(a[:NUM_COMPARED] == b[:NUM_COMPARED] for a, b in pairs) / len(pairs)
                continue
            num_tokens = NUM_NEW * len(case.bodies)
            case.bare.append(num_tokens / bare_s)
            case.whole.append(num_tokens / whole_s)
            case.streamed.append(num_tokens / streamed_s)
            case.step_ms = step_ms
            after, now = deployment.usages(), psutil.Process().cpu_times()
            case.cpu_per_second = {
                role: (usage.cpu_s - before[role].cpu_s) / took_s for role, usage in after.items() if role in before
            }
            case.cpu_per_second["client"] = (now.user + now.system - own.user - own.system) / took_s
            console.print(
                f"{case.name}: bare {case.bare[-1]:,.0f}, whole {case.whole[-1]:,.0f}, streamed "
                f"{case.streamed[-1]:,.0f} tokens/s; CPU while streaming "
                + ", ".join(f"{role} {share:.0%}" for role, share in case.cpu_per_second.items())
            )


def _bars_of(case: Case) -> list[Bar]:
    """Of the fastest round of each: what others do on the machine only ever makes one slower."""
    bare = max(case.bare)
    bar = MAX_OVERHEAD if case.has_bar else None
    return [
        Bar(f"{case.name}: answers that begin like the bare engine's", case.share_equal, MIN_SHARE_OF_EQUAL),
        Bar(f"{case.name}: bare engine", bare, None, unit="tokens/s"),
        Bar(f"{case.name}: its step", case.step_ms, None, unit="ms"),
        Bar(f"{case.name}: overhead, whole answers", 1 - max(case.whole) / bare, bar, at_least=False),
        Bar(f"{case.name}: overhead, streamed", 1 - max(case.streamed) / bare, bar, at_least=False),
        *(
            Bar(f"{case.name}: CPU of {role} while streaming", share, None, unit="cores")
            for role, share in case.cpu_per_second.items()
        ),
    ]


def text_of(event: bytes) -> str:
    text: str = json.loads(event)["choices"][0]["text"]
    return text


async def answer_all(deployment: Deployment, bodies: Bodies, *, stream: bool) -> tuple[float, list[Reply]]:
    """Seconds for all, and the replies in order; RuntimeError if one is no whole answer."""
    requests = [write_request("/v1/completions", {**body, "stream": stream}) for body in bodies]
    replies: list[Reply | None] = [None] * len(requests)
    numbers = iter(range(len(requests)))
    connections = [await Connection.open(HOST, deployment.port) for _ in range(NUM_IN_FLIGHT)]

    async def ask_in_turn(connection: Connection) -> None:
        for number in numbers:
            replies[number] = await connection.ask(requests[number])

    started = time.perf_counter()
    await asyncio.gather(*map(ask_in_turn, connections))
    seconds = time.perf_counter() - started
    for connection in connections:
        connection.cut()
    done = [reply for reply in replies if reply is not None and reply.status == 200 and reply.is_whole]
    if len(done) < len(requests):
        raise RuntimeError(f"{len(requests) - len(done)} of {len(requests)} requests had no whole answer")
    return seconds, done


class BareEngine:
    """An engine in a process of its own, without a worker, an event loop or HTTP."""

    def __init__(self, settings: dict[str, Any], bodies: Bodies) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_answer_for_ever, args=(settings, bodies, theirs), daemon=True)
        self._process.start()

    def answer_all(self) -> tuple[float, list[str], float]:
        """Seconds, texts, and the mean time of a step in ms."""
        self._pipe.send("again")
        answer: tuple[float, list[str], float] = self._pipe.recv()
        return answer

    def __enter__(self) -> BareEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


def _answer_for_ever(settings: dict[str, Any], bodies: Bodies, pipe: Any) -> None:
    config = EndpointConfig.model_validate(settings).resolve(named_models())
    engine = Engine(config.engine)
    tokenizer = load_tokenizer(config.engine.tokenizer or config.model)
    reader = RequestReader(config.prompt, tokenizer, max_model_len=engine.max_model_len)
    asked = [reader.read_completion(CompletionRequest.model_validate(body))[0] for body in bodies]
    while pipe.recv():
        waiting = iter([replace(request, request_id=str(i)) for i, request in enumerate(asked)])
        texts = [""] * len(asked)
        steps, started = engine.stats.num_steps, time.perf_counter()
        for request in itertools.islice(waiting, NUM_IN_FLIGHT):
            engine.add(request)
        while engine.has_unfinished():
            for completion in engine.step():
                texts[int(completion.request_id)] = completion.outputs[0].text
                for request in itertools.islice(waiting, 1):
                    engine.add(request)
        seconds = time.perf_counter() - started
        pipe.send((seconds, texts, 1000 * seconds / (engine.stats.num_steps - steps)))
