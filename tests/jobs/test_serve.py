"""The endpoint on Ray Serve: the answers of a job, cut connections, draining, and a replica that starts when asked."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from batch_files import chat, read, start, wait
from live_endpoint import ENGINE, settings
from prometheus_client.parser import text_string_to_metric_families

from jobs.ingress import choose_ingress
from jobs.run import run
from pipeline.settings_file import JobError

choose_ingress(Path(tempfile.gettempdir()))  # for the session's Ray, before it starts and Serve is imported

from jobs import serve as shoal_serve  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = [
    {
        "id": i,
        "messages": [{"role": "user", "content": f"My {thing} is late. Order 7-{i}."}],
        "own": json.dumps({"seed": 100 + i, "temperature": 0.9, "n": 2}),
    }
    for i, thing in enumerate(["printer", "watch", "router", "camera"])
]
LONG = {"model": "demo", "prompt": "Order 7", "max_tokens": 1500, "ignore_eos": True, "stream": True, "temperature": 0}


@pytest.fixture(scope="module")
def serve_on(ray_cluster: None) -> Iterator[Callable[..., str]]:
    """Deploys the endpoint with sections laid over its settings, unless it runs like that; returns its URL."""
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    running: list[object] = []

    def deploy(**sections: object) -> str:
        config = settings(**sections, port=port)
        if [config] != running or not serve.status().applications:
            serve.start(proxy_location="HeadOnly", http_options=shoal_serve.http_options(config))
            serve.run(shoal_serve.application(config, ()), name=shoal_serve.APPLICATION, route_prefix="/")
            running[:] = [config]
        return f"http://127.0.0.1:{port}"

    yield deploy
    serve.shutdown()


def metric(url: str, name: str) -> float:
    page = httpx2.get(f"{url}/metrics", timeout=30).text
    (value,) = [s.value for f in text_string_to_metric_families(page) for s in f.samples if s.name == name]
    return value


@pytest.mark.slow
def test_answers_are_those_of_a_job_over_the_same_rows(serve_on: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "in" / "rows.parquet")
    job = {
        "input": {"path": "in", "messages_column": "messages", "id_column": "id", "sampling_column": "own"},
        "model": "demo",
        "engine": ENGINE,
        "sampling": {"max_tokens": 24, "n": 2},
        "output": {"path": "out"},
        "pricing": {"usd_per_device_hour": 1.0},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert run(str(tmp_path / "job.yaml"), []) == 0
    rows = pq.read_table(tmp_path / "out" / "results" / "rows.parquet").to_pylist()

    client = openai.OpenAI(base_url=f"{serve_on()}/v1", api_key="none", max_retries=0)
    for row in rows:
        ask = dict(model="demo", messages=row["messages"], max_tokens=24, **json.loads(row["own"]))
        answer = client.chat.completions.create(**ask)
        assert [choice.message.content for choice in answer.choices] == row["response"]
        assert answer.usage.completion_tokens == row["completion_tokens"]
        texts = ["", ""]
        for chunk in client.chat.completions.create(**ask, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == row["response"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_cut_connection_gives_its_pages_back(serve_on: Callable[..., str], stream: bool) -> None:
    url = serve_on()
    if stream:
        with httpx2.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{url}/v1/completions", json={**LONG, "stream": False}, timeout=0.3)
    deadline = time.monotonic() + 60
    while metric(url, "shoal_pages_in_use") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert metric(url, "shoal_pages_in_use") == metric(url, "shoal_sequences_running") == 0


def test_a_stream_that_runs_when_the_endpoint_is_ended_is_finished(serve_on: Callable[..., str]) -> None:
    from ray import serve

    url = serve_on()
    ask = {**LONG, "stream_options": {"include_usage": True}}
    with httpx2.stream("POST", f"{url}/v1/completions", json=ask, timeout=120) as answer:
        lines = answer.iter_lines()
        next(lines)
        ending = threading.Thread(target=serve.delete, args=[shoal_serve.APPLICATION])
        ending.start()
        rest = [line for line in lines if line]
    ending.join()
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["usage"]["completion_tokens"] == LONG["max_tokens"]


@pytest.mark.slow
def test_with_no_replica_the_first_request_waits_for_one_and_the_last_leaves_none(serve_on: Callable[..., str]) -> None:
    from ray import serve

    url = serve_on(replicas={"min": 0, "max": 1, "idle_s": 2.0})

    def num_replicas() -> int:
        replicas = serve.status().applications[shoal_serve.APPLICATION].deployments[shoal_serve.APPLICATION]
        return sum(replicas.replica_states.values())

    with contextlib.suppress(TimeoutError):
        _wait_until(lambda: num_replicas() == 0)
    assert num_replicas() == 0
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
    assert client.completions.create(model="demo", prompt="Order 7", max_tokens=4).usage.completion_tokens
    _wait_until(lambda: num_replicas() == 0)


@pytest.mark.slow
def test_a_replica_that_dies_ends_its_streams_with_an_error_and_another_takes_over(
    serve_on: Callable[..., str],
) -> None:
    url = serve_on()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=20)
    ask = dict(model="demo", prompt="Order 7", max_tokens=8, temperature=0)
    before = client.completions.create(**ask).choices[0].text
    (replica,) = _replicas_of(os.getpid())
    with httpx2.stream("POST", f"{url}/v1/completions", json=LONG, timeout=120) as answer:
        lines = answer.iter_lines()
        next(lines)
        replica.kill()
        rest = [line for line in lines if line]
    assert "[DONE]" not in rest[-1] and json.loads(rest[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert client.completions.create(**ask).choices[0].text == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_of_two_replicas_both_answer_and_one_that_dies_takes_only_what_it_has_in_hand(
    serve_on: Callable[..., str], tmp_path: Path
) -> None:
    sections: dict[str, dict[str, object]] = {
        "replicas": {"min": 2, "max": 2, "num_cpus": 0.5},
        "engine": {"max_num_seqs": 16},
        "limits": {"max_choices": 16, "max_queue_s": 600},
    }
    url = serve_on(**sections, batches={"storage": str(tmp_path)})
    assert len(_replicas_of(os.getpid())) == 2
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=30)
    lines = [chat(f"row-{number}", max_tokens=200, ignore_eos=True) for number in range(80)]
    batch = wait(client, start(client, lines), until=("in_progress",))

    _wait_until(lambda: len(_replicas_seen_by_ray()) == 2, within_s=120)
    first = {"model": "demo", "prompt": "Order 7", "max_tokens": 8, "temperature": 0}
    before = client.completions.create(**first).choices[0].text
    all_run, outcomes = threading.Barrier(13), []

    def follow() -> None:
        with httpx2.stream("POST", f"{url}/v1/completions", json=LONG, timeout=600) as answer:
            stream = answer.iter_lines()
            assert answer.status_code == 200 and next(stream)
            all_run.wait(300)
            outcomes.append([line for line in stream if line][-1])

    streams = [threading.Thread(target=follow) for _ in range(12)]
    for thread in streams:
        thread.start()
    all_run.wait(300)
    lease = max((tmp_path / "_lease").glob("*.json"))
    psutil.Process(json.loads(lease.read_text())["pid"]).kill()  # the one that works on the batch
    for _ in range(20):  # at once, some of them to the dead one
        assert client.completions.create(**first).choices[0].text == before
    for thread in streams:
        thread.join(300)
    ends = [
        "done" if end == "data: [DONE]" else json.loads(end.removeprefix("data: "))["error"]["type"] for end in outcomes
    ]
    assert len(ends) == 12 and set(ends) == {"done", "server_error"}, "both had some, and only one died"

    done = wait(client, batch, within_s=400)
    assert (done.status, done.request_counts.completed) == ("completed", 80)
    answers = read(client, done.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in lines]
    _wait_until(lambda: len(_replicas_of(os.getpid())) == 2, within_s=200)


def _replicas_seen_by_ray() -> set[str]:
    """Which replicas' metrics Ray's own endpoint has."""
    import ray

    (node,) = ray.nodes()
    page = httpx2.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=60).text
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return {sample.labels["replica"] for sample in samples if sample.name == "ray_shoal_pages" and sample.value > 0}


def _replicas_of(pid: int) -> list[psutil.Process]:
    """Of the Ray that a process started."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ServeReplica" in "".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.slow
def test_serve_run_starts_what_the_configuration_file_says(tmp_path: Path) -> None:
    config = yaml.safe_load((REPOSITORY / "deploy" / "serve.yaml").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = config["http_options"]["port"] = free.getsockname()[1]
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", "--address", "local", str(tmp_path / "serve.yaml")]
    key = "sk-a-key-of-a-test-0001"
    (tmp_path / "keys").write_text(key)
    environment = {
        **os.environ,
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "jobs.endpoint.front_door:middlewares",
        "SHOAL_API_KEY_FILE": str(tmp_path / "keys"),
    }
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until(lambda: server.poll() is not None or _is_ready(port), within_s=240)
        assert server.poll() is None, (tmp_path / "log").read_text()
        stranger = httpx2.get(f"http://127.0.0.1:{port}/v1/models", timeout=60)
        assert stranger.status_code == 401, "replicas let everybody in here, so that was the front door"
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key)
        assert client.completions.create(model="demo", prompt="Order 7", max_tokens=4).usage.completion_tokens
        server.send_signal(signal.SIGINT)
        server.wait(120)
    finally:
        server.kill()


@pytest.mark.slow
def test_a_wrong_key_starts_no_replica_and_a_client_waits_for_the_cold_start(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    key = "sk-a-key-of-a-test-0001"
    (tmp_path / "keys").write_text(key)
    settings = ["model=demo", f"port={port}", f"access.api_key_file={tmp_path / 'keys'}", "engine.num_threads=1"]
    settings += ["replicas.min=0", "replicas.idle_s=2"]
    command = [sys.executable, "-m", "jobs", "serve", *(word for one in settings for word in ("--set", one))]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)

    try:
        _wait_until(lambda: server.poll() is not None or "answers on" in (tmp_path / "log").read_text(), within_s=240)
        assert server.poll() is None, (tmp_path / "log").read_text()
        _wait_until(lambda: not _replicas_of(server.pid), within_s=120)
        url = f"http://127.0.0.1:{port}/v1"
        for _ in range(5):
            answer = httpx2.get(f"{url}/models", headers={"Authorization": "Bearer sk-some-other-key-000"}, timeout=60)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        time.sleep(3)
        assert not _replicas_of(server.pid)
        client = openai.OpenAI(base_url=url, api_key=key, timeout=600)
        assert client.completions.create(model="demo", prompt="Order 7", max_tokens=4).usage.completion_tokens
        server.terminate()
        assert server.wait(150) == 0
    finally:
        server.kill()


def _is_ready(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/ready", timeout=10).status_code == 200
    except httpx2.TransportError:
        return False


def _wait_until(holds: Callable[[], bool], within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.5)


def test_others_get_in_with_a_key_or_because_the_settings_say_so(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no API keys are set"):
        shoal_serve.build({"model": "demo"})
    with pytest.raises(JobError, match="no API keys are set"):
        shoal_serve.run_serve(None, ["model=demo", "host=0.0.0.0"])
    assert shoal_serve.build({"model": "demo", "access": {"allow_anonymous": True}})
    (tmp_path / "keys").write_text("sk-a-key-of-a-test-0001")
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump({"model": "demo", "access": {"api_key_file": "nowhere"}}))
    assert shoal_serve.build(
        {"config": str(tmp_path / "serve.yaml"), "access": {"api_key_file": str(tmp_path / "keys")}}
    )


def test_a_model_that_is_not_there_is_said_before_ray_is_started(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs", "serve", "--set", f"model={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no directory with files" in done.stderr and "Traceback" not in done.stderr
