"""`shoal bench speculation`: drafts on and off, on the demo's corpus and on one with nothing to guess.

First the answers: in deterministic mode every row must be the same with and without drafts, whatever is sampled.
Then output tokens per second at batch sizes from 1 to 256: no drafts, fixed numbers of draft tokens, and `auto`. Every
run has an engine of its own, warmed with the same rows; settings take turns, and the best run of each counts.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.config import EngineConfig, SpeculativeConfig
from actors.engine import Engine
from actors.requests import Completion, Request, SamplingParams, derive_seed
from actors.weights.checkpoint import load_tokenizer
from jobs.bench.result import Bar, BenchResult
from jobs.demo.main import JOB_FILE
from jobs.demo.tickets import write_corpus
from jobs.run import named_models
from pipeline.job import load_job
from pipeline.prefix_plan import plan_shard
from pipeline.shards import list_shards

NUM_CHECKED = 2000
NUM_SAMPLED = 200
NUM_WARM_UP = 64
NUM_RUNS = 3
ROWS_BY_BATCH = {1: 64, 2: 96, 4: 128, 8: 256, 16: 384, 32: 512, 64: 1024, 128: 1536, 256: 1536}
FIXED = (2, 4, 8, 16)
NUM_RANDOM_TOKENS = 48

SETTINGS: dict[str, SpeculativeConfig] = {
    "none": SpeculativeConfig(method="none"),
    **{f"fixed {k}": SpeculativeConfig(method="combined", num_speculative_tokens=k) for k in FIXED},
    "auto": SpeculativeConfig(),
}
SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2},
    {"temperature": 0.8, "stop": ('", "urgency',), "logprobs": 2},
    {"temperature": 1.0, "n": 2},
    {"min_tokens": 40},
)


@dataclass(slots=True)
class Measured:
    """The runs of one setting at one batch size."""

    seconds: list[float]
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_steps: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / min(self.seconds)


def bench_speculation() -> BenchResult:
    """Check, then time; about a quarter of an hour on two cores."""
    console = Console(stderr=True)
    engine, requests = demo_requests(2 * NUM_CHECKED)
    share_equal, det_ratio = check_determinism(engine, requests[:NUM_CHECKED], console)
    bars = [Bar("rows equal with and without drafts, deterministic", share_equal, 1.0)]
    bars.append(Bar("time of deterministic mode over the normal one, batch 64", det_ratio, None, unit="x"))
    share = share_that_differs(engine, requests[:NUM_SAMPLED])
    bars.append(Bar("sampled rows that differ between batches of 64 and of 3 when not deterministic", share, None))
    config: dict[str, Any] = {"checked_rows": NUM_CHECKED, "rows": ROWS_BY_BATCH, "tokens_per_s": {}, "drafts": {}}

    index: list[dict[str, float]] = []
    worst_of_fixed, worst_of_none, num_differing, num_compared = 1e9, 1e9, 0, 0
    for batch, num_rows in ROWS_BY_BATCH.items():
        rows = requests[: NUM_WARM_UP + num_rows]
        measured, answers = measure(engine, rows, batch, SETTINGS, index)
        rates = {name: m.tokens_per_s for name, m in measured.items()}
        speed_up, best_fixed = (
            rates["auto"] / rates["none"],
            max(rate for name, rate in rates.items() if name != "auto"),
        )
        worst_of_none = min(worst_of_none, speed_up)
        worst_of_fixed = min(worst_of_fixed, rates["auto"] / best_fixed)
        num_differing += sum(a != b for a, b in zip(answers["auto"], answers["none"]))
        num_compared += num_rows
        bars.append(Bar(f"auto over no drafts, batch {batch}", speed_up, {1: 2.5, 8: 1.8}.get(batch, 0.98), unit="x"))
        bars.append(Bar(f"auto over the best fixed setting, batch {batch}", rates["auto"] / best_fixed, 0.95, unit="x"))
        config["tokens_per_s"][batch] = {name: round(rate) for name, rate in rates.items()}
        config["drafts"][batch] = {
            name: [m.num_drafted, m.num_accepted, m.num_steps] for name, m in measured.items() if m.num_drafted
        }
        console.print(
            f"batch {batch}: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()) + " tokens/s"
        )

    for batch in (8, 64):
        rows = random_requests(engine, NUM_WARM_UP + 4 * batch + 64)
        chosen = {name: SETTINGS[name] for name in ("none", "auto")}
        measured, _ = measure(engine, rows, batch, chosen, [])
        ratio = measured["auto"].tokens_per_s / measured["none"].tokens_per_s
        bars.append(Bar(f"auto over no drafts, random tokens, batch {batch}", ratio, 0.97, unit="x"))
    bars.append(
        Bar("share of the run that building the index takes", max(i["share"] for i in index), 0.02, at_least=False)
    )
    bars.append(Bar("memory of the index", max(i["bytes"] for i in index) / 2**20, 64, at_least=False, unit="MiB"))
    bars.append(Bar("rows that differ with drafts when not deterministic", num_differing / num_compared, None))
    return BenchResult("speculation", share_equal == 1.0, bars, config)


def demo_requests(num_rows: int) -> tuple[EngineConfig, list[Request]]:
    """The engine of the demo's job, and the requests of a corpus of so many tickets, in the order of their plan."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus", num_rows=num_rows)
        job_file = folder / JOB_FILE.name
        job_file.write_text(JOB_FILE.read_text())
        job = load_job(str(job_file), []).resolve(named_models())
        tokenizer = load_tokenizer(job.model)
        requests = [
            replace(request, request_id=f"{slice_.shard}/{request.request_id}")
            for shard in sorted(list_shards(job).good, key=lambda shard: shard.name)
            for slice_ in plan_shard(job, shard, tokenizer)
            for request in slice_.requests(job.sampling)
        ]
    num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return job.engine.model_copy(update={"num_threads": num_threads}), requests


def random_requests(engine: EngineConfig, count: int) -> list[Request]:
    """Prompts of random tokens, answered with random tokens: a high temperature on a model that has never seen such."""
    rng = random.Random(11)
    vocabulary = len(load_tokenizer(engine.tokenizer or engine.model))
    sampling = SamplingParams(temperature=50.0, max_tokens=NUM_RANDOM_TOKENS, ignore_eos=True)
    return [
        Request(f"random-{i}", [rng.randrange(8, vocabulary) for _ in range(64)], sampling, derive_seed(0, i))
        for i in range(count)
    ]


def check_determinism(engine: EngineConfig, requests: Sequence[Request], console: Console) -> tuple[float, float]:
    """The share of rows whose tokens, text and log-probabilities are the same bytes with and without drafts, and in
    batches of other sizes; and what the mode costs, as a ratio of times without drafts."""
    mixed = [
        replace(
            request,
            sampling=request.sampling.model_copy(update={"max_tokens": 48, **SAMPLING[i % len(SAMPLING)]}),
            seed=derive_seed(1, i),
        )
        for i, request in enumerate(requests)
    ]
    fixed = engine.model_copy(update={"deterministic": True})
    without, _ = answer(new_engine(fixed, 64, SETTINGS["none"]), mixed)
    with_drafts, _ = answer(new_engine(fixed, 24, SETTINGS["fixed 8"]), mixed[::-1])
    automatic, _ = answer(new_engine(fixed, 64, SETTINGS["auto"]), mixed)
    num_equal = sum(without[r.request_id] == with_drafts[r.request_id] == automatic[r.request_id] for r in mixed)
    console.print(f"deterministic: {num_equal} of {len(mixed)} rows are the same with and without drafts")
    seconds: dict[str, float] = {}
    for name, config in (("normal", engine), ("deterministic", fixed)) * 2:
        one = new_engine(config, 64, SETTINGS["none"])
        answer(one, requests[:NUM_WARM_UP])
        seconds[name] = min(seconds.get(name, 1e9), answer(one, requests[NUM_WARM_UP:768])[1])
    return num_equal / len(mixed), seconds["deterministic"] / seconds["normal"]


def share_that_differs(engine: EngineConfig, requests: Sequence[Request]) -> float:
    """The share of rows whose tokens at temperature 1 are others in small batches and steps than in large ones."""
    sampling = {"temperature": 1.0, "ignore_eos": True}
    sampled = [
        replace(request, sampling=request.sampling.model_copy(update=sampling), seed=derive_seed(2, i))
        for i, request in enumerate(requests)
    ]
    small_steps = engine.model_copy(update={"max_num_batched_tokens": 64})
    large, _ = answer(new_engine(engine, 64, SETTINGS["none"]), sampled)
    small, _ = answer(new_engine(small_steps, 3, SETTINGS["none"]), sampled)
    num_differing = sum(
        [output[0] for output in large[r.request_id].outputs] != [output[0] for output in small[r.request_id].outputs]
        for r in sampled
    )
    return num_differing / len(sampled)


def measure(
    engine: EngineConfig,
    requests: Sequence[Request],
    batch: int,
    settings: dict[str, SpeculativeConfig],
    index: list[dict[str, float]],
) -> tuple[dict[str, Measured], dict[str, list[Any]]]:
    """Time all settings in turns; the tokens that each wrote, and into `index` what its corpus index took."""
    measured = {name: Measured([]) for name in settings}
    tokens: dict[str, list[Any]] = {}
    warm_up, rows = requests[:NUM_WARM_UP], requests[NUM_WARM_UP:]
    for _ in range(NUM_RUNS):
        for name, config in settings.items():
            one = new_engine(engine, batch, config)
            answer(one, warm_up)
            steps = one.stats.num_steps
            found, seconds = answer(one, rows)
            result = measured[name]
            result.seconds.append(seconds)
            result.num_steps = one.stats.num_steps - steps
            result.num_tokens = sum(found[r.request_id].num_tokens for r in rows)
            result.num_drafted = sum(found[r.request_id].num_drafted for r in rows)
            result.num_accepted = sum(found[r.request_id].num_accepted for r in rows)
            tokens[name] = [[output[0] for output in found[r.request_id].outputs] for r in rows]
            if one.speculation is not None and one.speculation.corpus_index is not None:
                corpus = one.speculation.corpus_index
                index.append({"share": corpus.learning_ns / one.stats.busy_ns, "bytes": corpus.num_bytes})
    return measured, tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """What must not depend on drafts, and beside it what does."""

    outputs: tuple[Any, ...]
    num_tokens: int
    num_drafted: int
    num_accepted: int

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Answer) and self.outputs == other.outputs

    __hash__ = None  # type: ignore[assignment]


def new_engine(engine: EngineConfig, batch: int, speculative: SpeculativeConfig) -> Engine:
    """An engine that answers so many rows at a time."""
    return Engine(engine.model_copy(update={"max_num_seqs": batch, "speculative_config": speculative}))


def answer(engine: Engine, requests: Sequence[Request]) -> tuple[dict[str, Answer], float]:
    """All answers, and the seconds that they took."""
    started = time.perf_counter()
    for request in requests:
        engine.add(request)
    completions: list[Completion] = []
    while engine.has_unfinished():
        completions += engine.step()
    seconds = time.perf_counter() - started
    return {completion.request_id: _essence(completion) for completion in completions}, seconds


def _essence(completion: Completion) -> Answer:
    if completion.error is not None:
        raise RuntimeError(f"row {completion.request_id} became an error: {completion.error.message}")
    outputs = tuple(
        (tuple(output.token_ids), output.text, output.finish_reason, output.mean_logprob, tuple(output.logprobs or ()))
        for output in completion.outputs
    )
    usage = completion.usage
    return Answer(outputs, usage.completion_tokens, usage.drafted_tokens, usage.accepted_tokens)
