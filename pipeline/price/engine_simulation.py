"""An engine's way through rows, in numbers: which steps it would take, and how long each by the step times.

In ten lines: rows come slice by slice, a few slices at a time, in the order of the plan. In each step every row that is
decoding gets a token (more where drafts were accepted before, and pay); what is left of its tokens goes to prompts,
without their beginnings that were computed for the row before. A prompt waits a step when that beginning is just being
computed. At most `max_num_seqs` rows run, and no more than the pages hold. A step takes what `StepTimes` says of its
tokens, rows and reads; steps in which nothing begins or ends are added up at once. Left out: preemption, eviction from
the prefix cache, and what a step takes besides the model, which `estimate` adds as a factor. No tokens, no tensors.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.scheduler import MAX_HELD_BACK, WORTH_WAITING_TOKENS
from actors.step_times import StepTimes

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowNumbers:
    """Rows in the order of computing: arrays of one length N, and the first row of each slice.

    prompt_N, output_N: tokens, at least 1. shared_N: first tokens that are also those of the row before.
    """

    prompt_N: Ints
    shared_N: Ints
    output_N: Ints
    slice_starts: Sequence[int] = (0,)

    def __len__(self) -> int:
        return len(self.prompt_N)


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What bounds an engine's steps. `num_pages` None: as many as needed."""

    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int = 64
    num_pages: int | None = None
    slices_in_flight: int = 4
    has_prefix_groups: bool = True


@dataclass(frozen=True, slots=True)
class Drafting:
    """What speculation does to a decode, as far as it is known: draft tokens verified per request and step, and tokens
    that a step brings on average, its own included. must_pay: only in steps where that is faster than without."""

    drafted: float = 0.0
    tokens_per_step: float = 1.0
    must_pay: bool = False


NO_DRAFTS = Drafting()


@dataclass(frozen=True, slots=True)
class Simulation:
    """`seconds` = prefill_s + decode_s. Until `steady_s` there was always a row waiting, and by then `steady_share` of
    all tokens were computed: the pace of an engine that is full."""

    seconds: float
    prefill_s: float
    decode_s: float
    num_steps: int
    cached_tokens: int
    steady_s: float
    steady_share: float


def simulate(
    rows: RowNumbers,
    engine: EngineShape,
    times: StepTimes,
    drafting: Drafting = NO_DRAFTS,
    *,
    share_drawn: float = 0.0,
) -> Simulation:
    """Take all rows through the engine. share_drawn: of rows whose tokens are drawn with noise."""
    if len(rows) == 0:
        return Simulation(0.0, 0.0, 0.0, 0, 0, 0.0, 0.0)
    run = _Run(rows, engine, times, drafting, share_drawn)
    while run.has_work():
        run.step()
    return run.result()


class _Run:
    """The state of one simulation; rows go by their index."""

    def __init__(
        self, rows: RowNumbers, engine: EngineShape, times: StepTimes, drafting: Drafting, share_drawn: float
    ) -> None:
        num_rows = len(rows)
        self._rows, self._engine, self._times = rows, engine, times
        self._drafting, self._share_drawn = drafting, share_drawn
        self._shared = np.minimum(rows.shared_N, rows.prompt_N - 1)
        self._left_prompt = rows.prompt_N.copy()
        self._left_output = rows.output_N.astype(np.float64)
        self._is_begun = np.zeros(num_rows, bool)
        self._slice_of = np.searchsorted(np.asarray(rows.slice_starts), np.arange(num_rows), side="right") - 1
        self._left_in_slice = np.bincount(self._slice_of, minlength=len(rows.slice_starts))
        self._bounds = [*rows.slice_starts, num_rows]
        self._next_slice = 0
        self._waiting: deque[int] = deque()
        self._running: list[int] = []
        self._pages_left = math.inf if engine.num_pages is None else float(engine.num_pages)
        self._seconds = self._prefill_s = 0.0
        self._num_steps = self._cached = 0
        self._num_done = 0.0
        self._steady: tuple[float, float] | None = None
        self._pays: dict[int, bool] = {}
        for _ in range(engine.slices_in_flight):
            self._begin_slice()

    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def result(self) -> Simulation:
        steady_s, num_done = self._steady or (self._seconds, self._num_done)
        return Simulation(
            self._seconds,
            self._prefill_s,
            self._seconds - self._prefill_s,
            self._num_steps,
            self._cached,
            steady_s,
            num_done / self._num_done,
        )

    def step(self) -> None:
        """One step with prompts in it, or all steps until a decoding row ends."""
        decoding = [row for row in self._running if self._left_prompt[row] == 0]
        drafting = self._drafting if self._drafts_pay(len(decoding)) else NO_DRAFTS
        num_verified = round(len(decoding) * (1 + drafting.drafted))
        prompts = self._plan_prompts(self._engine.max_num_batched_tokens - num_verified)
        decoding_X = np.array(decoding, np.int64)
        gain = drafting.tokens_per_step
        num_steps = 1 if prompts or not decoding else math.ceil(self._left_output[decoding_X].min() / gain - 1e-9)
        self._spend(decoding_X, num_verified, prompts, num_steps, gain)
        if decoding:
            before = self._left_output[decoding_X]
            self._left_output[decoding_X] = before - num_steps * gain
            self._num_done += float(np.minimum(before, num_steps * gain).sum())
        for row, num_tokens in prompts.items():
            self._left_prompt[row] -= num_tokens
            self._num_done += num_tokens
            if self._left_prompt[row] == 0:
                self._left_output[row] -= 1
                self._num_done += 1
        self._finish_rows()

    def _begin_slice(self) -> None:
        if self._next_slice < len(self._rows.slice_starts):
            self._waiting.extend(range(self._bounds[self._next_slice], self._bounds[self._next_slice + 1]))
            self._next_slice += 1

    def _plan_prompts(self, budget: int) -> dict[int, int]:
        """Prompt tokens per row: chunks of prompts that are begun, then new rows, as the scheduler admits them."""
        prompts: dict[int, int] = {}
        for row in self._running:
            if self._left_prompt[row] and budget > 0:
                prompts[row] = min(int(self._left_prompt[row]), budget)
                budget -= prompts[row]
        whole_budget = budget
        held_back: list[int] = []
        # Per row that is looked at: first tokens that are in the cache, and those that somebody is about to compute.
        known: dict[int, int] = {}
        coming: dict[int, int] = {}
        while self._waiting and budget > 0 and len(self._running) < self._engine.max_num_seqs:
            row = self._waiting[0]
            known[row], coming[row] = self._look_up(row, known, coming, prompts)
            num_left = int(self._rows.prompt_N[row]) - known[row]
            if budget < num_left <= whole_budget or len(held_back) >= MAX_HELD_BACK:
                break
            if coming[row] - known[row] >= WORTH_WAITING_TOKENS:
                held_back.append(self._waiting.popleft())
                continue
            num_pages = self._num_pages(row)
            if self._running and num_pages > self._pages_left:
                break
            self._pages_left -= num_pages
            self._waiting.popleft()
            self._running.append(row)
            self._is_begun[row] = True
            self._left_prompt[row] = num_left
            self._cached += known[row]
            prompts[row] = min(num_left, budget)
            budget -= prompts[row]
        self._waiting.extendleft(reversed(held_back))
        return prompts

    def _look_up(
        self, row: int, known: dict[int, int], coming: dict[int, int], prompts: dict[int, int]
    ) -> tuple[int, int]:
        shared = int(self._shared[row])
        if shared == 0:
            return 0, 0
        before = row - 1
        if not self._is_begun[before]:
            return min(shared, known.get(before, 0)), min(shared, coming.get(before, 0))
        if before in prompts or self._left_prompt[before]:
            computed = int(self._rows.prompt_N[before] - self._left_prompt[before])
            return min(shared, computed), shared
        return shared, 0

    def _num_pages(self, row: int) -> int:
        size = self._engine.page_size
        num_tokens = int(self._rows.prompt_N[row] + self._rows.output_N[row])
        return -(-num_tokens // size) - int(self._shared[row]) // size

    def _drafts_pay(self, num_decoding: int) -> bool:
        """Whether decodes get more tokens per second with drafts, as the engine would decide it; they are not told
        apart, and of their drafts all are taken or none."""
        drafted = self._drafting.drafted
        if not self._drafting.must_pay or drafted == 0 or num_decoding == 0:
            return True
        if num_decoding not in self._pays:
            num_verified = round(num_decoding * (1 + drafted))
            with_drafts = self._times.seconds(num_verified, num_decoding, num_verified, num_verified)
            without = self._times.seconds(num_decoding, num_decoding, num_decoding, num_decoding)
            self._pays[num_decoding] = bool(with_drafts < without * self._drafting.tokens_per_step)
        return self._pays[num_decoding]

    def _spend(
        self, decoding_X: Ints, num_verified: int, prompts: dict[int, int], num_steps: int, tokens_per_step: float
    ) -> None:
        """Add the time of the step, or of steps that differ only in what decoding rows have written since."""
        rows = self._rows
        num_prompt_tokens = sum(prompts.values())
        num_ending = sum(self._left_prompt[row] == count for row, count in prompts.items())
        num_rows = num_verified + num_ending
        written_X = rows.output_N[decoding_X] - self._left_output[decoding_X]
        num_read = float((rows.prompt_N[decoding_X] + written_X).sum())
        num_read += num_verified - len(decoding_X)
        num_read += (num_steps - 1) / 2 * len(decoding_X) * tokens_per_step
        num_read_by_prompts = sum(
            int(rows.prompt_N[row] - self._left_prompt[row]) + count for row, count in prompts.items()
        )
        num_read += num_read_by_prompts
        num_chunks = sum(
            self._left_prompt[row] < rows.prompt_N[row] and count > 1 for row, count in prompts.items()
        ) + (len(decoding_X) if num_verified >= 2 * len(decoding_X) else 0)
        num_together = min(num_read, self._num_read_together([*decoding_X.tolist(), *prompts]))
        seconds = num_steps * float(
            self._times.seconds(
                num_prompt_tokens + num_verified,
                len(decoding_X) + len(prompts),
                num_rows,
                num_read - num_together,
                self._share_drawn * num_rows,
                num_chunks,
            )
        )
        self._seconds += seconds
        # As an engine charges its rows (`StepTimes.weigh_step`): tokens alike, and attention by what is read.
        num_tokens, num_requests = num_prompt_tokens + num_verified, len(decoding_X) + len(prompts)
        token_s = float(self._times.seconds(num_tokens, num_requests, num_requests, 0, num_chunks=0)) / num_tokens
        read_s = self._times.attention_s_per_read
        read_s *= 1 - num_together / max(1.0, num_read)  # what is read once is shared by those who need it
        weight = num_prompt_tokens * token_s + num_read_by_prompts * read_s
        self._prefill_s += seconds * weight / (num_tokens * token_s + num_read * read_s)
        self._num_steps += num_steps

    def _num_read_together(self, in_step: list[int]) -> float:
        """Tokens of context that neighbours in the step have in whole pages in common, and which are read once."""
        if not self._engine.has_prefix_groups or len(in_step) < 2 or not self._shared.any():
            return 0.0
        order = np.sort(np.array(in_step, np.int64))
        # Of two rows, the least that any row between them shares with its forerunner.
        padded = np.append(self._shared, 0)
        between = np.column_stack([order[:-1] + 1, order[1:] + 1]).ravel()
        common = np.minimum.reduceat(padded, between)[::2]
        return float((common // self._engine.page_size * self._engine.page_size).sum())

    def _finish_rows(self) -> None:
        finished = [row for row in self._running if self._left_prompt[row] == 0 and self._left_output[row] <= 1e-9]
        if finished:
            gone = set(finished)
            self._running = [row for row in self._running if row not in gone]
        for row in finished:
            self._pages_left += self._num_pages(row)
            slice_ = self._slice_of[row]
            self._left_in_slice[slice_] -= 1
            if self._left_in_slice[slice_] == 0:
                self._begin_slice()
        if self._steady is None and not self._waiting and self._next_slice >= len(self._rows.slice_starts):
            self._steady = (self._seconds, self._num_done)
