"""Requests made up from the endpoint's own OpenAPI description, fitting it and not: the server makes no mistake."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from live_endpoint import live_endpoint
from live_endpoint import settings as endpoint_settings
from schemathesis.generation import GenerationMode


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    config = endpoint_settings(
        sampling={"max_tokens": 2},
        engine={"max_model_len": 64},
        limits={"max_choices": 4},
        batches={"storage": str(tmp_path_factory.mktemp("batches"))},
    )
    with live_endpoint(config) as live:
        yield schemathesis.openapi.from_url(f"{live.url}/openapi.json")


COMPLETIONS = ["/v1/chat/completions", "/v1/completions"]
PLAIN = ["/v1/models", "/health", "/ready", "/metrics"]  # without a field that could be wrong
OTHERS = [
    ("GET", "/v1/models/{name}"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"),
    ("DELETE", "/v1/files/{file_id}"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches"),
    ("GET", "/v1/batches/{batch_id}"),
    ("POST", "/v1/batches/{batch_id}/cancel"),
]
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [
    *(("POST", route, mode, 40) for route in COMPLETIONS for mode in GenerationMode),
    *(("GET", route, POSITIVE, 5) for route in PLAIN),
    *((method, route, mode, 15) for method, route in OTHERS for mode in GenerationMode),
]


def test_no_route_is_left_out(schema):
    described = {(one.ok().method.upper(), one.ok().path) for one in schema.get_all_operations()}
    assert described == {(method, route) for method, route, _, _ in CASES}


@pytest.mark.parametrize(("method", "route", "mode", "num_examples"), CASES)
def test_no_request_makes_the_server_fail(schema, method, route, mode, num_examples):
    operation = schema[route][method]
    statuses = set()

    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "demo"  # else nearly all would be over with 404
        response = case.call()
        statuses.add(response.status_code)
        assert response.status_code < 500, response.text
        assert response.status_code < 400 or "message" in response.json()["error"]

    try:
        ask()
    except Unsatisfiable:  # of what can be said here, nothing is wrong
        assert mode is NEGATIVE and route not in COMPLETIONS
    if route in COMPLETIONS:
        assert statuses <= ({400} if mode is NEGATIVE else {200, 400})
