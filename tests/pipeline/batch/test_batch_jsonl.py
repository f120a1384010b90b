"""OpenAI Batch files as input of a job: every line a row, read as the endpoint reads it, whatever is in it."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
import uuid

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.weights.checkpoint import load_tokenizer
from jobs.run import named_models
from pipeline.batch import batch_jsonl
from pipeline.batch.batch_jsonl import LINE, PROBLEM, SCHEMA, JsonlFile, read_lines
from pipeline.job import Job, JobError, job_from_dict, load_job
from pipeline.openai_api import batch_lines
from pipeline.openai_api.batch_lines import api_error_of, check_line, load_line, read_body, read_requests
from pipeline.openai_api.reading import RequestReader
from pipeline.prefix_plan import plan_shard
from pipeline.prompts import Renderer
from pipeline.shards import ShardError, list_shards, open_shard
from pipeline.storage import Storage

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "My printer is late. Order 71-40822."}]


def chat(custom_id="a", **fields):
    body = {"model": "demo", "messages": MESSAGES, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def text(custom_id="t", **fields):
    body = {"model": "demo", "prompt": "Order 7", **fields}
    return {"custom_id": custom_id, "method": "POST", "url": TEXT, "body": body}


def to_bytes(*lines):
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)


def numbered(data, **more):
    return [(line.number, line.data) for line in read_lines(io.BytesIO(data), **more)]


def rows_of(data, **more):
    file = JsonlFile(io.BytesIO(data), 0, is_gzip=False)
    columns = more.pop("columns", [*SCHEMA.names, PROBLEM])
    return [
        row for batch in file.iter_batches(more.get("batch_size", 100), columns=columns) for row in batch.to_pylist()
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(named_models()["demo"])


@pytest.fixture
def make_job(tmp_path):
    def make(*lines, name="in.jsonl", **sections) -> Job:
        data = to_bytes(*lines)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        own = {"model": "demo", "output": {"path": str(tmp_path / "out")}, **sections}
        own["input"] = {"path": str(tmp_path / name), **sections.get("input", {})}
        return job_from_dict(own).resolve(named_models())

    return make


def render(job, tokenizer, data):
    renderer = Renderer(job, tokenizer)
    file = JsonlFile(io.BytesIO(data), 0, is_gzip=False)
    return [row for batch in file.iter_batches(100, columns=renderer.columns) for row in renderer.render(batch)]


def test_lines_are_numbered_as_an_editor_does_and_blank_ones_are_none():
    data = b"\xef\xbb\xbfone\r\n\n  \t\ntwo\nthree"
    assert numbered(data) == [(1, b"one"), (4, b"two"), (5, b"three")]
    assert numbered(gzip.compress(data), is_gzip=True) == numbered(data)
    assert numbered(b"") == [] == numbered(b"\n\n")


def test_a_line_that_is_too_long_is_one_row_and_not_held(monkeypatch):
    monkeypatch.setattr(batch_jsonl, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 100)
    data = b"a" * 100 + b"\n" + b"b" * 5000 + b"\nc\n" + b"d" * 101
    lines = numbered(data)
    assert [(number, len(line)) for number, line in lines] == [(1, 100), (2, 101), (3, 1), (4, 101)]
    codes = [json.loads(row[PROBLEM])["code"] for row in rows_of(data)]
    assert codes == ["invalid_json_line", "line_too_long", "invalid_json_line", "line_too_long"]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"junk" + data])
def test_a_damaged_gzip_file_is_an_error_of_the_file(damage):
    with pytest.raises(OSError):
        numbered(damage(gzip.compress(b'{"a": 1}\n' * 5000)), is_gzip=True)


JUNK = [
    (b"{broken\n", "invalid_json_line"),
    (b"\xff\xfe{\n", "invalid_json_line"),
    (b"[1]\n", "invalid_json_line"),
    (b"NaN\n", "invalid_json_line"),
    (b"[" * 100_000 + b"\n", "invalid_json_line"),
    (b'{"custom_id": ' + b"9" * 5000 + b"}\n", "invalid_json_line"),
    ({"custom_id": "a"}, "missing_required_parameter"),
    ({**chat(), "more": 1}, "unknown_parameter"),
    ({**chat(), "method": "PUT"}, "invalid_method"),
    ({**chat(), "url": "/v1/embeddings"}, "invalid_url"),
    ({**chat(), "url": ["x"]}, "invalid_url"),
    ({**chat(), "body": []}, "invalid_value"),
    ({**chat(), "custom_id": ""}, "invalid_value"),
    ({**chat(), "custom_id": None}, "invalid_value"),
    ({**chat(), "custom_id": "\ud800"}, "invalid_value"),
    (chat(model="gpt-4o"), "model_not_found"),
    (chat(stream=True), "invalid_value"),
    (chat(temperature=-1), "invalid_value"),
    (chat(temperature="hot"), "invalid_value"),
    (chat(messages=[]), "invalid_value"),
    (chat(messages=[{"role": "user", "content": "\ud800"}]), "invalid_text"),
    (chat(tools=[{}]), "unsupported_parameter"),
    (chat(colour="red"), "unknown_parameter"),
    (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}),
        "invalid_value",
    ),
    (text(prompt="Order " * 4000), "context_length_exceeded"),
    (text(prompt=[]), "empty_prompt"),
    (text(max_tokens=10**6), "context_length_exceeded"),
]


def test_a_line_that_cannot_be_answered_is_an_error_row_in_its_place(make_job, tokenizer):
    junk = [
        {**line, "custom_id": f"junk {number}"} if isinstance(line, dict) and line["custom_id"] in ("a", "t") else line
        for number, (line, _) in enumerate(JUNK)
    ]
    lines = [chat("first"), *junk, chat("first"), chat("last")]
    data = to_bytes(*lines)
    rows = render(make_job(chat()), tokenizer, data)
    assert len(rows) == len(lines)
    assert [row.error and row.error.kind for row in rows] == [
        None, *(kind for _, kind in JUNK), "duplicate_custom_id", None
    ]  # fmt: skip
    assert "line 1 " in rows[-2].error.message and rows[-1].id == "last"
    for row in rows[1:-1]:
        error = api_error_of(row.error)
        assert error.status in (400, 404) and len(row.error.message) <= 500
        row.error.message.encode()
    assert api_error_of(rows[18].error).param == "temperature"


BACKWARDS = {
    "type": "object",
    "properties": {"z": {"type": "null"}, "a": {"type": "null"}},
    "required": ["z", "a"],
}
GOOD = [
    chat(),
    chat(max_tokens=5, temperature=0, stop=["x", "y"], n=3, seed=7, logprobs=True, top_logprobs=2),
    chat(max_completion_tokens=9, top_p=0.5, presence_penalty=0.5, frequency_penalty=-0.5, top_k=4, min_p=0.1),
    chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": BACKWARDS}}),
    chat(structured_outputs={"choice": ["yes", "no"]}, user="somebody", metadata={"a": "b"}),
    text(),
    text(prompt=[5, 6, 7], logprobs=0, seed=0),
    text(prompt=["Order 7", "Order 8"], n=2, min_tokens=3, ignore_eos=True),
    text(prompt=[[5, 6], [7]], seed=3, temperature=0.5, stop_token_ids=[9]),
]  # fmt: skip


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.3, "max_tokens": 50, "seed": 5, "n": 2}], ids=str)
def test_a_line_means_what_the_same_request_means_to_the_endpoint(make_job, tokenizer, sampling):
    lines = [{**line, "custom_id": str(number)} for number, line in enumerate(GOOD)]
    job = make_job(*lines, sampling=sampling)
    (shard,) = list_shards(job).good
    assert shard.num_rows == len(lines) and shard.name == "in"
    plan = plan_shard(job, shard, tokenizer)
    asked = {request.request_id: request for slice_ in plan for request in slice_.requests(job.sampling)}
    assert plan.num_error_rows == 0
    defaults = {key: value for key, value in sampling.items() if key != "seed"}
    reader = RequestReader(
        job.prompt, tokenizer, max_model_len=job.resolved.max_model_len, max_choices=128, defaults=defaults
    )
    num_asked = 0
    for number, line in enumerate(lines):
        body = read_body(check_line(load_line(json.dumps(line).encode())), "demo")
        for place, online in enumerate(read_requests(reader, body)):
            mine = asked[f"{number}.{place}" if place else str(number)]
            assert mine.prompt_token_ids == list(online.prompt_token_ids)
            unseeded = {"seed": 0}
            assert mine.sampling.model_copy(update=unseeded) == online.sampling.model_copy(update=unseeded)
            if body.seed is not None:
                assert mine.seed == body.seed == mine.sampling.seed
            num_asked += 1
    assert num_asked == len(asked)


def test_seeds_are_the_line_s_own_or_come_of_its_custom_id(make_job, tokenizer):
    def seeds(job):
        (shard,) = list_shards(job).good
        return {
            row.row_index: row.seed for slice_ in plan_shard(job, shard, tokenizer) for row in slice_.rows
        }  # fmt: skip

    lines = [chat("a", seed=9), chat("b"), chat("c")]
    first, second = seeds(make_job(*lines)), seeds(make_job(*reversed(lines), name="other.jsonl"))
    assert first[0] == second[2] == 9
    assert first[1] == second[1] and first[2] == second[0], "wherever a line stands"
    assert len(set(first.values())) == 3
    assert seeds(make_job(*lines, sampling={"seed": 1}))[1] != first[1]


def test_a_shard_reads_like_parquet(make_job):
    lines = [chat(str(number)) for number in range(50)]
    job = make_job(*lines, b"broken\n", name="in.jsonl.gz")
    (shard,) = list_shards(job).good
    assert (shard.name, shard.num_rows) == ("in", 51)
    with open_shard(shard) as source:
        assert source.metadata.num_rows == source.metadata.row_group(0).num_rows == 51 and source.num_row_groups == 1
        for _ in range(2):
            batches = list(source.iter_batches(20))
            assert [len(batch) for batch in batches] == [20, 20, 11]
            assert all(batch.schema.names == ["custom_id", "method", "url", "body"] for batch in batches)
        assert [len(batch) for batch in source.iter_batches(40, columns=[])] == [40, 11]
        rows = pa.Table.from_batches(source.iter_batches(100, row_groups=[0], columns=["custom_id", "body", LINE]))
        assert rows["custom_id"].to_pylist() == [*(str(number) for number in range(50)), None]
        assert json.loads(rows["body"][3].as_py()) == lines[3]["body"] and rows[LINE][50].as_py() == b"broken"


def test_files_in_object_storage_are_read_as_local_ones(s3_environment, monkeypatch, make_job, tokenizer):
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    storage = Storage(f"s3://batch-files/{uuid.uuid4().hex}")
    filesystem = storage._filesystem()
    if not filesystem.exists("batch-files"):
        filesystem.mkdir("batch-files")
    data = to_bytes(*(chat(str(number)) for number in range(30)), b"broken\n")
    storage.write_whole("in/a.jsonl", data)
    storage.write_whole("in/b.jsonl.gz", gzip.compress(data))
    job = make_job(input={"path": [f"{storage.uri}/in/a.jsonl", f"{storage.uri}/in/*.jsonl.gz"]})
    shards = list_shards(job).good
    assert sorted((shard.name, shard.num_rows) for shard in shards) == [("a", 31), ("b", 31)]
    plans = [plan_shard(job, shard, tokenizer) for shard in shards]
    assert [(plan.num_rows, plan.num_error_rows) for plan in plans] == [(31, 1)] * 2


def test_a_file_that_has_changed_is_noticed(make_job, tmp_path, tokenizer):
    job = make_job(chat())
    (shard,) = list_shards(job).good
    (tmp_path / "in.jsonl").write_bytes(to_bytes(chat(), chat("b")))
    with pytest.raises(ShardError, match="was changed"):
        plan_shard(job, shard, tokenizer)


def test_a_large_file_is_streamed(tmp_path):
    path = tmp_path / "large.jsonl"
    line = to_bytes(chat("x" * 300, messages=[{"role": "user", "content": "word " * 1000}]))
    with path.open("wb") as file:
        for number in range(6000):
            file.write(line.replace(b"xxxxxxxx", f"{number:08d}".encode(), 1))
    assert path.stat().st_size > 30 << 20
    tracemalloc.start()
    try:
        with path.open("rb") as file:
            assert sum(1 for _ in read_lines(file)) == 6000
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
        tracemalloc.reset_peak()
        with path.open("rb") as file:
            read = JsonlFile(file, 6000, is_gzip=False).iter_batches(8192, columns=["custom_id", PROBLEM])
            batches = [batch.column(PROBLEM).null_count for batch in read]
        assert sum(batches) == 6000 and len(batches) > 1, "cut by bytes"
        assert tracemalloc.get_traced_memory()[1] < 28 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([json.dumps(chat()).encode(), b"", b" ", b"{}", b"\r"])))
)
def test_whatever_bytes_a_file_has_each_line_with_something_in_it_is_a_row(pieces):
    data = b"\n".join(pieces)
    expected = sum(1 for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip())
    rows = rows_of(data, batch_size=7)
    assert len(rows) == expected == len(numbered(data))
    assert all(row["custom_id"] == "a" for row in rows if row[PROBLEM] is None)


def test_settings_are_checked_and_results_always_have_lists(make_job, tmp_path):
    job = make_job(chat())
    assert job.is_batch_jsonl and job.input.format == "openai_batch" and job.lines_model_name == "demo"
    assert (job.answer_shape.n, job.answer_shape.logprobs) == (2, 0) and job.sampling.n == 1
    assert make_job(chat(), input={"served_model_name": "gpt-4o"}).lines_model_name == "gpt-4o"
    for sections, reason in [
        ({"input": {"prompt_column": "x"}}, "prompt_column"),
        ({"input": {"path": ["a.jsonl", "b.parquet"]}}, "both .jsonl files and others"),
        ({"prompt": {"template": "{{ x }}"}}, "prompt.template"),
        ({"input": {"path": "a.parquet", "prompt_column": "x", "served_model_name": "y"}}, "served_model_name"),
    ]:
        with pytest.raises(JobError, match=reason):
            make_job(chat(), **sections)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(to_bytes(chat()))
    with pytest.raises(JobError, match="openai_batch"):
        list_shards(make_job(input={"path": str(folder), "prompt_column": "x"}))
    assert list_shards(make_job(input={"path": str(folder), "format": "openai_batch"})).good[0].name == "a"


def test_what_changes_answers_changes_the_fingerprint(make_job):
    fingerprint = make_job(chat()).fingerprint()
    assert make_job(chat(), sampling={"max_tokens": 256}).fingerprint() != fingerprint, "unset is up to the context"
    assert make_job(chat(), input={"served_model_name": "x"}).fingerprint() != fingerprint
    fields = make_job(input={"path": "x.parquet", "prompt_column": "x"}).fingerprint_fields()
    assert fields["input.format"] == "parquet" and "input.served_model_name" not in fields, "as it always was"


def test_a_batch_file_may_stand_for_a_job_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = load_job("night.jsonl.gz", ["model=demo"])
    assert job.input_paths == (str(tmp_path / "night.jsonl.gz"),)
    assert job.output.path == str(tmp_path / "night-answers") and job.is_batch_jsonl
