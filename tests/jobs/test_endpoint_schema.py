"""Requests made up from the endpoint's own OpenAPI description, fitting it and not: the server makes no mistake."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from live_endpoint import live_endpoint
from live_endpoint import settings as endpoint_settings
from schemathesis.generation import GenerationMode


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    batches = {"storage": str(tmp_path_factory.mktemp("batches"))}
    config = endpoint_settings(
        sampling={"max_tokens": 2}, engine={"max_model_len": 64}, limits={"max_choices": 4}, batches=batches
    )
    with live_endpoint(config) as live:
        yield schemathesis.openapi.from_url(f"{live.url}/openapi.json")


POST = ["/v1/chat/completions", "/v1/completions"]
GET = ["/v1/models", "/health", "/ready", "/metrics"]  # without a field that could be wrong
BATCHES = ["/v1/batches", "/v1/batches/{batch_id}", "/v1/files", "/v1/files/{file_id}", "/v1/files/{file_id}/content"]
CASES = [
    *((route, mode) for route in POST for mode in GenerationMode),
    *((route, GenerationMode.POSITIVE) for route in GET),
]


@pytest.mark.parametrize(("route", "mode"), CASES)
def test_no_request_makes_the_server_fail(schema, route, mode):
    (operation,) = [one.ok() for one in schema.get_all_operations() if one.ok().path == route]
    statuses = set()

    @settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "demo"  # else nearly all would be over with 404
        response = case.call()
        statuses.add(response.status_code)
        assert response.status_code < 500, response.text
        assert response.status_code < 400 or "message" in response.json()["error"]

    ask()
    assert statuses <= ({400} if mode is GenerationMode.NEGATIVE else {200, 400})


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("route", BATCHES)
def test_no_file_and_no_batch_makes_the_server_fail(schema, route, mode):
    for operation in [one.ok() for one in schema.get_all_operations() if one.ok().path == route]:

        @settings(
            max_examples=15, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case):
            response = case.call()
            assert response.status_code < 500, response.text
            assert response.status_code < 400 or "message" in response.json()["error"]

        if mode is GenerationMode.POSITIVE or operation.method.upper() == "POST" or operation.query:
            ask()
