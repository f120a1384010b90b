"""Draft tokens in a tree: which query tokens of a request see which, where one step verifies several branches.

A request's query tokens are then no sequence: token i follows its parent, one of the tokens before it, and sees this
parent, what the parent sees, and itself. Their keys lie in the slots behind the context in the order of the tokens, but
a token's position, which rotary embeddings and windows go by, is that of the first query token plus its depth.

    position[i] = context - queries + number of ancestors of i
    i sees key j of the context before    iff  position[i] - window < j
    i sees query token j                  iff  j is an ancestor or i itself, and position[i] - window < position[j]

As in SpecInfer (arXiv 2305.09781, topology-aware mask). A kernel gets the mask as 64 bits per token. Knows no keys.

The engine's drafters guess chains, which causal attention serves; nothing above this floor builds trees yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kernels.on_demand import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

MAX_TREE_TOKENS = 64
"""A token's row of the mask is one word of so many bits."""

TREE_FIELDS = 3
"""Of a query token, as kernels read it: the first key that the bits are about, and the lower and the upper 32 bits."""

TreeMask = NDArray[np.bool_]
"""[L, L]: whether query token i of a request sees its query token j."""


def tree_mask(parents: Sequence[int]) -> TreeMask:
    """The mask of a tree given by each token's parent, a token before it; -1 is none: it follows the context."""
    mask = np.eye(len(parents), dtype=np.bool_)
    for i, parent in enumerate(parents):
        if not -1 <= parent < i:
            raise ValueError(f"tree_mask: token {i} has parent {parent}; it must be a token before it, or -1 for none")
        if parent >= 0:
            mask[i] |= mask[parent]
    return mask


def check_trees(trees: Mapping[int, TreeMask], query_lens: Sequence[int]) -> None:
    """Refuse masks that are not of the requests' query tokens, or no trees."""
    for request, mask in trees.items():
        if not 0 <= request < len(query_lens):
            raise ValueError(f"trees: there is one of request {request}; the step has {len(query_lens)} requests")
        length = query_lens[request]
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (length, length):
            found = f"{mask.dtype} {tuple(mask.shape)}" if hasattr(mask, "dtype") else type(mask).__name__
            raise ValueError(
                f"trees: the mask of request {request} is {found}; it must be a bool array of numpy's, "
                f"[{length}, {length}] as the request has {length} query tokens"
            )
        if length > MAX_TREE_TOKENS:
            raise ValueError(
                f"trees: request {request} has {length} query tokens; a tree has at most {MAX_TREE_TOKENS}"
            )
        ancestors = np.tril(mask, -1)
        parent = length - 1 - ancestors[:, ::-1].argmax(1)  # where there is one
        follows = mask[parent] & (ancestors.sum(1) > 0)[:, None]
        if (mask != (follows | np.eye(length, dtype=np.bool_))).any():
            raise ValueError(
                f"trees: the mask of request {request} is no tree; each token must see itself, one token before it or "
                "none, and what that one sees"
            )


def depths(mask: TreeMask) -> NDArray[np.int64]:
    """[L]: how many ancestors each token has."""
    return mask.sum(1) - 1


def seen_in_tree(mask: TreeMask, window: int | None) -> TreeMask:
    """The mask without the ancestors that are `window` or more positions away."""
    if window is None:
        return mask
    depth = depths(mask)
    return mask & (depth[None, :] > depth[:, None] - window)


def hidden_keys(order: NDArray[np.int64], num_keys: int, mask: TreeMask | None, window: int | None) -> TreeMask:
    """[L, C]: which of a request's first `num_keys` keys its query tokens, in slots `order`, do not see; it may have
    fewer, or more."""
    key = np.arange(num_keys)
    if mask is None:
        position = order
        hidden = key > order[:, None]
    else:
        position = order[0] + depths(mask)
        hidden = np.repeat(key[None, :] >= order[0], len(order), axis=0)
        of_tree = hidden[:, order[0] : order[-1] + 1]
        of_tree[:] = ~seen_in_tree(mask, window)[:, : of_tree.shape[1]]
    if window is not None:
        hidden |= key <= position[:, None] - window
    return hidden


def pack_tree(mask: TreeMask, window: int | None, first_key: int) -> NDArray[np.int64]:
    """[L, 3] for kernels: see TREE_FIELDS."""
    words = np.zeros((len(mask), MAX_TREE_TOKENS // 8), np.uint8)
    bits = np.packbits(seen_in_tree(mask, window), axis=1, bitorder="little")
    words[:, : bits.shape[1]] = bits
    packed = np.empty((len(mask), TREE_FIELDS), np.int64)
    packed[:, 0] = first_key
    packed[:, 1:] = words.view("<i4")
    return packed


@triton_kernel
def is_seen_by_tree(key, tree_start, low_bits, high_bits):
    """[R, keys]: which rows see which keys of theirs, by the three numbers that each row's token has in `pack_tree`."""
    # Keys before the request's query tokens are seen, and of these the ones whose bits are set.
    place = key[None, :] - tree_start[:, None]
    bits = tl.where(place < 32, low_bits[:, None], high_bits[:, None])
    in_tree = (place < 64) & (((bits >> (place & 31)) & 1) != 0)
    return (place < 0) | in_tree
