"""The text of one output while its tokens come: only what no later token can change.

Not given yet: a character of which bytes are missing, and what may turn out to be a stop string or stands behind one.
Joined, the pieces are the engine's whole text to the letter. Knows no engine; called by whoever streams to a person.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_WINDOW_TOKENS = 32
"""Decoded again with each new token, up to twice as many: a tokenizer's decoder looks back, but not far."""


class Detokenizer:
    """What streaming needs to know of a tokenizer (of transformers): made once, for all outputs."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        names = {f"<0x{byte:02X}>" for byte in range(256)}
        ids = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
        # A run of these is one piece of text or, if it is no UTF-8, a row of replacement characters: all or nothing.
        self.byte_ids = {i for name, i in ids.items() if i is not None and tokenizer.convert_ids_to_tokens(i) == name}

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StreamedText:
    """One output. `add` its tokens as they come; `finish` with the text that the engine says it has in the end."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._window: list[int] = []  # the newest tokens, special ones left out
        self._mark: int | None = None  # a later window may begin here: between two characters
        self._num_certain = 0  # characters of the window's text that are in `_held` or given
        self._held = ""
        self._given: list[str] = []

    def add(self, token_ids: Sequence[int]) -> str:
        """Take tokens that do not end the output; returns the text that has become certain."""
        self._window += [token for token in token_ids if token not in self._detokenizer.special_ids]
        end = len(self._window)
        while end and self._window[end - 1] in self._detokenizer.byte_ids:
            end -= 1
        text = self._detokenizer.decode(self._window[:end])
        certain = text.rstrip(REPLACEMENT)
        self._held += certain[self._num_certain :]
        self._num_certain = max(self._num_certain, len(certain))
        if end == len(self._window) and certain == text:
            self._slide(text)
        return self._give(self._num_releasable())

    def finish(self, text: str) -> str:
        """The rest of `text`, the whole output's. RuntimeError if it does not begin with what was given."""
        given = "".join(self._given)
        if not text.startswith(given):
            raise RuntimeError(
                f"the tokenizer changed its mind about the first {len(given)} characters of an answer; ask without "
                "streaming, and tell us which tokenizer it is"
            )
        return text[len(given) :]

    def _slide(self, text: str) -> None:
        """Drop old tokens from a window that ends between two characters."""
        if self._mark is None and len(self._window) >= _WINDOW_TOKENS:
            self._mark = len(self._window)
        if self._mark is None or len(self._window) < self._mark + _WINDOW_TOKENS:
            return
        newer = self._window[self._mark :]
        rest = self._detokenizer.decode(newer)
        # Decoders drop a space at the beginning; with something behind it they have done so already.
        if rest.strip() and text.endswith(rest):
            self._window, self._num_certain = newer, len(rest)
        self._mark = None

    def _num_releasable(self) -> int:
        """How much of the held text lies before anything that is a stop string, or may become one."""
        held = self._held
        limit = len(held)
        for stop in self._stop:
            at = held.find(stop)
            if at >= 0:
                limit = min(limit, at)
            for length in range(min(len(stop) - 1, len(held)), 0, -1):
                if held.endswith(stop[:length]):
                    limit = min(limit, len(held) - length)
                    break
        return limit

    def _give(self, num_characters: int) -> str:
        piece, self._held = self._held[:num_characters], self._held[num_characters:]
        if piece:
            self._given.append(piece)
        return piece
