"""What parallel samples and templates share is computed once, from the plan to the engine: counted to the token."""

import pyarrow as pa
import pytest

from actors.engine import Engine
from actors.weights.checkpoint import load_tokenizer
from pipeline.job import load_job
from pipeline.prefix_plan import plan_shard
from pipeline.shards import list_shards

HEAD = "Decide whether the review is good or bad. A fine day: good. Too cold: bad. Never again: bad. Thank you: good. "
HEAD_TOKENS = len(HEAD)
"""The test tokenizer has one token per character, and puts nothing before it."""


@pytest.fixture
def answer(write_job, write_corpus, small_model):
    """Plans one shard and answers it by a fresh engine; the slices' rows, and their completions by row index."""

    def run(columns, **sections):
        write_corpus({"part": pa.table(columns)})
        job = load_job(str(write_job(**sections))).resolve()
        plan = plan_shard(job, list_shards(job).good[0], load_tokenizer(str(small_model)))
        engine, completions = Engine(job.engine), {}
        for piece in plan:
            for request in piece.requests(job.sampling):
                engine.add(request)
        while engine.has_unfinished():
            completions.update({int(c.request_id): c for c in engine.step()})
        assert len(completions) == len(next(iter(columns.values())))
        assert all(c.error is None for c in completions.values())
        return plan, engine, completions

    return run


def computed_prompt_tokens(engine, completions):
    """Of all that the engine computed, what is no answer: an answer's last token is never computed."""
    stats = engine.stats
    num_generated = sum(len(o.token_ids) - 1 for c in completions.values() for o in c.outputs)
    return stats.num_prefill_tokens + stats.num_decode_tokens - num_generated


NO_DRAFTS = {"speculative_config": {"method": "none"}}


def engine_settings(page_size):
    return {"page_size": page_size, "num_pages": 4096 // page_size, **NO_DRAFTS}


@pytest.mark.parametrize("page_size", [8, 64])
def test_samples_of_a_prompt_compute_it_once(answer, page_size):
    prompt = HEAD + "Lovely"
    _, engine, completions = answer(
        {"prompt": [prompt]}, sampling={"n": 6, "temperature": 1.0}, engine=engine_settings(page_size)
    )
    assert len(completions[0].outputs) == 6
    # Each sample but the first computes one token, the last: its logits are what it is drawn from.
    assert computed_prompt_tokens(engine, completions) == len(prompt) + 5
    assert completions[0].usage.cached_tokens == 0, "as OpenAI counts: the prompt, once"


@pytest.mark.parametrize("page_size", [8, 64])
def test_rows_of_a_few_shot_template_compute_its_head_once(answer, page_size):
    # No two begin alike, so all that any two have in common is the head.
    reviews = [f"{letter}{letter * i} review" for i, letter in enumerate("abcdefghijkl")]
    labels = [str(i) for i in range(len(reviews))]
    plan, engine, completions = answer(
        {"review": reviews, "label": labels},
        input={"prompt_column": None},
        prompt={"template": HEAD + "{{ review }} ({{ label }}):", "chat_template": False},
        engine=engine_settings(page_size),
    )
    own = sum(len(f"{review} ({label}):") for review, label in zip(reviews, labels))
    assert plan.prompt_tokens == len(reviews) * HEAD_TOKENS + own
    assert plan.achievable_prefix_tokens == (len(reviews) - 1) * HEAD_TOKENS
    cached = [completions[i].usage.cached_tokens for i in range(len(reviews))]
    assert sorted(cached) == [0, *[HEAD_TOKENS] * (len(reviews) - 1)]
    assert computed_prompt_tokens(engine, completions) == HEAD_TOKENS + own


@pytest.mark.parametrize("has_groups", [False, True])
def test_samples_of_rows_with_a_common_head_compute_head_and_prompts_once(answer, has_groups):
    reviews = [f"{letter} was the day, and {letter * 9} the night" for letter in "abcde"]
    plan, engine, completions = answer(
        {"review": reviews},
        input={"prompt_column": None},
        prompt={"template": HEAD + "{{ review }}", "chat_template": False},
        sampling={"n": 3, "temperature": 1.0},
        engine={**engine_settings(16), "enable_prefix_groups": has_groups},
    )
    distinct = HEAD_TOKENS + sum(map(len, reviews))
    assert plan.prompt_tokens - plan.achievable_prefix_tokens == distinct
    assert sum(c.usage.cached_tokens for c in completions.values()) == plan.achievable_prefix_tokens
    assert computed_prompt_tokens(engine, completions) == distinct + 2 * len(reviews)
    assert engine.stats.num_evicted_tokens == 0
