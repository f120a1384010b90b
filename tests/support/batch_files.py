"""Batch files made up, sent to a live endpoint by OpenAI's client, and their answers compared."""

from __future__ import annotations

import io
import json
import time

import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


def chat(custom_id, text="My printer is late. Order 71-40822.", **fields):
    own = {
        "model": "demo",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 8,
        "temperature": 0,
        **fields,
    }
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": own}


def text(custom_id, prompt="Order 7", **fields):
    own = {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": TEXT, "body": own}


def jsonl(lines):
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)


def upload(client, data, name="requests.jsonl", **more):
    return client.files.create(file=(name, io.BytesIO(data)), purpose="batch", **more)


def start(client, lines, endpoint=CHAT, **more):
    file = upload(client, jsonl(lines))
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **more)


def wait(client, batch, until=ENDED, within_s=120.0):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch.id)
        if batch.status in until:
            return batch
        time.sleep(0.05)
    raise AssertionError(f"still {batch.status}: {batch.request_counts}")


def read(client, file_id):
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()] if file_id else []


def assert_same(body, other):
    """That two answers say the same. Log-probabilities are those of other batches, so their last digits may differ."""
    assert len(body["choices"]) == len(other["choices"])
    for choice, another in zip(body["choices"], other["choices"]):
        for key in ("index", "finish_reason", "text"):
            assert choice.get(key) == another.get(key)
        assert choice.get("message") == another.get("message")
        tokens, values = logprobs_of(choice)
        other_tokens, other_values = logprobs_of(another)
        assert tokens == other_tokens and values == pytest.approx(other_values, abs=1e-3)


def logprobs_of(choice):
    logprobs = choice["logprobs"] or {}
    content = logprobs.get("content", [])
    tokens = logprobs.get("tokens", [token["token"] for token in content])
    return tokens, logprobs.get("token_logprobs", [token["logprob"] for token in content])
