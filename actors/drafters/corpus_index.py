"""Drafts from what this corpus has already answered: an index from the last few tokens to the token that came next.

Rows of one corpus are asked the same thing, so their answers repeat each other's format and phrases. The index knows,
for contexts of one to eight tokens, the most frequent next token; a draft walks it token by token. Contexts reach back
into the prompt's tail (the end of a chat template), so the start of an answer is drafted too. A longer context is
learnt only where a shorter one has been seen to be ambiguous, which keeps the index small and quick to build. Where
nothing is sure, `actors.drafters.learned_copies` may know what part of the prompt comes next.

Related: REST (arXiv 2311.08252) and SuffixDecoding (arXiv 2411.04975) keep whole answers. Knows no files: `to_bytes`
and `merge_bytes` are for whoever saves it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.drafters.acceptance import MIN_SURVIVAL, WEAK_CHANCE, Acceptance
from actors.drafters.learned_copies import CopiedFrom, LearnedCopies
from actors.drafters.prompt_lookup import to_code_points
from actors.sequence import Sequence

if TYPE_CHECKING:
    from actors.drafters.drafting import Draft

logger = logging.getLogger(__name__)

ORDERS = (1, 2, 4, 8)
"""Lengths of contexts, in tokens."""

MAX_ORDER = ORDERS[-1]

ENTRY_BYTES = 160
"""Upper bound of an entry in CPython: key and value are integers of 48 bytes as allocated, and a dictionary which has
just grown is a third full (20 bytes a slot, so 60). While it grows, the old table is there too, for a moment."""

MAX_LEARNING_SHARE = 0.015
"""Of the time since the first answer. Beyond it answers are not learnt: a fast device brings enough of them."""

MAX_LOADED_COUNT = 127
"""Of each saved entry. Workers that load the same files all save what was in them: unbounded, four workers make 64
times of a count in three nights, and what has changed in the corpus would hardly be learnt."""

NUM_FREE_ANSWERS = 64
"""The first answers are learnt whatever it takes."""

PLACE_ORDER = 4
"""Contexts of this length which branch are the places where answers may copy from the prompt."""

MIN_BRANCH_SEEN = 6

MAX_WALKS = 1024
"""Remembered walks. With what `learned_copies` knows they take at most 2 MB beside the entries."""

MAX_STALE_TOKENS = 1 << 14
"""Walks are forgotten when so many tokens more were learnt, or a quarter of what was known if that is less."""

MAX_WALK_TOKENS = 64
"""As many draft tokens as the configuration allows."""

_BITS = 20
_MASK = (1 << _BITS) - 1
_SAME = (1 << _BITS) + 1
_HALVES = (_MASK >> 1) << _BITS | _MASK >> 1

_SHARE_PRIORS = (0.97, 0.9, 0.85, 0.75, 0.6, 0.4, 0.25, 0.15)
_SHARE_ROWS = (7, 7, 7, 6, 6, 6, 5, 5, 5, 5, 4, 4, 4, 4, 3, 3, 3, 2, 2, 1, 0)
"""By twentieths of the share that the expected token has."""

_COUNT_PRIORS = (0.6, 0.75, 0.9, 0.97, 1.0)
_COUNT_ROWS = (0, 0, 1, 2, 2, 3, 3)
"""By binary digits of how often the context was seen; more digits are row 4."""

_MAGIC = b"shoal corpus index\n"
_VERSION = 1
_HASH_PROBE = [hash((1,)), hash((1, 2, 3, 500, 70000))]
"""Keys are hashes of tuples of integers: the same in every process, not in every interpreter."""


_Walk = tuple[list[int], list[int]]
"""Tokens and their cells."""


class CorpusIndex:
    """An entry is one integer: next token << 40 | how often it came << 20 | how often the context was seen.

    The next token's count loses one for each other token, and the token is replaced at zero: the most frequent one wins
    if it has a majority, and the count over the total is a lower bound of its share.

    identity: what must be equal for a saved index to be taken over, such as the tokenizer's fingerprint.
    """

    name = "corpus"

    def __init__(
        self,
        acceptance: Acceptance,
        max_bytes: int = 64 << 20,
        identity: str = "",
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self.max_entries = max_bytes // ENTRY_BYTES
        self.num_answers = 0
        self.num_skipped = 0
        self.learning_ns = 0
        self._identity = identity
        self._clock = clock
        self._started_at: int | None = None
        self._entries: dict[int, int] = {}
        self._walks: dict[int, _Walk] = {}
        self._reaches: dict[int, int] = {}
        self._num_learnt = self._num_learnt_before = 0
        self._chances = acceptance.chances
        priors = [count * share for _ in ORDERS for count in _COUNT_PRIORS for share in _SHARE_PRIORS]
        self._cells = acceptance.add_cells(priors)
        self._copies = LearnedCopies(acceptance)

    @property
    def num_entries(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Memory that the entries take at most."""
        return len(self._entries) * ENTRY_BYTES

    def propose(self, sequences: SequenceOf[Sequence], drafts: SequenceOf[Draft], limits: SequenceOf[int]) -> None:
        """Extend each draft by a walk through the index, until nothing is known or hardly anything would survive."""
        for sequence, draft, limit in zip(sequences, drafts, limits):
            num_wanted = limit - len(draft.token_ids)
            if num_wanted > 0:
                self._extend(sequence, draft, num_wanted)

    def finish(self, sequence: Sequence) -> None:
        """Learn an answer, unless learning has taken more than its share of the time."""
        started = self._clock()
        if self._started_at is None:
            self._started_at = started
        elapsed = started - self._started_at
        if self.num_answers >= NUM_FREE_ANSWERS and self.learning_ns > MAX_LEARNING_SHARE * elapsed:
            self.num_skipped += 1
            return
        self.learn(sequence.token_ids, sequence.num_prompt)
        sequence.drafting.pop(self.name, None)
        self.learning_ns += self._clock() - started

    def learn(self, token_ids: SequenceOf[int], start: int) -> None:
        """Count what came after the contexts of all tokens from `start` on."""
        entries = self._entries
        get = entries.get
        prompt = ""
        for i in range(start, len(token_ids)):
            token = token_ids[i]
            for order in ORDERS:
                if order > i:
                    break
                key = hash(tuple(token_ids[i - order : i]))
                entry = get(key)
                if entry is None:
                    entries[key] = token << 2 * _BITS | _SAME
                    break
                if order == PLACE_ORDER and _is_branch(entry):
                    prompt = prompt or to_code_points(token_ids[:start])
                    self._copies.learn(token_ids[i - order : i], token_ids[i:], prompt)
                if entry >> 2 * _BITS == token:
                    entries[key] = _SAME + (entry if entry & _MASK < _MASK else _halve(entry))
                    if _is_sure(entry):
                        break
                else:
                    entries[key] = _contradict(entry, token)
        self.num_answers += 1
        self._num_learnt += len(token_ids) - start
        if len(entries) > self.max_entries:
            self._forget_rare()
        if self._num_learnt - self._num_learnt_before > min(self._num_learnt_before // 4, MAX_STALE_TOKENS):
            self._forget_walks()

    def to_bytes(self) -> bytes:
        """The index as bytes for `merge_bytes`, 16 for each entry and what copies take."""
        keys = np.fromiter(self._entries.keys(), "<i8", len(self._entries)).tobytes()
        values = np.fromiter(self._entries.values(), "<i8", len(self._entries)).tobytes()
        copies = json.dumps(self._copies.to_list()).encode()
        header = {
            "version": _VERSION,
            "hash_probe": _HASH_PROBE,
            "identity": self._identity,
            "num_entries": len(self._entries),
            "num_answers": self.num_answers,
            "digest": hashlib.blake2b(keys + values + copies, digest_size=16).hexdigest(),
        }
        return _MAGIC + json.dumps(header).encode() + b"\n" + keys + values + copies

    def merge_bytes(self, data: bytes) -> bool:
        """Add a saved index to this one; False, with a warning that says why, when it cannot be used."""
        try:
            header, keys, values, copies = _parse(data, self._identity)
        except ValueError as error:
            logger.warning("a saved index of answers is not used: %s", error)
            return False
        entries = self._entries
        for key, value in zip(keys, values):
            while value & _MASK > MAX_LOADED_COUNT:
                value = _halve(value)
            known = entries.get(key)
            entries[key] = value if known is None else _join(known, value)
            if len(entries) > self.max_entries:
                self._forget_rare()
                entries = self._entries
        self._copies.merge_list(copies)
        self.num_answers += header["num_answers"]
        self._forget_walks()
        return True

    def _extend(self, sequence: Sequence, draft: Draft, num_wanted: int) -> None:
        survival = 1.0
        context = sequence.token_ids[-MAX_ORDER:]
        if draft.token_ids:
            survival = draft.survival
            context = (context + draft.token_ids)[-MAX_ORDER:]
        walk = self._known_walk(context)
        table = self._chances
        chances = []
        for cell in walk[1][:num_wanted]:
            chance = table[cell]
            survival *= chance
            if survival < MIN_SURVIVAL:
                break
            chances.append(chance)
        if not chances or chances[0] < WEAK_CHANCE:
            copy = None
            if self._copies.knows(context):
                copy = self._copies.propose(context, self._copied_from(sequence), num_wanted)
            if copy is not None and copy[2][0] > (chances[0] if chances else 0.0):
                draft.token_ids += copy[0]
                draft.cells += copy[1]
                draft.chances += copy[2]
                return
        draft.token_ids += walk[0][: len(chances)]
        draft.cells += walk[1][: len(chances)]
        draft.chances += chances

    def _copied_from(self, sequence: Sequence) -> CopiedFrom:
        """The prompt to copy from, made when first needed."""
        row: CopiedFrom | None = sequence.drafting.get(self.name)
        if row is None:
            prompt = to_code_points(sequence.token_ids[: sequence.num_prompt])
            row = sequence.drafting[self.name] = CopiedFrom(prompt)
        return row

    def _known_walk(self, context: list[int]) -> _Walk:
        """The walk from a context, remembered by as many of its last tokens as walks from its newest one depend on."""
        order = self._reaches.get(context[-1], 1)
        walk = self._walks.get(hash(tuple(context[-order:])))
        if walk is None:
            walk, reach = self._walk(context)
            if len(self._walks) >= MAX_WALKS:
                self._forget_walks()
            if reach > order:
                self._reaches[context[-1]] = order = reach
            self._walks[hash(tuple(context[-order:]))] = walk
        return walk

    def _walk(self, context: SequenceOf[int]) -> tuple[_Walk, int]:
        """The tokens which are most likely after a context, with their cells; and how many of the context's tokens
        were looked at."""
        get, chances = self._entries.get, self._chances
        known = list(context)
        tokens: list[int] = []
        cells: list[int] = []
        reach = 0
        while len(tokens) < MAX_WALK_TOKENS:
            best, best_cell, best_chance = 0, -1, 0.0
            for row, order in enumerate(ORDERS):
                if order > len(known):
                    break
                reach = max(reach, order - len(tokens))
                entry = get(hash(tuple(known[-order:])))
                if entry is None:
                    break
                cell = self._cell(row, entry)
                if chances[cell] >= best_chance:
                    best, best_cell, best_chance = entry >> 2 * _BITS, cell, chances[cell]
                if _is_sure(entry):
                    break
            # A guess may start a walk, not go on with it: from there others may know better.
            if best_chance < (WEAK_CHANCE if tokens else MIN_SURVIVAL):
                break
            tokens.append(best)
            cells.append(best_cell)
            known.append(best)
        return (tokens, cells), reach

    def _cell(self, row: int, entry: int) -> int:
        same, seen = entry >> _BITS & _MASK, entry & _MASK
        digits = seen.bit_length()
        count_row = _COUNT_ROWS[digits] if digits < len(_COUNT_ROWS) else len(_COUNT_PRIORS) - 1
        share_row = _SHARE_ROWS[same * 20 // seen]
        return self._cells + (row * len(_COUNT_PRIORS) + count_row) * len(_SHARE_PRIORS) + share_row

    def _forget_rare(self) -> None:
        """Halve all counts and drop the contexts that were seen once, until a quarter of the room is free."""
        while len(self._entries) > self.max_entries * 3 // 4:
            self._entries = {key: _halve(entry) for key, entry in self._entries.items() if entry & _MASK > 1}
        self._forget_walks()

    def _forget_walks(self) -> None:
        self._walks.clear()
        self._reaches.clear()
        self._num_learnt_before = self._num_learnt


def _is_sure(entry: int) -> bool:
    """Whether nothing else has ever followed."""
    return not (entry >> _BITS ^ entry) & _MASK


def _is_branch(entry: int) -> bool:
    """Whether a context was seen often and the token that comes next is anybody's guess."""
    return entry & _MASK >= MIN_BRANCH_SEEN and 2 * (entry >> _BITS & _MASK) < (entry & _MASK)


def _contradict(entry: int, token: int) -> int:
    """Another token came than the one that was expected."""
    if entry & _MASK == _MASK:
        entry = _halve(entry)
    if entry >> _BITS & _MASK:
        return entry - (1 << _BITS) + 1
    return token << 2 * _BITS | 1 << _BITS | (entry & _MASK) + 1


def _halve(entry: int) -> int:
    return entry >> 2 * _BITS << 2 * _BITS | entry >> 1 & _HALVES


def _join(a: int, b: int) -> int:
    """What two indexes know of the same context."""
    same_a, same_b = a >> _BITS & _MASK, b >> _BITS & _MASK
    is_same_token = a >> 2 * _BITS == b >> 2 * _BITS
    best = a if same_a >= same_b else b
    same = same_a + same_b if is_same_token else abs(same_a - same_b)
    joined = best >> 2 * _BITS << 2 * _BITS
    seen = (a & _MASK) + (b & _MASK)
    return joined | (same << _BITS | seen if seen <= _MASK else same >> 1 << _BITS | seen >> 1)


def _parse(data: bytes, identity: str) -> tuple[dict[str, Any], list[int], list[int], list[Any]]:
    """Header, keys, entries and copies of a saved index; ValueError with the reason when it is not to be used."""
    if not data.startswith(_MAGIC):
        raise ValueError("it does not start like one")
    line, _, body = data[len(_MAGIC) :].partition(b"\n")
    try:
        header = json.loads(line)
        num_entries, digest = int(header["num_entries"]), header["digest"]
        expected = {"version": _VERSION, "hash_probe": _HASH_PROBE, "identity": identity}
        found = {key: header[key] for key in expected}
        int(header["num_answers"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its header is broken: {error!r}") from error
    for key, value in expected.items():
        if found[key] != value:
            raise ValueError(f"its {key} is {found[key]!r}, here it is {value!r}")
    if len(body) < 16 * num_entries or hashlib.blake2b(body, digest_size=16).hexdigest() != digest:
        raise ValueError(f"it is truncated or changed: {len(body)} bytes for {num_entries} entries")
    keys, entries = np.frombuffer(body[: 16 * num_entries], "<i8").reshape(2, num_entries)
    return header, keys.tolist(), entries.tolist(), json.loads(body[16 * num_entries :])
