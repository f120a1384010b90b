"""Answers of a form: response_format and structured_outputs, as OpenAI's client asks for them."""

import json

import pytest
from live_endpoint import live_endpoint, settings

MESSAGES = [{"role": "user", "content": "Hello, my printer arrived broken. Order 71-40822. Thanks, Iris"}]

SCHEMA = {
    "type": "object",
    "properties": {"urgency": {"enum": ["low", "high"]}, "order": {"type": "integer", "maximum": 99}},
    "required": ["urgency", "order"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client():
    with live_endpoint(settings(engine={"max_model_len": 512})) as live:
        yield live.client()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_the_form_that_was_asked_for(client, stream):
    wanted = {"type": "json_schema", "json_schema": {"name": "ticket", "schema": SCHEMA, "strict": True}}
    ask = dict(model="demo", messages=MESSAGES, temperature=1.5, seed=3, max_tokens=200, response_format=wanted)
    if stream:
        chunks = client.chat.completions.create(**ask, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        text = client.chat.completions.create(**ask).choices[0].message.content
    answer = json.loads(text)
    assert list(answer) == ["urgency", "order"] and answer["urgency"] in ("low", "high") and answer["order"] <= 99


def test_a_text_is_one_of_a_choice(client):
    one_of = client.completions.create(
        model="demo", prompt="Order", max_tokens=20, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert one_of.choices[0].text in ("yes", "no")
