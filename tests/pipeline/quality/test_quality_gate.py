"""The quality gate: which rows it draws, when it refuses, and that it measures a job once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.quality.quality_gate as gate
from actors.weights.checkpoint import load_tokenizer
from jobs import cli
from pipeline.job import JobError, job_from_dict, load_job
from pipeline.prompts import Renderer
from pipeline.quality.prompt_sample import sample_prompts
from pipeline.quality.quality_gate import QualityError, check_quality, keep_measured
from pipeline.shards import list_shards
from pipeline.storage import Storage

EXIT_USAGE = 2


def load(path: Path):
    job = load_job(str(path)).resolve()
    return job, list_shards(job).good, Storage(job.output.path)


def test_a_sample_is_rows_of_all_shards_rendered_as_a_run_would(tmp_path, write_corpus, write_job):
    folder = write_corpus({"a": [], "c": ["only"], "d": [None, "", "x"]})
    table = pa.table({"id": list(range(100)), "prompt": [f"prompt {i}" for i in range(100)]})
    pq.write_table(table, folder / "b.parquet", row_group_size=7)
    job, shards, _ = load(write_job())
    renderer = Renderer(job, load_tokenizer(job.model))
    everything = sample_prompts(renderer, shards, 1000, seed=0)
    assert everything.num_unusable == 2
    assert [(p.shard, p.row) for p in everything.prompts] == [*(("b", i) for i in range(100)), ("c", 0), ("d", 2)]
    tokenizer = load_tokenizer(job.model)
    assert all(
        list(p.token_ids) == tokenizer(f"prompt {p.row}")["input_ids"] for p in everything.prompts if p.shard == "b"
    )
    some = sample_prompts(renderer, shards, 20, seed=3)
    assert len(some.prompts) + some.num_unusable == 20
    assert some == sample_prompts(renderer, list(reversed(shards)), 20, seed=3)
    assert some != sample_prompts(renderer, shards, 20, seed=4)


@pytest.fixture
def int4_job(write_corpus, write_job, small_model):
    def write(**limits):
        write_corpus({"a": [f"Say {i} and more" for i in range(30)], "b": ["One more"]})
        engine = {"device": "cpu", "dtype": "float32", "num_threads": 1, "num_pages": 256, "quantization": "int4"}
        quality = {"reference": str(small_model), "sample": 8, **limits}
        return write_job(engine=engine, quality=quality)

    return write


def test_a_model_within_its_limits_passes_and_is_measured_once(int4_job, monkeypatch):
    job, shards, output = load(int4_job(max_kl=100.0, min_top1=0.0))
    said = []
    measured = check_quality(job, shards, output, said.append)
    assert measured.quality.num_rows == 8 and measured.quality.kl_mean.value > 1e-4
    assert not output.exists("quality.json")
    keep_measured(output, measured)
    written = json.loads(output.read_bytes("quality.json"))
    assert written["quality"]["kl_mean"]["value"] == measured.quality.kl_mean.value
    assert written["rows_drawn"] == 8

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(gate, "compare_configs", refuse)
    again = check_quality(job, shards, output, said.append)
    assert again == measured
    stricter = load(int4_job(max_kl=measured.quality.kl_mean.value / 2))
    with pytest.raises(QualityError, match=r"above quality\.max_kl"):
        check_quality(*stricter, said.append)
    with pytest.raises(AssertionError, match="measured again"):
        check_quality(*load(int4_job(max_kl=100.0, seed=1)), said.append)


def test_a_job_is_refused_with_figures_limits_and_ways_out_before_ray_starts(int4_job, tmp_path, monkeypatch, capsys):
    def refuse():
        raise AssertionError("Ray is started, and the model should have been refused before")

    monkeypatch.setattr("jobs.run.start_ray", refuse)
    path = int4_job(max_kl=1e-7, min_top1=1.0, min_exact_match=1.0)
    monkeypatch.setattr(sys, "argv", ["shoal", "run", str(path)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    message = capsys.readouterr().err
    assert left.value.code == EXIT_USAGE
    for words in ("above quality.max_kl=1e-07", "8 rows of its own prompts", "nothing was run", "shoal quantize"):
        assert words in message, message
    assert not list((tmp_path / "out").rglob("*")), "an output that was refused is free for another model"


def test_a_job_without_a_quality_section_measures_nothing(write_corpus, write_job, monkeypatch):
    write_corpus({"a": ["one"]})
    monkeypatch.setattr(gate, "compare_configs", None)
    assert check_quality(*load(write_job()), print) is None


def test_quality_is_not_in_the_fingerprint(int4_job, write_job):
    with_gate, _, _ = load(int4_job(max_kl=1.0))
    without = with_gate.model_copy(update={"quality": None})
    assert with_gate.fingerprint() == without.fingerprint()


def test_the_reference_is_run_as_it_is_stored(int4_job, small_model):
    job, _, _ = load(int4_job(max_kl=1.0))
    job = job.model_copy(update={"engine": job.engine.model_copy(update={"kv_cache_dtype": "int8"})})
    config = gate.reference_config(job, "elsewhere")
    assert (config.model, config.quantization, config.kv_cache_dtype) == ("elsewhere", "auto", "auto")
    assert (config.tokenizer, config.num_pages, config.dtype) == (str(small_model), 256, "float32")


@pytest.mark.parametrize(
    ("quality", "said"),
    [
        ({"max_kl": 0.05}, "quality.reference: missing"),
        ({"reference": "x"}, "no limit is set"),
        ({"reference": "x", "max_kl": -1}, "quality.max_kl"),
        ({"reference": "x", "min_top1": 1.5}, "quality.min_top1"),
        ({"reference": "x", "max_lk": 1}, "did you mean max_kl"),
    ],
)
def test_a_mistake_in_the_section_is_named(quality, said):
    job = {"input": {"path": "in", "prompt_column": "p"}, "model": "m", "output": {"path": "out"}, "quality": quality}
    with pytest.raises(JobError, match=said):
        job_from_dict(job)


def test_a_reference_that_is_not_there_is_named(int4_job):
    path = int4_job(max_kl=1.0, reference="nowhere")
    with pytest.raises(ValueError, match="nowhere"):
        check_quality(*load(path), print)
