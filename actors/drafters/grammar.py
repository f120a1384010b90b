"""Which tokens an answer of a given form may go on with, and which it must.

llguidance follows the constraint; here are its view of the tokenizer, one compiled constraint for all rows that share
it, and a matcher per sequence. What is allowed depends on the constraint and the answer so far alone, so neither
batches nor drafts change an answer. Called by the engine (`Grammars`), by sequences and the runner (`Matcher`), and
by the drafters' combination (`GrammarDrafter`). The library compiles lazily: a mask costs some 10 microseconds with
1,000 tokens and some 15 to 100 with 140,000, the first ones of a constraint up to 4 ms (one core, no GPU needed).

Shape letters: P places in a sequence, W words of 32 tokens.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.hf import from_tokenizer
from numpy.typing import NDArray

from actors.structured_outputs import LIMITS, StructuredOutputs, call_library

if TYPE_CHECKING:
    from actors.drafters.acceptance import Acceptance
    from actors.drafters.drafting import Draft
    from actors.sequence import Sequence

MAX_COMPILED = 64
"""Constraints that are kept compiled, the latest used ones; compiling one again takes about a millisecond."""

FORCED_CHANCE = 0.9999
"""That a token which is the only one allowed is the one that is sampled; chances are below 1."""

Words = NDArray[np.int32]


class Grammars:
    """The constraints of one engine's rows, compiled for its tokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: SequenceOf[int]) -> None:
        """vocab_size: how many logits there are. The tokenizer is read when the first constraint comes."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokens: LLTokenizer | None = None
        self._compiled: OrderedDict[StructuredOutputs, LLMatcher] = OrderedDict()

    def new_matcher(self, constraint: StructuredOutputs) -> Matcher:
        """A matcher at the start of an answer. ValueError if the constraint cannot be followed with this tokenizer."""
        start = self._compiled.get(constraint) or self._compile(constraint)
        self._compiled.move_to_end(constraint)
        assert self._tokens is not None
        ends = tuple(self._tokens.eos_tokens)
        return Matcher(start.deep_copy(), self._vocab_size, ends, lambda: self._compile(constraint).deep_copy())

    def _compile(self, constraint: StructuredOutputs) -> LLMatcher:
        if self._tokens is None:
            self._tokens = read_tokenizer(self._tokenizer, self._vocab_size, self._eos_token_ids)
        tokens = self._tokens
        start = call_library(lambda: LLMatcher(tokens, constraint.to_grammar(), log_level=0, limits=LIMITS))
        if start.is_error():
            raise ValueError(" ".join(start.get_error().split()))
        self._compiled[constraint] = start
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return start


class Matcher:
    """Where one sequence stands in its constraint.

    is_done: the answer is whole and nothing may follow. error: why it cannot go on; empty while it can.
    end_token_ids: those that are allowed where the answer may end.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        end_token_ids: tuple[int, ...],
        compile_again: Callable[[], LLMatcher],
    ) -> None:
        self.end_token_ids = end_token_ids
        self.num_words = -(-vocab_size // 32)
        self.is_done = False
        self.error = ""
        self._matcher = matcher
        self._compile_again = compile_again
        self._token_ids: list[int] = []
        self._broken_at: int | None = None  # no mask could be made for the token with this index

    def append(self, token_id: int) -> None:
        """Follow a token that was sampled."""
        if self._broken_at == len(self._token_ids) or not self._matcher.consume_token(token_id):
            self.error = (
                f"no token can come after the first {len(self._token_ids)} of the answer: the tokenizer has no tokens "
                "for what structured_outputs asks for, or it is too complex to follow; simplify it"
            )
            return
        self._token_ids.append(token_id)
        self.is_done = self._matcher.is_stopped()

    def fill_masks(self, draft: SequenceOf[int], words_PW: Words) -> None:
        """Write what is allowed after all that is known and the first p tokens of a draft, for p from 0 to all of it.

        words_PW: contiguous rows of `num_words`; token j is bit j % 32 of word j // 32. Rows that lie behind the end
        of the answer, or that no mask can be made for, get all bits.
        """
        self._broken_at = None
        place = self._walk(draft, words_PW)
        if place is None:
            return
        # The library's matchers never leave an error, and it may have come from what other rows put into the states
        # that all of a constraint share. A new one errs where this answer itself is to blame.
        self._restart()
        place = self._walk(draft, words_PW)
        if place is not None:
            self._restart()
            self._broken_at = len(self._token_ids) + place

    def count_allowed(self, draft: SequenceOf[int]) -> int:
        """How many tokens of a draft the constraint allows."""
        return self._matcher.validate_tokens(list(draft))

    def forced(self, draft: SequenceOf[int], limit: int) -> list[int]:
        """The tokens after a draft that are the only allowed ones, as far as there are any; at most `limit`."""
        matcher = self._matcher
        forced: list[int] = []
        num_taken = matcher.try_consume_tokens(list(draft))
        if num_taken == len(draft):
            while len(forced) < limit and not matcher.is_stopped():
                more = matcher.compute_ff_tokens()
                count = matcher.try_consume_tokens(more)
                forced += more[:count]
                num_taken += count
                if count == 0:
                    break
        if num_taken > 0:
            matcher.rollback(num_taken)
        return forced[:limit]

    def _walk(self, draft: SequenceOf[int], words_PW: Words) -> int | None:
        """Fill masks along a draft, and come back. The first place where that was not possible, or None."""
        matcher = self._matcher
        address, num_bytes = words_PW.ctypes.data, words_PW.strides[0]
        for place in range(len(words_PW)):
            if place > 0:
                is_taken = matcher.consume_token(draft[place - 1])
                if is_taken and matcher.is_stopped() and not matcher.is_error():
                    words_PW[place:] = -1
                    matcher.rollback(place)
                    return None
            matcher.unsafe_compute_mask_ptr(address + place * num_bytes, num_bytes)
            if matcher.is_error() or not words_PW[place].any():
                words_PW[place:] = -1
                return place
        if len(words_PW) > 1:
            matcher.rollback(len(words_PW) - 1)
        return None

    def _restart(self) -> None:
        self._matcher = self._compile_again()
        self._matcher.consume_tokens(self._token_ids)


class GrammarDrafter:
    """Drafts the tokens that are forced, such as the names of a schema's properties: many tokens in one step."""

    name = "grammar"

    def __init__(self, acceptance: Acceptance) -> None:
        self._chances = acceptance.chances
        self._cell = acceptance.add_cells([FORCED_CHANCE])

    def propose(self, sequences: SequenceOf[Sequence], drafts: SequenceOf[Draft], limits: SequenceOf[int]) -> None:
        """Extend drafts of constrained sequences by what must follow."""
        for sequence, draft, limit in zip(sequences, drafts, limits):
            if sequence.matcher is None:
                continue
            forced = sequence.matcher.forced(draft.token_ids, limit - len(draft.token_ids))
            draft.token_ids += forced
            draft.cells += [self._cell] * len(forced)
            draft.chances += [self._chances[self._cell]] * len(forced)

    def finish(self, sequence: Sequence) -> None:
        """There is nothing to learn or to forget."""


def ban(words_W: Words, token_ids: SequenceOf[int]) -> None:
    """Take tokens out of a mask, in place, unless no other one is in it."""
    kept_W = words_W.view(np.uint32).copy()
    for token in token_ids:
        kept_W[token // 32] &= ~np.uint32(1 << (token % 32))
    if kept_W.any():
        words_W[:] = kept_W.view(np.int32)


def read_tokenizer(tokenizer: Any, vocab_size: int, eos_token_ids: SequenceOf[int]) -> LLTokenizer:
    """The library's view of a transformers tokenizer; takes 2 s for 140,000 tokens.

    ValueError if it is none of the tokenizers library, writes its tokens in a way that llguidance does not know (it
    knows byte-level ones and those with byte fallback, and those whose texts are simply joined are read here), has more
    tokens than there are logits, or no token that ends an answer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("structured_outputs needs a tokenizer with a tokenizer.json, and this model's has none")
    ends = list(eos_token_ids) or [token for token in [tokenizer.eos_token_id] if token is not None]
    if len(tokenizer) > vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, more than the model's {vocab_size} logits")
    if not ends:
        raise ValueError("structured_outputs needs a token that ends an answer, and the model names none")
    if (json.loads(backend.to_str())["decoder"] or {}).get("type") != "Fuse":
        return call_library(lambda: from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=ends))
    literal = TokenizerWrapper(_LiteralTokens(tokenizer, ends[0]))
    return call_library(lambda: LLTokenizer(literal, n_vocab=vocab_size, eos_token=ends))


class _LiteralTokens:
    """A tokenizer whose tokens are simply joined, as the library asks for one."""

    bos_token_id = None

    def __init__(self, tokenizer: Any, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.tokens = [(text or "").encode() for text in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
        self.special_token_ids = sorted(tokenizer.all_special_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        text = text if isinstance(text, str) else text.decode()
        return self._tokenizer.encode(text, add_special_tokens=False)
