"""Measures how long steps take, on the real path: plans of made-up sequences through the engine's own runner.

Done once when an engine is made, before it has any request; a few seconds, kept in the user's cache by device, model,
settings and versions, so that the next engine of the kind reads them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from actors.architecture import Architecture
from actors.config import EngineConfig
from actors.decoder import Decoder
from actors.requests import Request, SamplingParams
from actors.runner import Runner
from actors.scheduler import StepPlan
from actors.sequence import Sequence
from actors.step_times import PROMPT_TOKENS, MeasuredStep, StepTimes, fit_step_times
from kernels import cpu_linear

logger = logging.getLogger(__name__)

BUDGET_S = 3.0
"""Seconds of steps after which only the first part of the shapes is still measured, and after twice as many nothing.
Ten times as much may pass on the clock, where kernels have to be compiled or the machine is busy."""

SLOW_STEP_S = 0.5
"""Steps with more tokens than others that are not expected below it are not measured, but extrapolated."""

NUM_NEEDED = 3
"""The first shapes are measured however long they take: the fit cannot do without."""

NUM_MORE_ROUNDS = 3
"""Times that every shape is measured again, as long as the budget lasts."""

MIN_OWN_SHARE = 0.9
"""A step during which the measuring thread had a core for less than this share of the time was held up by others."""

MAX_KEPT_ERROR = 0.1
"""Median relative error of a fit that is kept. On a machine of their own models fit within 3 %."""

MAX_KV_BYTES = 512 << 20
"""Pages used for measuring: memory that a small job might otherwise never touch."""

CONTEXT_TOKENS, LONG_CONTEXT_TOKENS = 96, 768
"""Earlier tokens of decodes and of drafts: of most measured steps, and of those that tell what reading costs."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine's steps may have at most."""

    num_pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class StepShape:
    """A step of sequences that are all alike.

    num_known: tokens of each that it computes. num_drafts: draft tokens of each that it verifies, if any.
    num_before: tokens of each that were computed before. is_drawn: tokens are drawn with noise.
    is_first: no step before had as many tokens.
    """

    num_requests: int
    num_known: int
    num_before: int = 0
    num_drafts: int = 0
    is_drawn: bool = False
    is_first: bool = False

    @property
    def num_context(self) -> int:
        """Tokens of each sequence in the pages after the step."""
        return self.num_before + self.num_known + self.num_drafts

    @property
    def num_tokens(self) -> int:
        return self.num_requests * (self.num_known + self.num_drafts)

    def measured(self, seconds: float) -> MeasuredStep:
        """The step with the time that it took."""
        num_rows = self.num_requests * (1 + self.num_drafts)
        return MeasuredStep(
            num_tokens=self.num_tokens,
            num_requests=self.num_requests,
            num_logit_rows=num_rows,
            num_read=self.num_requests * self.num_context,
            num_drawn=num_rows if self.is_drawn else 0,
            num_chunks=self.num_requests if self.num_before and self.num_known + self.num_drafts > 1 else 0,
            is_first=self.is_first,
            seconds=seconds,
        )


def load_or_measure_step_times(
    runner: Runner,
    decoder: Decoder,
    architecture: Architecture,
    config: EngineConfig,
    limits: Limits,
    *,
    force: bool = False,
) -> StepTimes:
    """The step times of an engine that has no requests yet: from the cache, else measured and written there.

    force: measure even if the cache has them. A cache that cannot be read or written is warned of and does without.
    """
    limits = _limit_pages(limits, decoder)
    key = _describe_engine(decoder, architecture, config, limits)
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
    path = cache_folder() / f"{digest}.json"
    times = None if force else _read(path, key)
    if times is None:
        times = _measure_on_runner(runner, decoder, limits)
        if times.fit_error <= MAX_KEPT_ERROR:
            _write(path, key, times)
        else:
            logger.warning(
                "step times are measured again at the next start, for they do not fit together (median error %.0f %%): "
                "is this machine busy with something else?",
                100 * times.fit_error,
            )
    return times


def _measure_on_runner(runner: Runner, decoder: Decoder, limits: Limits) -> StepTimes:
    # Nothing of this shows in an answer: the prefix tree, by which requests find what is in a page, is not told of
    # these tokens; a request writes a slot before it reads it; and as slots that nobody wrote are read with weight 0,
    # the pages are zeros again at the end. Zeros are written before, too: memory never touched reads too fast.
    pages = list(range(limits.num_pages))
    runner.clear_pages(pages)
    try:
        return measure_step_times(RunnerTimer(runner, decoder, limits.page_size), limits, BUDGET_S)
    finally:
        runner.clear_pages(pages)


def cache_folder() -> Path:
    """Where step times are kept: a file per device, model, settings and versions."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal" / "step_times"


def measure_step_times(time_step: Callable[[StepShape], float], limits: Limits, budget_s: float) -> StepTimes:
    """Time steps of many shapes and fit. `time_step` runs one step and returns its seconds.

    Every shape at its best: first all of them, quick ones three times, then all again in turns while there is time, so
    that whatever disturbs does not hit one shape only.
    """
    measured: dict[StepShape, float] = {}
    spent_s = 0.0
    stop_at = time.perf_counter() + 10 * budget_s

    def measure(shape: StepShape) -> float:
        nonlocal spent_s
        seconds = time_step(shape)
        spent_s += seconds
        measured[shape] = min(seconds, measured.get(shape, seconds))
        return seconds

    for deadline_s, shapes in zip((2 * budget_s, budget_s, budget_s), shapes_to_measure(limits)):
        for shape in shapes:
            is_late = spent_s > deadline_s or time.perf_counter() > stop_at
            may_be_left_out = len(measured) >= NUM_NEEDED and (is_late or _is_slow(shape, measured))
            if shape in measured or may_be_left_out or not _fits(shape, limits):
                continue
            seconds = measure(shape)
            for _ in range(0 if shape.is_first else min(2, int(SLOW_STEP_S / 2 / seconds))):
                measure(shape)
    for shape in [shape for shape in measured if not shape.is_first] * NUM_MORE_ROUNDS:
        if spent_s + measured[shape] < budget_s and time.perf_counter() < stop_at:
            measure(shape)
    return fit_step_times([shape.measured(seconds) for shape, seconds in measured.items()])


def shapes_to_measure(limits: Limits) -> list[list[StepShape]]:
    """What to measure, the most needed first: powers of 4, of 2, and the edges at which a CPU changes its ways."""
    powers = [4**i for i in range(12) if 4**i <= limits.max_num_batched_tokens]
    between = [2 * power for power in powers]
    edges = sorted(
        {n + 1 for n in cpu_linear.MEASURED_TOKENS} | {3, 6, 12, 24, 48, 96, 192, 384, limits.max_num_batched_tokens}
    )
    # Contexts beside which 16 tokens still fit, and of which a few fit.
    room = min(limits.max_model_len, limits.num_pages * limits.page_size // 4) - 16
    long = max(1, min(LONG_CONTEXT_TOKENS, room))
    short = min(CONTEXT_TOKENS, long)
    return [
        [
            StepShape(1, 1, short),
            StepShape(1, 1, short, 15),
            # One token more than an int4 product takes at most: cheap to know, and a jump in the curve.
            *(StepShape(1, 1, short, num_tokens) for num_tokens in cpu_linear.MEASURED_TOKENS),
            _prefill(64, limits),
            *itertools.chain.from_iterable(_mixed(n, short, 3, limits) for n in powers),
            StepShape(1, 1, long),
            StepShape(4, 1, long),
            StepShape(4, 1, long, 3),
            StepShape(1, 256, long - 256) if long > 256 else StepShape(1, long // 2, long // 2),
            *(StepShape(num, 39 * num, is_first=True) for num in (1, 2, 3, 4, 5)),
            StepShape(16, 1, short, is_drawn=True),
            StepShape(16, 1, long),
            # Prompts behind a beginning that is in the cache: most of what a plan by prefixes leaves to compute.
            StepShape(16, 48, short),
            StepShape(16, 48, max(1, long // 2 - 48)),
            StepShape(48, 64, short),
        ],
        [
            *itertools.chain.from_iterable(_mixed(n, short, 7, limits) for n in between),
            *(StepShape(1, 1, short, n - 1) for n in (2, 4, 8)),
            StepShape(2, 1, short, 3),
            StepShape(3, 1, short),
            StepShape(64, 1, short, is_drawn=True),
            StepShape(64, 1, long),
            StepShape(16, 1, long, 3),
            StepShape(1, min(1024, limits.max_model_len - 1)),
        ],
        [
            *(StepShape(1, 1, short, n - 1) for n in edges if 1 < n <= 48),
            *itertools.chain.from_iterable(_mixed(n, short, 1, limits) for n in edges),
        ],
    ]


class RunnerTimer:
    """Runs steps of given shapes on a runner, over its first pages, each read before the next is prepared: that is how
    steps with drafts are computed everywhere, and only theirs are compared with what is measured here."""

    def __init__(self, runner: Runner, decoder: Decoder, page_size: int) -> None:
        self._runner, self._page_size = runner, page_size
        # Any ids will do, as long as rows of the embedding do not all come from one line of the CPU's cache.
        self._token_ids = itertools.cycle([i * 7919 % decoder.vocab_size for i in range(4096)])
        # What sequences cost is of no interest here, but the runner always weighs them.
        self._costs = StepTimes((1,), (1.0,))
        self._is_cuda = decoder.device.type == "cuda"
        self._compiled: set[tuple[StepShape, ...]] = set()

    def __call__(self, *shapes: StepShape) -> float:
        """Seconds of one step with the sequences of all shapes, from its plan to its tokens, without what others held
        it up on a CPU."""
        plan = StepPlan()
        first_page = 0
        for shape in shapes:
            for _ in range(shape.num_requests):
                num_pages = -(-shape.num_context // self._page_size)
                sequence = self._sequence(shape, list(range(first_page, first_page + num_pages)))
                first_page += num_pages
                plan.sequences.append(sequence)
                plan.num_tokens.append(shape.num_known)
                if shape.num_drafts:
                    plan.drafts[sequence] = list(itertools.islice(self._token_ids, shape.num_drafts))
        if self._is_cuda and shapes not in self._compiled:
            self._compiled.add(shapes)
            self._runner.run(plan, self._costs)
        started, started_own = time.perf_counter(), time.thread_time()
        self._runner.run(plan, self._costs)  # reads its tokens, so that the device is done
        seconds, own_s = time.perf_counter() - started, time.thread_time() - started_own
        # On a CPU this thread works or spins all the time; where it did not, others had its core. That would bend what
        # is kept: short steps find their time between two turns of others, long ones never do.
        return own_s if not self._is_cuda and own_s < MIN_OWN_SHARE * seconds else seconds

    def _sequence(self, shape: StepShape, pages: list[int]) -> Sequence:
        token_ids = list(itertools.islice(self._token_ids, shape.num_before + shape.num_known))
        sampling = SamplingParams(temperature=1.0 if shape.is_drawn else 0.0, max_tokens=1 + shape.num_drafts)
        sequence = Sequence(Request("measured", token_ids, sampling), 0, shape.num_context + 1)
        sequence.num_computed = shape.num_before
        sequence.pages = pages
        return sequence


def _prefill(num_tokens: int, limits: Limits) -> StepShape:
    """Whole prompts, about `num_tokens` in all."""
    num_requests = -(-num_tokens // min(PROMPT_TOKENS, limits.max_model_len))
    return StepShape(num_requests, num_tokens // num_requests)


def _mixed(num_tokens: int, num_before: int, num_drafts: int, limits: Limits) -> Iterator[StepShape]:
    """`num_tokens` as decodes, as drafts to verify, and as prompts."""
    yield StepShape(num_tokens, 1, num_before)
    if num_tokens > num_drafts:
        yield StepShape(num_tokens // (1 + num_drafts), 1, num_before, num_drafts)
    if num_tokens >= 16:
        yield _prefill(num_tokens, limits)


def _is_slow(shape: StepShape, measured: dict[StepShape, float]) -> bool:
    """Whether it is expected to be slow, supposing that time grows as the number of tokens from the largest on."""
    if not measured:
        return False
    largest = max(measured, key=lambda known: known.num_tokens)
    return measured[largest] * shape.num_tokens / largest.num_tokens > max(SLOW_STEP_S, measured[largest])


def _fits(shape: StepShape, limits: Limits) -> bool:
    return (
        min(shape.num_requests, shape.num_known) >= 1
        and shape.num_requests <= limits.max_num_seqs
        and shape.num_tokens <= limits.max_num_batched_tokens
        and shape.num_context <= limits.max_model_len
        and shape.num_requests * -(-shape.num_context // limits.page_size) <= limits.num_pages
    )


def _limit_pages(limits: Limits, decoder: Decoder) -> Limits:
    num_pages = MAX_KV_BYTES // (decoder.kv_bytes_per_token * limits.page_size)
    return replace(limits, num_pages=min(limits.num_pages, max(num_pages, 16)))


def _describe_engine(
    decoder: Decoder, architecture: Architecture, config: EngineConfig, limits: Limits
) -> dict[str, Any]:
    """All that the time of a step depends on, as JSON has it."""
    key = {
        "device": _device_name(decoder.device),
        "architecture": asdict(architecture),
        "dtype": str(decoder.dtype),
        "linears": _forms(decoder),
        "group_size": config.group_size,
        "kv_bytes_per_token": decoder.kv_bytes_per_token,
        "kv_cache_dtype": config.kv_cache_dtype,
        "deterministic": config.deterministic,
        "enable_prefix_groups": config.enable_prefix_groups,
        "enforce_eager": config.enforce_eager,
        "limits": asdict(limits),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "shoal": _version()},
    }
    return json.loads(json.dumps(key))


def _forms(decoder: Decoder) -> dict[str, int]:
    """What the linear layers are multiplied as. Up to how many tokens a CPU multiplies packed int4 is measured at each
    start, by a hair's breadth: with it in the key, two starts in three found nothing and measured again."""
    forms: Counter[str] = Counter()
    for line in decoder.describe():
        number, _, form = line.partition(" x ")
        forms["int4 and a copy" if "int4" in form and "copy" in form else form] += int(number)
    return dict(forms)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    # Virtual machines hide the name of the CPU; family, model and stepping still tell.
    named = [facts[name] for name in ("model name", "cpu family", "model", "stepping") if name in facts]
    return " ".join([*(named or [platform.processor(), platform.machine()]), f"{torch.get_num_threads()} threads"])


def _version() -> str:
    """The version, and a digest of the engine's sources: they change more often than the version does."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in (Path(__file__).parent, Path(cpu_linear.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return f"{importlib.metadata.version('shoal')} {digest.hexdigest()}"


def _read(path: Path, key: dict[str, Any]) -> StepTimes | None:
    """What `_write` wrote for this key; None when there is nothing, with a warning when it is of no use."""
    try:
        kept = json.loads(path.read_text())
        if kept["key"] != key:
            raise ValueError("it was written for another engine")
        return StepTimes.from_json(json.dumps(kept["step_times"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("step times are measured anew, since %s cannot be used: %s", path, error)
        return None


def _write(path: Path, key: dict[str, Any], times: StepTimes) -> None:
    """Appears whole or not at all; several engines may write at once."""
    text = json.dumps({"key": key, "step_times": json.loads(times.to_json())}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".unfinished-", delete=False) as file:
            file.write(text)
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("step times are measured at every start, since %s cannot be written: %s", path, error)
