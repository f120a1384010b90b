"""The endpoint as OpenAI's own client sees it: a real server and a real engine, no Ray."""

import asyncio
import json

import httpx2
import openai
import pyarrow as pa
import pytest
from live_endpoint import live_endpoint, settings
from prometheus_client.parser import text_string_to_metric_families

from actors.requests import EngineError, Request, SamplingParams
from pipeline.job import Job
from pipeline.openai_api.fields import ChatRequest
from pipeline.prompts import Renderer

MESSAGES = [
    {"role": "system", "content": "Read the support ticket and answer with one JSON object."},
    {"role": "user", "content": "Hello, my printer arrived broken. Order 71-40822. Thanks, Iris"},
]


@pytest.fixture(scope="module")
def live():
    with live_endpoint(settings(engine={"max_model_len": 512})) as live:
        yield live


@pytest.fixture(scope="module")
def client(live):
    return live.client()


def post(live, route="/v1/chat/completions", **fields):
    own = {"messages": MESSAGES} if "chat" in route else {"prompt": "Order 7"}
    return httpx2.post(f"{live.url}{route}", json={"model": "demo", **own, **fields}, timeout=60)


def test_the_model_is_listed_and_found(client):
    (model,) = client.models.list()
    assert model.id == "demo" and client.models.retrieve("demo").object == "model"


SAMPLINGS = [
    {"max_tokens": 24},
    {"max_tokens": 24, "temperature": 0.9, "seed": 11, "n": 3, "logprobs": 3},
    {"max_tokens": 40, "temperature": 0.8, "top_p": 0.9, "seed": 3, "stop": ("er", '"')},
    {"max_tokens": 16, "temperature": 1.2, "seed": 5, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
    {"max_tokens": 16, "temperature": 1.0, "seed": 2**63 - 1, "presence_penalty": 0.5, "frequency_penalty": -0.5},
    {"max_tokens": 30, "temperature": 1.0, "seed": 9, "min_tokens": 20, "ignore_eos": True},
]
VLLM_ONLY = ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids")


def arguments(sampling):
    """The same sampling in the words of OpenAI's client."""
    known = {key: value for key, value in sampling.items() if key not in (*VLLM_ONLY, "logprobs")}
    known["extra_body"] = {key: value for key, value in sampling.items() if key in VLLM_ONLY}
    return {"temperature": 0.0, **known}


def answers_of_a_job(live, column, value, sampling):
    """What the rows of a corpus answer, asked of the same engine by the pipeline's own rendering."""
    job = Job.model_validate(
        {
            "input": {"path": "-", column: "it"},
            "model": live.endpoint.config.model,
            "output": {"path": "-"},
            "sampling": sampling,
        }
    )
    worker = live.endpoint.desk.worker
    (row,) = Renderer(job, worker.engine.tokenizer).render(pa.RecordBatch.from_pylist([{"it": value}]))
    assert row.error is None
    request = Request("row", row.token_ids, row.sampling, row.sampling.seed)
    (completion,) = asyncio.run(worker.generate([request]))
    return completion


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_chat_answers_as_a_row_of_a_job_does(live, client, sampling):
    row = answers_of_a_job(live, "messages_column", MESSAGES, sampling)
    more = {"logprobs": True, "top_logprobs": sampling["logprobs"]} if "logprobs" in sampling else {}
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, **arguments(sampling), **more)
    assert [(c.message.content, c.finish_reason) for c in answer.choices] == [
        (output.text, output.finish_reason) for output in row.outputs
    ]
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (row.usage.prompt_tokens, row.usage.completion_tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens > 0, "the job's row has left its prefix in the cache"
    for choice, output in zip(answer.choices, row.outputs):
        if output.logprobs is None:
            assert choice.logprobs is None
            continue
        assert [token.token for token in choice.logprobs.content] == [token.token for token in output.logprobs]
        assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_text_answers_as_a_row_of_a_job_does(live, client, sampling):
    row = answers_of_a_job(live, "prompt_column", "Order 71-4", sampling)
    more = {"logprobs": sampling["logprobs"]} if "logprobs" in sampling else {}
    answer = client.completions.create(model="demo", prompt="Order 71-4", **arguments(sampling), **more)
    assert [(c.text, c.finish_reason) for c in answer.choices] == [(o.text, o.finish_reason) for o in row.outputs]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_stream_joined_is_the_answer(client, sampling):
    more = {"logprobs": True, "top_logprobs": 2} if "logprobs" in sampling else {}
    ask = dict(model="demo", messages=MESSAGES, **arguments(sampling), **more)
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    *early, last = chunks
    assert last.choices == [] and all(chunk.usage is None for chunk in early)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in early if chunk.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in mine) == choice.message.content
        assert [one.finish_reason for one in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        if choice.logprobs is not None:
            heard = [token.token for one in mine if one.logprobs for token in one.logprobs.content]
            assert heard == [token.token for token in choice.logprobs.content]


def test_a_stream_of_several_prompts_numbers_its_choices_as_the_whole_answer_does(client):
    ask = dict(
        model="demo", prompt=["Order 7", "the printer", "x"], n=2, seed=4, temperature=0.9, max_tokens=12, logprobs=1
    )
    whole = client.completions.create(**ask)
    texts, offsets = dict.fromkeys(range(6), ""), {i: [] for i in range(6)}
    for chunk in client.completions.create(**ask, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        offsets[choice.index] += choice.logprobs.text_offset if choice.logprobs else []
    assert list(texts.values()) == [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert list(offsets.values()) == [choice.logprobs.text_offset for choice in whole.choices]


def test_a_stream_comes_in_pieces_and_ends_with_done(live):
    lines = post(live, stream=True, max_tokens=20, temperature=0, ignore_eos=True).text.split("\n\n")
    assert lines.pop() == "" and lines[-1] == "data: [DONE]"
    assert len(lines) > 15, "about one per token"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk" for line in lines[:-1])


def read_stream(body):
    """How many pieces a chat's stream has, and its text."""
    pieces = [json.loads(line.removeprefix("data: ")) for line in body.split("\n\n")[:-2]]
    return len(pieces), "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces)


def test_tokens_that_come_faster_than_the_interval_share_a_piece():
    ask = {"stream": True, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    with live_endpoint(settings(limits={"stream_interval_s": 10.0})) as slow, live_endpoint(settings()) as quick:
        pieces, texts = zip(*(read_stream(post(live, **ask).text) for live in (slow, quick)))
    assert texts[0] == texts[1] != ""
    assert pieces[0] <= 4 < pieces[1], "the role, the first token, the rest and the end"


def test_token_ids_are_prompts_too(live, client):
    ids = live.endpoint.desk.worker.engine.tokenizer.encode("Order 7")
    ask = dict(model="demo", max_tokens=8, temperature=0)
    by_text = client.completions.create(prompt="Order 7", **ask).choices[0].text
    assert client.completions.create(prompt=ids, **ask).choices[0].text == by_text
    assert [c.text for c in client.completions.create(prompt=[ids, ids], **ask).choices] == [by_text] * 2


def test_without_a_seed_two_answers_differ(client):
    ask = dict(model="demo", messages=MESSAGES, temperature=1.5, max_tokens=24)
    assert len({client.chat.completions.create(**ask).choices[0].message.content for _ in range(3)}) > 1


def test_defaults_are_openais_unless_the_settings_say_otherwise(live):
    assert (
        len(post(live, "/v1/completions", ignore_eos=True, logprobs=0).json()["choices"][0]["logprobs"]["tokens"]) == 16
    )
    config = settings(sampling={"max_tokens": 5, "temperature": 0.0})
    with live_endpoint(config) as other:
        answers = [post(other, ignore_eos=True).json() for _ in range(2)]
        assert answers[0]["usage"]["completion_tokens"] == 5
        assert answers[0]["choices"] == answers[1]["choices"]
        assert post(other, ignore_eos=True, max_tokens=7).json()["usage"]["completion_tokens"] == 7


def test_a_chat_without_a_bound_ends_at_the_context(live):
    usage = post(live, ignore_eos=True, temperature=0).json()["usage"]
    assert usage["total_tokens"] == live.endpoint.desk.worker.engine.max_model_len


def test_ignored_fields_are_named_in_a_header(live):
    answer = post(live, user="me", metadata={"a": "b"}, max_tokens=1)
    assert answer.status_code == 200 and answer.headers["X-Shoal-Ignored-Fields"] == "metadata, user"
    assert "X-Shoal-Ignored-Fields" not in post(live, max_tokens=1).headers


NEUTRAL = {"tools": [], "best_of": 1, "echo": False, "logit_bias": None, "response_format": {"type": "text"}, "n": None}


def test_unsupported_fields_pass_where_they_change_nothing(live):
    assert post(live, **NEUTRAL, max_tokens=1).status_code == 200


DEEP = "[" * 5000 + "]" * 5000
BAD = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b"null", None),
    (b"\xff\xfe", None),
    (DEEP.encode(), None),
    (b'{"model": "demo"}', "messages"),
    (b'{"messages": []}', "model"),
    ({"model": 7}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "half \ud83d a pair"}]}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:;base64,!"}}]}]},
        "messages[0].content",
    ),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
    ({"max_completion_tokens": 100_000}, "max_completion_tokens"),
    ({"max_tokens": 5.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [7]}, "stop"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"min_tokens": 9, "max_tokens": 5}, "min_tokens"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"best_of": 3}, "best_of"),
    ({"logit_bias": {"5": 100}}, "logit_bias"),
    ({"max_token": 5}, "max_token"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}},
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strange"}}}},
        "response_format",
    ),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "response_format"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=lambda value: repr(value)[:60])
def test_a_bad_request_is_told_which_field_and_reaches_no_engine(live, change, param):
    before = live.endpoint.desk.worker.stats().num_steps
    if isinstance(change, bytes):
        content = change
    else:
        # As Python writes it: NaN and half a surrogate pair are what a careless client sends.
        content = json.dumps({"model": "demo", "messages": MESSAGES, **change}).encode()
    answer = httpx2.post(
        f"{live.url}/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}, timeout=30
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert live.endpoint.desk.worker.stats().num_steps == before


BAD_TEXTS = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": ["a"] * 30, "n": 5}, "n"),
    ({"echo": True}, "echo"),
    ({"suffix": "end"}, "suffix"),
    ({"logprobs": -1}, "logprobs"),
]


@pytest.mark.parametrize(("change", "param"), BAD_TEXTS, ids=lambda value: repr(value)[:60])
def test_a_bad_text_request_is_told_which_field(live, change, param):
    answer = post(live, "/v1/completions", **change)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_token_ids_outside_of_the_vocabulary_are_refused(live):
    for tokens in ([10**6], [-1]):
        answer = post(live, "/v1/completions", prompt=tokens)
        assert answer.status_code == 400 and "vocabulary" in answer.json()["error"]["message"]


def test_the_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError) as found:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert (found.value.code, found.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=10**6)
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_unknown_routes_and_methods_answer_as_everything_else(live):
    for method, route, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)):
        answer = httpx2.request(method, f"{live.url}{route}")
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_metrics_say_what_was_done(live):
    post(live, max_tokens=3, ignore_eos=True)

    def read():
        page = httpx2.get(f"{live.url}/metrics").text
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
        return {(sample.name, *sample.labels.values()): sample.value for sample in samples}

    before = read()
    post(live, max_tokens=3, ignore_eos=True)
    post(live, max_tokens=-3)
    after = read()

    def grown(*key):
        return after[key] - before.get(key, 0)

    assert grown("shoal_requests_total", "/v1/chat/completions", "200") == 1
    assert grown("shoal_requests_total", "/v1/chat/completions", "400") == 1
    assert grown("shoal_completion_tokens_total") == 3
    assert grown("shoal_cached_tokens_total") > 0
    assert grown("shoal_time_to_first_token_seconds_count") == grown("shoal_inter_token_seconds_count") == 1
    assert after["shoal_sequences_running",] == 0 and after["shoal_pages",] == 512


def test_no_prompt_is_logged(live, caplog, monkeypatch):
    caplog.set_level("DEBUG")
    secret = "the launch code is 7731"
    messages = [{"role": "user", "content": secret}]
    post(live, messages=messages, max_tokens=2, user=secret)
    post(live, messages=messages, max_tokens=-1)
    post(live, messages=[{"role": secret, "content": secret}])

    async def explode(requests):
        raise EngineError("CUDA error")

    monkeypatch.setattr(live.endpoint.desk.worker, "generate", explode)
    answer = post(live, messages=messages)
    assert answer.status_code == 503 and answer.headers["Retry-After"] and secret not in answer.text
    assert "7731" not in caplog.text


def test_sampling_parameters_of_a_request_are_those_of_a_job():
    assert set(SamplingParams.model_fields) <= set(ChatRequest.model_fields)
