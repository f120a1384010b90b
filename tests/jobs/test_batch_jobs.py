"""A Batch file through all doors: `shoal run`, /v1/batches and single requests say the same."""

from __future__ import annotations

import json

import httpx2
import pyarrow.parquet as pq
import pytest
from batch_files import assert_same, chat, jsonl, read, start, text, wait
from live_endpoint import ENGINE, live_endpoint, settings

from jobs.run import EXIT_DONE, run
from jobs.status import status

pytestmark = pytest.mark.usefixtures("ray_cluster")

ENGINE_OF_BOTH = {**ENGINE, "max_model_len": 256}
LINES = [
    chat("greedy"),
    chat("again"),
    chat("seeded", "My watch is late.", temperature=0.9, seed=11, n=2, logprobs=True, top_logprobs=2),
    chat("form", response_format={"type": "json_object"}, max_tokens=24),
    chat("stopped", "Hello", temperature=0.7, seed=4, stop=["er", "a"], max_tokens=30),
    chat("wrong", temperature=-1),
    chat("long", "word " * 400),
]
TEXTS = [text("several", ["Order 7", "Order 71-4"], n=2, temperature=0.9, seed=5, logprobs=1), text("one")]
BROKEN = [b"{broken\n", chat("greedy"), chat("later", stream=True)]


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def answer_by_job(folder, data, monkeypatch):
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "night.jsonl").write_bytes(data)
    overrides = [f"engine.{key}={value}" for key, value in ENGINE_OF_BOTH.items()]
    overrides += ["model=demo", "plan.max_rows_per_slice=3"]
    assert run("night.jsonl", overrides) == EXIT_DONE
    return folder / "night-answers"


def test_a_job_and_a_batch_answer_the_same_lines_alike(tmp_path, monkeypatch):
    output = answer_by_job(tmp_path / "job", jsonl([*LINES, *TEXTS, *BROKEN]), monkeypatch)
    answered = {line["custom_id"]: line for line in lines_of(output / "batch_output" / "night.jsonl")}
    failed = lines_of(output / "batch_output" / "night_errors.jsonl")
    assert len(answered) + len(failed) == len(LINES) + len(TEXTS) + len(BROKEN)

    results = pq.read_table(output / "results" / "night.parquet").to_pylist()
    assert [row["custom_id"] for row in results] == [
        *(line["custom_id"] for line in LINES + TEXTS), None, "greedy", "later"
    ]  # fmt: skip
    for row in results:
        if row["error"] is None:
            choices = answered[row["custom_id"]]["response"]["body"]["choices"]
            texts = [choice.get("message", {}).get("content", choice.get("text")) for choice in choices]
            assert row["response"] == texts and len(row["finish_reason"]) == len(texts)
            assert (
                row["completion_tokens"] == answered[row["custom_id"]]["response"]["body"]["usage"]["completion_tokens"]
            )
    errors = [(line["custom_id"], line["response"]["body"]["error"]["code"]) for line in failed]
    assert errors == [
        ("wrong", "invalid_value"),
        ("long", "context_length_exceeded"),
        (None, "invalid_json_line"),
        ("greedy", "duplicate_custom_id"),
        ("later", "invalid_value"),
    ]
    again = (output / "errors" / "night.jsonl").read_bytes()
    assert again == jsonl([LINES[5], LINES[6], *BROKEN]), "the lines as they were, for another run"
    assert status(str(output)) == 0

    batches = {"storage": str(tmp_path / "kept")}
    with live_endpoint(settings(engine=ENGINE_OF_BOTH, batches=batches)) as live:
        client = live.client()
        for lines, url in ((LINES, "/v1/chat/completions"), (TEXTS, "/v1/completions")):
            done = wait(client, start(client, lines, url))
            assert done.status == "completed"
            for line in read(client, done.output_file_id):
                other = answered[line["custom_id"]]["response"]["body"]
                assert_same(line["response"]["body"], other)
                assert line["response"]["body"].keys() == other.keys()
                assert line["response"]["body"]["system_fingerprint"] == other["system_fingerprint"]
            mine = {line["custom_id"]: line["response"] for line in failed}
            for line in read(client, done.error_file_id):
                error = line["response"]["body"]["error"]
                assert error["code"] == mine[line["custom_id"]]["body"]["error"]["code"]
                assert error["message"] == mine[line["custom_id"]]["body"]["error"]["message"]
        for line in LINES[:5]:
            single = httpx2.post(f"{live.url}{line['url']}", json=line["body"], timeout=60).json()
            assert_same(single, answered[line["custom_id"]]["response"]["body"])


def test_the_same_command_again_changes_nothing(tmp_path, monkeypatch):
    output = answer_by_job(tmp_path / "job", jsonl([chat("a"), chat("b")]), monkeypatch)
    files = [path for path in output.rglob("*") if path.parent.name in ("batch_output", "results")]
    before = {path: path.read_bytes() for path in files}
    assert len(before) == 2, "no error file where nothing failed"
    overrides = [f"engine.{key}={value}" for key, value in ENGINE_OF_BOTH.items()]
    assert run("night.jsonl", [*overrides, "model=demo", "plan.max_rows_per_slice=3"]) == EXIT_DONE
    assert {path: path.read_bytes() for path in files} == before
