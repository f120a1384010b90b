"""Where answers copy from: the words in the prompt after which the copied part starts, learnt from earlier answers.

Extraction answers branch where a name or a number of the row comes, and no row before this one had it. But it mostly
stands behind the same few words ("order no. ", "invoice "). For each place in the answers that branches, pairs of
prompt tokens (cues) are learnt that stand before what is copied, how often each was right, how a copy starts (" Q" in
the prompt is "Q" in the answer) and which token follows it. Part of `actors.drafters.corpus_index`; knows one
prompt at a time, as a string of code points.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

from actors.drafters.acceptance import WEAK_CHANCE, Acceptance

CONTEXT = 4
"""Tokens before a place by which it is known again."""

MAX_PLACES = 64
MAX_CUES = 24
"""Per place. Places, cues and starts bound the memory: at most 600 KB, beside the entries of the index."""

MAX_STARTS = 1024
"""Prompt tokens that a copy has started with; a cue before any other token is followed only if there is none before
one of these."""

NUM_JUDGED, JUDGED_LATER = 64, 8
"""After so many answers only every eighth is used to judge the cues of a place."""

MIN_RATE = 0.3
"""Cues that were right less often are not followed."""

_RATE_PRIORS = (0.3, 0.45, 0.6, 0.75, 0.9)
_NUM_TOKEN_CELLS = 251
_FADE = 0.98


@dataclass(slots=True)
class _Place:
    """cues: pair of tokens -> [times right, times found], both fading. after: the token that followed the last copy."""

    cues: dict[str, list[float]] = field(default_factory=dict)
    best: list[tuple[float, str]] = field(default_factory=list)
    after: int = -1
    num_seen: int = 0


@dataclass(slots=True)
class CopiedFrom:
    """A row's prompt as code points, and where copies start in it, by place; found once."""

    prompt: str
    starts: dict[int, tuple[int, int]] = field(default_factory=dict)


class LearnedCopies:
    """Confidence: of a copy's first token by how often its cue was right and whether copies have started with it, of
    the others by which token it is (a full stop mostly ends a copy)."""

    def __init__(self, acceptance: Acceptance) -> None:
        self._acceptance = acceptance
        self._places: dict[int, _Place] = {}
        self._starts: dict[str, int] = {}
        self._first = acceptance.add_cells(_RATE_PRIORS)
        self._unknown = acceptance.add_cells([0.3])
        self._next = acceptance.add_cells([0.9])
        self._after = acceptance.add_cells([0.8])
        self._tokens = acceptance.add_nested_cells([self._next] * _NUM_TOKEN_CELLS)

    def knows(self, context: SequenceOf[int]) -> bool:
        """Whether answers have copied from the prompt at this place."""
        return hash(tuple(context[-CONTEXT:])) in self._places

    def propose(
        self, context: SequenceOf[int], row: CopiedFrom, num_wanted: int
    ) -> tuple[list[int], list[int], list[float]] | None:
        """Tokens, cells and chances of the likeliest copy at a place; None when no cue of it is in the prompt."""
        key = hash(tuple(context[-CONTEXT:]))
        place = self._places.get(key)
        if place is None:
            return None
        if key not in row.starts:
            row.starts[key] = self._find_start(place, row.prompt)
        start, cell = row.starts[key]
        if start < 0:
            return None
        return self._copy(place, cell, row.prompt[start : start + num_wanted], num_wanted)

    def _find_start(self, place: _Place, prompt: str) -> tuple[int, int]:
        """Behind the best cue that is in the prompt, and the cell of a copy's first token; -1 when there is none."""
        unknown = -1
        for rate, cue in place.best:
            start = prompt.rfind(cue, 0, len(prompt) - 1) + len(cue)
            if start < len(cue):
                continue
            if prompt[start] in self._starts:
                row = min(int((rate - MIN_RATE) / (1 - MIN_RATE) * len(_RATE_PRIORS)), len(_RATE_PRIORS) - 1)
                return start, self._first + row
            if unknown < 0:
                unknown = start
        return unknown, self._unknown

    def learn(self, context: SequenceOf[int], answer: SequenceOf[int], prompt: str) -> None:
        """Note where the beginning of `answer`, what came at a place, stands in the prompt."""
        if len(answer) < 3 or len(prompt) < 4:
            return
        key = hash(tuple(context[-CONTEXT:]))
        place = self._places.get(key)
        was_right = False
        if place is not None:
            place.num_seen += 1
            if place.num_seen > NUM_JUDGED and place.num_seen % JUDGED_LATER:
                return
            was_right = self._judge(place, answer[0], prompt)
            if was_right and place.after >= 0:
                return
        follow = chr(answer[1]) + chr(answer[2])
        at = prompt.find(follow)
        if at < 3 or prompt.find(follow, at + 1) >= 0:
            return  # not there, or in several places: which one was meant cannot be known
        if place is None:
            place = self._new_place(key)
        start = at - 1
        if prompt[start] in self._starts or len(self._starts) < MAX_STARTS:
            self._starts[prompt[start]] = answer[0]
        size = 1
        while start + size < len(prompt) and size < len(answer) and ord(prompt[start + size]) == answer[size]:
            size += 1
        if size < len(answer):
            place.after = answer[size]
        if not was_right:
            self._add_cue(place, prompt[start - 2 : start])

    def to_list(self) -> list[Any]:
        """All that was learnt, as JSON can hold it."""
        places = [
            [key, place.after, [[ord(cue[0]), ord(cue[1]), *counts] for cue, counts in place.cues.items()]]
            for key, place in self._places.items()
        ]
        return [places, [[ord(source), token] for source, token in self._starts.items()]]

    def merge_list(self, data: list[Any]) -> None:
        """Take over what `to_list` gave, where nothing is known yet."""
        places, starts = data
        for key, after, cues in places[: MAX_PLACES - len(self._places)]:
            if key not in self._places:
                place = self._places[key] = _Place(after=after)
                place.cues = {chr(a) + chr(b): [right, found] for a, b, right, found in cues[:MAX_CUES]}
                _rank(place)
        for source, token in starts[: MAX_STARTS - len(self._starts)]:
            self._starts.setdefault(chr(source), token)

    def _copy(self, place: _Place, cell: int, source: str, num_wanted: int) -> tuple[list[int], list[int], list[float]]:
        first = self._starts.get(source[0], ord(source[0]))
        tokens, cells, chances = [first], [cell], [self._acceptance.chances[cell]]
        for character in source[1:]:
            token = ord(character)
            cell = self._tokens + token % _NUM_TOKEN_CELLS
            chance = self._acceptance.nested_chance(cell)
            if chance < WEAK_CHANCE:
                break
            tokens.append(token)
            cells.append(cell)
            chances.append(chance)
        if 1 < len(tokens) < num_wanted and place.after >= 0:
            tokens.append(place.after)
            cells.append(self._after)
            chances.append(self._acceptance.chances[self._after])
        return tokens, cells, chances

    def _judge(self, place: _Place, token: int, prompt: str) -> bool:
        """Count for each cue in the prompt whether it leads to the token; whether the best one did."""
        best_rate, best_is_right = 0.0, False
        for cue, counts in place.cues.items():
            start = prompt.rfind(cue, 0, len(prompt) - 1) + len(cue)
            if start < len(cue) or prompt[start] not in self._starts:
                continue
            is_right = self._starts[prompt[start]] == token
            rate = counts[0] / counts[1]
            if rate > best_rate:
                best_rate, best_is_right = rate, is_right
            counts[0] = counts[0] * _FADE + is_right
            counts[1] = counts[1] * _FADE + 1
        _rank(place)
        return best_is_right

    def _new_place(self, key: int) -> _Place:
        if len(self._places) >= MAX_PLACES:
            weakest = min(self._places, key=lambda key: sum(right for right, _ in self._places[key].cues.values()))
            del self._places[weakest]
        place = self._places[key] = _Place()
        return place

    def _add_cue(self, place: _Place, cue: str) -> None:
        if cue in place.cues:
            return
        if len(place.cues) >= MAX_CUES:
            del place.cues[min(place.cues, key=lambda cue: place.cues[cue][0])]
        place.cues[cue] = [1.0, 2.0]
        _rank(place)


def _rank(place: _Place) -> None:
    """The cues that are worth following, best first."""
    rates = [(right / found, cue) for cue, (right, found) in place.cues.items()]
    place.best = sorted((rate for rate in rates if rate[0] >= MIN_RATE), reverse=True)
