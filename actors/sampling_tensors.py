"""What every sampled token needs as tensors: its request's filters, its row's seed and its position.

Called by the runner for the target's tokens (`SamplingTensors`) and by the draft model for its guesses, which take the
same noise (`keyed_sampling`).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from actors.drafters.grammar import ban
from actors.sequence import Sequence
from actors.stopping import banned_tokens
from kernels.sampling import AllowedTokens, Penalties, SamplingBatch


class Position(NamedTuple):
    """A place where a token is sampled: after all that a sequence knows and the first `num_drafts` of its draft."""

    sequence: Sequence
    draft: list[int]
    num_drafts: int

    @property
    def place(self) -> int:
        """Index of the token in the whole sequence."""
        return len(self.sequence.token_ids) + self.num_drafts


def to_device(array: NDArray, device: torch.device) -> torch.Tensor:
    """An array as a tensor; to a GPU it goes without waiting for what the GPU is doing."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def keyed_sampling(sequences: SequenceOf[Sequence], positions: SequenceOf[int], device: torch.device) -> SamplingBatch:
    """How a token of each sequence is sampled, without penalties and bans, in two copies to the device.

    positions: of each token, its index in the whole sequence.
    """
    params = [sequence.request.sampling for sequence in sequences]
    floats = np.array([(p.temperature, p.top_p, p.min_p) for p in params], np.float32)
    temperature_B, top_p_B, min_p_B = to_device(np.ascontiguousarray(floats.T), device)
    integers = np.array(
        [[max(p.top_k, 0) for p in params], [sequence.seed for sequence in sequences], positions], np.int64
    )
    top_k_B, seed_B, position_B = to_device(integers, device)
    return SamplingBatch(
        temperature_B=temperature_B,
        top_k_B=top_k_B,
        top_p_B=top_p_B,
        min_p_B=min_p_B,
        seed_B=seed_B,
        position_B=position_B,
    )


class SamplingTensors:
    """Makes the SamplingBatch of each step. While the same sequences get tokens, only their positions go to the device,
    and nothing is looked for that none of them asks for."""

    def __init__(self, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        self._eos_token_ids, self._device = eos_token_ids, device
        self._sequences: list[Sequence] = []
        self._batch: SamplingBatch | None = None
        self._has_min_tokens = self._has_penalties = self._has_matchers = False

    def batch(self, positions: list[Position]) -> SamplingBatch:
        """How the token of each position is sampled; at least one."""
        sequences = [position.sequence for position in positions]
        places = [position.place for position in positions]
        if self._batch is None or sequences != self._sequences:
            self._remember(sequences, places)
            assert self._batch is not None
        else:
            position_B = to_device(np.array(places, np.int64), self._device)
            self._batch = replace(self._batch, position_B=position_B)
        if not (self._has_min_tokens or self._has_penalties or self._has_matchers):
            return self._batch
        return replace(
            self._batch,
            penalties=_build_penalties(positions, self._device) if self._has_penalties else None,
            banned=_list_banned(positions, self._eos_token_ids) or None if self._has_min_tokens else None,
            allowed=_build_allowed(positions, self._eos_token_ids, self._device) if self._has_matchers else None,
        )

    def _remember(self, sequences: list[Sequence], places: list[int]) -> None:
        params = [sequence.request.sampling for sequence in sequences]
        num_top_logprobs = max(p.logprobs or 0 for p in params)
        keyed = keyed_sampling(sequences, places, self._device)
        self._sequences, self._batch = sequences, replace(keyed, num_top_logprobs=num_top_logprobs)
        self._has_min_tokens = any(p.min_tokens for p in params)
        self._has_penalties = any(p.has_penalties for p in params)
        self._has_matchers = any(sequence.matcher is not None for sequence in sequences)


def _list_banned(positions: list[Position], eos_token_ids: tuple[int, ...]) -> list[tuple[int, int]]:
    return [
        (row, token)
        for row, position in enumerate(positions)
        if position.sequence.matcher is None
        for token in banned_tokens(position.sequence, position.num_drafts, eos_token_ids)
    ]


def _build_allowed(positions: list[Position], eos_token_ids: tuple[int, ...], device: torch.device) -> AllowedTokens:
    rows = [row for row, position in enumerate(positions) if position.sequence.matcher is not None]
    matcher = positions[rows[0]].sequence.matcher
    assert matcher is not None
    words_MW = np.empty((len(rows), matcher.num_words), np.int32)
    for index, row in enumerate(rows):
        position = positions[row]
        # The places of a sequence stand together, and are all filled with the first of them.
        if position.num_drafts == 0 and position.sequence.matcher is not None:
            position.sequence.matcher.fill_masks(position.draft, words_MW[index : index + 1 + len(position.draft)])
        banned = banned_tokens(position.sequence, position.num_drafts, eos_token_ids)
        if banned:
            ban(words_MW[index], banned)
    return AllowedTokens(rows, torch.from_numpy(words_MW).to(device))


def _build_penalties(positions: list[Position], device: torch.device) -> Penalties:
    params = [position.sequence.request.sampling for position in positions]
    counts = [position.sequence.count_tokens(position.draft[: position.num_drafts]) for position in positions]
    longest = max(len(count) for count in counts)
    ids = [[*count.keys(), *[-1] * (longest - len(count))] for count in counts]
    times = [[*count.values(), *[0] * (longest - len(count))] for count in counts]
    return Penalties(
        token_ids_BL=torch.tensor(ids, dtype=torch.int64, device=device),
        output_counts_BL=torch.tensor(times, dtype=torch.int32, device=device),
        repetition_B=torch.tensor([p.repetition_penalty for p in params], dtype=torch.float32, device=device),
        presence_B=torch.tensor([p.presence_penalty for p in params], dtype=torch.float32, device=device),
        frequency_B=torch.tensor([p.frequency_penalty for p in params], dtype=torch.float32, device=device),
    )
