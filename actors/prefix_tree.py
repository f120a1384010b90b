"""The prefix cache: a radix tree whose nodes are pages, with reference counts and eviction.

A node is one page of KV memory and the tokens whose keys and values lie in it; only full pages have children. A prompt
reuses the longest chain of full pages that starts with its tokens, and of the next page the part that still agrees is
copied, so sharing is exact to the token and not rounded down to pages.

Nodes enter the tree when their tokens are known, before they are computed: a second prompt with the same beginning
then sees that somebody is about to compute it, and can wait for that instead of computing it again.

Radix caching is SGLang's idea (arXiv 2312.07104). Knows no scheduler and no tensors.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from actors.pages import PagePool

MAX_SIBLINGS_COMPARED = 16
"""Children with the same first token that a partial match looks at, latest first: corpora come sorted by tokens, so
the best neighbour is nearly always the latest."""


class Node:
    """One page: its tokens, how many of them are computed, and how many sequences use it now."""

    __slots__ = ("children", "in_tree", "last_used", "num_computed", "num_refs", "page", "parent", "tokens")

    def __init__(self, parent: Node | None, page: int, tokens: list[int]):
        self.parent = parent
        self.page = page
        self.tokens = tokens
        self.num_computed = 0
        self.num_refs = 0
        self.last_used = 0
        self.in_tree = False
        self.children: dict[int, list[Node]] = {}  # by first token

    def __lt__(self, other: Node) -> bool:
        return self.page < other.page


@dataclass(frozen=True, slots=True)
class Match:
    """What the cache knows of a prompt. `nodes` are full and computed; the first `num_partial` tokens of `partial`
    go on from there. `num_pending` further tokens are being computed by somebody now."""

    nodes: list[Node]
    partial: Node | None
    num_partial: int
    num_pending: int


class PrefixTree:
    """All pages that hold computed tokens, shared by sequences, evicted least recently used leaf first."""

    def __init__(self, pool: PagePool, page_size: int, enabled: bool = True):
        self._pool = pool
        self._page_size = page_size
        self._enabled = enabled
        self._root = Node(None, -1, [])
        self._root.in_tree = True
        self._clock = itertools.count(1)
        self._evictable: list[tuple[int, Node]] = []  # heap of (last_used, leaf); entries can be stale
        self.num_unused = 0  # nodes in the tree that no sequence uses: all of them could be evicted

    @property
    def num_available(self) -> int:
        """Pages that can be had now, by eviction if need be."""
        return self._pool.num_free + self.num_unused

    def match(self, tokens: SequenceOf[int], limit: int) -> Match:
        """Find the longest cached beginning of the first `limit` tokens. Takes no references."""
        node, nodes, start = self._root, [], 0
        while self._enabled and start < limit:
            child, agreed = self._closest_child(node, tokens[start : min(start + self._page_size, limit)])
            if child is None:
                break
            usable = min(agreed, child.num_computed)
            if usable == self._page_size:
                nodes.append(child)
                node, start = child, start + usable
                continue
            num_pending = self._num_pending(child, tokens, start, limit) - usable
            return Match(nodes, child if usable else None, usable, num_pending)
        return Match(nodes, None, 0, 0)

    def acquire(self, nodes: SequenceOf[Node]) -> None:
        """Take a reference on each node: none of them is evicted until it is released."""
        stamp = next(self._clock)
        for node in nodes:
            if node.num_refs == 0 and node.in_tree:
                self.num_unused -= 1
            node.num_refs += 1
            node.last_used = stamp

    def release(self, nodes: SequenceOf[Node]) -> None:
        """Give references back, deepest first. Nodes outside of the tree lose their page at once."""
        for node in reversed(nodes):
            node.num_refs -= 1
            if node.num_refs:
                continue
            if node.in_tree:
                self.num_unused += 1
                self._offer(node)
            else:
                self._pool.free(node.page)

    def new_nodes(self, parent: Node | None, tokens: SequenceOf[int], num_pages: int) -> list[Node]:
        """Allocate `num_pages` pages in a chain below `parent` (None: the root) for `tokens`, the last of which may be
        empty, each with one reference. Known tokens join the tree at once. The caller has checked `num_available`."""
        self._evict(num_pages - self._pool.num_free)
        nodes: list[Node] = []
        above = parent or self._root
        stamp = next(self._clock)
        for i, page in enumerate(self._pool.allocate(num_pages)):
            node = Node(above, page, list(tokens[i * self._page_size : (i + 1) * self._page_size]))
            node.num_refs, node.last_used = 1, stamp
            if node.tokens:
                self._link(node)
            nodes.append(node)
            above = node
        return nodes

    def settle(self, nodes: SequenceOf[Node], num_shared: int, tokens: SequenceOf[int], num_computed: int) -> None:
        """Record what a sequence's own nodes (all but the first `num_shared`) really hold, now that it ends: the first
        `num_computed` of `tokens`. What was promised but never computed leaves the tree, what was generated joins it.
        """
        size = self._page_size
        for i in reversed(range(num_shared, len(nodes))):
            if i * size >= num_computed and nodes[i].in_tree:
                self._unlink(nodes[i])
        for i in range(num_shared, -(-num_computed // size)):
            node = nodes[i]
            node.tokens = list(tokens[i * size : min((i + 1) * size, num_computed)])
            node.num_computed = len(node.tokens)
            if not node.in_tree:
                self._link(node)

    def _closest_child(self, node: Node, tokens: SequenceOf[int]) -> tuple[Node | None, int]:
        best, most = None, 0
        for child in reversed(node.children.get(tokens[0], ())[-MAX_SIBLINGS_COMPARED:]):
            agreed = _num_equal(child.tokens, tokens)
            if agreed > most:
                best, most = child, agreed
                if agreed == len(tokens):
                    break
        return best, most

    def _num_pending(self, node: Node | None, tokens: SequenceOf[int], start: int, limit: int) -> int:
        """Tokens from `start` that `node` and those below it have or will have."""
        total = 0
        while node is not None:
            agreed = _num_equal(node.tokens, tokens[start : min(start + self._page_size, limit)])
            total += agreed
            start += agreed
            if agreed < self._page_size or start >= limit:
                break
            node, _ = self._closest_child(node, tokens[start : min(start + self._page_size, limit)])
        return total

    def _link(self, node: Node) -> None:
        """Put a node into the tree, unless caching is off, its parent is not there, or a sibling says as much."""
        parent = node.parent
        assert parent is not None
        parent_is_full = parent is self._root or len(parent.tokens) == self._page_size
        if not (self._enabled and parent.in_tree and parent_is_full):
            return
        siblings = parent.children.setdefault(node.tokens[0], [])
        for sibling in siblings[-MAX_SIBLINGS_COMPARED:]:
            if _num_equal(sibling.tokens, node.tokens) == len(node.tokens):
                return
        siblings.append(node)
        node.in_tree = True

    def _unlink(self, node: Node) -> None:
        assert node.in_tree
        assert node.parent is not None
        siblings = node.parent.children[node.tokens[0]]
        siblings.remove(node)
        if not siblings:
            del node.parent.children[node.tokens[0]]
        node.in_tree = False
        if node.num_refs == 0:
            self.num_unused -= 1
        self._offer(node.parent)

    def _offer(self, node: Node) -> None:
        """Note a node as a candidate for eviction if it is one now."""
        if node.in_tree and node.num_refs == 0 and not node.children and node is not self._root:
            heapq.heappush(self._evictable, (node.last_used, node))

    def _evict(self, count: int) -> None:
        while count > 0:
            last_used, node = heapq.heappop(self._evictable)
            if not node.in_tree or node.num_refs or node.children or node.last_used != last_used:
                continue  # stale entry
            self._unlink(node)
            self._pool.free(node.page)
            count -= 1


def _num_equal(a: SequenceOf[int], b: SequenceOf[int]) -> int:
    """Length of the common beginning."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    for i in range(length):
        if a[i] != b[i]:
            return i
    return length
