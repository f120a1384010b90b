"""Real prompts and real weights, where a folder `shared` lies beside the checkout: each row has its answer or its
error, usage adds up, and greedy tokens equal transformers'."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from actors.config import EngineConfig
from actors.engine import Engine
from actors.requests import SamplingParams
from jobs.run import named_models, run
from pipeline.bill.ledger import ROUNDING, read_bill
from pipeline.storage import Storage

SHARED = Path(__file__).resolve().parents[3] / "shared"
CORPORA = sorted(path.name for path in (SHARED / "corpora").glob("*") if path.is_dir())
STORIES = SHARED / "models" / "stories260K"

needs_corpora = pytest.mark.skipif(not CORPORA, reason=f"no corpora in {SHARED}; runs where they lie there")
needs_stories = pytest.mark.skipif(not STORIES.exists(), reason=f"no {STORIES}; runs where it lies there")


def run_corpus(corpus: str, model: str, tmp_path: Path) -> None:
    """Run a corpus whole and check every row of it."""
    job = {
        "input": {"path": str(SHARED / "corpora" / corpus), "prompt_column": "prompt", "id_column": "id"},
        "model": model,
        "engine": {"device": "cpu"},
        "sampling": {"max_tokens": 16},
        "output": {"path": str(tmp_path / "out")},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    assert run(str(path), []) == 0

    rows, device_seconds = 0, []
    for shard in sorted((SHARED / "corpora" / corpus).glob("*.parquet")):
        prompts, answers = pq.read_table(shard), pq.read_table(tmp_path / "out" / "results" / shard.name)
        assert answers.select(prompts.column_names).equals(prompts), "the input's rows, in the input's order"
        for row in answers.to_pylist():
            assert (row["error"] is None) == (row["response"] is not None)
            if row["error"] is None:
                assert row["finish_reason"] in ("stop", "length")
                assert 1 <= row["completion_tokens"] <= 16
                assert 0 <= row["cached_tokens"] < row["prompt_tokens"]
                assert math.isfinite(row["mean_logprob"])
            else:
                assert row["error"]["kind"] == "prompt_too_long"
            device_seconds.append(row["device_seconds"])
        rows += len(answers)

    bill = read_bill(Storage(str(tmp_path / "out")))
    assert bill.rows == rows == bill.rows_ok + bill.rows_error
    assert bill.busy_s == pytest.approx(math.fsum(device_seconds), rel=ROUNDING)
    assert bill.device_seconds == pytest.approx(bill.busy_s + bill.load_s + bill.idle_s + bill.lost_s, rel=ROUNDING)


@needs_corpora
@needs_stories
def test_a_real_corpus_is_answered_by_a_real_checkpoint(tmp_path, ray_cluster):
    run_corpus("mt_bench", str(STORIES), tmp_path)


@needs_corpora
@pytest.mark.slow
@pytest.mark.parametrize("model", ["demo", "stories260K"])
@pytest.mark.parametrize("corpus", CORPORA)
def test_every_real_corpus_is_answered(corpus, model, tmp_path, ray_cluster):
    if model == "stories260K" and not STORIES.exists():
        pytest.skip(f"no {STORIES}")
    run_corpus(corpus, "demo" if model == "demo" else str(STORIES), tmp_path)


@needs_corpora
@pytest.mark.parametrize("model", ["demo", "stories260K"])
def test_greedy_tokens_on_real_prompts_equal_transformers(model):
    """Eleven scripts, code and long worked examples: what a tokenizer makes of them, in many lengths at once."""
    from transformers import AutoModelForCausalLM

    directory = named_models()["demo"] if model == "demo" else str(STORIES)
    if not Path(directory).exists():
        pytest.skip(f"no {directory}")
    engine = Engine(EngineConfig(model=directory, device="cpu", dtype="float32", num_threads=1, page_size=16))
    prompts = [
        tokens
        for corpus in CORPORA
        for text in pq.read_table(SHARED / "corpora" / corpus, columns=["prompt"])["prompt"].to_pylist()[::151]
        if len(tokens := engine.tokenizer.encode(text)) + 12 < engine.max_model_len
    ]
    assert len(prompts) > 15
    completions = engine.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for prompt, completion in zip(prompts, completions):
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert completion.outputs[0].token_ids == expected[0, len(prompt) :].tolist()
