"""Drafts copied from the sequence itself: what followed the last place where its newest tokens stood before.

vLLM's prompt lookup (method "ngram"): extraction, quoting and rewriting repeat the prompt. Nothing is built per row:
tokens are kept as the code points of a string, and the string search of the interpreter finds the n-gram. Knows no
other rows.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from actors.drafters.acceptance import MIN_SURVIVAL, Acceptance
from actors.sequence import Sequence

if TYPE_CHECKING:
    from actors.drafters.drafting import Draft

NUM_PLACES = 1021
"""Places, told apart by the three tokens before them, whose first copied tokens have a record of their own: where the
answer branches, a copy is wrong as a rule, however many tokens agree. Places with the same hash share one."""

MAX_AGREED = 12
"""Matches are measured up to this length for their confidence."""

MAX_DRAFT_TOKENS = 64
"""As many as the configuration allows."""

COPIED_PER_AGREED = 4
"""A match of one token is good for four more; if these are right, it has become a longer one."""


CODE_POINTS = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"
"""Named with its byte order, else a token with the number of a byte order mark would be taken for one."""


class PromptLookup:
    """Confidence is the number of tokens that agree before a copied one, the accepted part of the draft included; for
    the first token of a copy also how copies went at this place before."""

    name = "ngram"

    def __init__(self, acceptance: Acceptance, shortest: int = 1, longest: int = 4) -> None:
        self._shortest, self._longest = shortest, longest
        self._acceptance = acceptance
        self._chances = acceptance.chances
        # A single token that agrees says little, eight nearly all.
        self._cells = acceptance.add_cells([1.0 - 0.75 / (1 + n / 2) for n in range(MAX_AGREED + 1)])
        self._rows = [self._cells + min(n, MAX_AGREED) for n in range(MAX_AGREED + MAX_DRAFT_TOKENS + 1)]
        self._places = acceptance.add_nested_cells(
            [self._cells + agreed for agreed in range(MAX_AGREED + 1) for _ in range(NUM_PLACES)]
        )

    def propose(self, sequences: SequenceOf[Sequence], drafts: SequenceOf[Draft], limits: SequenceOf[int]) -> None:
        """Extend each draft by what followed the latest match of the longest n-gram."""
        for sequence, draft, limit in zip(sequences, drafts, limits):
            num_wanted = limit - len(draft.token_ids)
            if num_wanted > 0:
                self._extend(sequence, draft, num_wanted)

    def finish(self, sequence: Sequence) -> None:
        """Forget the sequence; there is nothing to learn."""
        sequence.drafting.pop(self.name, None)

    def _extend(self, sequence: Sequence, draft: Draft, num_wanted: int) -> None:
        text = self._text(sequence)
        if draft.token_ids:
            text += "".join(map(chr, draft.token_ids))
        end = len(text) - 1
        # The shortest n-gram first: mostly there is none, and that is known after one search.
        size = self._shortest
        start = text.rfind(text[-size:], 0, end) if end >= size else -1
        if start < 0:
            return
        follow = start + size
        agreed = _num_agreed(text, follow, size)
        for longer in range(min(self._longest, end), agreed, -1):
            start = text.rfind(text[-longer:], 0, end)
            if start >= 0:
                follow = start + longer
                agreed = _num_agreed(text, follow, longer)
                break
        copied = text[follow : follow + min(num_wanted, COPIED_PER_AGREED * agreed)]
        agreed = min(agreed, MAX_AGREED)  # the longest n-gram may be longer
        # Not the hash of a string, which differs between processes.
        place = (ord(text[end]) * 33 + ord(text[end - 1])) * 33 + ord(text[end - 2]) if end > 1 else 0
        place = self._places + agreed * NUM_PLACES + place % NUM_PLACES
        chance = self._acceptance.nested_chance(place)
        if chance * draft.survival < MIN_SURVIVAL:
            return
        cells = self._rows[agreed + 1 : agreed + len(copied)]
        chances = self._chances
        draft.token_ids += map(ord, copied)
        draft.cells.append(place)
        draft.cells += cells
        draft.chances.append(chance)
        draft.chances += [chances[cell] for cell in cells]

    def _text(self, sequence: Sequence) -> str:
        """The sequence's tokens as one string, kept and grown with it."""
        text: str = sequence.drafting.get(self.name, "")
        tokens = sequence.token_ids
        if len(text) < len(tokens):
            text += to_code_points(tokens[len(text) :])
            sequence.drafting[self.name] = text
        return text


def _num_agreed(text: str, follow: int, size: int) -> int:
    """How many characters before `follow` are those at the end of the text, `size` being known to be."""
    while size < MAX_AGREED and follow > size and text[follow - size - 1] == text[-size - 1]:
        size += 1
    return size


def to_code_points(token_ids: SequenceOf[int]) -> str:
    """Tokens as a string of one character each, which the interpreter searches fast: 330 of them in a microsecond."""
    return array("I", token_ids).tobytes().decode(CODE_POINTS, "surrogatepass")
