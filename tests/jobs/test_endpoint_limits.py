"""Who may ask the endpoint, how much, and what happens when they leave or the engine breaks: over real connections."""

import collections
import concurrent.futures
import hashlib
import json
import random
import socket
import threading
import time

import httpx2
import openai
import pytest
from live_endpoint import live_endpoint, settings

KEY = "sk-a-key-of-a-test-0001"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
LONG = {"model": "demo", "prompt": "Order 7", "max_tokens": 1000, "ignore_eos": True}


@pytest.fixture(scope="module")
def guarded():
    config = settings(limits={"max_body_bytes": 4096, "body_timeout_s": 0.5, "max_choices": 8})
    with live_endpoint(config, (DIGEST,)) as live:
        yield live


@pytest.fixture(scope="module")
def narrow():
    """Room for one completion that runs and one that waits."""
    config = settings(engine={"max_num_seqs": 1}, limits={"max_queue": 1, "max_queue_s": 600, "max_choices": 2})
    with live_endpoint(config) as live:
        yield live


def bearer(key=KEY):
    return {"Authorization": f"Bearer {key}"}


def test_without_a_key_there_is_health_and_nothing_else(guarded):
    for route in ("/health", "/ready"):
        assert httpx2.get(guarded.url + route).status_code == 200
    for route in ("/v1/models", "/v1/models/demo", "/metrics", "/openapi.json", "/nowhere", "/health/x"):
        answer = httpx2.get(guarded.url + route)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", route
    assert httpx2.post(f"{guarded.url}/v1/completions", json=LONG).status_code == 401


@pytest.mark.parametrize("key", ["Bearer", "sk-wrong", KEY[:-1], KEY + "x", DIGEST, f"sha256:{DIGEST}", "\xff\xfe"])
def test_a_wrong_key_is_refused(guarded, key):
    headers = {"Authorization": b"Bearer " + key.encode("latin-1")}
    assert httpx2.get(f"{guarded.url}/v1/models", headers=headers).status_code == 401


def test_a_key_comes_behind_the_word_bearer(guarded):
    assert httpx2.get(f"{guarded.url}/v1/models", headers={"Authorization": KEY}).status_code == 401
    assert httpx2.get(f"{guarded.url}/v1/models", headers={"Authorization": "Bearer"}).status_code == 401


def test_the_right_key_is_let_in(guarded):
    assert [model.id for model in guarded.client(KEY).models.list()] == ["demo"]
    with pytest.raises(openai.AuthenticationError):
        guarded.client("sk-some-other-key-000").models.list()


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(guarded):
    body = json.dumps({**LONG, "prompt": "x" * 5000}).encode()
    pieces = (body[at : at + 500] for at in range(0, len(body), 500))  # sent in chunks, without a length
    for content in (body, pieces):
        headers = {**bearer(), "Content-Type": "application/json"}
        answer = httpx2.post(f"{guarded.url}/v1/completions", content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_a_body_that_drips_in_is_given_up(guarded):
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as drip:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        drip.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n".encode())
        started = time.monotonic()
        drip.sendall(b'{"model"')
        answer = drip.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer
    assert time.monotonic() - started < 5


def test_a_full_queue_says_when_to_come_back(narrow):
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(
                lambda _: httpx2.post(f"{narrow.url}/v1/completions", json={**LONG, "max_tokens": 200}, timeout=60),
                range(12),
            )
        )
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 2
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert narrow.is_empty()


def test_the_clients_own_retries_get_through_a_full_queue(narrow):
    client = narrow.client(max_retries=20)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        ask = dict(model="demo", prompt="Order 7", max_tokens=30, extra_body={"ignore_eos": True})
        usages = list(pool.map(lambda _: client.completions.create(**ask).usage, range(4)))
    assert [usage.completion_tokens for usage in usages] == [30] * 4


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_gives_its_place_and_pages_back(narrow, stream):
    ask = {**LONG, "stream": stream, "max_tokens": 2000}
    if stream:
        with httpx2.stream("POST", f"{narrow.url}/v1/completions", json=ask) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{narrow.url}/v1/completions", json=ask, timeout=0.1)
    assert narrow.is_empty()
    assert narrow.endpoint.desk.worker.stats().lost_s > 0


def test_a_client_that_leaves_while_it_waits_is_forgotten(narrow):
    running = threading.Thread(
        target=httpx2.post,
        args=[f"{narrow.url}/v1/completions"],
        kwargs={"json": {**LONG, "max_tokens": 400}, "timeout": 60},
    )
    running.start()
    while narrow.endpoint.desk.worker.load().num_running == 0:
        time.sleep(0.01)
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{narrow.url}/v1/completions", json={**LONG, "stream": True}, timeout=0.1)
    running.join()
    assert narrow.is_empty()


def test_a_broken_engine_fails_its_requests_and_its_health():
    with live_endpoint(settings()) as live:
        worker = live.endpoint.desk.worker
        assert httpx2.get(f"{live.url}/ready").json() == {"status": "ready"}
        client = live.client()

        def explode():
            raise RuntimeError("device lost")

        with httpx2.stream("POST", f"{live.url}/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            worker.engine.step = explode
            rest = [line for line in lines if line]
        error = json.loads(rest[-1].removeprefix("data: "))["error"]
        assert error["type"] == "server_error" and "device lost" not in error["message"]
        for _ in range(2):
            with pytest.raises(openai.InternalServerError) as found:
                client.completions.create(model="demo", prompt="Order 7")
            assert found.value.status_code == 503
        assert httpx2.get(f"{live.url}/health").status_code == httpx2.get(f"{live.url}/ready").status_code == 503


def test_a_crowd_of_which_some_leave_gets_answers_or_429_and_leaves_nothing_behind():
    config = settings(engine={"max_num_seqs": 4, "num_pages": 64}, limits={"max_queue": 4, "max_choices": 4})

    def ask(number):
        draw = random.Random(number)
        body = {
            **LONG,
            "prompt": f"Order {number % 5}",
            "n": draw.choice([1, 1, 2]),
            "max_tokens": draw.randint(1, 120),
            "stream": number % 2 == 0,
            "temperature": 1.0,
        }
        leaves = number % 3 == 0
        timeout = 0.3 if leaves and number % 2 else 60
        for attempt in range(1000):
            try:
                with client.stream("POST", f"{live.url}/v1/completions", json=body, timeout=timeout) as answer:
                    lines = [line for line, _ in zip(answer.iter_lines(), range(4 if leaves else 10**6)) if line]
            except httpx2.ReadTimeout:
                return "left", leaves, attempt
            if answer.status_code != 429:
                return answer.status_code, leaves or not body["stream"] or lines[-1], attempt
            time.sleep(0.1)
        raise AssertionError("no place in a thousand attempts")

    # One client: each makes a TLS context of its own, and a crowd of them would leave the engine no time to compute.
    with (
        live_endpoint(config) as live,
        httpx2.Client() as client,
        concurrent.futures.ThreadPoolExecutor(16) as pool,
    ):
        outcomes = list(pool.map(ask, range(60)))
        statuses = collections.Counter(status for status, _, _ in outcomes)
        assert set(statuses) <= {200, "left"} and statuses[200] > 30, statuses
        assert all(end in (True, "data: [DONE]") for _, end, _ in outcomes), outcomes
        assert sum(attempt for _, _, attempt in outcomes) > 10, "the queue was never full"
        assert live.is_empty()
