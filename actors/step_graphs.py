"""Steps without prompts as captured CUDA graphs: decoding and verification of drafts, replayed instead of launched.

A step of a small model takes less time on the GPU than Python needs to launch its kernels. A graph launches all of them
at once, but always the same ones at the same addresses: so there is one graph for each number of tokens in a short list
(`bucket_sizes`) and for each of a few numbers of attention parts, and a step is padded to the next. Padding writes no
keys (slot -1) and attends to nothing; its logits are never looked at.

Knows tensors and plans, no requests. The runner asks `forward` for every step that could be one; None means that the
step has no graph and is to be launched kernel by kernel.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.decoder import Decoder, KVPages
from kernels.attention_batch import AttentionBatch
from kernels.attention_plan import SMALL_SPLIT, PlanBuffers, PlanRoom, lay_out_plan

logger = logging.getLogger(__name__)

MAX_GRAPH_TOKENS = 512
"""Above, a step keeps a GPU busy for longer than its launches take."""

MAX_LOGITS_BYTES = 256 * 2**20
"""Of the buffer that all graphs write their logits to."""

PARTS_PER_TOKEN = (2, 8, 32)
"""Attention parts of a graph per token, up to those of the longest context. An empty part is a program that ends at
once: a fourth of a step's programs may be such."""

SHARED_SLOTS = 4
"""Rows of partial results per token beyond its own parts: it may be in so many parts of prefix groups."""

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a step, may run it, and returns what repeats it."""


@dataclass(frozen=True, slots=True)
class StepArrays:
    """The tokens of a step in the order of its AttentionBatch: ids, positions and KV slots, int64 [T] each."""

    token_ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    slots_T: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Graph:
    room: PlanRoom
    replay: Callable[[], None]


class StepGraphs:
    """Graphs of one decoder and its pages, captured when made.

    They share buffers: a step's logits must have been read before the next `forward`.
    """

    def __init__(self, decoder: Decoder, kv: KVPages, page_size: int, max_num_seqs: int, capture: Capture) -> None:
        self._decoder, self._kv, self._page_size = decoder, kv, page_size
        self._heads_per_kv = decoder.num_heads // decoder.num_kv_heads
        device, vocab_size = decoder.device, decoder.vocab_size
        most = min(MAX_GRAPH_TOKENS, MAX_LOGITS_BYTES // (4 * vocab_size))
        sizes = bucket_sizes(max(1, most))
        largest = sizes[-1]
        self._host_3T = torch.zeros((3, largest), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._inputs_3T = torch.zeros((3, largest), dtype=torch.int64, device=device)
        self._logits_TV = torch.zeros((largest, vocab_size), dtype=torch.float32, device=device)
        self._rows_T = torch.arange(largest, device=device)
        rooms = [room for size in sizes for room in self._rooms(size, max_num_seqs)]
        self._buffers = {window: PlanBuffers(_largest(rooms), device) for window in decoder.windows}
        self._graphs: list[_Graph] = []
        self.num_replayed = self.num_without = 0
        started = time.perf_counter()
        # The largest first: the others' memory then fits into what it has left.
        for number, room in enumerate(reversed(rooms), 1):
            self._graphs.insert(0, self._capture(room, capture))
            if number % 8 == 0 or number == len(rooms):
                logger.info("captured %d of %d CUDA graphs", number, len(rooms))
        self.capture_s = time.perf_counter() - started

    def forward(self, arrays: StepArrays, batch: AttentionBatch) -> Tensor | None:
        """Run a step that wants the logits of all its tokens; float32 [T, V], valid until the next call."""
        num_tokens = len(arrays.token_ids_T)
        if num_tokens > self._graphs[-1].room.num_tokens:
            self.num_without += 1
            return None
        plans = {
            window: lay_out_plan(batch, self._heads_per_kv, window, self._decoder.deterministic)
            for window in self._buffers
        }
        for graph in self._graphs:
            if num_tokens <= graph.room.num_tokens and all(graph.room.holds(plan) for plan in plans.values()):
                break
        else:
            self.num_without += 1
            return None
        for window, plan in plans.items():
            self._buffers[window].load(plan, graph.room)
        self._load(arrays, graph.room.num_tokens)
        graph.replay()
        self.num_replayed += 1
        return self._logits_TV[:num_tokens]

    def describe(self) -> str:
        """One line for a person."""
        sizes = sorted({graph.room.num_tokens for graph in self._graphs})
        return (
            f"{len(self._graphs)} CUDA graphs for steps of up to {sizes[-1]} tokens, captured in {self.capture_s:.1f} s"
        )

    def _rooms(self, num_tokens: int, max_num_seqs: int) -> list[PlanRoom]:
        """The plans for which there are graphs of this many tokens, smaller ones first."""
        longest = -(-self._decoder.max_model_len // SMALL_SPLIT)
        per_token = sorted({min(count, longest + 1) for count in PARTS_PER_TOKEN})
        num_requests = min(num_tokens, max_num_seqs)
        pages = -(-self._decoder.max_model_len // self._page_size)
        return [
            PlanRoom(
                num_tokens=num_tokens,
                num_small=num_tokens * count,
                num_large=max(8, num_tokens),
                num_slots=num_tokens * (count + SHARED_SLOTS),
                # Twice, as the tables of groups stand beside those of their requests.
                num_page_ids=2 * num_requests * pages,
            )
            for count in per_token
        ]

    def _load(self, arrays: StepArrays, num_padded: int) -> None:
        num_tokens = len(arrays.token_ids_T)
        host = self._host_3T.numpy()
        for row, (array, blank) in enumerate(((arrays.token_ids_T, 0), (arrays.positions_T, 0), (arrays.slots_T, -1))):
            host[row, :num_tokens] = array
            host[row, num_tokens:num_padded] = blank
        self._inputs_3T.copy_(self._host_3T, non_blocking=True)

    def _capture(self, room: PlanRoom, capture: Capture) -> _Graph:
        num_tokens = room.num_tokens
        token_ids_T, positions_T, slots_T = (row[:num_tokens] for row in self._inputs_3T)
        slots_T.fill_(-1)
        nothing = lay_out_plan(AttentionBatch([], [], [], self._page_size), self._heads_per_kv, None)
        # Lengths that pass the checks; the kernels read the plans that are in the cache already.
        batch = AttentionBatch([1] * num_tokens, [1] * num_tokens, [[0]] * num_tokens, self._page_size)
        for window, buffers in self._buffers.items():
            buffers.load(nothing, room)
            key = ("triton_attention", self._heads_per_kv, window, self._decoder.deterministic)
            batch.cache[key] = buffers.plan(room)
        rows_T, logits_TV = self._rows_T[:num_tokens], self._logits_TV[:num_tokens]

        def step() -> None:
            logits_TV.copy_(self._decoder.forward(token_ids_T, positions_T, slots_T, self._kv, batch, rows_T))

        return _Graph(room, capture(step))


def bucket_sizes(most: int) -> list[int]:
    """Numbers of tokens for which there are graphs, up to `most`: padding adds at most a quarter from 16 on."""
    sizes = {1, 2, 4, 8, 12, most}
    size = 16
    while size <= most:
        sizes |= {size + quarter * size // 4 for quarter in range(4)}
        size *= 2
    return sorted(size for size in sizes if size <= most)


def capture_cuda_graph() -> Capture:
    """Capture into graphs that share one pool of memory. Each step runs once before, which compiles its kernels."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        return graph.replay

    return capture


def _largest(rooms: list[PlanRoom]) -> PlanRoom:
    return PlanRoom(*(max(getattr(room, name) for room in rooms) for name in PlanRoom.__slots__))
