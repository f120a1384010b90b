"""Lines of OpenAI's Batch format: what one asks for, and what is answered to it.

A line is a JSON object with `custom_id`, `method`, `url` and `body`; the body is a request as the endpoint reads it.
Knows no files. Called by `pipeline.batch.batch_jsonl` for jobs and by the endpoint for /v1/batches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from actors.requests import Request, RowError
from pipeline.openai_api.errors import ApiError, error_of_fields, error_of_row
from pipeline.openai_api.fields import ChatRequest, CompletionRequest, ignored_fields
from pipeline.openai_api.reading import RequestReader

CHAT_URL, TEXT_URL = "/v1/chat/completions", "/v1/completions"
URLS = (CHAT_URL, TEXT_URL)

MAX_LINE_BYTES = 8 << 20
"""Of one line. It is held as text and as objects while it is read, some ten times of this."""

MAX_CUSTOM_ID_CHARACTERS = 512

_KEYS = ("custom_id", "method", "url", "body")
_FIELD_FIRST = re.compile(r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*)(?:: | is not supported by)")
_FIELD_CODES = (
    "duplicate_custom_id",
    "invalid_method",
    "invalid_url",
    "invalid_value",
    "missing_required_parameter",
    "unknown_parameter",
    "unsupported_parameter",
)
"""Of errors whose message begins with the field's name."""


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of a batch; its body is not checked yet."""

    custom_id: str
    url: str
    body: dict[str, Any]


def load_line(data: bytes) -> dict[str, Any]:
    """The object that a line holds, whatever is in it; ApiError if it holds none."""
    if len(data) > MAX_LINE_BYTES:
        raise ApiError(400, f"the line is longer than {MAX_LINE_BYTES} bytes", code="line_too_long")
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the line is not valid UTF-8 at byte {error.start}", code="invalid_json_line") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise ApiError(400, f"the line is not valid JSON: {reason}", code="invalid_json_line") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the line holds a {type(value).__name__}, not an object", code="invalid_json_line")
    return value


def check_line(value: Mapping[str, Any]) -> BatchLine:
    """A line's request, all of it checked but its body; ApiError says what is wrong."""
    for key in _KEYS:
        if key not in value:
            raise ApiError(400, f"{key}: missing", param=key, code="missing_required_parameter")
    for key in value:
        if key not in _KEYS:
            shown = key if len(key) <= 64 else f"{key[:61]}..."
            raise ApiError(400, f"{shown}: unknown key of a line", param=shown, code="unknown_parameter")
    custom_id = custom_id_of(value)
    if custom_id is None:
        text = f"custom_id: should be text of 1 to {MAX_CUSTOM_ID_CHARACTERS} characters"
        raise ApiError(400, text, param="custom_id", code="invalid_value")
    if value["method"] != "POST":
        raise ApiError(400, "method: should be POST", param="method", code="invalid_method")
    if value["url"] not in URLS:
        raise ApiError(400, f"url: should be {' or '.join(URLS)}", param="url", code="invalid_url")
    if not isinstance(value["body"], dict):
        raise ApiError(400, "body: should be an object", param="body", code="invalid_value")
    return BatchLine(custom_id, value["url"], value["body"])


def custom_id_of(value: Mapping[str, Any]) -> str | None:
    """A line's `custom_id` if it can be one."""
    found = value.get("custom_id")
    if not isinstance(found, str) or not 1 <= len(found) <= MAX_CUSTOM_ID_CHARACTERS:
        return None
    try:
        found.encode()
    except UnicodeEncodeError:  # half a surrogate pair: JSON can write it, UTF-8 cannot
        return None
    return found


def repeated_custom_id(first_line: int) -> ApiError:
    return ApiError(400, f"custom_id: line {first_line} has the same", param="custom_id", code="duplicate_custom_id")


def read_body(line: BatchLine, model: str) -> ChatRequest | CompletionRequest:
    """The body as the endpoint's own request; ApiError for what the endpoint would refuse, and for a stream."""
    kind = ChatRequest if line.url == CHAT_URL else CompletionRequest
    try:
        request = kind.model_validate(line.body)
    except ValidationError as error:
        raise error_of_fields(error.errors(include_url=False, include_input=False)) from None
    if request.model != model:
        raise ApiError(404, f"there is no such model here, only {model}", param="model", code="model_not_found")
    if request.stream:
        raise ApiError(400, "stream: a batch answers whole; leave it out", param="stream", code="invalid_value")
    ignored_fields(request)
    return request


def read_requests(reader: RequestReader, body: ChatRequest | CompletionRequest) -> list[Request]:
    """The engine's requests for a body, one per prompt; ApiError for what is wrong with it."""
    return reader.read_chat(body) if isinstance(body, ChatRequest) else reader.read_completion(body)


def answer_line(line_id: str, custom_id: str | None, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the output file (status 200) or of the error file: an answer, or a refusal, of the endpoint's."""
    response = {"status_code": status, "request_id": f"req_{line_id}", "body": body}
    return {"id": f"batch_req_{line_id}", "custom_id": custom_id, "response": response, "error": None}


def unanswered_line(line_id: str, custom_id: str | None, code: str, message: str) -> dict[str, Any]:
    """A line of the error file for a request that was never tried."""
    error = {"code": code, "message": message}
    return {"id": f"batch_req_{line_id}", "custom_id": custom_id, "response": None, "error": error}


def to_jsonl(line: Mapping[str, Any]) -> bytes:
    """A line of a file. All of its text is ASCII, for half a surrogate pair could not be written otherwise."""
    return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def row_error_of(error: ApiError) -> RowError:
    """What a row of a job keeps of an error."""
    return RowError(error.code or "invalid_request", str(error).encode("utf-8", "backslashreplace").decode()[:500])


def api_error_of(error: RowError) -> ApiError:
    """The way back from `row_error_of`, and from an engine's error row, to what the endpoint would say."""
    if error.kind == "model_not_found":
        return ApiError(404, error.message, param="model", code=error.kind)
    found = error_of_row(error)
    match = _FIELD_FIRST.match(error.message)
    if match and error.kind in _FIELD_CODES:
        found.param = match[1]
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
