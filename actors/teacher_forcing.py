"""Logits of given tokens: what a loaded model expects at every place of sequences that are already written.

The same decoder, pages and attention as when it answers, so what is measured is what runs. Knows no sampling and no
comparison. Called by `actors.quality`.

Shape letters: T tokens of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from actors.common_prefix import num_in_common
from actors.config import EngineConfig
from actors.decoder import Decoder
from kernels.attention_batch import AttentionBatch, PrefixGroup

LOGIT_BYTES = 64 << 20
"""About what the logits of one step take; bounds the tokens of a step."""

MAX_STEP_TOKENS = 2048


class LoadedModel(Protocol):
    """What is needed of an engine."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def decoder(self) -> Decoder: ...


@dataclass(frozen=True, slots=True)
class Expected:
    """Float32 logits [T, V]: row t is for the token at place `first + t` of sequence `sequence`."""

    sequence: int
    first: int
    logits_TV: Tensor


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many first tokens all of them share; 0 for a single one, which shares with nobody."""
    if len(sequences) < 2:
        return 0
    return num_in_common(min(sequences, key=tuple), max(sequences, key=tuple))


def expected_tokens(model: LoadedModel, sequences: Sequence[Sequence[int]], first: int = 1) -> Iterator[Expected]:
    """Logits for the tokens from place `first` on of every sequence, in order; a long one comes in several pieces.

    All sequences must share their first `first - 1` tokens: whole pages of these are computed once. first is at least
    1, as nothing precedes a first token.
    """
    wanted = [i for i, tokens in enumerate(sequences) if len(tokens) > first]
    if not wanted:
        return
    decoder, size = model.decoder, model.config.page_size
    num_shared = (first - 1) // size
    step_tokens = max(16, min(MAX_STEP_TOKENS, LOGIT_BYTES // (4 * decoder.vocab_size)))
    packs = _pack(wanted, [len(tokens) - 1 - num_shared * size for tokens in sequences], step_tokens)
    own_pages = {i: -(-(len(sequences[i]) - 1 - num_shared * size) // size) for i in wanted}
    kv = decoder.new_kv(num_shared + max(sum(own_pages[i] for i in pack) for pack in packs), size)
    shared = list(range(num_shared))

    def forward(pieces: list[_Piece]) -> Iterator[Expected]:
        return _forward(decoder, kv, size, num_shared, sequences, pieces, first)

    if num_shared:
        for start, stop in _chunks(0, num_shared * size, step_tokens):
            list(forward([_Piece(wanted[0], start, stop, shared)]))
    for pack in packs:
        pages, next_page = {}, num_shared
        for i in pack:
            pages[i] = [*shared, *range(next_page, next_page + own_pages[i])]
            next_page += own_pages[i]
        if len(pack) > 1:
            yield from forward([_Piece(i, num_shared * size, len(sequences[i]) - 1, pages[i]) for i in pack])
            continue
        for start, stop in _chunks(num_shared * size, len(sequences[pack[0]]) - 1, step_tokens):
            yield from forward([_Piece(pack[0], start, stop, pages[pack[0]])])


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens [start, stop) of a sequence, to be read in one step."""

    sequence: int
    start: int
    stop: int
    pages: list[int]


def _pack(wanted: Sequence[int], lengths: Sequence[int], step_tokens: int) -> list[list[int]]:
    """Neighbours that fit one step together; a sequence that does not fit is alone."""
    packs: list[list[int]] = []
    room = 0
    for i in wanted:
        if lengths[i] > room:
            packs.append([])
            room = step_tokens
        packs[-1].append(i)
        room -= lengths[i]
    return packs


def _chunks(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def _forward(
    decoder: Decoder,
    kv: list,
    page_size: int,
    num_shared: int,
    sequences: Sequence[Sequence[int]],
    pieces: Sequence[_Piece],
    first: int,
) -> Iterator[Expected]:
    """Run one step and hand out the logits of the tokens from place `first` on."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    spans: list[tuple[int, int, int]] = []
    for piece in pieces:
        start_row = len(token_ids) - piece.start
        token_ids += sequences[piece.sequence][piece.start : piece.stop]
        positions += range(piece.start, piece.stop)
        slots += [piece.pages[p // page_size] * page_size + p % page_size for p in range(piece.start, piece.stop)]
        read_from = max(piece.start, first - 1)
        if read_from < piece.stop:
            spans.append((piece.sequence, read_from + 1, piece.stop - read_from))
            rows += range(start_row + read_from, start_row + piece.stop)
    grouped = len(pieces) > 1 and num_shared > 0
    batch = AttentionBatch(
        query_lens=[piece.stop - piece.start for piece in pieces],
        context_lens=[piece.stop for piece in pieces],
        page_ids=[piece.pages[: -(-piece.stop // page_size)] for piece in pieces],
        page_size=page_size,
        groups=[PrefixGroup(0, len(pieces), list(range(num_shared)))] if grouped else [],
    )
    device = decoder.device
    logits = decoder.forward(
        torch.tensor(token_ids, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(slots, device=device),
        kv,
        batch,
        torch.tensor(rows, device=device, dtype=torch.int64),
    )
    row = 0
    for sequence, place, count in spans:
        yield Expected(sequence, place, logits[row : row + count])
        row += count
