"""The order of a slice's rows within its plan: long prompts among long answers, where that is faster.

A long prompt with a short answer keeps a device computing, a short prompt with a long answer keeps it reading memory;
in one step the two cost hardly more than one of them. So prefix groups, which stay whole, are taken from both ends of
their order by kind (after BlendServe, arXiv 2411.16102), if the simulated engine is faster by it; else the plan's order
stands. The first and the last group stay where they are: slices before and after go on with their prefixes. Tokens in,
an order out: which rows a slice has, and the order of its results, do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.requests import Completion, Request
from actors.scheduler import WORTH_WAITING_TOKENS
from actors.step_times import StepTimes
from pipeline.prefix_plan import shared_prefix_lengths
from pipeline.price.engine_simulation import EngineShape, RowNumbers, simulate

MIN_GAIN = 0.03
"""The plan's order is left for one that is expected to be faster by this share; the simulation is no better."""

MIN_SPREAD = 4.0
"""Groups are of different kinds if the ratio of prompt to answer tokens differs so many times among the middle 80 %."""

MAX_ROWS = 512
"""Slices of more rows are not simulated: a simulated row takes about as long as a step of a small model."""

NUM_COPIES = 2
"""The slice is simulated so many times in a row: what counts is the pace while slices follow each other."""

MIXED = f"rows of some slices were answered in another order, expected to be at least {MIN_GAIN:.0%} faster (plan.mix)"
"""What a run's notes say where it happened."""

Ints = NDArray[np.int64]


@dataclass(slots=True)
class AnswerLengths:
    """How long answers are, as shares of what rows may write: all of it, until some are seen."""

    num_tokens: int = 0
    max_tokens: int = 0

    def observe(self, requests: Sequence[Request], completions: Sequence[Completion]) -> None:
        """Take note of answered rows."""
        for request, completion in zip(requests, completions):
            if completion.error is None:
                self.num_tokens += completion.usage.completion_tokens
                self.max_tokens += request.sampling.max_tokens * request.sampling.n

    def expected(self, requests: Sequence[Request]) -> Ints:
        """Tokens of each answer (of a request's n completions together), at least 1."""
        share = self.num_tokens / self.max_tokens if self.max_tokens else 1.0
        limits = np.array([request.sampling.max_tokens * request.sampling.n for request in requests], np.float64)
        return np.maximum(1, np.rint(limits * share)).astype(np.int64)


def mix_requests(
    requests: Sequence[Request], lengths: AnswerLengths, engine: EngineShape, times: StepTimes
) -> list[int] | None:
    """A faster order of these requests, which are in the plan's; None if there is none that is worth it."""
    if not 4 <= len(requests) <= MAX_ROWS or any(request.sampling.n > 1 for request in requests):
        return None
    prompts = [np.asarray(request.prompt_token_ids, np.int32) for request in requests]
    shared_N = shared_prefix_lengths(prompts).astype(np.int64)
    prompt_N = np.array([len(prompt) for prompt in prompts], np.int64)
    rows = RowNumbers(prompt_N, shared_N, lengths.expected(requests))
    order = mixed_order(rows)
    if order is None:
        return None
    gain = 1 - _seconds(_reorder(rows, order), engine, times) / _seconds(rows, engine, times)
    return order.tolist() if gain >= MIN_GAIN else None


def mixed_order(rows: RowNumbers) -> Ints | None:
    """Rows by whole prefix groups from both ends of their order by kind, so that at any point about the same share of
    all prompt and of all answer tokens has been begun; None where groups are few or of one kind."""
    starts = group_starts(rows.shared_N)
    if len(starts) < 4:
        return None
    prompt_G = np.add.reduceat(rows.prompt_N - rows.shared_N, starts).astype(np.float64)
    output_G = np.add.reduceat(rows.output_N, starts).astype(np.float64)
    kind_G = prompt_G / output_G
    low, high = np.quantile(kind_G, [0.1, 0.9])
    if high < MIN_SPREAD * low:
        return None
    by_kind = np.argsort(kind_G[1:-1], kind="stable") + 1
    taken, first, last = [0], 0, len(by_kind) - 1
    prompts, outputs = prompt_G[0] / prompt_G.sum(), output_G[0] / output_G.sum()
    while first <= last:
        # Short prompts lead where both are level: answers have to be on their way for prompts to join them.
        if prompts >= outputs:
            group, first = int(by_kind[first]), first + 1
        else:
            group, last = int(by_kind[last]), last - 1
        taken.append(group)
        prompts += prompt_G[group] / prompt_G.sum()
        outputs += output_G[group] / output_G.sum()
    taken.append(len(starts) - 1)
    ends = np.append(starts[1:], len(rows))
    return np.concatenate([np.arange(starts[group], ends[group]) for group in taken])


def group_starts(shared_N: Ints) -> Ints:
    """The first row of each prefix group: rows that share little more with the one before than all rows do."""
    if len(shared_N) < 2:
        return np.zeros(len(shared_N), np.int64)
    is_first = shared_N - shared_N[1:].min() < WORTH_WAITING_TOKENS
    is_first[0] = True
    return np.flatnonzero(is_first)


def _reorder(rows: RowNumbers, order: Ints) -> RowNumbers:
    """Rows in another order, with what each then shares with the row before."""
    shared_N = rows.shared_N[order]
    for i in range(1, len(order)):
        before, row = sorted((int(order[i - 1]), int(order[i])))
        if row != before + 1 or order[i] < order[i - 1]:
            shared_N[i] = rows.shared_N[before + 1 : row + 1].min()
    return RowNumbers(rows.prompt_N[order], shared_N, rows.output_N[order])


def _seconds(rows: RowNumbers, engine: EngineShape, times: StepTimes) -> float:
    copies = RowNumbers(
        np.tile(rows.prompt_N, NUM_COPIES),
        np.tile(rows.shared_N, NUM_COPIES),
        np.tile(rows.output_N, NUM_COPIES),
        [copy * len(rows) for copy in range(NUM_COPIES)],
    )
    return simulate(copies, engine, times).seconds
