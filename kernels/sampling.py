"""Choosing tokens from logits with keyed noise. Called through kernels.backend.

    token = argmax_j (x_j / temperature + gumbel_j)

which samples softmax(x / temperature) (Gumbel-max; Maddison et al. 2014). The noise is a function of (row seed,
position, candidate j) alone, so a row's tokens do not depend on its batch. gumbel_j comes from lane j % 4 of
Philox-4x32-10 (Salmon et al. 2011) under the key (seed mod 2^32, seed div 2^32) at the counter (j div 4, position,
0, 0):

    v = min((bits + 1/2) 2^-32, 1 - 2^-24)     E = -log(1 - v)     gumbel = -log(E)      all in float32

where E is v (1 + v (1/2 + v/3)) below v = 2^-7, since 1 - v would lose the low bits there. The noise lies in
[-2.82, 22.88]; a candidate further below the best than that range cannot win, and gets no noise.

Filters in vLLM's order: penalties, banned tokens and those not allowed, temperature, min_p, top_k, top_p. All three
thresholds keep ties: top_k keeps what is not below the k-th largest value, top_p what has less than p of the mass
strictly above.

Shape letters: B rows, V vocabulary, L the width of a padded list, M rows with allowed tokens, W words of 32 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.on_demand import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

GREEDY_TEMPERATURE = float(np.float32(1e-5))
"""Rows below this temperature take the largest logit, as in vLLM. Rounded to float32, as the temperatures are."""

NOISE_SPAN = 26.0
"""Above the difference of the largest and the smallest noise, 22.874 + 2.812."""

NOISE_MIN = -2.82
"""Below the smallest noise, -2.812."""

DRAW_CANDIDATES = 1 << 14
"""The CPU draws for so many candidates at once, or for one row: enough to hide calls, and within its cache."""

PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
PHILOX_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ZERO = np.uint64(0)

FloatArray = NDArray[np.float32]
Words = NDArray[np.uint64] | np.uint64


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
class AllowedTokens:
    """The only tokens that some rows may choose from, as bits; other rows may choose from all.

    rows: ascending, none twice. words_MW: int32, W = ceil(V / 32); of rows[m], token j is bit j % 32 of word j // 32.
    At least one bit of each row is 1.
    """

    rows: list[int]
    words_MW: Tensor


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
    allowed: AllowedTokens | None = None


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
        if getattr(batch, name).device != logits_BV.device:
            raise ValueError(f"sample: {name} is on {getattr(batch, name).device}, logits on {logits_BV.device}")
    if not 0 <= batch.num_top_logprobs <= vocab_size:
        raise ValueError(f"sample: num_top_logprobs={batch.num_top_logprobs}; it must be 0 to {vocab_size}")
    for row, token in batch.banned or ():
        if not (0 <= row < num_rows and 0 <= token < vocab_size):
            raise ValueError(f"sample: banned pair ({row}, {token}) is outside of logits {tuple(logits_BV.shape)}")
    if batch.allowed is not None:
        _check_allowed(logits_BV, batch.allowed)


def _check_allowed(logits_BV: Tensor, allowed: AllowedTokens) -> None:
    num_rows, vocab_size = logits_BV.shape
    words_MW, shape = allowed.words_MW, (len(allowed.rows), -(-vocab_size // 32))
    if words_MW.dtype != torch.int32 or words_MW.shape != shape or words_MW.device != logits_BV.device:
        raise ValueError(
            f"sample: words_MW is {words_MW.dtype} {tuple(words_MW.shape)} on {words_MW.device}; it must be int32 "
            f"{shape} on {logits_BV.device}"
        )
    places = [-1, *allowed.rows, num_rows]
    if not allowed.rows or any(row >= after for row, after in pairwise(places)):
        raise ValueError(f"sample: rows with allowed tokens are {allowed.rows}; they must ascend from 0 to {num_rows}")


@triton_kernel
def _largest(x, size, BLOCK: tl.constexpr):
    """max(x)."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(x + column, mask=column < size, other=float("-inf")))
    return tl.max(best, axis=0)


@triton_kernel
def _ordered(x):
    """float32 as uint32 that compare alike; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    flip = (bits >> 31) | -2147483648
    return (bits ^ flip).to(tl.uint32, bitcast=True)


@triton_kernel
def _count_and_mass(x, size, temperature, best, threshold, BLOCK: tl.constexpr):
    """How many x / temperature are not below the threshold (as ordered bits), and their sum of exp(. - best)."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < size
        scaled = tl.div_rn(tl.load(x + column, mask=inside, other=float("-inf")), temperature)
        kept = inside & (_ordered(scaled) >= threshold)
        count += kept.to(tl.int32)
        mass += tl.where(kept, tl.exp(scaled - best), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass, axis=0)


@triton_kernel
def _gumbel(bits):
    """uint32 words to standard Gumbel noise; see the head of the file."""
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)
    series = v * (1.0 + v * (0.5 + v * 0.3333333333333333))
    return -tl.log(tl.where(v < 0.0078125, series, -tl.log(1.0 - v)))


@triton_kernel
def _sample_kernel(
    raw,
    filtered,
    temperature,
    top_k,
    top_p,
    log_min_p,
    seed,
    position,
    token_ids,
    logprobs,
    log_sums,
    size,
    raw_stride,
    filtered_stride,
    greedy_temperature,
    noise_span,
    BLOCK: tl.constexpr,
):
    """One program per row. Reads a row three times when greedy, four times when sampled, and 32 times more for each
    of top_k and top_p: their thresholds are found bit by bit, without sorting, and so keep all ties."""
    row = tl.program_id(0)
    raw += row.to(tl.int64) * raw_stride
    x = filtered + row.to(tl.int64) * filtered_stride
    raw_best = _largest(raw, size, BLOCK)
    zero_threshold = (row * 0).to(tl.uint32)
    _, raw_mass = _count_and_mass(raw, size, 1.0, raw_best, zero_threshold, BLOCK)
    log_sum = raw_best + tl.log(raw_mass)

    row_temperature = tl.load(temperature + row)
    is_greedy = row_temperature < greedy_temperature
    divisor = tl.where(is_greedy, 1.0, row_temperature)
    best = tl.div_rn(_largest(x, size, BLOCK), divisor)
    threshold = zero_threshold
    cut = best
    if not is_greedy:
        cut = best - noise_span - tl.abs(best) * 2.384185791015625e-07
        threshold = _ordered(best + tl.load(log_min_p + row))
        k = tl.load(top_k + row)
        if (k > 0) & (k < size):
            found = zero_threshold
            bit = zero_threshold + 2147483648
            for _ in range(32):
                count, _mass = _count_and_mass(x, size, divisor, best, found | bit, BLOCK)
                found = tl.where(count >= k, found | bit, found)
                bit = bit >> 1
            threshold = tl.maximum(threshold, found)
        p = tl.load(top_p + row)
        if p < 1.0:
            _count, kept_mass = _count_and_mass(x, size, divisor, best, threshold, BLOCK)
            found = zero_threshold
            bit = zero_threshold + 2147483648
            for _ in range(32):
                _count, mass = _count_and_mass(x, size, divisor, best, found | bit, BLOCK)
                found = tl.where(mass >= p * kept_mass, found | bit, found)
                bit = bit >> 1
            threshold = tl.maximum(threshold, found)

    # Each place of the vectors sees ascending candidates, so a strict comparison keeps the smallest id of a tie.
    row_seed = tl.load(seed + row)
    row_position = tl.load(position + row).to(tl.uint32).to(tl.int32, bitcast=True)
    best_score = tl.full((BLOCK // 4,), float("-inf"), tl.float32)
    best_id = tl.full((BLOCK // 4,), 2147483647, tl.int32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(x + column, mask=column < size, other=float("-inf"))
        if tl.max(tl.div_rn(values, divisor), axis=0) >= cut:
            counter = start // 4 + tl.arange(0, BLOCK // 4)
            zeros = counter * 0
            words = tl.philox(row_seed, counter, zeros + row_position, zeros, zeros)
            for lane in tl.static_range(4):
                candidate = 4 * counter + lane
                value = tl.load(x + candidate, mask=candidate < size, other=float("-inf"))
                scaled = tl.div_rn(value, divisor)
                score = scaled + tl.where(is_greedy, 0.0, _gumbel(words[lane]))
                better = (score > best_score) & (_ordered(scaled) >= threshold)
                best_score = tl.where(better, score, best_score)
                best_id = tl.where(better, candidate, best_id)
    winner = tl.max(best_score, axis=0)
    token = tl.min(tl.where(best_score == winner, best_id, 2147483647), axis=0)
    token = tl.minimum(token, size - 1)  # a row without any number has no winner
    tl.store(token_ids + row, token.to(tl.int64))
    tl.store(logprobs + row, tl.load(raw + token) - log_sum)
    tl.store(log_sums + row, log_sum)


@triton_kernel
def _penalise_kernel(
    logits, token_ids, counts, repetition, presence, frequency, stride, list_stride, width, BLOCK: tl.constexpr
):
    """One program per row and BLOCK listed tokens; in place."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    token = tl.load(token_ids + row * list_stride + column, mask=inside, other=-1)
    count = tl.load(counts + row * list_stride + column, mask=inside, other=0)
    used = token >= 0
    at = logits + row.to(tl.int64) * stride + token
    x = tl.load(at, mask=used, other=0.0)
    factor = tl.load(repetition + row)
    x = tl.where(x > 0, tl.div_rn(x, factor), x * factor)
    x -= tl.load(frequency + row) * count.to(tl.float32)
    x -= tl.where(count > 0, tl.load(presence + row), 0.0)
    tl.store(at, x, mask=used)


@triton_kernel
def _allow_kernel(logits, rows, words, stride, words_stride, size, BLOCK: tl.constexpr):
    """x = -inf where its bit is 0. One program per listed row and BLOCK tokens; in place."""
    index = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < size
    word = tl.load(words + index.to(tl.int64) * words_stride + token // 32, mask=inside, other=0)
    row = tl.load(rows + index).to(tl.int64)
    is_forbidden = inside & (((word >> (token % 32)) & 1) == 0)
    tl.store(logits + row * stride + token, float("-inf"), mask=is_forbidden)


def sample_triton(logits_BV: Tensor, batch: SamplingBatch) -> SampleResult:
    """Choose one token per row on the device; nothing is copied to the host. Any vocabulary size below 2^31 - 4096.

    A row whose logits hold NaN gets a logprob of NaN and some token, for the caller to refuse.
    """
    check_sampling(logits_BV, batch)
    num_rows, vocab_size = logits_BV.shape
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    token_ids = torch.empty((num_rows,), dtype=torch.int64, device=logits_BV.device)
    logprobs = torch.empty((num_rows,), dtype=torch.float32, device=logits_BV.device)
    log_sums = torch.empty((num_rows,), dtype=torch.float32, device=logits_BV.device)
    if num_rows:
        filtered = penalise_triton(logits_BV, batch)
        _sample_kernel[(num_rows,)](
            logits_BV,
            filtered,
            batch.temperature_B,
            batch.top_k_B,
            batch.top_p_B,
            batch.min_p_B.double().log().float(),
            batch.seed_B,
            batch.position_B,
            token_ids,
            logprobs,
            log_sums,
            vocab_size,
            logits_BV.stride(0),
            filtered.stride(0),
            GREEDY_TEMPERATURE,
            NOISE_SPAN,
            BLOCK=min(4096, max(16, 1 << (vocab_size - 1).bit_length())),
            num_warps=8,
        )
    if not batch.num_top_logprobs:
        return SampleResult(token_ids, logprobs)
    top_BL, top_ids_BL = likeliest_on_device(logits_BV, batch.num_top_logprobs)
    return SampleResult(token_ids, logprobs, top_ids_BL, top_BL - log_sums.unsqueeze(1))


def penalise_triton(logits_BV: Tensor, batch: SamplingBatch) -> Tensor:
    """The logits themselves, or a copy with penalties, bans, and only what is allowed."""
    penalties, allowed = batch.penalties, batch.allowed
    if penalties is None and not batch.banned and allowed is None:
        return logits_BV
    changed_BV = logits_BV.clone()
    if penalties is not None and penalties.token_ids_BL.shape[1]:
        token_ids_BL = penalties.token_ids_BL.contiguous()
        num_rows, width = token_ids_BL.shape
        _penalise_kernel[(num_rows, -(-width // 256))](
            changed_BV,
            token_ids_BL,
            penalties.output_counts_BL.contiguous(),
            penalties.repetition_B,
            penalties.presence_B,
            penalties.frequency_B,
            changed_BV.stride(0),
            width,
            width,
            BLOCK=256,
            num_warps=4,
        )
    if batch.banned:
        pairs = torch.tensor(batch.banned).to(logits_BV.device, non_blocking=True)
        changed_BV[pairs[:, 0], pairs[:, 1]] = -torch.inf
    if allowed is not None:
        rows = torch.tensor(allowed.rows).to(logits_BV.device, non_blocking=True)
        words_MW = allowed.words_MW.contiguous()
        vocab_size = logits_BV.shape[1]
        _allow_kernel[(len(allowed.rows), -(-vocab_size // 1024))](
            changed_BV,
            rows,
            words_MW,
            changed_BV.stride(0),
            words_MW.stride(0),
            vocab_size,
            BLOCK=1024,
            num_warps=4,
        )
    return changed_BV


def sample_cpu(logits_BV: Tensor, batch: SamplingBatch) -> SampleResult:
    """Choose one token per row on the CPU; no row's arithmetic depends on the others, nor on the number of threads.

    A row whose logits hold NaN gets a logprob of NaN and some token, for the caller to refuse.
    """
    check_sampling(logits_BV, batch)
    raw_BV = logits_BV.numpy()
    changed = penalise_rows(raw_BV, batch)
    filters = zip(*(x.tolist() for x in (batch.temperature_B, batch.top_k_B, batch.top_p_B, batch.min_p_B)))
    tokens = np.zeros(len(raw_BV), np.int64)
    log_sums_B = torch.logsumexp(logits_BV, dim=1)  # a row is one thread's, whatever their number
    drawn: list[Candidates] = []
    for row, (raw, (temperature, top_k, top_p, min_p)) in enumerate(zip(raw_BV, filters)):
        logits = changed.get(row, raw)
        tokens[row] = logits.argmax()
        if temperature >= GREEDY_TEMPERATURE and np.isfinite(logits[tokens[row]]):
            drawn.append(Candidates(row, *likely_candidates(logits, temperature, top_k, top_p, min_p)))
    draw(drawn, batch, tokens)
    tokens_B = torch.from_numpy(tokens)
    logprobs_B = logits_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1) - log_sums_B
    if not batch.num_top_logprobs:
        return SampleResult(tokens_B, logprobs_B)
    top_BL, top_ids_BL = likeliest(logits_BV, batch.num_top_logprobs)
    return SampleResult(tokens_B, logprobs_B, top_ids_BL, top_BL - log_sums_B.unsqueeze(1))


def likeliest(logits_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits of each row, descending, and their ids; of equal ones the smaller id comes first.

    torch.topk orders equal ones by `count`, which is the largest that any row of the batch asks for.
    """
    smallest_B1 = logits_BV.topk(count, dim=1).values[:, -1:]
    # Those not below the last one, by row and then by id; all of a row with NaN.
    rows, ids = (~(logits_BV < smallest_B1)).nonzero(as_tuple=True)
    order = logits_BV[rows, ids].argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    num_kept_B = torch.bincount(rows, minlength=len(logits_BV))
    starts_B1 = (num_kept_B.cumsum(0) - num_kept_B).unsqueeze(1)
    ids_BL = ids[order[starts_B1 + torch.arange(count, device=ids.device)]]
    return logits_BV.gather(1, ids_BL), ids_BL


def likeliest_on_device(logits_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`likeliest` with sizes that are all known beforehand, so that nobody waits for a GPU; it reads the logits more
    often, and takes a CPU twice the time. Of a row with NaN: any."""
    smallest_B1 = logits_BV.topk(count, dim=1).values[:, -1:]
    above_BV, equal_BV = logits_BV > smallest_B1, logits_BV == smallest_B1
    # Of those that are equal to the last one, the first ids fill what those above it leave.
    num_equal_B1 = count - above_BV.sum(dim=1, keepdim=True, dtype=torch.int32)
    kept_BV = above_BV | (equal_BV & (equal_BV.cumsum(dim=1, dtype=torch.int32) <= num_equal_B1))
    last = logits_BV.shape[1] - 1
    ids_V = torch.arange(last + 1, device=logits_BV.device)
    ids_BL = torch.where(kept_BV, ids_V, last).topk(count, dim=1, largest=False, sorted=True).values
    values_BL = logits_BV.gather(1, ids_BL)
    order_BL = values_BL.argsort(dim=1, descending=True, stable=True)
    return values_BL.gather(1, order_BL), ids_BL.gather(1, order_BL)


def penalise_rows(raw_BV: FloatArray, batch: SamplingBatch) -> dict[int, FloatArray]:
    """Changed copies of the rows that penalties, bans or allowed tokens change, by row."""
    changed: dict[int, FloatArray] = {}
    if batch.penalties is not None:
        penalties = batch.penalties
        factors = (penalties.repetition_B.numpy(), penalties.presence_B.numpy(), penalties.frequency_B.numpy())
        for row, (repetition, presence, frequency) in enumerate(zip(*factors)):
            if repetition == 1 and presence == 0 and frequency == 0:
                continue
            ids = penalties.token_ids_BL[row].numpy()
            counts = penalties.output_counts_BL[row].numpy()[ids >= 0].astype(np.float32)
            ids = ids[ids >= 0]
            changed[row] = raw_BV[row].copy()
            x = changed[row][ids]
            x = np.where(x > 0, x / repetition, x * repetition) - frequency * counts
            changed[row][ids] = x - presence * (counts > 0)
    for row, token in batch.banned or ():
        if row not in changed:
            changed[row] = raw_BV[row].copy()
        changed[row][token] = -np.inf
    if batch.allowed is not None:
        words_MW = np.ascontiguousarray(batch.allowed.words_MW.numpy())
        for row, words in zip(batch.allowed.rows, words_MW):
            bits = np.unpackbits(words.view(np.uint8), count=raw_BV.shape[1], bitorder="little")
            changed[row] = np.where(bits.view(np.bool_), changed.get(row, raw_BV[row]), np.float32(-np.inf))
    return changed


@dataclass(frozen=True, slots=True)
class Candidates:
    """What may still win in one row: ascending token ids, and their logits over the temperature."""

    row: int
    ids: NDArray[np.int64]
    scaled: FloatArray

    def could_win(self, bits: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Which candidates have noise large enough to beat the best candidate with the smallest noise.

        Their score is at most scaled - log(v), as E >= v, and the best one's at least its scaled value + NOISE_MIN.
        """
        best = self.scaled.max()
        slack = np.float32(0.01) + abs(best) * np.float32(2.0**-22)  # covers every rounding, here and of the scores
        with np.errstate(over="ignore"):
            return bits <= np.exp(self.scaled - (best + np.float32(NOISE_MIN) - slack)) * np.float32(2.0**32)


def likely_candidates(
    logits: FloatArray, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[NDArray[np.int64], FloatArray]:
    """Apply temperature, min_p, top_k, top_p, and drop what no noise can lift above the best: ids, scaled logits."""
    scaled = logits / np.float32(temperature)
    best = scaled.max()
    kept_from = -np.float32(np.inf)
    if min_p > 0:
        kept_from = best + np.float32(np.log(min_p))
    if 0 < top_k < len(scaled):
        kept_from = max(kept_from, np.partition(scaled, len(scaled) - top_k)[len(scaled) - top_k])
    if top_p < 1:
        kept_from = max(kept_from, top_p_threshold(scaled[scaled >= kept_from], top_p))
    can_win_from = best - np.float32(NOISE_SPAN) - abs(best) * np.float32(2.0**-22)
    ids = np.flatnonzero(scaled >= max(kept_from, can_win_from))
    return ids, scaled[ids]


def top_p_threshold(x: FloatArray, top_p: float) -> np.float32:
    """The smallest value of x with less than top_p of the mass strictly above it."""
    descending = np.sort(x)[::-1]
    mass_to = np.cumsum(np.exp(descending - descending[0]), dtype=np.float64)
    num_kept = int(np.searchsorted(mass_to, top_p * mass_to[-1])) + 1
    return descending[min(num_kept, len(descending)) - 1]


def draw(drawn: list[Candidates], batch: SamplingBatch, tokens: NDArray[np.int64]) -> None:
    """Write the winners of rows into `tokens`, at most DRAW_CANDIDATES (or one row) at a time."""
    seeds, positions = batch.seed_B.tolist(), batch.position_B.tolist()
    start = 0
    while start < len(drawn):
        stop, num_candidates = start + 1, len(drawn[start].ids)
        while stop < len(drawn) and num_candidates + len(drawn[stop].ids) <= DRAW_CANDIDATES:
            num_candidates += len(drawn[stop].ids)
            stop += 1
        rows = drawn[start:stop]
        bits = noise_bits([(seeds[c.row], positions[c.row], c.ids) for c in rows])
        for candidates, row_bits in zip(rows, bits):
            live = np.flatnonzero(candidates.could_win(row_bits))
            scores = candidates.scaled[live] + gumbel_of_bits(row_bits[live])
            tokens[candidates.row] = candidates.ids[live[scores.argmax()]]
        start = stop


def noise_bits(rows: list[tuple[int, int, NDArray[np.int64]]]) -> list[NDArray[np.uint32]]:
    """The 32 random bits of each candidate, for rows of (seed, position, ascending candidates)."""
    blocks, places, seeds, positions = [], [], [], []
    for seed, position, ids in rows:
        first, last = int(ids[0]) >> 2, int(ids[-1]) >> 2
        if len(ids) > last - first:  # dense: four candidates share a counter
            blocks.append(np.arange(first, last + 1, dtype=np.uint64))
            places.append(ids - 4 * first)
        else:
            blocks.append((ids >> 2).astype(np.uint64))
            places.append((ids & 3) + 4 * np.arange(len(ids)))
        seeds.append(seed)
        positions.append(position)
    lengths = [len(row) for row in blocks]
    # One row's key stays a scalar, which spares the passes over arrays of keys.
    seed_of, position_of = (
        np.repeat(np.array(x, np.uint64), lengths) if len(rows) > 1 else np.uint64(x[0]) for x in (seeds, positions)
    )
    words = philox_4x32(np.concatenate(blocks), position_of, (seed_of & _LOW, seed_of >> _HALF))
    ends = np.cumsum(lengths)
    return [words[end - n : end].ravel()[place] for end, n, place in zip(ends, lengths, places)]


def philox_4x32(
    c0: Words, c1: Words, key: tuple[Words, Words], c2: Words = _ZERO, c3: Words = _ZERO
) -> NDArray[np.uint32]:
    """Philox-4x32-10 of n counters (c0, c1, c2, c3) as uint32 [n, 4].

    Arguments are uint64 below 2^32, arrays [n] or scalars; c0 must be an array.
    """
    c1, c2, c3 = (np.broadcast_to(c, c0.shape) for c in (c1, c2, c3))
    key0, key1 = key
    for i in range(10):
        if i > 0:
            key0, key1 = (key0 + PHILOX_WEYL[0]) & _LOW, (key1 + PHILOX_WEYL[1]) & _LOW
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c2 = product1 >> _HALF, product0 >> _HALF
        c0 ^= c1
        c0 ^= key0
        c2 ^= c3
        c2 ^= key1
        product0 &= _LOW
        product1 &= _LOW
        c1, c3 = product1, product0
    return np.stack((c0, c1, c2, c3), axis=1).astype(np.uint32)


def gumbel_of_bits(bits: NDArray[np.uint32]) -> FloatArray:
    """Uniform 32-bit words to standard Gumbel noise, in float32."""
    v = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    v = np.minimum(v, np.float32(1 - 2.0**-24))
    series = v * (np.float32(1) + v * (np.float32(0.5) + v * np.float32(1 / 3)))
    return -np.log(np.where(v < np.float32(2.0**-7), series, -np.log(np.float32(1) - v)))
