"""What is wrong with a request, as OpenAI's clients expect it: status, message, type, param and code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actors.requests import RowError

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

_CODES_OF_ROWS = {"prompt_too_long": "context_length_exceeded"}

_FAULTS_OF_OURS = ("not_finite", "engine_error")
"""Kinds of row errors that no other prompt would have avoided for sure."""


class ApiError(Exception):
    """Ends a request. `param` is the offending field, `code` a stable word, `headers` go with the response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def error_of_row(error: RowError) -> ApiError:
    """The same mistake as an error row of a corpus would have."""
    if error.kind in _FAULTS_OF_OURS:
        return ApiError(500, error.message, code=error.kind)
    return ApiError(400, error.message, code=_CODES_OF_ROWS.get(error.kind, error.kind))


def error_of_fields(mistakes: Sequence[Any], *, prefix: tuple[str, ...] = ()) -> ApiError:
    """From pydantic's list of mistakes, the first field's; never repeats a value, which may be a whole prompt."""
    named = [
        (_name_field(mistake["loc"], prefix), mistake["msg"].removeprefix("Value error, ")) for mistake in mistakes
    ]
    field = named[0][0]
    # Pydantic tries all branches of a union; what it says of their parts belongs to the same field.
    reasons = [f"{name}: {text}" if name != field else text for name, text in named if name.startswith(field)]
    message = "; or ".join(dict.fromkeys(reasons))
    missing = mistakes[0]["type"] == "missing"
    if not field:
        return ApiError(400, f"the body is not a valid request: {message}", code="invalid_body")
    return ApiError(
        400,
        f"{field}: {message}",
        param=field,
        code="missing_required_parameter" if missing else "invalid_value",
    )


def _name_field(location: Sequence[int | str], prefix: tuple[str, ...]) -> str:
    """As OpenAI writes it: messages[0].role. Pydantic also names the branch of a union that it tried; not OpenAI."""
    name = ""
    parts = list(location)
    if tuple(parts[: len(prefix)]) == prefix:
        parts = parts[len(prefix) :]
    for part in parts:
        if isinstance(part, int):
            name += f"[{part}]" if name else ""  # without a field before it: where in the text the JSON broke off
        elif part.isidentifier() and part not in ("str", "int", "float", "bool", "TextPart"):
            name += f".{part}" if name else part
    return name
