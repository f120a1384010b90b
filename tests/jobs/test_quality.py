"""`shoal quality` on the shipped model and on tiny ones: the report, the printed table, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.config import EngineConfig
from actors.engine import Engine
from actors.quality import METRICS, Estimate, Quality, compare_models, summarise
from actors.requests import SamplingParams
from jobs import cli
from jobs.demo.evaluate import HELD_OUT_SEED, encode_prefix, encode_tickets, load_tokenizer
from jobs.demo.tickets import make_tickets
from jobs.quality import ReportRow, print_report, report_table
from jobs.run import named_models

EXIT_USAGE = 2
CPU = ("--set", "device=cpu", "--set", "dtype=float32", "--set", "num_threads=1", "--set", "num_pages=256")


@pytest.fixture
def shoal_quality(monkeypatch, capsys):
    """Exit code, stdout and stderr of the command, in this process."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shoal", "quality", *map(str, words), *CPU])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as left:
            cli.main()
        streams = capsys.readouterr()
        return int(left.value.code or 0), streams.out, streams.err

    return call


@pytest.fixture
def corpus(write_corpus) -> Path:
    texts = [f"Count the {word} sheep" for word in ("black", "white", "lost", "brave", "last")]
    return write_corpus({"one": texts, "two": [*texts[::-1], None, "And then?"]})


def test_a_report_has_all_figures_with_intervals_in_total_and_per_shard(shoal_quality, corpus, small_model, tmp_path):
    out = tmp_path / "report.parquet"
    words = (small_model, small_model, "--prompts", corpus, "--b", "quantization=int4", "--max-tokens", 5, "--out", out)
    code, printed, _ = shoal_quality(*words)
    assert code == 0
    rows = pq.read_table(out).to_pylist()
    assert [(row["shard"], row["part"], row["num_rows"]) for row in rows] == [
        (shard, part, count) for shard, count in ((None, 11), ("one", 5), ("two", 6)) for part in ("answer", "prompt")
    ]
    for row in rows:
        for name in METRICS:
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], (name, row)
    total = rows[0]
    assert total["num_tokens"] == sum(row["num_tokens"] for row in rows[2:] if row["part"] == "answer")
    assert total["kl_mean"] > 1e-4, "int4 was meant to differ"
    weighted = sum(row["kl_mean"] * row["num_tokens"] for row in rows[2:] if row["part"] == "answer")
    assert total["kl_mean"] == pytest.approx(weighted / total["num_tokens"])
    about = json.loads(pq.read_metadata(out).metadata[b"shoal"])["quality"]
    assert (about["rows_drawn"], about["rows_compared"], about["settings_b"][-1]) == (12, 11, "quantization=int4")
    for text in ("perplexity of A", "KL(A || B), mean", "exact match", "one", "two", "11 of 12 rows"):
        assert text in printed
    first = out.read_bytes()
    assert shoal_quality(*words)[0] == 0
    assert out.read_bytes() == first, "the same command gives the same report"


def test_prompts_may_be_those_of_a_job(shoal_quality, corpus, write_job, small_model, tmp_path):
    job = write_job(prompt={"template": "Q: {{ prompt }}"}, input={"prompt_column": None})
    out = tmp_path / "report.parquet"
    code, _, err = shoal_quality(small_model, small_model, "--job", job, "--rows", 4, "--out", out)
    assert code == 0, err
    total = pq.read_table(out).to_pylist()[0]
    assert total["kl_mean"] < 1e-6 and total["exact_match"] == 1.0
    assert total["num_tokens"] == total["num_rows"] * 8, "the job's own max_tokens and ignore_eos hold"
    assert not (tmp_path / "out").exists(), "the job's output was touched"


def test_messages_go_through_the_chat_template(shoal_quality, tmp_path):
    messages = [[{"role": "user", "content": f"My phone number {i} is broken."}] for i in range(3)]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "chats.parquet")
    code, printed, err = shoal_quality(
        "demo", "demo", "--prompts", tmp_path / "chats.parquet", "--messages-column", "messages", "--max-tokens", 4
    )
    assert code == 0, err
    assert "3 of 3 rows" in printed and "100.00%" in printed


def test_mistakes_are_told_with_exit_code_2(shoal_quality, corpus, small_model, write_job, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(small_model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    model, prompts = small_model, ("--prompts", corpus)
    mistakes = {
        (model, model): "give either --prompts",
        (model, model, *prompts, "--job", write_job()): "give either --prompts",
        (model, model, *prompts, "--prompt-column", "question"): "column 'question' is not there",
        (model, "nowhere", *prompts): "nowhere has no config.json",
        (model, model, *prompts, "--b", "kv_cache_dtype"): "write KEY=VALUE",
        (model, model, *prompts, "--b", "kv_cache=int8"): "did you mean kv_cache_dtype?",
        (model, model, *prompts, "--b", "kv_cache_dtype=fp4"): "kv_cache_dtype",
        (model, other, *prompts): "have different tokenizers",
    }
    for words, said in mistakes.items():
        code, _, message = shoal_quality(*words)
        assert (code, said in message) == (EXIT_USAGE, True), message


def test_many_shards_are_printed_in_part_and_written_in_full(capsys):
    from rich.console import Console

    one = Estimate(0.5, 0.25, 0.75)
    quality = Quality(3, 9, *[one] * 6)
    report = [ReportRow(None, "answer", quality), *(ReportRow(f"shard-{i}", "answer", quality) for i in range(50))]
    about = {"model_a": "a", "model_b": "b", "settings_a": [], "settings_b": [], "rows_compared": 3, "rows_drawn": 3}
    print_report(Console(width=120), report, about)
    printed = capsys.readouterr().out
    assert printed.count("shard-") == 20
    assert "and 30 more shards, in the report" in printed
    assert report_table(report).num_rows == 51


@pytest.fixture(scope="module")
def demo_prompts():
    tokenizer = load_tokenizer(Path(named_models()["demo"]))
    tickets = make_tickets(100, HELD_OUT_SEED)
    prefix = encode_prefix(tokenizer)
    return tickets, [prefix + prompt for prompt, _ in encode_tickets(tokenizer, tickets)]


def test_int8_keys_and_values_cost_the_shipped_model_at_most_a_point(demo_prompts):
    tickets, prompts = demo_prompts
    settings = {"model": named_models()["demo"], "device": "cpu", "dtype": "bfloat16", "kv_cache_bytes": 1 << 28}
    plain = Engine(EngineConfig(**settings, kv_cache_dtype="bf16"))
    int8 = Engine(EngineConfig(**settings, kv_cache_dtype="int8"))
    rows = compare_models(plain, int8, prompts, SamplingParams(max_tokens=64))

    def num_right(answers: list[list[int]]) -> int:
        texts = [plain.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        return sum(text == ticket.gold for text, ticket in zip(texts, tickets))

    assert len(rows) == 100
    assert abs(num_right([row.answer_a for row in rows]) - num_right([row.answer_b for row in rows])) <= 1
    answers, whole = summarise(rows, "answer"), summarise(rows, "prompt")
    assert answers.exact_match.value >= 0.99
    assert 0 < answers.kl_mean.value < 1e-5
    assert 0 < whole.kl_mean.value < 1e-3
