"""What every sampled token needs as tensors: its request's filters, its row's seed and its position.

Called by the runner for the target's tokens and by the draft model for its guesses, which take the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from numpy.typing import NDArray

from actors.sequence import Sequence
from kernels.sampling import SamplingBatch


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
