"""Choosing tokens from logits with keyed noise. Called through kernels.backend.

    token = argmax_j (x_j / temperature + gumbel_j)

which samples softmax(x / temperature) (Gumbel-max; Maddison et al. 2014). The noise is a function of (row seed,
position, candidate j) alone, so a row's tokens do not depend on its batch. gumbel_j comes from lane j % 4 of
Philox-4x32-10 (Salmon et al. 2011) under the key (seed mod 2^32, seed div 2^32) at the counter (j div 4, position,
0, 0):

    v = min((bits + 1/2) 2^-32, 1 - 2^-24)     E = -log(1 - v)     gumbel = -log(E)      all in float32

where E is v (1 + v (1/2 + v/3)) below v = 2^-7, since 1 - v would lose the low bits there. The noise lies in
[-2.82, 22.88]; a candidate further below the best than that range cannot win, and gets no noise.

Filters in vLLM's order: penalties, banned tokens, temperature, min_p, top_k, top_p. All three thresholds keep
ties: top_k keeps what is not below the k-th largest value, top_p what has less than p of the mass strictly above.

Shape letters: B rows, V vocabulary, L the width of a padded list.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GREEDY_TEMPERATURE = 1e-5
"""Rows below this temperature take the largest logit; as in vLLM."""

NOISE_SPAN = 26.0
"""Above the difference of the largest and the smallest noise, 22.874 + 2.812."""

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Penalties:
    """Which tokens of which row are penalised, and by how much.

    token_ids_BL: int64, the distinct ids of prompt and output, padded with -1. output_counts_BL: int32, how often
    each stands in the output. Repetition applies to all, presence and frequency where the count is above 0.
    """

    token_ids_BL: Tensor
    output_counts_BL: Tensor
    repetition_B: Tensor
    presence_B: Tensor
    frequency_B: Tensor


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How each row of a step is sampled. float32 tensors [B], except where said.

    top_k_B: int64, 0 is off. top_p_B: 1 is off. min_p_B: 0 is off. seed_B: int64, not negative. position_B: int64,
    the position of the token to be chosen, below 2^32. banned: (row, token) pairs which get no probability.
    """

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    seed_B: Tensor
    position_B: Tensor
    num_top_logprobs: int = 0
    penalties: Penalties | None = None
    banned: list[tuple[int, int]] | None = None


@dataclass(frozen=True, slots=True)
class SampleResult:
    """token_ids_B int64; logprobs_B float32, the log of the raw softmax (before any filter); and where asked for,
    the likeliest tokens of the raw softmax, descending."""

    token_ids_B: Tensor
    logprobs_B: Tensor
    top_ids_BL: Tensor | None = None
    top_logprobs_BL: Tensor | None = None


def check_sampling(logits_BV: Tensor, batch: SamplingBatch) -> None:
    """Refuse shapes and dtypes that do not fit; values of the parameters are the caller's to check."""
    if logits_BV.ndim != 2 or logits_BV.dtype != torch.float32 or logits_BV.shape[1] < 1:
        raise ValueError(
            f"sample: logits are {logits_BV.dtype} {tuple(logits_BV.shape)}; they must be float32 [rows, vocab]"
        )
    num_rows, vocab_size = logits_BV.shape
    for name in ("temperature_B", "top_k_B", "top_p_B", "min_p_B", "seed_B", "position_B"):
        if getattr(batch, name).shape != (num_rows,):
            raise ValueError(f"sample: {name} is {tuple(getattr(batch, name).shape)}; it must be [{num_rows}]")
    if not 0 <= batch.num_top_logprobs <= vocab_size:
        raise ValueError(f"sample: num_top_logprobs={batch.num_top_logprobs}; it must be 0 to {vocab_size}")
    for row, token in batch.banned or ():
        if not (0 <= row < num_rows and 0 <= token < vocab_size):
            raise ValueError(f"sample: banned pair ({row}, {token}) is outside of logits {tuple(logits_BV.shape)}")


def sample_cpu(logits_BV: Tensor, batch: SamplingBatch) -> SampleResult:
    """Choose one token per row on the CPU; rows are computed one by one, so none depends on the batch."""
    check_sampling(logits_BV, batch)
    raw_BV = logits_BV.numpy()
    filtered = penalised_rows(raw_BV, batch)
    log_sums = [log_sum_exp(row) for row in raw_BV]
    token_ids = []
    for row in range(len(raw_BV)):
        values = filtered.get(row, raw_BV[row])
        temperature = float(batch.temperature_B[row])
        if temperature < GREEDY_TEMPERATURE:
            token_ids.append(int(values.argmax()))
            continue
        scaled = values / np.float32(temperature)
        keep_likely(scaled, int(batch.top_k_B[row]), float(batch.top_p_B[row]), float(batch.min_p_B[row]))
        token_ids.append(choose_with_noise(scaled, int(batch.seed_B[row]), int(batch.position_B[row])))
    tokens_B = torch.tensor(token_ids, dtype=torch.int64)
    log_sums_B = torch.tensor(log_sums, dtype=torch.float32)
    logprobs_B = logits_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1) - log_sums_B
    if not batch.num_top_logprobs:
        return SampleResult(tokens_B, logprobs_B)
    top_BL, top_ids_BL = logits_BV.topk(batch.num_top_logprobs, dim=1)
    return SampleResult(tokens_B, logprobs_B, top_ids_BL, top_BL - log_sums_B.unsqueeze(1))


def penalised_rows(raw_BV: FloatArray, batch: SamplingBatch) -> dict[int, FloatArray]:
    """Copies of the rows that penalties or bans change, by row."""
    changed: dict[int, FloatArray] = {}
    if batch.penalties is not None:
        penalties = batch.penalties
        for row, ids in enumerate(penalties.token_ids_BL.numpy()):
            used = ids >= 0
            repetition, presence, frequency = (
                np.float32(getattr(penalties, name)[row]) for name in ("repetition_B", "presence_B", "frequency_B")
            )
            if not used.any() or (repetition == 1 and presence == 0 and frequency == 0):
                continue
            ids, counts = ids[used], penalties.output_counts_BL[row].numpy()[used].astype(np.float32)
            values = changed[row] = raw_BV[row].copy()
            x = values[ids]
            x = np.where(x > 0, x / repetition, x * repetition)
            values[ids] = x - frequency * counts - presence * (counts > 0)
    for row, token in batch.banned or ():
        if row not in changed:
            changed[row] = raw_BV[row].copy()
        changed[row][token] = -np.inf
    return changed


def keep_likely(x: FloatArray, top_k: int, top_p: float, min_p: float) -> None:
    """Set to -inf, in place, what min_p, top_k and top_p do not keep of one row of scaled logits."""
    if min_p > 0:
        x[x < x.max() + np.float32(np.log(min_p))] = -np.inf
    if 0 < top_k < len(x):
        x[x < np.partition(x, len(x) - top_k)[len(x) - top_k]] = -np.inf
    if top_p < 1:
        descending = np.sort(x)[::-1]
        mass = np.exp(descending - descending[0], dtype=np.float64)
        mass_above = np.concatenate(([0.0], np.cumsum(mass)[:-1]))
        num_kept = int((mass_above < top_p * mass.sum()).sum())
        x[x < descending[max(num_kept, 1) - 1]] = -np.inf


def choose_with_noise(x: FloatArray, seed: int, position: int) -> int:
    """The argmax of one row of scaled logits plus keyed noise; the smallest id on ties."""
    best = x.max()
    candidates = np.flatnonzero(x >= best - NOISE_SPAN - abs(best) * np.float32(2.0**-22))
    return int(candidates[(x[candidates] + gumbel_noise(seed, position, candidates)).argmax()])


def log_sum_exp(x: FloatArray) -> np.float32:
    """log(sum(exp(x))) of one row."""
    best = x.max()
    return best + np.log(np.exp(x - best).sum(dtype=np.float32))


def philox_4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox-4x32-10 of uint64 [4, n] counters whose entries are below 2^32; the same shape and range."""
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(10):
        product0, product1 = c0 * np.uint64(PHILOX_MULTIPLIERS[0]), c2 * np.uint64(PHILOX_MULTIPLIERS[1])
        c0, c2 = (product1 >> _HALF) ^ c1 ^ np.uint64(key0), (product0 >> _HALF) ^ c3 ^ np.uint64(key1)
        c1, c3 = product1 & _LOW, product0 & _LOW
        key0, key1 = (key0 + PHILOX_WEYL[0]) & 0xFFFFFFFF, (key1 + PHILOX_WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))


def gumbel_noise(seed: int, position: int, candidates: NDArray[np.int64]) -> FloatArray:
    """The noise of the candidates (ascending ids) of one row at one position."""
    blocks, inverse = np.unique(candidates >> 2, return_inverse=True)
    counter = np.zeros((4, len(blocks)), np.uint64)
    counter[0], counter[1] = blocks, position
    words = philox_4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return gumbel_of_bits(words[candidates & 3, inverse])


def gumbel_of_bits(bits: NDArray[np.uint64]) -> FloatArray:
    """Uniform 32-bit words to standard Gumbel noise, in float32."""
    v = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    v = np.minimum(v, np.float32(1 - 2.0**-24))
    series = v * (np.float32(1) + v * (np.float32(0.5) + v * np.float32(1 / 3)))
    return -np.log(np.where(v < np.float32(2.0**-7), series, -np.log(np.float32(1) - v)))
