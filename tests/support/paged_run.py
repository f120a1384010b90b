"""A decoder with pages and nothing else of the engine around it."""

from __future__ import annotations

import random

import torch

from actors.decoder import Decoder
from kernels.attention_batch import AttentionBatch

PAGE_SIZE = 4


class PagedRun:
    """What the engine does around a decoder, in its simplest form: pages in random order, one list of tokens each."""

    def __init__(self, decoder: Decoder, num_requests: int, max_tokens: int) -> None:
        self.decoder = decoder
        pages_each = -(-max_tokens // PAGE_SIZE)
        page_ids = list(range(num_requests * pages_each))
        random.Random(0).shuffle(page_ids)
        self.page_ids = [page_ids[i * pages_each : (i + 1) * pages_each] for i in range(num_requests)]
        self.num_cached = [0] * num_requests
        self.kv = decoder.new_kv(len(page_ids), PAGE_SIZE)
        for pages in self.kv:
            for tensor in pages:
                tensor.fill_(1e4)  # what a former owner may have left in slots not yet written

    def step(self, work: list[tuple[int, list[int]]], wanted: list[int] | None = None) -> torch.Tensor:
        """Run some tokens of some requests; logits of the `wanted` rows, by default the last one of each request."""
        tokens, positions, slots, ends = [], [], [], []
        for request, new_tokens in work:
            start = self.num_cached[request]
            for position, token in enumerate(new_tokens, start):
                tokens.append(token)
                positions.append(position)
                slots.append(self.page_ids[request][position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE)
            ends.append(len(tokens) - 1)
            self.num_cached[request] += len(new_tokens)
        batch = AttentionBatch(
            query_lens=[len(new_tokens) for _, new_tokens in work],
            context_lens=[self.num_cached[request] for request, _ in work],
            page_ids=[self.page_ids[request] for request, _ in work],
            page_size=PAGE_SIZE,
        )
        return self.decoder.forward(
            torch.tensor(tokens),
            torch.tensor(positions),
            torch.tensor(slots),
            self.kv,
            batch,
            torch.tensor(ends if wanted is None else wanted, dtype=torch.int64),
        )
