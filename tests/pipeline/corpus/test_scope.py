"""What a sample says about planning all shards as one: near the truth, the same every time, and kept by a run."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from actors.weights.checkpoint import load_tokenizer
from pipeline.corpus.scope import choose_scope, measure_gain
from pipeline.job import load_job
from pipeline.shards import list_shards


def make_shards(kind: str, num_shards: int = 6, num_rows: int = 200) -> dict[str, list[str]]:
    rng = random.Random(1)
    documents = ["".join(rng.choices("abcdefgh ", k=120)) for _ in range(num_shards * num_rows // 4)]

    def row(shard: int, index: int) -> str:
        question = "".join(rng.choices("abcdefgh", k=8))
        if kind == "scattered":
            return rng.choice(documents) + question
        if kind == "within":
            return documents[shard * num_rows // 4 + index // 4] + question
        return "".join(rng.choices("abcdefgh", k=120))

    return {f"s{shard}": [row(shard, index) for index in range(num_rows)] for shard in range(num_shards)}


@pytest.mark.parametrize(("kind", "scope"), [("scattered", "corpus"), ("within", "shard"), ("nothing", "shard")])
def test_half_of_the_rows_say_what_all_of_them_do(kind, scope, write_corpus, write_job):
    write_corpus(make_shards(kind))
    job = load_job(str(write_job())).resolve()
    shards, tokenizer = list_shards(job).good, load_tokenizer(job.model)
    truth, seen = measure_gain(job, tokenizer, shards, 10**6), measure_gain(job, tokenizer, shards, 600)
    assert truth.num_read == 1200 and seen.num_read == 600
    again = measure_gain(job, tokenizer, shards, 600)
    assert replace(again, rendering_s=0.0) == replace(seen, rendering_s=0.0)
    assert seen.tokens_by_shard == pytest.approx(truth.tokens_by_shard, rel=0.2)
    assert seen.tokens_by_corpus == pytest.approx(truth.tokens_by_corpus, rel=0.2)
    assert choose_scope(job, shards, shards).scope == scope


def test_a_run_keeps_to_the_scope_it_began_with_unless_the_job_says_another(write_corpus, write_job):
    write_corpus(make_shards("scattered"))
    path = str(write_job())
    job = load_job(path).resolve()
    shards = list_shards(job).good
    assert choose_scope(job, shards, shards).scope == "corpus"
    write_corpus(make_shards("nothing"))
    changed = list_shards(job).good
    assert "as this run began" in choose_scope(job, changed, changed[:3]).reason
    asked = load_job(path, ["plan.scope=shard"]).resolve()
    assert choose_scope(asked, shards, shards).scope == "shard"
    assert job.fingerprint() == asked.fingerprint(), "no answer depends on it"


def test_one_shard_or_an_unreadable_one_needs_no_corpus(write_corpus, write_job):
    folder = write_corpus({"a": ["one", "two"], "b": ["three"]})
    job = load_job(str(write_job())).resolve()
    shards = list_shards(job).good
    assert "there is one shard" in choose_scope(job, shards, shards[:1]).reason
    (folder / "b.parquet").unlink()
    assert choose_scope(job, shards, shards).scope == "shard"
