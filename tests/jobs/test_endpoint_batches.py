"""Files and batches as OpenAI's own client sees them: a real server and a real engine, no Ray."""

from __future__ import annotations

import concurrent.futures
import socket
import threading
import time

import httpx2
import openai
import pytest
from batch_files import CHAT, TEXT, assert_same, chat, jsonl, read, start, text, upload, wait
from live_endpoint import live_endpoint, settings

from jobs.endpoint.config import EndpointConfig, load_endpoint
from pipeline.settings_file import JobError

ENGINE = {"max_model_len": 256}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    batches = {"storage": str(tmp_path_factory.mktemp("batches")), "max_file_bytes": 2 << 20, "max_requests": 300}
    with live_endpoint(settings(engine=ENGINE, batches=batches)) as live:
        yield live


@pytest.fixture(scope="module")
def client(live):
    return live.client()


SAMPLINGS = [
    {},
    {"temperature": 0.9, "seed": 11, "n": 2, "logprobs": True, "top_logprobs": 2},
    {"temperature": 0.8, "top_p": 0.9, "seed": 3, "stop": ["er", '"'], "max_tokens": 20},
    {"response_format": {"type": "json_object"}, "max_tokens": 24},
    {"temperature": 1.0, "seed": 9, "top_k": 20, "min_p": 0.01, "max_completion_tokens": 6, "max_tokens": None},
]


def test_a_batch_answers_as_single_requests_do(live, client):
    lines = [chat(f"row-{i}", f"My watch is late. Order 7-{i}.", **own) for i, own in enumerate(SAMPLINGS)]
    batch = start(client, lines, metadata={"night": "7"})
    assert (batch.object, batch.endpoint, batch.completion_window) == ("batch", CHAT, "24h")
    done = wait(client, batch)
    assert done.status == "completed" and done.error_file_id is None and done.metadata == {"night": "7"}
    assert done.completed_at >= done.finalizing_at >= done.in_progress_at >= done.created_at
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (5, 5, 0)
    answers = {line["custom_id"]: line for line in read(client, done.output_file_id)}
    assert list(answers) == [line["custom_id"] for line in lines]
    usage = 0
    for line in lines:
        answer = answers[line["custom_id"]]
        assert answer["error"] is None and answer["response"]["status_code"] == 200
        assert answer["id"].startswith("batch_req_") and answer["response"]["request_id"]
        body = answer["response"]["body"]
        single = httpx2.post(f"{live.url}{CHAT}", json=line["body"], timeout=60).json()
        assert_same(body, single)
        assert body["object"] == "chat.completion"
        usage += body["usage"]["total_tokens"]
    assert done.usage.total_tokens == usage > 0
    assert done.usage.input_tokens + done.usage.output_tokens == usage
    assert live.is_empty() and live.endpoint.desk.num_background == 0


def test_a_batch_of_texts_may_have_several_prompts_a_line(live, client):
    lines = [text("a", ["Order 7", "Order 71-4"], n=2, temperature=0.9, seed=5, logprobs=1), text("b")]
    done = wait(client, start(client, lines, TEXT))
    answers = read(client, done.output_file_id)
    for line, answer in zip(lines, answers, strict=True):
        single = httpx2.post(f"{live.url}{TEXT}", json=line["body"], timeout=60).json()
        assert_same(answer["response"]["body"], single)
    assert len(answers[0]["response"]["body"]["choices"]) == 4


def test_a_request_that_is_wrong_is_in_the_error_file_and_the_others_are_answered(client):
    lines = [
        chat("good"),
        chat("hot", temperature=-1),
        chat("tools", tools=[{}]),
        chat("stream", stream=True),
        chat("long", "word " * 400),
        chat("role", messages=[{"role": "king", "content": "x"}]),
    ]
    done = wait(client, start(client, lines))
    counts = done.request_counts
    assert (done.status, counts.total, counts.completed, counts.failed) == ("completed", 6, 1, 5)
    assert [line["custom_id"] for line in read(client, done.output_file_id)] == ["good"]
    errors = {line["custom_id"]: line["response"] for line in read(client, done.error_file_id)}
    assert {response["status_code"] for response in errors.values()} == {400}
    params = {custom_id: response["body"]["error"]["param"] for custom_id, response in errors.items()}
    assert params == {
        "hot": "temperature", "tools": "tools", "stream": "stream", "long": "messages", "role": "messages[0].role"
    }  # fmt: skip


JUNK = {
    "invalid_json_line": [chat("a"), b"{broken\n"],
    "invalid_json_line 2": [b"\xff\xfe\x00\x01" * 50],
    "invalid_json_line 3": [b"[1]\n"],
    "duplicate_custom_id": [chat("a"), chat("a")],
    "mismatched_url": [chat("a"), text("b")],
    "invalid_url": [{**chat("a"), "url": "/v1/embeddings"}],
    "invalid_method": [{**chat("a"), "method": "GET"}],
    "model_not_found": [chat("a", model="gpt-4o")],
    "missing_required_parameter": [{"method": "POST", "url": CHAT, "body": {}}],
    "invalid_value": [{**chat("a"), "custom_id": 7}],
    "unknown_parameter": [{**chat("a"), "priority": 1}],
    "too_many_requests": [chat(str(i)) for i in range(301)],
    "empty_file": [b"\n\n \n"],
}


@pytest.mark.parametrize("case", JUNK)
def test_a_file_that_is_no_batch_fails_with_the_line_s_number(client, case):
    done = wait(client, start(client, JUNK[case]))
    assert done.status == "failed" and done.failed_at and done.output_file_id is None
    (error, *_) = done.errors.data
    assert error.code == case.split()[0] and error.message
    lines = {"invalid_json_line": 2, "duplicate_custom_id": 2, "mismatched_url": 2, "too_many_requests": 301}
    assert error.line == (None if case == "empty_file" else lines.get(case, 1))


def test_a_line_beyond_the_limit_fails_the_batch_and_costs_no_memory(client, monkeypatch):
    from pipeline.batch import batch_jsonl
    from pipeline.openai_api import batch_lines

    monkeypatch.setattr(batch_jsonl, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 1000)
    done = wait(client, start(client, [chat("a"), chat("b", "x" * (1 << 20)), chat("c")]))
    assert [(error.code, error.line) for error in done.errors.data] == [("line_too_long", 2)]


def test_a_cancelled_batch_stops_and_gives_what_it_has(live, client):
    lines = [chat("first"), *(chat(str(i), max_tokens=200, ignore_eos=True, n=8) for i in range(120))]
    batch = start(client, lines)
    wait(client, batch, until=("in_progress",))
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status in ("cancelling", "cancelled") and cancelling.cancelling_at
    done = wait(client, batch)
    assert done.status == "cancelled" and done.cancelled_at >= done.cancelling_at
    answered, failed = read(client, done.output_file_id), read(client, done.error_file_id)
    assert len(answered) + len(failed) == len(lines) and failed
    assert {line["custom_id"] for line in answered + failed} == {line["custom_id"] for line in lines}
    assert {line["error"]["code"] for line in failed} == {"batch_cancelled"}
    assert done.request_counts.completed == len(answered) and live.is_empty()
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_clients_are_answered_while_a_batch_runs(live, client):
    lines = [chat(str(i), max_tokens=150, ignore_eos=True) for i in range(200)]
    batch = start(client, lines)
    wait(client, batch, until=("in_progress",))
    answer = client.chat.completions.create(**chat("x")["body"])
    assert answer.choices[0].message.content
    assert live.endpoint.desk.num_background <= live.endpoint.desk.max_background == 32
    assert client.batches.retrieve(batch.id).status == "in_progress", "the client did not wait for the batch"
    client.batches.cancel(batch.id)
    wait(client, batch)


def test_a_batch_in_all_places_gives_one_up_for_a_client_and_answers_the_same(tmp_path, live):
    lines = [chat(str(i), f"My watch is late. Order 7-{i}.", max_tokens=40, ignore_eos=True) for i in range(4)]
    places = {"engine": {"max_num_seqs": 4}, "limits": {"max_choices": 4}}
    config = settings(**places, batches={"storage": str(tmp_path), "max_num_seqs": 4})
    with live_endpoint(config) as narrow, concurrent.futures.ThreadPoolExecutor(1) as pool:
        worker = narrow.endpoint.desk.worker
        step, is_full, may_go_on = worker.engine.step, threading.Event(), threading.Event()

        def step_by_step():
            load = worker.load()
            if not is_full.is_set() and load.num_running + load.num_waiting < 4:
                time.sleep(0.005)
                return []
            if load.num_running == 4:
                is_full.set()
                assert may_go_on.wait(120)
            return step()

        worker.engine.step = step_by_step
        client = narrow.client()
        batch = start(client, lines)
        assert is_full.wait(120)
        own = chat("x", max_tokens=3, ignore_eos=True)["body"]
        asking = pool.submit(httpx2.post, f"{narrow.url}{CHAT}", json=own, timeout=120)
        while not (worker._arrivals or asking.done()):
            time.sleep(0.01)
        may_go_on.set()
        assert asking.result().json()["usage"]["completion_tokens"] == 3
        done = wait(client, batch)
        assert done.request_counts.completed == 4
        assert worker.stats().num_preemptions == 1, "the client had a place at once"
        answers = {line["custom_id"]: line["response"]["body"] for line in read(client, done.output_file_id)}
        for line in lines:
            single = httpx2.post(f"{live.url}{CHAT}", json=line["body"], timeout=60).json()
            assert_same(answers[line["custom_id"]], single)


def test_files_are_uploaded_listed_read_and_deleted(client):
    data = jsonl([chat("a")])
    files = [upload(client, data, name=f"{i}.jsonl") for i in range(3)]
    assert len({file.id for file in files}) == 3
    assert (files[0].bytes, files[0].filename, files[0].purpose) == (len(data), "0.jsonl", "batch")
    assert client.files.content(files[0].id).content == data
    newest = client.files.list(limit=2)
    assert newest.has_more and len(newest.data) == 2
    assert {file.id for file in files} <= {file.id for file in client.files.list(limit=1)}, "by pages of one"
    assert all(file.purpose == "batch_output" for file in client.files.list(purpose="batch_output"))
    oldest_first = [file.id for file in client.files.list(order="asc")]
    assert oldest_first == [file.id for file in client.files.list()][::-1]
    assert client.files.delete(files[0].id).deleted
    for ask in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(files[0].id)


def test_batches_are_listed_by_pages(client):
    for _ in range(3):
        wait(client, start(client, [chat("a")]))
    ids = [batch.id for batch in client.batches.list(limit=2)]
    assert len(ids) == len(set(ids)) >= 3 and ids == sorted(ids, reverse=True)


@pytest.mark.parametrize("name", ["../../etc/passwd", "..\\..\\x.jsonl", "/etc/shadow", "a\n\0b.jsonl", "ü" * 300])
def test_a_file_s_name_is_for_showing_only(client, live, name):
    file = upload(client, b"{}\n", name=name)
    assert "/" not in file.filename and "\\" not in file.filename and file.filename.isprintable()
    assert len(file.filename) <= 255


@pytest.mark.parametrize(
    "file_id", ["..%2f..%2fetc%2fpasswd", "file-../x", "file-", "file-" + "0" * 32, "file-" + "g" * 32, "%00", "_lease"]
)
def test_an_id_that_is_none_is_not_found(live, file_id):
    for path in (f"/v1/files/{file_id}", f"/v1/files/{file_id}/content", f"/v1/batches/{file_id}"):
        answer = httpx2.get(f"{live.url}{path}")
        assert answer.status_code == 404 and answer.json()["error"]["message"]
    assert httpx2.delete(f"{live.url}/v1/files/{file_id}").status_code == 404


def test_uploads_that_are_refused(live, client):
    def refused(data=b"{}\n", purpose="batch", **more):
        with pytest.raises(openai.APIStatusError) as raised:
            client.files.create(file=("x.jsonl", data), purpose=purpose, **more)
        return raised.value.status_code, raised.value.param

    assert refused(purpose="fine-tune") == (400, "purpose")
    assert refused(data=b"") == (400, "file")
    assert refused(expires_after={"anchor": "created_at", "seconds": 5}) == (400, "expires_after")
    assert refused(data=b"x" * ((2 << 20) + 1)) == (413, "file")
    assert refused(data=b"x" * (3 << 20))[0] == 413, "refused before it is read"
    for body, kind in ((b"junk", "multipart/form-data; boundary=x"), (b"{}", "application/json")):
        answer = httpx2.post(f"{live.url}/v1/files", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_batches_that_are_refused(client):
    file = upload(client, jsonl([chat("a")]))

    def refused(**fields):
        own = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **fields}
        with pytest.raises(openai.APIStatusError) as raised:
            client.batches.create(**own)
        return raised.value.status_code, raised.value.param

    assert refused(input_file_id="file-" + "0" * 32) == (404, "input_file_id")
    assert refused(input_file_id="../x") == (404, "input_file_id")
    assert refused(endpoint="/v1/embeddings") == (400, "endpoint")
    assert refused(completion_window="1h") == (400, "completion_window")
    assert refused(metadata={str(i): "x" for i in range(17)}) == (400, "metadata")
    assert refused(metadata={"x": 5})[0] == 400
    assert refused(extra_body={"hurry": True}) == (400, "hurry")
    done = wait(client, start(client, [chat("a")]))
    assert refused(input_file_id=done.output_file_id) == (400, "input_file_id")


def test_a_client_that_leaves_during_an_upload_leaves_nothing(live, client, tmp_path):
    before = {file.id for file in client.files.list()}
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        headers = "Host: x\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 99999\r\n"
        head = f"POST /v1/files HTTP/1.1\r\n{headers}\r\n"
        part = '--b\r\nContent-Disposition: form-data; name="file"; filename="x.jsonl"\r\n\r\n{"custom_id"'
        connection.sendall((head + part).encode())
    assert client.models.list(), "the server goes on"
    assert {file.id for file in client.files.list()} == before


def test_keys_are_asked_for_as_everywhere(tmp_path):
    import hashlib

    digest = hashlib.sha256(b"a-long-secret-key").hexdigest()
    config = settings(engine=ENGINE, batches={"storage": str(tmp_path / "kept")})
    with live_endpoint(config, (digest,)) as live:
        for path in ("/v1/files", "/v1/batches", "/v1/files/file-x/content"):
            assert httpx2.get(f"{live.url}{path}").status_code == 401
        assert httpx2.post(f"{live.url}/v1/files", content=b"x").status_code == 401
        assert upload(live.client("a-long-secret-key"), b"{}\n").id
    assert not any(b"a-long-secret-key" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_without_a_storage_the_setting_is_named():
    with live_endpoint(settings(engine=ENGINE)) as live:
        for ask in (live.client().files.list, live.client().batches.list, lambda: upload(live.client(), b"{}\n")):
            with pytest.raises(openai.NotFoundError, match=r"batches\.storage"):
                ask()


def test_settings_that_would_lose_batches_are_refused(tmp_path):
    with pytest.raises(JobError, match=r"replicas\.min"):
        load_endpoint(None, {"model": "demo", "batches": {"storage": "kept"}, "replicas": {"min": 0}})
    (tmp_path / "serve.yaml").write_text("model: demo\nbatches: {storage: kept}\n")
    config: EndpointConfig = load_endpoint(str(tmp_path / "serve.yaml"), {})
    assert config.batches.storage == str(tmp_path / "kept"), "relative to its file"
