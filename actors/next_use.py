"""What the queue of waiting sequences says about pages: who reads a page next. And which were evicted too early.

A corpus is known before it is computed, so eviction need not guess from the past: the page to give up is the one whose
next reader is furthest away (Belady 1966), and best is one that nobody waits for. Pages go by a hash of all tokens from
the prompt's first to the page's last; a collision costs a page too many or too few in the cache and never an answer.

Nothing is hashed before the first eviction. Knows no tree; `prefix_tree` asks, `scheduler` tells.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.sequence import Sequence

ROOT = 0
"""The hash of no tokens at all."""

MAX_TAILS = 8
"""Ends of the order that are kept in mind: about as many as slices are in flight."""

_TURNS_OF_A_PRIORITY = 1 << 44
"""Turns are numbered apart for each priority, in the order of priorities."""

_AFTER_THE_QUEUE = 1 << 60
"""Turns of what is expected behind the queue; the latest end has the lowest, and is expected first."""

MAX_PAGES_REMEMBERED = 1 << 16
"""Evicted pages whose hash is remembered, about 100 bytes each."""

MAX_HEADS_REMEMBERED = 1 << 13
"""Evicted pages whose tokens are remembered, about 1 KB each."""


def page_hash(above: int, tokens: SequenceOf[int]) -> int:
    """The hash of a page with these tokens below pages of the hash `above`."""
    return hash((above, *tokens))


def hash_path(tokens: SequenceOf[int], page_size: int, limit: int) -> tuple[list[int], list[int]]:
    """Hashes of the full pages among the first `limit` tokens; and, for each page that begins there, of what is above
    it and its first token."""
    path, heads, above = [], [], ROOT
    for start in range(0, limit, page_size):
        heads.append(hash((above, tokens[start])))
        if start + page_size <= limit:
            above = page_hash(above, tokens[start : start + page_size])
            path.append(above)
    return path, heads


class FutureUses:
    """The turns of waiting sequences, by page. A lower turn comes sooner; each waiting sequence has one of its own.
    The order of turns is that of priorities, and among equal ones that of joining."""

    def __init__(self, page_size: int):
        self._page_size = page_size
        self._first, self._last, self._last_tail = 0, 0, 0
        self._waiting: dict[int, Sequence] = {}
        self._tails: dict[int, tuple[Sequence, set[int]]] = {}  # with their hashes, by turn
        self._readers: dict[int, int | deque[int]] = {}  # turns by the hash of a page, ascending
        self._goers: dict[int, int | deque[int]] = {}  # and by the hash above a page with its first token
        self._newest: Sequence | None = None
        self._is_used = False

    def start(self) -> None:
        """Begin to hash: pages have run out for the first time."""
        if self._is_used:
            return
        self._is_used = True
        for turn in sorted(self._waiting):
            self._enlist(self._waiting[turn])
        for turn, (sequence, _) in self._tails.items():
            self._tails[turn] = self._hash_tail(sequence)

    def join(self, sequence: Sequence, at_front: bool = False) -> None:
        """A sequence waits now, behind all others of its priority or before them."""
        sequence.turn = sequence.request.priority * _TURNS_OF_A_PRIORITY
        if at_front:
            self._first -= 1
            sequence.turn += self._first
        else:
            self._last += 1
            sequence.turn += self._last
            self._newest = sequence
        sequence.path = sequence.heads = None
        self._waiting[sequence.turn] = sequence
        if self._is_used:
            self._enlist(sequence)

    def leave(self, sequence: Sequence) -> int:
        """A sequence waits no more; returns the turn that it had."""
        del self._waiting[sequence.turn]
        if self._is_used:
            path, heads = self._hashes(sequence)
            for key in path:
                self._strike(self._readers, key)
            for key in heads:
                self._strike(self._goers, key)
            sequence.path = sequence.heads = None
        return sequence.turn

    def expect_more(self) -> int | None:
        """More like the newest sequence will come, next in its order. Returns the turn of an end that is forgotten
        for this one, None if there is none."""
        if self._newest is None:
            return None
        self._last_tail += 1
        tail = self._hash_tail(self._newest) if self._is_used else (self._newest, set())
        self._tails[_AFTER_THE_QUEUE - self._last_tail] = tail
        self._newest = None
        if len(self._tails) <= MAX_TAILS:
            return None
        oldest = next(iter(self._tails))
        del self._tails[oldest]
        return oldest

    def next_reader(self, page: int) -> int | None:
        """The turn of the next sequence that begins with this page and all above it; None if none is known."""
        turns = self._readers.get(page)
        if turns is not None:
            return turns if isinstance(turns, int) else turns[0]
        return self._find_tail(page) if self._tails else None

    def next_goer(self, above: int, first_token: int, start: int) -> tuple[int, list[int]] | None:
        """The turn of the next sequence that begins with the pages `above`, which are `start` tokens, and goes on with
        this token; and what it looks for in its next page."""
        key = hash((above, first_token))
        turns = self._goers.get(key)
        if turns is not None:
            turn = turns if isinstance(turns, int) else turns[0]
            sequence = self._waiting[turn]
            limit = len(sequence.token_ids) - 1
        else:
            found = self._find_tail(key) if self._tails else None
            if found is None:
                return None
            turn, sequence = found, self._tails[found][0]
            limit = sequence.num_prompt - 1
        return turn, sequence.token_ids[start : min(start + self._page_size, limit)]

    def _find_tail(self, key: int) -> int | None:
        return next((turn for turn in reversed(self._tails) if key in self._tails[turn][1]), None)

    def _hash_tail(self, sequence: Sequence) -> tuple[Sequence, set[int]]:
        path, heads = hash_path(sequence.token_ids, self._page_size, sequence.num_prompt - 1)
        return sequence, {*path, *heads}

    def _hashes(self, sequence: Sequence) -> tuple[list[int], list[int]]:
        if sequence.path is None or sequence.heads is None:
            # The last token of all is computed whatever is cached: its logits are wanted.
            limit = len(sequence.token_ids) - 1
            sequence.path, sequence.heads = hash_path(sequence.token_ids, self._page_size, limit)
        return sequence.path, sequence.heads

    def _enlist(self, sequence: Sequence) -> None:
        path, heads = self._hashes(sequence)
        turn = sequence.turn
        for turns_by_key, keys in ((self._readers, path), (self._goers, heads)):
            for key in keys:
                turns = turns_by_key.get(key)
                if turns is None:
                    turns_by_key[key] = turn  # mostly it stays alone, and a deque takes 700 bytes
                elif isinstance(turns, int):
                    turns_by_key[key] = deque((turn, turns) if turn < turns else (turns, turn))
                elif turn > turns[-1]:
                    turns.append(turn)
                elif turn < turns[0]:
                    turns.appendleft(turn)
                else:
                    insort(turns, turn)

    def _strike(self, turns_by_key: dict[int, int | deque[int]], key: int) -> None:
        """Take out the first turn, and those behind it, that wait no more."""
        turns = turns_by_key[key]
        if not isinstance(turns, int):
            while turns and turns[0] not in self._waiting:
                turns.popleft()
            if turns:
                return
        del turns_by_key[key]


class LostPages:
    """Prompt tokens that were computed and then evicted, the latest of them: to tell how many are computed again."""

    def __init__(self, page_size: int):
        self._page_size = page_size
        self._pages: OrderedDict[int, None] = OrderedDict()
        self._heads: OrderedDict[int, list[int]] = OrderedDict()

    def add(self, above: int, tokens: list[int], num_prompt: int) -> None:
        """A page below `above` was evicted, the first `num_prompt` of its tokens a prompt's."""
        if num_prompt == self._page_size:
            _remember(self._pages, page_hash(above, tokens), None, MAX_PAGES_REMEMBERED)
        if num_prompt:
            _remember(self._heads, hash((above, tokens[0])), tokens[:num_prompt], MAX_HEADS_REMEMBERED)

    def num_lost(self, sequence: Sequence, num_found: int) -> int:
        """How many of a waiting prompt's tokens, beside the first `num_found`, would be cached but for eviction."""
        if not self._heads or sequence.path is None or sequence.heads is None:
            return 0
        tokens = sequence.token_ids
        i = num_found // self._page_size
        while i < len(sequence.path) and sequence.path[i] in self._pages:
            i += 1
        end = i * self._page_size
        if i < len(sequence.heads):
            for a, b in zip(self._heads.get(sequence.heads[i], ()), tokens[end:-1]):
                if a != b:
                    break
                end += 1
        return max(0, end - num_found)


def _remember(known: OrderedDict[int, Any], key: int, value: Any, most: int) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > most:
        known.popitem(last=False)
