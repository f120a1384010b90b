"""How far a model is from another, the reference, on prompts of one's own: what a user pays for fewer bits.

Both read the same text, each prompt with the reference's greedy answer after it, and say what they expect at every
place; and both answer every prompt greedily. The reference is measured first and reduced to what a comparison needs, so
the two models need never be in memory together, and many models can be compared with one reference. Knows no files and
no shards. Called by `shoal quality`, the job's quality gate and the quantiser's bench.

    KL(A || B) = sum_v p_A(v) (ln p_A(v) - ln p_B(v))        perplexity = exp(-mean ln p(token))

Shape letters: T tokens, V vocabulary, C candidates kept, N rows, X bootstrap samples.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from actors.config import EngineConfig, SpeculativeConfig
from actors.engine import Engine
from actors.requests import Completion, SamplingParams
from actors.teacher_forcing import LoadedModel, common_prefix, expected_tokens

NUM_CANDIDATES = 1024
"""Of the reference's distribution at a place, this many of the likeliest tokens are kept, and the rest as one. The KL
over these is exact for vocabularies up to this size; for larger ones it is never above the exact one, and short of it
only by what happens inside the rest. 8 KiB of host memory per token, where 128k log-probabilities would take 512."""

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95

Part = Literal["answer", "prompt", "all"]
"""Which tokens count: the answers', the prompts', or both. Prompt tokens that all rows share never do."""

METRICS = ("perplexity_a", "perplexity_b", "kl_mean", "kl_p99", "top1_agreement", "exact_match")


class QualityError(ValueError):
    """Two models cannot be compared on these prompts, or the comparison came out worse than a limit."""


class AnsweringModel(LoadedModel, Protocol):
    """What `actors.engine.Engine` offers."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | None = None, /
    ) -> list[Completion]: ...


@dataclass(frozen=True, slots=True)
class ReferenceRow:
    """What the reference answered to prompt `index`, and what it expected at the places [first, end).

    candidates_TC are its likeliest tokens and logprobs_TC their log-probabilities; rest_T is the log-probability of all
    others together.
    """

    index: int
    num_prompt: int
    token_ids: list[int]
    first: int
    token_logprob_T: Tensor
    top_T: Tensor
    candidates_TC: Tensor
    logprobs_TC: Tensor
    rest_T: Tensor


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference measured on prompts: `rows` has those that it could answer."""

    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    vocab_size: int
    rows: list[ReferenceRow]


@dataclass(frozen=True, slots=True)
class RowQuality:
    """One row, token by token: the first `num_prompt` places are the prompt's (as far as it is the row's own)."""

    index: int
    num_prompt: int
    logprob_a_T: np.ndarray
    logprob_b_T: np.ndarray
    kl_T: np.ndarray
    is_same_top_T: np.ndarray
    answer_a: list[int]
    answer_b: list[int]

    @property
    def is_same_answer(self) -> bool:
        return self.answer_a == self.answer_b


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Quality:
    """The figures of a set of rows. kl_* are in nats per token."""

    num_rows: int
    num_tokens: int
    perplexity_a: Estimate
    perplexity_b: Estimate
    kl_mean: Estimate
    kl_p99: Estimate
    top1_agreement: Estimate
    exact_match: Estimate

    def to_row(self) -> dict[str, Any]:
        """Flat: a column per value, and two for its interval."""
        row: dict[str, Any] = {"num_rows": self.num_rows, "num_tokens": self.num_tokens}
        for name in METRICS:
            estimate: Estimate = getattr(self, name)
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        return row


def compare_models(
    a: AnsweringModel, b: AnsweringModel, prompts: Sequence[Sequence[int]], sampling: SamplingParams | None = None
) -> list[RowQuality]:
    """Compare b with the reference a on prompts (token ids), both loaded; see `measure_reference` and `compare`."""
    return compare(measure_reference(a, prompts, sampling), b)


def compare_configs(
    a: EngineConfig, b: EngineConfig, prompts: Sequence[Sequence[int]], sampling: SamplingParams | None = None
) -> list[RowQuality]:
    """Load the reference a, measure it, drop it, load b and compare it: never both in memory."""
    engine = _load(a)
    vocabulary = engine.tokenizer.get_vocab()
    reference = measure_reference(engine, prompts, sampling)
    del engine
    _free_memory()
    engine = _load(b)
    if engine.tokenizer.get_vocab() != vocabulary:
        raise QualityError(
            f"{a.model} and {b.model} have different tokenizers, so that the same tokens are not the same text; "
            "give two models with the same tokenizer"
        )
    rows = compare(reference, engine)
    del engine
    _free_memory()
    return rows


def measure_reference(
    model: AnsweringModel, prompts: Sequence[Sequence[int]], sampling: SamplingParams | None = None
) -> Reference:
    """Let the reference answer greedily and say what it expects; prompts that do not fit it are left out.

    sampling: what ends an answer (max_tokens, stop ...); it is made greedy. QualityError if nothing can be answered.
    """
    sampling = greedy(sampling or SamplingParams())
    answers = _answer(model, prompts, sampling, "the reference")
    if not answers:
        raise QualityError(
            f"the reference can answer none of the {len(prompts)} prompts; give others, or raise engine.max_model_len"
        )
    indexes = list(answers)
    sequences = [[*prompts[index], *answers[index]] for index in indexes]
    first = max(1, common_prefix([prompts[index] for index in indexes]))
    pieces: list[list[tuple[Tensor, ...]]] = [[] for _ in indexes]
    for expected in expected_tokens(model, sequences, first):
        tokens = sequences[expected.sequence][expected.first : expected.first + len(expected.logits_TV)]
        pieces[expected.sequence].append(_reduce(expected.logits_TV, tokens))
    rows = [
        ReferenceRow(index, len(prompts[index]), tokens, first, *(torch.cat(parts) for parts in zip(*found)))
        for index, tokens, found in zip(indexes, sequences, pieces)
    ]
    return Reference(prompts, sampling, model.decoder.vocab_size, rows)


def compare(reference: Reference, model: AnsweringModel) -> list[RowQuality]:
    """Compare a model with a measured reference, row by row, in the order of the prompts.

    Rows that are too long for the model, with the reference's answer, are left out. QualityError for another vocabulary
    and for logits that are not finite.
    """
    if model.decoder.vocab_size != reference.vocab_size:
        raise QualityError(
            f"the models have vocabularies of {reference.vocab_size} and {model.decoder.vocab_size} tokens, "
            "so their probabilities cannot be compared; give two models with the same tokenizer"
        )
    fitting = [row for row in reference.rows if len(row.token_ids) - 1 <= model.decoder.max_model_len]
    answers = _answer(model, [reference.prompts[row.index] for row in fitting], reference.sampling, "the model")
    rows = [fitting[i] for i in answers]
    if not rows:
        raise QualityError(f"the model can answer none of the {len(reference.rows)} prompts; give shorter ones")
    pieces: list[list[tuple[Tensor, ...]]] = [[] for _ in rows]
    for expected in expected_tokens(model, [row.token_ids for row in rows], rows[0].first):
        row = rows[expected.sequence]
        start = expected.first - row.first
        pieces[expected.sequence].append(_judge(row, start, expected.logits_TV, row.token_ids[expected.first :]))
    return [
        _finish(row, answer, *(torch.cat(parts) for parts in zip(*found)))
        for row, answer, found in zip(rows, answers.values(), pieces)
    ]


def greedy(sampling: SamplingParams) -> SamplingParams:
    """The same ends of an answer, without chance: one answer, the likeliest token each time."""
    return sampling.model_copy(update={"temperature": 0.0, "n": 1, "logprobs": None})


def summarise(rows: Sequence[RowQuality], part: Part = "answer", seed: int = 0) -> Quality:
    """The figures over rows, with intervals; deterministic.

    Intervals are percentiles of a bootstrap over rows, as the tokens of a row depend on each other; that of exact_match
    is Wilson's, as a bootstrap of rows that all agree would claim certainty (and does so for top1_agreement).
    QualityError without rows or tokens.
    """
    counts_N = np.array([len(_part(row.kl_T, row, part)) for row in rows])
    if not counts_N.sum():
        raise QualityError(f"no {part} tokens in {len(rows)} rows; there is nothing to compare")
    weights_XN = _resample(len(rows), seed)
    totals_X = weights_XN @ counts_N

    def mean(values: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
        sums_N = np.array([_part(x, row, part).sum(dtype=np.float64) for x, row in zip(values, rows)])
        return float(sums_N.sum() / counts_N.sum()), (weights_XN @ sums_N)[totals_X > 0] / totals_X[totals_X > 0]

    def perplexity(values: Sequence[np.ndarray]) -> Estimate:
        value, samples_X = mean(values)
        return _estimate(math.exp(-value), np.exp(-samples_X))

    kl_T = np.concatenate([_part(row.kl_T, row, part) for row in rows])
    return Quality(
        num_rows=len(rows),
        num_tokens=int(counts_N.sum()),
        perplexity_a=perplexity([row.logprob_a_T for row in rows]),
        perplexity_b=perplexity([row.logprob_b_T for row in rows]),
        kl_mean=_estimate(*mean([row.kl_T for row in rows])),
        kl_p99=_estimate(*_quantile(kl_T, counts_N, weights_XN, 0.99)),
        top1_agreement=_estimate(*mean([row.is_same_top_T for row in rows])),
        exact_match=_wilson(sum(row.is_same_answer for row in rows), len(rows)),
    )


def _load(config: EngineConfig) -> Engine:
    # Speculation changes no token, and measuring what it would gain takes time.
    return Engine(config.model_copy(update={"speculative_config": SpeculativeConfig(method="none")}))


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _answer(
    model: AnsweringModel, prompts: Sequence[Sequence[int]], sampling: SamplingParams, who: str
) -> dict[int, list[int]]:
    """Greedy answers by the number of their prompt, without those that do not fit."""
    answers = {}
    for index, completion in enumerate(model.generate(prompts, sampling)):
        if completion.error is None:
            answers[index] = completion.outputs[0].token_ids
        elif completion.error.kind == "not_finite":
            raise QualityError(f"{who}, prompt {index}: {completion.error.message}")
    return answers


def _reduce(logits_TV: Tensor, token_ids: Sequence[int]) -> tuple[Tensor, ...]:
    """What is kept of the reference's distributions: the fields of ReferenceRow from token_logprob_T on."""
    logprobs_TV = _log_softmax(logits_TV)
    top_T = logprobs_TV.argmax(-1)
    logprobs_TC, candidates_TC = logprobs_TV.topk(min(NUM_CANDIDATES, logprobs_TV.shape[1]), dim=-1, sorted=False)
    parts = (_pick(logprobs_TV, token_ids), top_T, candidates_TC.int(), logprobs_TC, _rest(logprobs_TV, candidates_TC))
    return tuple(part.cpu() for part in parts)


def _judge(row: ReferenceRow, start: int, logits_TV: Tensor, token_ids: Sequence[int]) -> tuple[Tensor, ...]:
    """The model's log-probability of each token, the KL, and whether the likeliest token is the reference's."""
    here, device = slice(start, start + len(logits_TV)), logits_TV.device
    logprobs_TV = _log_softmax(logits_TV)
    candidates_TC = row.candidates_TC[here].to(device).long()
    logprobs_a_TC, rest_a_T = row.logprobs_TC[here].to(device), row.rest_T[here].to(device)
    kl_TC = logprobs_a_TC.exp() * (logprobs_a_TC - logprobs_TV.gather(1, candidates_TC))
    kl_T = kl_TC.sum(-1, dtype=torch.float64)
    rest_b_T = _rest(logprobs_TV, candidates_TC)
    has_rest_T = rest_a_T > float("-inf")
    kl_T += torch.where(has_rest_T, rest_a_T.exp() * (rest_a_T - rest_b_T), 0.0)
    is_same_T = logprobs_TV.argmax(-1) == row.top_T[here].to(device)
    # Rounding alone can make the sum a little negative.
    parts = (_pick(logprobs_TV, token_ids[: len(logits_TV)]), kl_T.clamp(min=0.0).float(), is_same_T)
    return tuple(part.cpu() for part in parts)


def _log_softmax(logits_TV: Tensor) -> Tensor:
    logprobs_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    if not bool(logprobs_TV.isfinite().all()):
        raise QualityError("a model's logits are not finite; set its dtype to bfloat16 or float32")
    return logprobs_TV


def _pick(logprobs_TV: Tensor, token_ids: Sequence[int]) -> Tensor:
    return logprobs_TV.gather(1, torch.tensor(token_ids, device=logprobs_TV.device)[:, None]).squeeze(1)


def _rest(logprobs_TV: Tensor, candidates_TC: Tensor) -> Tensor:
    """Log-probability of all tokens that are no candidates; -inf where there are none."""
    return logprobs_TV.scatter(1, candidates_TC, float("-inf")).logsumexp(-1)


def _finish(row: ReferenceRow, answer: list[int], logprob_b_T: Tensor, kl_T: Tensor, is_same_T: Tensor) -> RowQuality:
    return RowQuality(
        index=row.index,
        num_prompt=row.num_prompt - row.first,
        logprob_a_T=row.token_logprob_T.numpy(),
        logprob_b_T=logprob_b_T.numpy(),
        kl_T=kl_T.numpy(),
        is_same_top_T=is_same_T.numpy(),
        answer_a=row.token_ids[row.num_prompt :],
        answer_b=answer,
    )


def _part(values_T: np.ndarray, row: RowQuality, part: Part) -> np.ndarray:
    if part == "all":
        return values_T
    return values_T[row.num_prompt :] if part == "answer" else values_T[: row.num_prompt]


def _resample(num_rows: int, seed: int) -> np.ndarray:
    """How often each row is drawn in each bootstrap sample, [X, N]."""
    draws = np.random.default_rng(seed).multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=NUM_RESAMPLES)
    return draws.astype(np.float64)


def _estimate(value: float, samples_X: np.ndarray) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(samples_X, (tail, 1 - tail))
    return Estimate(value, float(low), float(high))


def _quantile(
    values_T: np.ndarray, counts_N: np.ndarray, weights_XN: np.ndarray, share: float
) -> tuple[float, np.ndarray]:
    """The smallest value that at least `share` of the tokens do not exceed, of all tokens and of each sample."""
    order = values_T.argsort(kind="stable")
    row_of_T = np.repeat(np.arange(len(counts_N)), counts_N)[order]
    sorted_T = values_T[order]

    def at(weights_N: np.ndarray) -> float:
        reached_T = weights_N[row_of_T].cumsum()
        place = int(np.searchsorted(reached_T, share * reached_T[-1] * (1 - 1e-12)))
        return float(sorted_T[place])

    samples = [at(weights_N) for weights_N in weights_XN if weights_N @ counts_N > 0]
    return at(np.ones(len(counts_N))), np.array(samples)


def _wilson(num_hits: int, num_rows: int) -> Estimate:
    """Wilson (1927): the score interval of a proportion."""
    z, p = 1.959964, num_hits / num_rows
    middle = (p + z * z / (2 * num_rows)) / (1 + z * z / num_rows)
    half = z * math.sqrt(p * (1 - p) / num_rows + (z / (2 * num_rows)) ** 2) / (1 + z * z / num_rows)
    return Estimate(p, max(0.0, middle - half), min(1.0, middle + half))
