"""Turns a step's plan into tensors, runs the forward pass, and samples. The only place where plans meet tensors.

Called by the engine once per step. `launch` waits for nothing that a GPU computes. Knows no waiting and no stopping.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.decoder import Decoder, clear_pages, copy_slots
from actors.prefix_groups import group_by_prefix
from actors.sampled_tokens import SampledToken, SampledTokens
from actors.sampling_tensors import Position, SamplingTensors, to_device
from actors.scheduler import StepPlan
from actors.sequence import UNKNOWN_TOKEN, Sequence
from actors.step_graphs import Capture, StepArrays, StepGraphs, UnreadTokens
from actors.step_times import StepTimes
from kernels.attention_batch import AttentionBatch, PrefixGroup
from kernels.attention_plan import ranges
from kernels.backend import sample
from kernels.quantized_kv import clear_slots

_NO_DRAFT: list[int] = []


class Runner:
    """Holds the decoder and its KV pages."""

    def __init__(self, decoder: Decoder, num_pages: int, page_size: int, enable_prefix_groups: bool):
        self._decoder = decoder
        self._device = decoder.device
        self._page_size = page_size
        self._enable_prefix_groups = enable_prefix_groups
        self._kv = decoder.new_kv(num_pages, page_size)
        self._sampling = SamplingTensors(decoder.eos_token_ids, decoder.device)
        self._graphs: StepGraphs | None = None
        self._tables: dict[Sequence, tuple[list[int], NDArray[np.int64]]] = {}
        self._grouped: list[Sequence] = []
        self._order: list[int] = []
        self._groups: list[PrefixGroup] = []

    def capture_graphs(self, max_num_seqs: int, capture: Capture) -> StepGraphs:
        """Capture steps without prompts, for all from now on."""
        self._graphs = StepGraphs(self._decoder, self._kv, self._page_size, max_num_seqs, capture)
        return self._graphs

    def run(self, plan: StepPlan, times: StepTimes) -> tuple[dict[Sequence, list[SampledToken]], list[float]]:
        """Compute a plan and wait for it: `launch`, and its tokens as SampledTokens.read returns them."""
        sampled, weights = self.launch(plan, times)
        return sampled.read(), weights

    def launch(
        self, plan: StepPlan, times: StepTimes, before: SampledTokens | None = None
    ) -> tuple[SampledTokens, list[float]]:
        """Compute a plan, drafts included, without waiting for a GPU.

        before: of the step launched last; where a sequence ends in UNKNOWN_TOKEN, its token is taken from there.

        Returns for each sequence that is now complete the token after its last one, then the token after each of its
        draft tokens, supposing that those were right; and what each sequence of the plan (in the plan's order) should
        bear of the step's time, as weights.
        """
        for copy in plan.copies:
            copy_slots(self._kv, copy.source, copy.target, copy.num_tokens)
        order, groups = self._group(plan)
        sequences = [plan.sequences[i] for i in order]
        drafts = [plan.drafts.get(sequence, _NO_DRAFT) for sequence in sequences]
        num_tokens = [plan.num_tokens[i] + len(draft) for i, draft in zip(order, drafts)]
        self._tables = {sequence: self._table_of(sequence) for sequence in sequences}
        # Triton's plans are made of arrays, those of a CPU of single pages, which are faster as lists.
        page_ids: list[Any] = [pages if self._device.type == "cpu" else table for pages, table in self._tables.values()]
        batch = AttentionBatch(
            query_lens=num_tokens,
            context_lens=[s.num_computed + count for s, count in zip(sequences, num_tokens)],
            page_ids=page_ids,
            page_size=self._page_size,
            groups=groups,
        )
        logits, positions = self._forward(sequences, drafts, batch, before)
        sampled = self._sample(logits, positions)
        weights = [0.0] * len(order)
        for i, weight in zip(order, _weigh(batch, times)):
            weights[i] = weight
        return sampled, weights

    def num_read(self, plan: StepPlan) -> float:
        """Tokens of keys and values that the plan's attention reads, those that a prefix group shares once."""
        _, groups = self._group(plan)
        num_known = sum(sequence.num_computed for sequence in plan.sequences) + sum(plan.num_tokens)
        shared = sum((group.num_requests - 1) * len(group.page_ids) for group in groups)
        return num_known - shared * self._page_size

    def clear_rejected(self, sequence: Sequence) -> None:
        """Zero the slots behind what a sequence has computed, as `clear_pages` does and for the same reason."""
        size = self._page_size
        for i in range(sequence.num_computed // size, len(sequence.pages)):
            first = max(0, sequence.num_computed - i * size)
            for k_pages, v_pages in self._kv:
                clear_slots(k_pages, sequence.pages[i], first)
                clear_slots(v_pages, sequence.pages[i], first)

    def _group(self, plan: StepPlan) -> tuple[list[int], list[PrefixGroup]]:
        if not self._enable_prefix_groups:
            return list(range(len(plan.sequences))), []
        # Groups last as long as the same sequences decode together.
        if plan.sequences != self._grouped or any(count > 1 for count in plan.num_tokens):
            self._grouped = list(plan.sequences)
            self._order, self._groups = group_by_prefix(
                [s.pages for s in plan.sequences], [s.num_computed // self._page_size for s in plan.sequences]
            )
        return self._order, self._groups

    def _table_of(self, sequence: Sequence) -> tuple[list[int], NDArray[np.int64]]:
        """A sequence's pages as a list, which is another one whenever it changes, and as an array."""
        known = self._tables.get(sequence)
        return known if known and known[0] is sequence.pages else (sequence.pages, np.array(sequence.pages, np.int64))

    def _forward(
        self,
        sequences: list[Sequence],
        drafts: list[list[int]],
        batch: AttentionBatch,
        before: SampledTokens | None,
    ) -> tuple[torch.Tensor, list[Position]]:
        token_ids: list[int] = []
        rows: list[int] = []
        sampled: list[Position] = []
        for sequence, draft, stop in zip(sequences, drafts, batch.context_lens):
            known = sequence.token_ids
            token_ids += known[sequence.num_computed : stop]
            if stop < len(known):
                continue
            rows.append(len(token_ids) - 1)
            sampled.append(Position(sequence, draft, 0))
            if draft:
                rows += range(len(token_ids), len(token_ids) + len(draft))
                sampled += [Position(sequence, draft, num_drafts) for num_drafts in range(1, len(draft) + 1)]
                token_ids += draft
        positions_T, slots_T = self._places(sequences, batch)
        token_ids_T = np.array(token_ids, np.int64)
        unread = None if before is None else self._unread(token_ids_T, sequences, batch.query_lens, before)
        arrays = StepArrays(token_ids_T, positions_T, slots_T, unread)
        if self._graphs is not None and len(rows) == len(token_ids):
            logits = self._graphs.forward(arrays, batch)
            if logits is not None:
                return logits, sampled
        ids_T = to_device(token_ids_T, self._device)
        if unread is not None:
            unread.write_into(ids_T)
        logits = self._decoder.forward(
            ids_T,
            to_device(positions_T, self._device),
            to_device(slots_T, self._device),
            self._kv,
            batch,
            to_device(np.array(rows, np.int64), self._device),
        )
        return logits, sampled

    def _unread(
        self, token_ids_T: NDArray[np.int64], sequences: list[Sequence], counts: SequenceOf[int], before: SampledTokens
    ) -> UnreadTokens | None:
        """The tokens that are known on the device only; counts: of each sequence's tokens in the step."""
        places_U = np.flatnonzero(token_ids_T == UNKNOWN_TOKEN)
        if not len(places_U):
            return None
        rows = before.rows_of()
        owners = np.searchsorted(np.cumsum(counts), places_U, side="right").tolist()
        rows_U = np.array([rows[sequences[owner]] for owner in owners], np.int64)
        assert before.token_ids_B is not None
        return UnreadTokens(to_device(places_U, self._device), to_device(rows_U, self._device), before.token_ids_B)

    def _places(self, sequences: list[Sequence], batch: AttentionBatch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions and KV slots of a step's tokens."""
        tables = [table for _, table in self._tables.values()]
        counts, contexts = np.array(batch.query_lens, np.int64), np.array(batch.context_lens, np.int64)
        positions_T = ranges(contexts - counts, counts)
        sizes = np.array([len(table) for table in tables], np.int64)
        page_T = np.repeat(np.cumsum(sizes) - sizes, counts) + positions_T // self._page_size
        return positions_T, np.concatenate(tables)[page_T] * self._page_size + positions_T % self._page_size

    def _sample(self, logits: torch.Tensor, positions: list[Position]) -> SampledTokens:
        if not positions:
            return SampledTokens([], None)
        result = sample(logits, self._sampling.batch(positions))
        return SampledTokens([position.sequence for position in positions], result)

    def clear_pages(self, pages: list[int]) -> None:
        """Zero pages. Slots that are not valid yet are masked in attention, but NaN times a weight of 0 is NaN."""
        clear_pages(self._kv, pages)


def _weigh(batch: AttentionBatch, times: StepTimes) -> list[float]:
    """What each request of a batch costs: its tokens, its own context, and its part of the shared one."""
    num_read = [float(count) for count in batch.context_lens]
    for group in batch.groups:
        shared = len(group.page_ids) * batch.page_size
        for request in range(group.first_request, group.first_request + group.num_requests):
            num_read[request] -= shared - shared / group.num_requests
    return times.weigh_step(batch.query_lens, num_read)
