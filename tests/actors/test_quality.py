"""Quality against plain formulas on transformers' logits, and its intervals against what is known of them."""

import math
import random

import numpy as np
import pytest
import torch

import actors.quality as file
import actors.teacher_forcing as forcing
from actors.config import EngineConfig
from actors.engine import Engine
from actors.quality import QualityError, RowQuality, compare, compare_models, measure_reference, summarise
from actors.requests import SamplingParams
from actors.teacher_forcing import common_prefix, expected_tokens

VOCAB = 97
SAMPLING = SamplingParams(max_tokens=6, ignore_eos=True)


def make_engine(path, **settings):
    defaults = {"dtype": "float32", "page_size": 8, "num_threads": 1, "num_pages": 64}
    return Engine(EngineConfig(model=str(path), **{**defaults, **settings}))


@pytest.fixture(scope="module")
def engine_a(tiny_llama):
    return make_engine(tiny_llama)


@pytest.fixture(scope="module")
def engine_b(tiny_llama):
    return make_engine(tiny_llama, quantization="int4")


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(7)
    shared = [rng.randrange(2, VOCAB) for _ in range(21)]
    return [[*shared, *(rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 25)))] for _ in range(9)]


def every_logit(model, sequences, first=1):
    found = [[] for _ in sequences]
    for expected in expected_tokens(model, sequences, first):
        assert expected.first == first + sum(map(len, found[expected.sequence]))
        found[expected.sequence].append(expected.logits_TV)
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("step_tokens", [16, 40, 2048])
@pytest.mark.parametrize("first", [1, 9, 18, 21])
def test_expected_tokens_are_transformers_logits_however_the_text_is_cut(
    first, step_tokens, engine_a, tiny_llama, model_zoo, prompts, monkeypatch
):
    monkeypatch.setattr(forcing, "MAX_STEP_TOKENS", step_tokens)
    model = model_zoo.reference(tiny_llama)
    for tokens, logits in zip(prompts, every_logit(engine_a, prompts, first)):
        with torch.no_grad():
            wanted = model(torch.tensor([tokens])).logits[0, first - 1 : -1]
        torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=2e-4)


def test_kl_perplexity_and_agreement_follow_their_formulas(engine_a, engine_b, prompts):
    rows = compare_models(engine_a, engine_b, prompts, SAMPLING)
    first = common_prefix(prompts)
    assert first == 21
    sequences = [prompt + row.answer_a for prompt, row in zip(prompts, rows)]
    logits_a, logits_b = every_logit(engine_a, sequences, first), every_logit(engine_b, sequences, first)
    all_kl, all_a, all_b, same = [], [], [], []
    for row, prompt, tokens, a, b in zip(rows, prompts, sequences, logits_a, logits_b):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        wanted = (p.exp() * (p - q)).sum(-1)
        assert np.allclose(row.kl_T, wanted, rtol=1e-4, atol=1e-6)
        target = torch.tensor(tokens[first:])[:, None]
        assert np.allclose(row.logprob_a_T, p.gather(1, target)[:, 0], atol=1e-5)
        assert np.allclose(row.logprob_b_T, q.gather(1, target)[:, 0], atol=1e-5)
        own = len(prompt) - first
        assert row.num_prompt == own
        all_kl.append(wanted[own:])
        all_a.append(p.gather(1, target)[own:, 0])
        all_b.append(q.gather(1, target)[own:, 0])
        same.append((a.argmax(-1) == b.argmax(-1))[own:].double())
    quality = summarise(rows, "answer")
    assert quality.num_tokens == 9 * 6
    assert quality.kl_mean.value == pytest.approx(float(torch.cat(all_kl).mean()), rel=1e-4)
    assert quality.perplexity_a.value == pytest.approx(math.exp(-torch.cat(all_a).mean()), rel=1e-4)
    assert quality.perplexity_b.value == pytest.approx(math.exp(-torch.cat(all_b).mean()), rel=1e-4)
    assert quality.top1_agreement.value == pytest.approx(float(torch.cat(same).mean()))
    assert quality.kl_mean.value > 1e-4, "int4 was meant to differ"
    assert quality.kl_p99.value >= quality.kl_mean.value
    counts = {part: summarise(rows, part).num_tokens for part in ("prompt", "answer", "all")}
    assert counts["prompt"] + counts["answer"] == counts["all"]


def test_a_model_is_as_good_as_itself(engine_a, prompts):
    quality = summarise(compare_models(engine_a, engine_a, prompts, SAMPLING), "all")
    assert quality.kl_mean.value < 1e-6
    assert quality.top1_agreement.value == quality.exact_match.value == 1.0
    assert quality.perplexity_a == quality.perplexity_b
    assert quality.exact_match.low < 1.0, "nine rows prove no certainty"


def test_candidates_and_a_rest_come_close_to_the_whole_vocabulary_from_below(engine_a, engine_b, prompts, monkeypatch):
    exact = summarise(compare_models(engine_a, engine_b, prompts, SAMPLING), "all").kl_mean.value
    monkeypatch.setattr(file, "NUM_CANDIDATES", 48)
    reduced = summarise(compare_models(engine_a, engine_b, prompts, SAMPLING), "all").kl_mean.value
    assert 0.7 * exact < reduced <= exact * (1 + 1e-6)


def test_one_reference_serves_many_models(engine_a, engine_b, prompts):
    reference = measure_reference(engine_a, prompts, SAMPLING)
    assert summarise(compare(reference, engine_a)).kl_mean.value < 1e-6
    assert summarise(compare(reference, engine_b)) == summarise(compare_models(engine_a, engine_b, prompts, SAMPLING))


def test_prompts_that_do_not_fit_one_of_the_models_are_left_out(engine_a, tiny_llama, prompts):
    short = make_engine(tiny_llama, max_model_len=40)
    rows = compare_models(engine_a, short, prompts, SAMPLING)
    assert [row.index for row in rows] == [i for i, prompt in enumerate(prompts) if len(prompt) + 5 <= 40]
    assert 0 < len(rows) < len(prompts)
    rows = compare_models(short, engine_a, prompts, SAMPLING)
    assert all(len(prompts[row.index]) < 40 for row in rows)
    with pytest.raises(QualityError, match="none of the 1 prompts"):
        compare_models(short, engine_a, [[5] * 40], SAMPLING)


def test_other_vocabularies_are_refused(engine_a, model_zoo, tiny_llama, prompts):
    import shutil

    other = model_zoo.path("llama", vocab_size=89)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_llama / name, other / name)
    with pytest.raises(QualityError, match="97 and 89"):
        compare_models(engine_a, make_engine(other), prompts, SAMPLING)


def make_rows(seed, num_rows, same=0.9):
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(num_rows):
        count = int(rng.integers(3, 12))
        kl = rng.exponential(0.05, count) * rng.lognormal(sigma=0.5)
        is_same = rng.random() < same
        rows.append(
            RowQuality(index, 1, -kl, -2 * kl, kl, kl < 0.2, [1], [1] if is_same else [2]),
        )
    return rows


def test_the_same_records_give_the_same_figures_and_another_seed_other_intervals():
    rows = make_rows(1, 40)
    assert summarise(rows) == summarise(rows)
    other = summarise(rows, seed=1)
    assert other.kl_mean.value == summarise(rows).kl_mean.value
    assert other.kl_mean.low != summarise(rows).kl_mean.low


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    truth = summarise(make_rows(0, 20_000), "answer")
    hits = dict.fromkeys(("kl_mean", "top1_agreement", "exact_match"), 0)
    for seed in range(1, 61):
        quality = summarise(make_rows(seed, 60), "answer")
        for name in hits:
            estimate = getattr(quality, name)
            assert estimate.low <= estimate.value <= estimate.high
            hits[name] += estimate.low <= getattr(truth, name).value <= estimate.high
    assert all(50 <= count <= 60 for count in hits.values()), hits


def test_the_99th_percentile_is_a_token_that_99_percent_do_not_exceed():
    rows = [RowQuality(0, 0, *(np.linspace(1, 200, 200),) * 3, np.ones(200, bool), [], [])]
    assert summarise(rows, "all").kl_p99.value == 198
    with pytest.raises(QualityError, match="no answer tokens"):
        summarise([], "answer")
