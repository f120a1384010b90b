"""The tokens that a step samples: on the device once it is launched, on the host when they are read.

Made by the runner. The next step may take its input from here before anybody on the host has seen it.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.sequence import Sequence
from kernels.sampling import SampleResult


@dataclass(slots=True)
class SampledToken:
    """`top` holds (token id, log-probability) of the likeliest tokens, descending."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class SampledTokens:
    """One row per token: of a sequence the one after its last, then the one after each of its draft tokens."""

    def __init__(self, owners: SequenceOf[Sequence], result: SampleResult | None) -> None:
        """owners: the sequence of each row. result: None when there are no rows."""
        self._owners = owners
        self.token_ids_B = None if result is None else result.token_ids_B
        tensors = [] if result is None else [result.token_ids_B, result.logprobs_B]
        if result is not None and result.top_ids_BL is not None and result.top_logprobs_BL is not None:
            tensors += [result.top_ids_BL, result.top_logprobs_BL]
        # The copies stand behind the step's own work on the device, and nobody waits for them yet.
        self._host = [_copy_to_host(tensor) for tensor in tensors]
        self._copied: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def rows_of(self) -> dict[Sequence, int]:
        """The first row of each sequence."""
        return {owner: row for row, owner in zip(range(len(self._owners) - 1, -1, -1), reversed(self._owners))}

    def read(self) -> dict[Sequence, list[SampledToken]]:
        """The tokens of each sequence, after waiting for the device."""
        if not self._host:
            return {}
        if self._copied is not None:
            self._copied.synchronize()
        token_ids, logprobs, *top = (tensor.tolist() for tensor in self._host)
        tops: list[list[tuple[int, float]]] = [[] for _ in self._owners]
        if top:
            tops = [list(zip(ids, values)) for ids, values in zip(*top)]
        tokens: dict[Sequence, list[SampledToken]] = {}
        for owner, token_id, logprob, likeliest in zip(self._owners, token_ids, logprobs, tops):
            tokens.setdefault(owner, []).append(SampledToken(token_id, logprob, likeliest))
        return tokens


def _copy_to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
