"""What stands before Serve: keys are asked for before anything of Serve's is, and its refusals have OpenAI's form."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.testclient import TestClient

from jobs.endpoint import front_door
from jobs.endpoint.front_door import FrontDoor, middlewares
from jobs.endpoint.gate import queue_is_full, respond
from jobs.ingress import DIGESTS, KEY_FILE, MAX_IN_FLIGHT, choose_ingress, set_front_door
from pipeline.settings_file import JobError

KEY = "sk-a-key-of-a-test-0001"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()


class Behind:
    """Stands for Serve: counts what reaches it, and gives one answer."""

    def __init__(self, answer: Response) -> None:
        self.answer = answer
        self.num_asked = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_asked += 1
        await self.answer(scope, receive, send)


def test_a_stranger_reaches_nothing_of_serves() -> None:
    behind = Behind(JSONResponse({}))
    client = TestClient(FrontDoor(behind, digests=(DIGEST,)))
    for headers in ({}, {"Authorization": "Bearer sk-some-other-key-000"}, {"Authorization": KEY}):
        answer = client.post("/v1/completions", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert behind.num_asked == 0
    assert client.post("/v1/completions", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
    assert client.get("/-/healthz").status_code == 200, "Serve's own probes carry no key"
    assert behind.num_asked == 2


@pytest.mark.parametrize(("status", "kind"), [(503, "server_error"), (429, "rate_limit_error"), (500, "server_error")])
def test_a_refusal_of_serves_is_an_error_of_openais(status: int, kind: str) -> None:
    behind = Behind(PlainTextResponse("Request dropped: num_queued_requests at max of 7 on node 10.0.0.1", status))
    answer = TestClient(FrontDoor(behind, digests=())).post("/v1/completions")
    assert answer.status_code == status and answer.json()["error"]["type"] == kind
    assert "10.0.0.1" not in answer.text
    assert ("retry-after" in answer.headers) == (status != 500)


def test_when_serve_says_when_to_come_back_that_stays() -> None:
    behind = Behind(PlainTextResponse("no", 503, headers={"Retry-After": "17"}))
    assert TestClient(FrontDoor(behind, digests=())).get("/v1/models").headers["retry-after"] == "17"


def test_a_replica_that_dies_before_or_within_an_answer_is_an_error_that_clients_understand() -> None:
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
    piece = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}

    def answer_of(*messages: Any) -> Any:
        async def serve(scope: Any, receive: Any, send: Any) -> None:
            for message in messages:
                await send(message)

        return TestClient(FrontDoor(serve, digests=())).post("/v1/completions")

    silent = answer_of()
    assert silent.status_code == 503 and silent.json()["error"]["code"] == "engine_error"
    assert int(silent.headers["retry-after"]) >= 1
    events = answer_of(start, piece, piece).text.split("\n\n")
    assert events[:2] == ["data: {}"] * 2 and events[3:] == [""]
    assert json.loads(events[2].removeprefix("data: "))["error"]["type"] == "server_error"
    last = {**piece, "body": b"data: [DONE]\n\n", "more_body": False}
    assert "error" not in answer_of(start, piece, last).text


@pytest.mark.parametrize("answer", [PlainTextResponse("shoal_pages 1"), JSONResponse({"error": {"code": "x"}}, 503)])
def test_what_the_endpoint_says_passes_as_it_is(answer: Response) -> None:
    got = TestClient(FrontDoor(Behind(answer), digests=())).get("/metrics")
    assert (got.status_code, got.content) == (answer.status_code, answer.body)


def test_a_crowd_is_refused_before_serve_and_the_next_one_is_let_in() -> None:
    async def run() -> None:
        release = asyncio.Event()
        asked: list[str] = []

        async def serve(scope: Any, receive: Any, send: Any) -> None:
            asked.append(scope["path"])
            await release.wait()
            await JSONResponse({})(scope, receive, send)

        async def ask(path: str) -> tuple[int, dict[str, str]]:
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            await door({"type": "http", "method": "POST", "path": path, "headers": []}, None, send)  # type: ignore[arg-type]
            return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}

        door = FrontDoor(serve, digests=(), max_in_flight=2)
        running = [asyncio.ensure_future(ask("/v1/chat/completions")) for _ in range(2)]
        left = asyncio.ensure_future(ask("/v1/models"))
        await asyncio.sleep(0)
        for _ in range(3):
            status, headers = await ask("/v1/completions")
            assert status == 429 and 1 <= int(headers["retry-after"]) <= 60
        assert len(asked) == 3, "other routes are not counted"
        running[0].cancel()
        await asyncio.wait(running[:1])
        running.append(asyncio.ensure_future(ask("/v1/completions")))
        await asyncio.sleep(0)
        assert len(asked) == 4, "who leaves makes room"
        release.set()
        answers = await asyncio.gather(*running[1:], left)
        assert [status for status, _ in answers] == [200] * 3

    asyncio.run(run())


def test_the_door_learns_from_the_replicas_how_many_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    class Replicas:
        """Take so many at once, and refuse the others."""

        def __init__(self, num_places: int) -> None:
            self.num_places = num_places
            self.num_asked = 0
            self.open: list[asyncio.Event] = []

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            self.num_asked += 1
            if len(self.open) >= self.num_places:
                await asyncio.sleep(0)
                await respond(queue_is_full(3.2))(scope, receive, send)
                return
            self.open.append(asyncio.Event())
            await self.open[-1].wait()
            await JSONResponse({})(scope, receive, send)

    now = 100.0
    monkeypatch.setattr(front_door, "time", SimpleNamespace(perf_counter=lambda: now))
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}

    async def run() -> None:
        nonlocal now

        async def ask() -> tuple[int, str]:
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            await door(scope, None, send)  # type: ignore[arg-type]
            assert len(sent) == 2 and not sent[1].get("more_body")
            headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
            if sent[0]["status"] == 429:
                assert json.loads(sent[1]["body"])["error"]["type"] == "rate_limit_error"
                assert int(headers["content-length"]) == len(sent[1]["body"])
            return sent[0]["status"], headers.get("retry-after", "")

        async def crowd(size: int) -> list[asyncio.Task[tuple[int, str]]]:
            tasks = [asyncio.create_task(ask()) for _ in range(size)]
            await asyncio.sleep(0.01)
            return tasks

        replicas = Replicas(5)
        door = FrontDoor(replicas, digests=(), max_in_flight=1000)
        tasks = await crowd(40)
        assert replicas.num_asked == 40 and len(replicas.open) == 5, "nothing is known yet"
        tasks += await crowd(500)
        assert replicas.num_asked == 40, "as many as they take are on their way"
        assert {task.result() for task in tasks if task.done()} == {(429, "4")}
        for _ in range(10):
            now += 0.11
            tasks += await crowd(50)
        assert replicas.num_asked == 50, "one in each tenth of a second, to see whether it is still so"
        replicas.open.pop().set()
        await asyncio.sleep(0.01)
        tasks += await crowd(50)
        assert replicas.num_asked == 51 and len(replicas.open) == 5, "who leaves makes room"
        replicas.num_places = 20
        for _ in range(20):
            now += 0.11
            tasks += await crowd(50)
        assert len(replicas.open) == 20
        for event in replicas.open:
            event.set()
        answers = await asyncio.gather(*tasks)
        assert [status for status, _ in answers].count(200) == 21

    asyncio.run(run())


def test_the_door_of_another_process_knows_whom_to_let_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DIGESTS, "")
    monkeypatch.setenv(MAX_IN_FLIGHT, "0")
    (door,) = middlewares()
    assert door.kwargs == {"digests": (), "max_in_flight": None}
    set_front_door([DIGEST, DIGEST[::-1]], 7)
    (door,) = middlewares()
    assert door.kwargs == {"digests": (DIGEST, DIGEST[::-1]), "max_in_flight": 7}
    (tmp_path / "keys").write_text(f"sk-a-key-of-a-file-0002\nsha256:{DIGEST[1:]}0\n")
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "keys"))
    (door,) = middlewares()
    assert len(door.kwargs["digests"]) == 4 and door.kwargs["digests"][-1] == f"{DIGEST[1:]}0"
    (tmp_path / "keys").write_text("# none yet\n")
    with pytest.raises(JobError, match="holds no key"):
        middlewares()


def test_haproxy_has_to_be_asked_for_and_gets_ports_and_sockets_of_its_own(tmp_path: Path) -> None:
    before = dict(os.environ)
    try:
        os.environ.pop("RAY_SERVE_ENABLE_HA_PROXY", None)
        choose_ingress(tmp_path)
        assert not any("HAPROXY" in name for name in os.environ)
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        ports = []
        for name in ("a", "b"):
            choose_ingress(tmp_path / name)
            ports += [os.environ[key] for key in os.environ if key.endswith("_PORT") and "RAY_SERVE" in key]
            assert os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"].startswith(str(tmp_path / name))
        assert len(ports) == 6 and len(set(ports[:3])) == 3
    finally:
        os.environ.clear()
        os.environ.update(before)
