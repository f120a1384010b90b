"""The prefix cache: a radix tree whose nodes are pages, with reference counts and eviction.

A node is one page of KV memory and the tokens whose keys and values lie in it; only full pages have children. A prompt
reuses the longest chain of full pages that starts with its tokens, and of the next page the part that still agrees is
copied, so sharing is exact to the token and not rounded down to pages.

Nodes enter the tree when their tokens are known, before they are computed: a second prompt with the same beginning
then sees that somebody is about to compute it, and can wait for that instead of computing it again.

What is evicted: a leaf that no waiting sequence will read, the one used longest ago first; when there is none, the leaf
whose next reader is furthest back in the queue. A leaf is judged when its turn for eviction comes and again when that
reader has left the queue, not before, so that a pool with room to spare pays nothing for it.

Radix caching is SGLang's idea (arXiv 2312.07104). Knows no scheduler and no tensors.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from actors.common_prefix import num_in_common
from actors.next_use import ROOT, FutureUses, LostPages, page_hash
from actors.pages import PagePool

MAX_SIBLINGS_COMPARED = 16
"""Children with the same first token that a partial match looks at, latest first: corpora come sorted by tokens, so
the best neighbour is nearly always the latest."""

WORTH_A_PAGE = 8
"""A page is kept for a reader of at least one in so many of its tokens."""


class Node:
    """One page: its tokens, how many of them are computed, and how many sequences use it now."""

    __slots__ = (
        "children",
        "depth",
        "in_tree",
        "last_used",
        "next_turn",
        "num_computed",
        "num_prompt",
        "num_refs",
        "page",
        "parent",
        "path",
        "tokens",
    )

    def __init__(self, parent: Node | None, page: int, tokens: list[int]):
        self.parent = parent
        self.page = page
        self.tokens = tokens
        self.num_computed = 0
        self.num_prompt = len(tokens)  # of a prompt, and not generated
        self.num_refs = 0
        self.last_used = 0
        self.next_turn: int | None = None  # of its next reader, when it was last judged
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.path: int | None = None  # hash of its tokens and all above, once asked for
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
    """All pages that hold computed tokens, shared by sequences.

    future: who waits, for choosing what to evict; None: the least recently used leaf goes first.
    """

    def __init__(self, pool: PagePool, page_size: int, enabled: bool = True, future: FutureUses | None = None):
        self._pool = pool
        self._page_size = page_size
        self._enabled = enabled
        self._future = future
        self.lost = LostPages(page_size)
        self._root = Node(None, -1, [])
        self._root.in_tree = True
        self._root.path = ROOT
        self._clock = itertools.count(1)
        # Leaves that are not judged, by last use, and those with a reader. Entries can be stale, and are cleared out
        # when most are.
        self._unjudged: list[tuple[int, Node]] = []
        self._needed: list[tuple[int, Node]] = []  # by minus their next reader's turn
        self._needed_by: dict[int, list[Node]] = {}
        self._max_entries = 4 * pool.num_pages + 1000
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
            node.path = None
            if not node.in_tree:
                self._link(node)

    def _closest_child(self, node: Node, tokens: SequenceOf[int]) -> tuple[Node | None, int]:
        best, most = None, 0
        for child in reversed(node.children.get(tokens[0], ())[-MAX_SIBLINGS_COMPARED:]):
            agreed = num_in_common(child.tokens, tokens)
            if agreed > most:
                best, most = child, agreed
                if agreed == len(tokens):
                    break
        return best, most

    def _num_pending(self, node: Node | None, tokens: SequenceOf[int], start: int, limit: int) -> int:
        """Tokens from `start` that `node` and those below it have or will have."""
        total = 0
        while node is not None:
            agreed = num_in_common(node.tokens, tokens[start : min(start + self._page_size, limit)])
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
            if num_in_common(sibling.tokens, node.tokens) == len(node.tokens):
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

    def reader_gone(self, turn: int) -> None:
        """Whoever had this turn waits no more: what was kept for it is judged anew."""
        for node in self._needed_by.pop(turn, ()):
            if node.next_turn == turn:
                self._offer(node)

    def _offer(self, node: Node) -> None:
        """Note a node as a candidate for eviction if it is one now."""
        if self._is_candidate(node):
            node.next_turn = None
            heapq.heappush(self._unjudged, (node.last_used, node))
            if len(self._unjudged) > self._max_entries:
                self._unjudged = sorted({entry for entry in self._unjudged if self._is_unjudged(*entry)})

    def _is_candidate(self, node: Node) -> bool:
        return node.in_tree and node.num_refs == 0 and not node.children and node is not self._root

    def _is_unjudged(self, last_used: int, node: Node) -> bool:
        return node.last_used == last_used and node.next_turn is None and self._is_candidate(node)

    def _evict(self, count: int) -> None:
        if count > 0 and self._future is not None:
            self._future.start()
        for _ in range(count):
            node = self._least_needed()
            assert node.parent is not None
            if self._future is not None and node.num_computed and node.num_prompt:
                self.lost.add(self._path_of(node.parent), node.tokens, min(node.num_prompt, node.num_computed))
            self._unlink(node)
            self._pool.free(node.page)

    def _least_needed(self) -> Node:
        while self._unjudged:
            last_used, node = heapq.heappop(self._unjudged)
            if self._is_unjudged(last_used, node) and not self._is_needed(node):
                return node
        while True:
            minus_turn, node = heapq.heappop(self._needed)
            if node.next_turn != -minus_turn or not self._is_candidate(node):
                continue  # stale
            # Somebody may have come since who reads it sooner, or somebody else's page may serve its reader better.
            if not self._is_needed(node) or node.next_turn == -minus_turn:
                return node

    def _is_needed(self, node: Node) -> bool:
        """Judge a candidate; one that has a reader is kept in mind by its turn."""
        before, node.next_turn = node.next_turn, self._next_turn(node)
        if node.next_turn is None:
            return False
        if node.next_turn != before:
            heapq.heappush(self._needed, (-node.next_turn, node))
            self._needed_by.setdefault(node.next_turn, []).append(node)
            if len(self._needed) > self._max_entries:
                valid = {(minus_turn, n) for minus_turn, n in self._needed if n.next_turn == -minus_turn}
                self._needed = sorted(entry for entry in valid if self._is_candidate(entry[1]))
        return True

    def _next_turn(self, node: Node) -> int | None:
        """The turn of the next sequence that would find this leaf of use; None if none is known."""
        future, parent = self._future, node.parent
        if future is None:
            return None
        assert parent is not None
        siblings = parent.children[node.tokens[0]][-MAX_SIBLINGS_COMPARED:]
        if node not in siblings:
            return None  # nobody looks so far back
        above = self._path_of(parent)
        reader = future.next_reader(page_hash(above, node.tokens)) if len(node.tokens) == self._page_size else None
        goer = future.next_goer(above, node.tokens[0], (node.depth - 1) * self._page_size)
        if goer is None or (reader is not None and reader <= goer[0]):
            return reader
        turn, wanted = goer
        agreed = num_in_common(node.tokens, wanted)
        if agreed * WORTH_A_PAGE < self._page_size:
            return reader
        is_newer = False
        for sibling in siblings:
            if sibling is node:
                is_newer = True
            elif num_in_common(sibling.tokens, wanted) >= agreed + (not is_newer):
                return reader  # that one will be taken
        return turn

    def _path_of(self, node: Node) -> int:
        """Hash of a full node's tokens and all above."""
        chain = []
        while node.path is None:
            chain.append(node)
            assert node.parent is not None
            node = node.parent
        path = node.path
        for node in reversed(chain):
            path = node.path = page_hash(path, node.tokens)
        return path
