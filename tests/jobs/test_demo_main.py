"""`shoal demo` around the run: the job file that it writes is valid, and its score counts what it says."""

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from jobs.demo.main import JOB_FILE, Score, report, score_answers
from pipeline.job import load_job

GOLD = '{"product": "phone", "order": "A-48213"}'


def write_results(directory):
    rows = [
        {"gold": GOLD, "response": GOLD, "error": None},
        {"gold": GOLD, "response": '{"order": "A-48213","product": "phone"}', "error": None},
        {"gold": GOLD, "response": GOLD.replace("3", "4"), "error": None},
        {"gold": GOLD, "response": '{"product": "pho', "error": None},
        {"gold": None, "response": None, "error": {"kind": "null_prompt", "message": "ticket is null"}},
    ]
    directory.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), directory / "tickets-000.parquet")


def test_the_shipped_job_file_is_a_valid_job_for_the_shipped_model():
    job = load_job(str(JOB_FILE))
    assert job.model == "demo"
    assert (job.engine.quantization, job.engine.group_size) == ("int4", 32)
    assert job.uses_chat_template


def test_the_score_tells_equal_json_from_equal_text_and_leaves_rows_without_gold_out(tmp_path):
    write_results(tmp_path / "results")
    score = score_answers(sorted((tmp_path / "results").glob("*.parquet")))
    assert score == Score(num_gold=4, num_same_json=2, num_same_text=1, num_errors=1)


def test_the_report_names_accuracy_and_places(tmp_path):
    write_results(tmp_path / "results")
    console = Console(width=400, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    report(console, tmp_path)
    text = console.export_text()
    assert "accuracy 50.0%" in text
    assert str(tmp_path / "results") in text
