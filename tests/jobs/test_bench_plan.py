"""What `shoal bench plan` runs: valid jobs over corpora that are what they are said to be."""

from __future__ import annotations

from collections import defaultdict

import pyarrow.parquet as pq
import pytest

from jobs.bench.plan import bench_plan, hits
from jobs.bench.plan.cases import SHARED, Case, documents, price_cases, write_case
from pipeline.job import load_job


@pytest.mark.parametrize("case", [*price_cases(), *hits.cases()], ids=lambda case: case.name)
def test_every_case_is_a_valid_job(case, tmp_path):
    job = load_job(str(write_case(Case(case.name, lambda folder: None, case.settings), tmp_path / "case")))
    assert job.model == "demo"


def test_there_are_twenty_jobs_where_the_real_corpora_are():
    real = ("gsm8k_test_chat", "gsm8k_test_cot8", "humaneval", "ifeval", "mgsm_11lang", "mt_bench")
    assert len(price_cases()) == 14 + sum((SHARED / name).is_dir() for name in real)
    assert len({case.name for case in price_cases()}) == len(price_cases())


def test_questions_of_a_document_are_scattered_over_shards(tmp_path):
    documents(5, 8, (30, 40))(tmp_path)
    shards_of = defaultdict(set)
    num_rows = 0
    for file in sorted(tmp_path.glob("*.parquet")):
        for prompt in pq.read_table(file)["prompt"].to_pylist():
            document, _, question = prompt.partition("\n\n")
            assert 30 <= len(document.split()) < 40 and question.endswith("?")
            shards_of[document].add(file.name)
            num_rows += 1
    assert num_rows == 40 and len(shards_of) == 5
    assert all(len(shards) > 2 for shards in shards_of.values())


def test_a_part_that_is_none_is_refused():
    with pytest.raises(ValueError, match="choose one of price, hits, scope, planning"):
        bench_plan(only="prices")
