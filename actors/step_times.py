"""How long a step of the engine takes, as a function of what is in it; fitted to measured steps.

The sum of a curve over the number of tokens (its steps are kept: a CPU multiplies packed int4 for a few tokens and a
dense copy for more, AMX works in tiles of 16 rows) and of linear terms for all else. The same figures serve drafting
(is one more token worth its time?), the scheduler's token budget and the split of a step's time among its rows. Knows
no tensors and no runner; `actors.step_measurement` measures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = float | NDArray[Any]

AS_GOOD = 0.03
"""Steps whose tokens per second differ by less than this share are as good as each other."""

FEW_REQUESTS = 4
"""A CPU attends for up to so many sequences one by one, for more together."""

PROMPT_TOKENS = 200
"""Tokens of a prompt in the prefill steps that are measured, at most, and that the best number of tokens is for."""

FEWEST_BATCHED_TOKENS = 512
"""The best number of tokens for a step is never below this, whatever was measured."""

HALF_LIFE_STEPS = 50
"""After so many steps an observation weighs half, in `StepTimesTracker`."""


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """What was in a step, in the words of `StepTimes.seconds`, and the seconds that it took.

    is_first: no step before had this number of tokens.
    """

    num_tokens: int
    num_requests: int
    num_logit_rows: int
    num_read: int
    num_drawn: int
    num_chunks: int
    is_first: bool
    seconds: float


@dataclass(frozen=True)
class StepTimes:
    """Expected seconds of a step: `curve_s` over `curve_tokens`, and the other terms.

    curve_tokens: ascending; curve_s: never falling.
    per_request_s, per_chunk_s, per_row_s, per_drawn_s, per_read_s: for one more of what `seconds` names.
    per_pair_s: for one more pair of a query token and a token that it reads.
    per_few_s: for one more of the first sequences, up to FEW_REQUESTS, which cost more than later ones.
    prompt_s: once per step with prompt tokens, whose number is seldom the same twice: oneDNN prepares for each new one.
    fit_error: the relative error of the median measured step.
    """

    curve_tokens: tuple[int, ...]
    curve_s: tuple[float, ...]
    per_request_s: float = 0.0
    per_chunk_s: float = 0.0
    per_row_s: float = 0.0
    per_drawn_s: float = 0.0
    per_read_s: float = 0.0
    per_pair_s: float = 0.0
    per_few_s: float = 0.0
    prompt_s: float = 0.0
    fit_error: float = 0.0
    _table: NDArray[np.float64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # One second per whole number of tokens: looking 2,000 of them up takes 4 us, interpolating 30.
        table = self._curve(np.arange(self.curve_tokens[-1] + 1))
        object.__setattr__(self, "_table", table)

    def seconds(
        self,
        num_tokens: int | NDArray[Any],
        num_requests: Numbers,
        num_logit_rows: Numbers,
        num_read: Numbers,
        num_drawn: Numbers = 0,
        num_chunks: Numbers | None = None,
    ) -> Any:
        """Seconds of a step; each argument is a number or an array, and they broadcast. Whole numbers of tokens.

        num_tokens: query tokens, those of drafts included. num_requests: sequences, at least 1.
        num_logit_rows: rows through the head and the sampler.
        num_read: tokens of keys and values that are read, this step's own included, and those of a prefix group once.
        num_drawn: logit rows whose token is drawn with noise, not greedily.
        num_chunks: sequences of several query tokens that also read earlier ones (drafts to verify, later parts of a
        prompt); None: as many as there can be. Nothing is checked, since this is called in every step.
        """
        try:
            curve: Any = self._table.take(num_tokens)
        except IndexError:
            curve = self._curve(np.asarray(num_tokens))
        # Query-key pairs, as if all sequences were alike; for decodes it is num_read.
        per_read_s = self.per_read_s + self.per_pair_s / num_requests * num_tokens
        seconds = curve + per_read_s * num_read
        few_s = self.per_few_s * np.minimum(num_requests, FEW_REQUESTS)
        seconds = seconds + (self.per_row_s * num_logit_rows + self.per_request_s * num_requests + few_s)
        if self.per_drawn_s and not (isinstance(num_drawn, int) and num_drawn == 0):
            seconds = seconds + self.per_drawn_s * num_drawn
        if self.per_chunk_s:
            if num_chunks is None:
                num_chunks = np.minimum(num_requests, num_tokens - num_requests)
            seconds = seconds + self.per_chunk_s * num_chunks
        if self.prompt_s:  # of decodes and drafts, every token has its row of logits
            seconds = seconds + self.prompt_s * (num_logit_rows < num_tokens)
        return seconds

    @property
    def attention_s_per_read(self) -> float:
        """Seconds for one token of keys and values that is read."""
        return self.per_read_s + self.per_pair_s

    def weigh_step(self, num_tokens: Sequence[int], num_read: Sequence[float]) -> list[float]:
        """What each sequence of a step bears of its time: what reading the weights and multiplying takes by its tokens,
        attention by what it reads."""
        total = sum(num_tokens)
        token_s = float(self.seconds(total, len(num_tokens), len(num_tokens), 0, num_chunks=0)) / total
        read_s = self.attention_s_per_read
        return [count * token_s + read * read_s for count, read in zip(num_tokens, num_read)]

    def best_num_batched_tokens(self, limit: int) -> int:
        """The most tokens of a prefill step, up to `limit`, whose tokens per second are within 3 % of the best.

        The most and not the fewest: prompts that come in several steps begin to be answered a few at a time, and each
        step of few answers reads all weights (35 % more time for 32 prompts in steps of 256 tokens, measured). And at
        least FEWEST_BATCHED_TOKENS: a noisy measurement must not leave a step without room for drafts beside prompts.
        """
        fewest = min(FEWEST_BATCHED_TOKENS, limit)
        candidates = np.array(sorted({n for n in self.curve_tokens if fewest <= n < limit} | {limit}))
        num_prompts = np.maximum(1, candidates // PROMPT_TOKENS)
        rates = candidates / self.seconds(candidates, num_prompts, num_prompts, candidates, num_chunks=0)
        return int(candidates[rates * (1 + AS_GOOD) >= rates.max()][-1])

    def describe(self) -> str:
        """One line for a person."""
        shown = [n for n in (1, 16, 64, 256, 1024, 4096) if n <= self.curve_tokens[-1]]
        curve = ", ".join(
            f"{_duration(float(s))} for {n}" + (" token" if n == 1 else "")
            for n, s in zip(shown, self._curve(np.array(shown)))
        )
        others = {
            "request": self.per_request_s,
            "sequence with drafts": self.per_chunk_s,
            "row of logits": self.per_row_s,
            "row drawn": self.per_drawn_s,
            "1,000 tokens read": 1000 * self.attention_s_per_read,
            "step with prompts": self.prompt_s,
        }
        terms = ", ".join(f"{_duration(s)} per {name}" for name, s in others.items() if s > 0)
        return f"a step takes {curve}; and {terms} (fitted to measured steps, median error {self.fit_error:.0%})"

    def to_json(self) -> str:
        """All of it, as one JSON object."""
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self) if f.init})

    @classmethod
    def from_json(cls, text: str) -> StepTimes:
        """What `to_json` wrote; ValueError for anything else."""
        try:
            values: Any = {name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(text).items()}
            times = cls(**values)
            times._check()
        except (TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"no step times: {error}") from error
        return times

    def _check(self) -> None:
        tokens, seconds = self.curve_tokens, self.curve_s
        others = [getattr(self, f.name) for f in fields(self) if f.name.endswith("_s") and f.name != "curve_s"]
        if (
            len(tokens) != len(seconds)
            or not all(a < b for a, b in zip((0, *tokens), tokens))
            or not all(a <= b for a, b in zip((1e-12, *seconds), seconds))
            or not all(math.isfinite(s) and s >= 0 for s in (*seconds, *others, self.fit_error))
        ):
            raise ValueError("no step times: tokens must ascend, seconds must not fall, and nothing may be negative")

    def _curve(self, num_tokens: NDArray[Any]) -> NDArray[np.float64]:
        """The curve; beyond the last measured number of tokens, as steep as over the last three quarters before."""
        last, last_s = self.curve_tokens[-1], self.curve_s[-1]
        before = max(last / 4, self.curve_tokens[0])
        slope = last_s / last
        if before < last:
            slope = (last_s - float(np.interp(before, self.curve_tokens, self.curve_s))) / (last - before)
        return np.interp(num_tokens, self.curve_tokens, self.curve_s) + slope * np.maximum(num_tokens - last, 0)


class StepTimesTracker:
    """By what factor steps take longer of late than `StepTimes` expects, for a machine may be busier than it was then.

    The factor is a decaying geometric mean; a single step that was held up moves it by 5 % at most.
    """

    def __init__(self) -> None:
        self._log_ratio = 0.0
        self._num_seen = 0

    @property
    def ratio(self) -> float:
        """Actual over predicted seconds; 1 before anything was observed."""
        return math.exp(self._log_ratio)

    def observe(self, predicted_s: float, actual_s: float) -> None:
        """Take note of a step, both times above 0."""
        share = max(1 - 0.5 ** (1 / HALF_LIFE_STEPS), 1 / (10 + self._num_seen))
        self._num_seen += 1
        surprise = math.log(actual_s / predicted_s) - self._log_ratio
        self._log_ratio += max(-0.05, min(0.05, share * surprise))


def fit_step_times(steps: Sequence[MeasuredStep]) -> StepTimes:
    """The StepTimes whose relative errors on measured steps are smallest.

    A knot of the curve at every number of tokens of a step that was not the first of its kind.

    No term may be negative, so that the curve rises and no step is expected to be faster for doing more.
    """
    knots = np.array(sorted({step.num_tokens for step in steps if not step.is_first}))
    columns = _columns(steps, knots)
    seconds = np.array([step.seconds for step in steps])
    weights = 1 / seconds
    for _ in range(4):
        solution = _solve_nonnegative(columns * weights[:, None], seconds * weights)
        errors = np.abs(columns @ solution / seconds - 1)
        # A step that was held up by somebody else must not bend the fit: towards least absolute errors.
        weights = 1 / seconds / np.sqrt(np.maximum(errors, 0.02))
    num_knots = len(knots)
    curve_s = np.maximum(np.cumsum(solution[:num_knots]), 1e-9)
    return StepTimes(
        tuple(knots.tolist()),
        tuple(curve_s.tolist()),
        *map(float, [*solution[num_knots:], np.median(errors)]),
    )


def _columns(steps: Sequence[MeasuredStep], knots: NDArray[Any]) -> NDArray[np.float64]:
    """A row per step: 1, the part of the way it has gone from each knot to the next, then the linear terms."""
    tokens = np.array([step.num_tokens for step in steps], float)
    ways = np.clip((tokens[:, None] - knots[:-1]) / np.diff(knots), 0, 1)
    others = [
        (
            s.num_requests,
            s.num_chunks,
            s.num_logit_rows,
            s.num_drawn,
            s.num_read,
            s.num_read * s.num_tokens / s.num_requests,
            min(s.num_requests, FEW_REQUESTS),
            s.is_first,
        )
        for s in steps
    ]  # in the order of StepTimes' fields
    return np.column_stack([np.ones(len(steps)), ways, np.array(others, float)])


def _solve_nonnegative(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """argmin |a x - b| over x >= 0, by active sets (Lawson and Hanson 1974, chapter 23)."""
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    a = a / scale
    x = np.zeros(a.shape[1])
    is_free = np.zeros(a.shape[1], bool)
    for _ in range(10 * len(x)):
        gradient = a.T @ (b - a @ x)
        gradient[is_free] = 0
        if gradient.max() <= 1e-10 * np.linalg.norm(b):
            break
        is_free[gradient.argmax()] = True
        while True:
            trial = np.zeros_like(x)
            trial[is_free] = np.linalg.lstsq(a[:, is_free], b, rcond=None)[0]
            falling = is_free & (trial <= 0)
            if not falling.any():
                break
            step = (x[falling] / np.maximum(x[falling] - trial[falling], 1e-300)).min()
            x = x + step * (trial - x)
            is_free &= x > 1e-14
            x[~is_free] = 0
        x = trial
    return x / scale


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.2g} ns"
