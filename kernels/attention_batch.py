"""Which query tokens of a step attend to which pages: the metadata that every attention kernel reads.

Built once per step by the runner, used by all layers. Knows no requests and no scheduler, only lengths and page ids.

Shape letters, here and in every kernel: T tokens of a step, B requests of a step, N query heads, K key/value heads,
D head dimension, P pages, S token slots of a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.draft_tree import TreeMask


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Requests `first_request .. first_request + num_requests - 1` of a step share pages.

    `page_ids` are their pages from number `first_page` on: full ones whose tokens all precede every query token of the
    group, so no mask is needed on them. Of nested groups each has the pages that follow those of the group around it.
    """

    first_request: int
    num_requests: int
    page_ids: Sequence[int]
    first_page: int = 0


@dataclass(slots=True)
class AttentionBatch:
    """The requests of one step, in the order of their query tokens.

    query_lens[b]: tokens of request b in this step (1 for decode, more for prefill or verification), at least 1.
    context_lens[b]: its tokens in the cache once this step's are written; the last query_lens[b] are its queries.
    page_ids[b]: its pages in order; token i of the request is slot i % S of page page_ids[b][i // S].
    groups: each of at least two requests, ascending by first_request, disjoint or one inside the other (the outer one
        first); requests outside of any group attend alone. Purely an optimisation: the result is the same without.
    trees: of requests whose query tokens, 64 at most, are draft tokens in a tree: the mask [L, L] of who sees whom
        among them (kernels.draft_tree has the semantics). All others are causal. The engine drafts no trees yet.
    """

    query_lens: list[int]
    context_lens: list[int]
    page_ids: list[Sequence[int]]
    page_size: int
    groups: list[PrefixGroup] = field(default_factory=list)
    trees: dict[int, TreeMask] = field(default_factory=dict)
    cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What a kernel derived from the fields above, kept so that it is derived once per step and not once per layer."""

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)


def new_kv_pages(
    num_pages: int, num_kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Allocate the key and value pages of one layer, each of logical shape [P, K, S, D].

    On a CPU the memory is laid out [K, P, S, D], so that a run of consecutive pages is one strided view per head;
    on a GPU it is [P, K, S, D], one page and head being one contiguous tile.
    """
    if device.type == "cpu":
        shape = (num_kv_heads, num_pages, page_size, head_dim)
        return (
            torch.zeros(shape, dtype=dtype).transpose(0, 1),
            torch.zeros(shape, dtype=dtype).transpose(0, 1),
        )
    shape = (num_pages, num_kv_heads, page_size, head_dim)
    return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
