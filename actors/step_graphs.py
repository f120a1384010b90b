"""Steps without prompts as captured CUDA graphs: decoding and verification of drafts, replayed instead of launched.

A step of a small model takes less time on the GPU than Python needs to launch its kernels. A graph launches all of them
at once, but always the same ones at the same addresses: so there is one graph for each number of tokens in a short list
(`bucket_sizes`) and for each of a few numbers of attention parts, and a step is padded to the next. Padding writes no
keys (slot -1) and attends to nothing; its logits are never looked at.

Knows tensors and plans, no requests. The runner asks `forward` for every step that could be one; None means that the
step has no graph and is to be launched kernel by kernel.

Graphs hold the addresses of the KV pages, so they come after these, and these have to leave room for them
(`expected_graph_bytes`). What capturing took is measured on a GPU, and stands beside that in `describe`.
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

from actors.architecture import Architecture
from actors.decoder import Decoder, KVPages
from kernels.attention_batch import AttentionBatch
from kernels.attention_plan import FIELDS, SMALL_SPLIT, PlanBuffers, PlanRoom, lay_out_plan

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
class UnreadTokens:
    """Tokens of a step that only the device knows: token places_U[i] of it is token_ids_B[rows_U[i]], all int64 and
    there."""

    places_U: Tensor
    rows_U: Tensor
    token_ids_B: Tensor

    def write_into(self, token_ids_T: Tensor) -> None:
        """Put the tokens in their places."""
        token_ids_T.index_copy_(0, self.places_U, self.token_ids_B.index_select(0, self.rows_U))


@dataclass(frozen=True, slots=True)
class StepArrays:
    """The tokens of a step in the order of its AttentionBatch: ids, positions and KV slots, int64 [T] each.

    unread: ids that are on the device only; what stands in their places means nothing.
    """

    token_ids_T: NDArray[np.int64]
    positions_T: NDArray[np.int64]
    slots_T: NDArray[np.int64]
    unread: UnreadTokens | None = None


@dataclass(frozen=True, slots=True)
class _Graph:
    room: PlanRoom
    replay: Callable[[], None]


class StepGraphs:
    """Graphs of one decoder and its pages, captured when made.

    They share buffers: a step's logits must have been read before the next `forward`, in the order of the device's
    work. On the host nothing has to be done before it, the copies to the device excepted: `forward` waits for these.
    """

    def __init__(self, decoder: Decoder, kv: KVPages, page_size: int, max_num_seqs: int, capture: Capture) -> None:
        self._decoder, self._kv, self._page_size = decoder, kv, page_size
        self._heads_per_kv = decoder.num_heads // decoder.num_kv_heads
        device, vocab_size = decoder.device, decoder.vocab_size
        free_before = _free_bytes(device)
        rooms = graph_rooms(vocab_size, decoder.max_model_len, page_size, max_num_seqs)
        largest = rooms[-1].num_tokens
        self._host_3T = torch.zeros((3, largest), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._inputs_3T = torch.zeros((3, largest), dtype=torch.int64, device=device)
        self._logits_TV = torch.zeros((largest, vocab_size), dtype=torch.float32, device=device)
        self._rows_T = torch.arange(largest, device=device)
        self._buffers = {window: PlanBuffers(_largest(rooms), device) for window in decoder.windows}
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._graphs: list[_Graph] = []
        self.num_replayed = self.num_without = 0
        started = time.perf_counter()
        # The largest first: the others' memory then fits into what it has left.
        for number, room in enumerate(reversed(rooms), 1):
            self._graphs.insert(0, self._capture(room, capture))
            if number % 8 == 0 or number == len(rooms):
                logger.info("captured %d of %d CUDA graphs", number, len(rooms))
        self.capture_s = time.perf_counter() - started
        self.buffer_bytes = graph_buffer_bytes(rooms, vocab_size, len(decoder.windows))
        self.took_bytes = free_before - _free_bytes(device)
        """Of the GPU's memory, by the driver's account: buffers, steps' temporaries and the graphs; 0 on a CPU."""

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
        if self._copied is not None:
            # The step before may be on its way still, but as its first work it copied what stands in memory here.
            self._copied.synchronize()
        for window, plan in plans.items():
            self._buffers[window].load(plan, graph.room)
        self._load(arrays, graph.room.num_tokens)
        if self._copied is not None:
            self._copied.record()
        graph.replay()
        self.num_replayed += 1
        return self._logits_TV[:num_tokens]

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"{len(self._graphs)} CUDA graphs for steps of up to {self._graphs[-1].room.num_tokens} tokens, captured "
            f"in {self.capture_s:.1f} s: took {self.took_bytes / 2**30:.2f} GiB, with buffers of "
            f"{self.buffer_bytes / 2**30:.2f} GiB"
        )

    def _load(self, arrays: StepArrays, num_padded: int) -> None:
        num_tokens = len(arrays.token_ids_T)
        host = self._host_3T.numpy()
        for row, (array, blank) in enumerate(((arrays.token_ids_T, 0), (arrays.positions_T, 0), (arrays.slots_T, -1))):
            host[row, :num_tokens] = array
            host[row, num_tokens:num_padded] = blank
        self._inputs_3T.copy_(self._host_3T, non_blocking=True)
        if arrays.unread is not None:
            arrays.unread.write_into(self._inputs_3T[0])

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


def graph_rooms(vocab_size: int, max_model_len: int, page_size: int, max_num_seqs: int) -> list[PlanRoom]:
    """The plans for which there are graphs, smaller ones first: a few numbers of parts for each number of tokens."""
    most = max(1, min(MAX_GRAPH_TOKENS, MAX_LOGITS_BYTES // (4 * vocab_size)))
    longest = -(-max_model_len // SMALL_SPLIT)
    pages = -(-max_model_len // page_size)
    return [
        PlanRoom(
            num_tokens=num_tokens,
            num_small=num_tokens * count,
            num_large=max(8, num_tokens),
            num_slots=num_tokens * (count + SHARED_SLOTS),
            # Twice, as the tables of groups stand beside those of their requests.
            num_page_ids=2 * min(num_tokens, max_num_seqs) * pages,
        )
        for num_tokens in bucket_sizes(most)
        for count in sorted({min(count, longest + 1) for count in PARTS_PER_TOKEN})
    ]


def graph_buffer_bytes(rooms: list[PlanRoom], vocab_size: int, num_windows: int) -> int:
    """Bytes on the device of what all graphs read and write: inputs and rows, logits, and a plan for each window."""
    largest = _largest(rooms)
    num_parts = largest.num_small + largest.num_large
    num_words = FIELDS * num_parts + 3 * largest.num_tokens + 1 + largest.num_slots + largest.num_page_ids
    return 8 * 4 * largest.num_tokens + 4 * largest.num_tokens * vocab_size + 4 * num_words * num_windows


def expected_graph_bytes(
    architecture: Architecture, max_model_len: int, dtype: torch.dtype, page_size: int, max_num_seqs: int
) -> int:
    """Bytes of the device to leave free for StepGraphs: its buffers, and the temporaries of the largest step.

    The temporaries are counted as if all of a layer and of the head lived at once, with the layer's largest weight
    expanded beside them, which is what an int4 product of many tokens does. That is more than lives at once, but says
    nothing of a packed head, of what torch's allocator loses between blocks, and of what the driver keeps for each
    graph: these come out of what `gpu_memory_utilization` leaves. The engine says when capturing took more.
    """
    rooms = graph_rooms(architecture.vocab_size, max_model_len, page_size, max_num_seqs)
    largest = _largest(rooms)
    queries, keys = (heads * architecture.head_dim for heads in (architecture.num_heads, architecture.num_kv_heads))
    # Residual and norms; q, k, v twice, for their norms; what was attended, projected; gate, up and their product.
    per_token = 4 * architecture.hidden_size + 2 * (queries + 2 * keys) + queries + 3 * architecture.intermediate_size
    temporaries = largest.num_tokens * (per_token + architecture.vocab_size) * dtype.itemsize
    logits = 4 * largest.num_tokens * architecture.vocab_size
    partial = 4 * largest.num_slots * architecture.num_heads * (architecture.head_dim + 1)
    widest = max(2 * architecture.intermediate_size, queries + 2 * keys)
    expanded = widest * architecture.hidden_size * dtype.itemsize
    buffers = graph_buffer_bytes(rooms, architecture.vocab_size, len(set(architecture.windows)))
    return buffers + temporaries + logits + partial + expanded


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


def _free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, without what torch keeps for later; 0 on a CPU, where nobody counts."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _largest(rooms: list[PlanRoom]) -> PlanRoom:
    return PlanRoom(*(max(getattr(room, name) for room in rooms) for name in PlanRoom.__slots__))
