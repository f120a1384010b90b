"""Drafts from a small model of the same family, which writes on where the target stands.

It has a decoder and KV pages of its own, under the same page numbers as the target's: what the scheduler shares between
sequences is shared here too. Its tokens are drawn with the target's noise, so where the two distributions agree, so do
the tokens. Knows no scheduler; `actors.drafters.drafting` asks it for drafts, the engine copies and clears slots here
as it does in the target's pages.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from actors.common_prefix import num_in_common
from actors.config import EngineConfig
from actors.decoder import Decoder, KVPages, clear_pages, copy_slots, load_decoder
from actors.drafters.acceptance import MIN_SURVIVAL, Acceptance
from actors.prefix_groups import group_by_prefix
from actors.sampling_tensors import keyed_sampling
from actors.sequence import Sequence
from actors.weights.checkpoint import load_tokenizer, open_checkpoint
from kernels.attention_batch import AttentionBatch
from kernels.backend import sample

if TYPE_CHECKING:
    from actors.drafters.drafting import Draft

_TENTHS = 10
"""Cells of confidence, by the draft's own probability of its token."""


@dataclass(frozen=True, slots=True)
class _Held:
    """What lies in a page: its tokens, after pages whose tokens hash to `before`; `after` includes its own."""

    token_ids: list[int]
    before: int
    after: int


_NOTHING = _Held([], 0, 0)


@dataclass(frozen=True, slots=True)
class _Progress:
    """What was computed of a sequence: its first num_certain tokens, and guesses that stood after them."""

    num_preemptions: int
    num_certain: int
    guesses: list[int]


class DraftModel:
    """Loads the model at once; call `allocate` and `join` before `propose`.

    ValueError (also CheckpointError) when the checkpoint is bad or config.speculative_config.model is not set.
    """

    name = "draft_model"

    def __init__(self, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
        speculative = config.speculative_config
        if speculative.model is None:
            raise ValueError("speculative_config.model is not set; name the directory of a draft model")
        own = config.model_copy(
            update={
                "model": speculative.model,
                "quantization": speculative.quantization,
                "max_model_len": None,
                "deterministic": False,  # what a draft says need not be the same twice
            }
        )
        self.decoder: Decoder = load_decoder(open_checkpoint(speculative.model), own, device, dtype)
        self.notes = [f"draft model: {note}" for note in self.decoder.notes]
        self._page_size = config.page_size
        self._kv: KVPages = []
        self._held: dict[int, _Held] = {}
        self._chances: list[float] = []
        self._cells = 0

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes here, beside the target's own."""
        return self.decoder.kv_bytes_per_token

    def allocate(self, num_pages: int) -> None:
        """Make KV pages, as many as the target has."""
        self._kv = self.decoder.new_kv(num_pages, self._page_size)

    def join(self, acceptance: Acceptance) -> None:
        """Take cells of a table for the confidence in tokens."""
        self._chances = acceptance.chances
        self._cells = acceptance.add_cells([0.05 + 0.9 * (i + 0.5) / _TENTHS for i in range(_TENTHS)])

    def copy_slots(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first num_tokens slots of page `source` to page `target`; call it before the next `propose`."""
        copy_slots(self._kv, source, target, num_tokens)
        held = self._held.get(source)
        if held is None:
            self._held.pop(target, None)
        else:
            self._hold(target, held.token_ids[:num_tokens], held.before)

    def clear(self, pages: list[int]) -> None:
        """Zero pages that may hold what is not finite."""
        clear_pages(self._kv, pages)
        for page in pages:
            self._held.pop(page, None)

    def propose(self, sequences: SequenceOf[Sequence], drafts: SequenceOf[Draft], limits: SequenceOf[int]) -> None:
        """Extend drafts token by token, one forward pass for each: the first also catches up with what was written.

        A draft ends at its limit, where the sequence's pages or the draft model's context end, or when it will hardly
        be accepted as a whole. Sequences without pages (waiting ones) get nothing.
        """
        writers = [
            _Writer(sequence, draft, limit, self._room(sequence))
            for sequence, draft, limit in zip(sequences, drafts, limits)
        ]
        for writer in writers:
            if writer.wants_more():
                writer.num_computed = self._num_valid(writer.sequence, writer.known)
                writer.first_page = writer.num_computed // self._page_size
        while active := [writer for writer in writers if writer.wants_more()]:
            self._step(active)
        for writer in writers:
            if writer.num_computed:
                self._note(writer)

    def finish(self, sequence: Sequence) -> None:
        """Forget the sequence."""
        sequence.drafting.pop(self.name, None)

    def _room(self, sequence: Sequence) -> int:
        """How many tokens may stand in the sequence, the last of which need not be in a page."""
        return min(len(sequence.pages) * self._page_size, self.decoder.max_model_len) + 1

    def _num_valid(self, sequence: Sequence, known: SequenceOf[int]) -> int:
        """How many of the first tokens, but the last, have their keys and values in the sequence's pages here.

        Pages are checked by what they hold: the target's prefix cache also finds pages that this model never computed.
        Those of a sequence that has run since were its own, and need no check.
        """
        progress: _Progress | None = sequence.drafting.get(self.name)
        if progress is not None and progress.num_preemptions == sequence.num_preemptions:
            start = progress.num_certain
            num_valid = start + num_in_common(progress.guesses, known[start : start + len(progress.guesses)])
            return min(num_valid, len(known) - 1)
        size, num_valid, before = self._page_size, 0, 0
        for page in sequence.pages:
            held = self._held.get(page)
            if held is None or held.before != before:
                break
            agreed = num_in_common(held.token_ids, known[num_valid : num_valid + size])
            num_valid += agreed
            if agreed < size:
                break
            before = held.after
        return min(num_valid, len(known) - 1)

    def _note(self, writer: _Writer) -> None:
        """Remember what was computed, for the sequence and for whoever gets its pages later."""
        sequence, size = writer.sequence, self._page_size
        computed = writer.known[: writer.num_computed]
        num_certain = min(len(sequence.token_ids), len(computed))
        sequence.drafting[self.name] = _Progress(sequence.num_preemptions, num_certain, computed[num_certain:])
        for i in range(writer.first_page, -(-len(computed) // size)):
            above = self._held.get(sequence.pages[i - 1]) if i else _NOTHING
            if above is None:
                return
            self._hold(sequence.pages[i], computed[i * size : (i + 1) * size], above.after)

    def _hold(self, page: int, token_ids: list[int], before: int) -> None:
        self._held[page] = _Held(token_ids, before, hash((before, *token_ids)))

    def _step(self, writers: list[_Writer]) -> None:
        """Append one token to the draft of each writer."""
        order, groups = group_by_prefix(
            [writer.sequence.pages for writer in writers], [w.num_computed // self._page_size for w in writers]
        )
        writers = [writers[i] for i in order]
        size, device = self._page_size, self.decoder.device
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last_rows: list[int] = []
        query_lens: list[int] = []
        for writer in writers:
            start, stop, pages = writer.num_computed, len(writer.known), writer.sequence.pages
            token_ids += writer.known[start:stop]
            positions += range(start, stop)
            slots += [pages[p // size] * size + p % size for p in range(start, stop)]
            query_lens.append(stop - start)
            last_rows.append(len(token_ids) - 1)
        batch = AttentionBatch(
            query_lens=query_lens,
            context_lens=[len(writer.known) for writer in writers],
            page_ids=[writer.sequence.pages for writer in writers],
            page_size=size,
            groups=groups,
        )
        logits = self.decoder.forward(
            torch.tensor(token_ids, device=device),
            torch.tensor(positions, device=device),
            torch.tensor(slots, device=device),
            self._kv,
            batch,
            torch.tensor(last_rows, device=device),
        )
        # Without penalties and bans: a draft need not be right.
        places = [len(writer.known) for writer in writers]
        chosen = sample(logits, keyed_sampling([writer.sequence for writer in writers], places, device))
        for writer, token, logprob in zip(writers, chosen.token_ids_B.tolist(), chosen.logprobs_B.exp().tolist()):
            writer.num_computed = len(writer.known)
            # What is not a number (stale or cleared pages can bring that) has no confidence.
            tenth = min(int(logprob * _TENTHS), _TENTHS - 1) if logprob == logprob else 0
            cell = self._cells + tenth
            writer.append(token, cell, self._chances[cell])


class _Writer:
    """A sequence and its draft while the draft grows. `known` are the tokens of both."""

    def __init__(self, sequence: Sequence, draft: Draft, limit: int, room: int) -> None:
        self.sequence, self.draft = sequence, draft
        self.known = sequence.token_ids + draft.token_ids
        self.num_computed = self.first_page = 0
        self.survival = draft.survival
        self._stop = min(len(sequence.token_ids) + limit, room)

    def wants_more(self) -> bool:
        return len(self.known) < self._stop and self.survival >= MIN_SURVIVAL and bool(self.sequence.pages)

    def append(self, token: int, cell: int, chance: float) -> None:
        self.known.append(token)
        self.draft.token_ids.append(token)
        self.draft.cells.append(cell)
        self.draft.chances.append(chance)
        self.survival *= chance


def check_draft_model(target_uri: str, draft_uri: str, tokenizer_uri: str | None = None) -> None:
    """Raise ValueError unless the two models speak of the same tokens; no weights are read.

    tokenizer_uri: where the target's tokenizer is, when not beside it. The draft's must be beside the draft.
    """
    target, draft = open_checkpoint(target_uri), open_checkpoint(draft_uri)
    sizes = target.architecture.vocab_size, draft.architecture.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"speculative_config.model {draft_uri} has a vocabulary of {sizes[1]} tokens and {target_uri} one of "
            f"{sizes[0]}; a draft model must share its target's"
        )
    ours = load_tokenizer(tokenizer_uri or target_uri).get_vocab()
    theirs = load_tokenizer(draft_uri).get_vocab()
    if ours != theirs:
        token = min(t for t in {**ours, **theirs} if ours.get(t) != theirs.get(t))
        raise ValueError(
            f"speculative_config.model {draft_uri} and {target_uri} have different tokenizers: {token!r} is "
            f"{theirs.get(token, 'missing')} and {ours.get(token, 'missing')}; a draft model must share its target's"
        )
