"""One completion in the making: its tokens, its pages, its place in time, and when it has to stop.

A request with n samples is n sequences. Knows the tree's nodes, no scheduler and no tensors.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actors.prefix_tree import Node
from actors.requests import FinishReason, Request, TokenLogprob, derive_seed

if TYPE_CHECKING:
    from actors.drafters.grammar import Matcher

UNKNOWN_TOKEN = -1
"""Stands at the end of `token_ids` for a token that is sampled but not read yet, only while a step is planned."""


@dataclass(slots=True, eq=False)
class Sequence:
    """`token_ids` is the prompt and what was generated; keys and values of the first `num_computed` are in the pages.

    `nodes` are its pages in order, the first `num_shared` of them found in the prefix tree.
    """

    request: Request
    index: int
    max_len: int
    token_ids: list[int] = field(default_factory=list)
    num_prompt: int = 0
    num_computed: int = 0
    num_cached: int = 0
    nodes: list[Node] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_shared: int = 0
    turn: int = 0  # while it waits; kept with the hashes of its pages by `next_use.FutureUses`
    path: list[int] | None = None
    heads: list[int] | None = None
    num_evicted: int = 0  # prompt tokens that would have been cached but for eviction
    seed: int = 0
    added_at: float = 0.0
    first_token_at: float | None = None
    last_token_at: float | None = None
    device_ns: int = 0
    sum_logprob: float = 0.0
    logprobs: list[TokenLogprob] | None = None
    num_preemptions: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    drafting: dict[str, Any] = field(default_factory=dict)  # what drafters remember of it, by their name
    matcher: Matcher | None = None  # follows structured_outputs
    finish_reason: FinishReason | None = None
    text: str = ""

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.token_ids = [int(token) for token in self.request.prompt_token_ids]
        self.num_prompt = len(self.token_ids)
        self.seed = self.request.seed if self.index == 0 else derive_seed(self.request.seed, self.index)
        self.added_at = time.perf_counter()
        self.max_len = min(self.max_len, self.num_prompt + sampling.max_tokens)
        if sampling.logprobs is not None:
            self.logprobs = []

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def is_decoding(self) -> bool:
        """Only the newest token is not computed yet."""
        return self.num_computed == len(self.token_ids) - 1 and self.num_generated > 0

    @property
    def mean_inter_token_s(self) -> float | None:
        """Seconds between tokens after the first; None when there is but one."""
        if self.num_generated < 2 or self.first_token_at is None or self.last_token_at is None:
            return None
        return (self.last_token_at - self.first_token_at) / (self.num_generated - 1)

    def append(self, token_id: int, logprob: float) -> None:
        """Take a sampled token."""
        self.token_ids.append(token_id)
        self.sum_logprob += logprob
        if self.matcher is not None:
            self.matcher.append(token_id)
        self.last_token_at = time.perf_counter()
        if self.first_token_at is None:
            self.first_token_at = self.last_token_at

    def count_tokens(self, draft: list[int]) -> Counter[int]:
        """How often each distinct token of prompt and output stands in the output (0: only in the prompt), supposing
        that `draft` goes on with it."""
        counts = Counter(dict.fromkeys(self.token_ids[: self.num_prompt], 0))
        counts.update(self.output_token_ids)
        counts.update(draft)
        return counts

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]
