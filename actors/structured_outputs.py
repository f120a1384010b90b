"""What form an answer must have: a JSON schema, any JSON object, a regular expression, a choice or a grammar.

Checks that a constraint can be followed before there is a tokenizer or a model; `actors.drafters.grammar` follows it.
Part of the sampling parameters, so it is in a job's fingerprint, and a row may have its own.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, Self, TypeVar

from llguidance import LLMatcher, LLParserLimits
from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.dataclasses import dataclass

T = TypeVar("T")

MAX_SCHEMA_BYTES = 256 << 10
MAX_GRAMMAR_BYTES = 32 << 10
"""Longer ones are refused. A grammar's may be shorter, since rules take the library time in their number squared."""

COMPILER_STACK_BYTES = 512 << 20
"""The library walks references and rules by recursion, and a chain of a thousand ends a thread of 8 MiB, and with it
the process. This is 2 KiB for each byte of the longest schema, of which only what is used takes memory."""

WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""Between the parts of JSON. Without an end, a model that has lost its thread writes spaces for ever."""

ONE_LINE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As `json.dumps` writes by default, and so as models have read it most."""

LIMITS = LLParserLimits(max_lexer_states=100_000, verbose_errors=False)
"""About 2 kB a state, so a constraint takes at most some 200 MB; one of ordinary size takes 1 MB."""


def _schema_text(value: Any) -> Any:
    """A schema as text. The order of its keys stays, for it is the order in which an answer has them."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except RecursionError as error:
            raise ValueError("the schema is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"the schema is not valid JSON: {error}") from error
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"the schema is of type {type(value).__name__}, should be an object (or its JSON text)")
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the schema cannot be written as JSON: {error}") from error


def _false_if_null(value: Any) -> Any:
    return False if value is None else value


Flag = Annotated[bool, BeforeValidator(_false_if_null)]
"""Null is false: a struct in a column has all keys in all rows."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class StructuredOutputs:
    """Exactly one of `json`, `json_object`, `regex`, `choice` and `grammar`; names are vLLM's.

    json: a JSON schema, as an object or as text; kept as text. An answer has the properties in the schema's order,
    required or not, and others after them where `additionalProperties` allows that. What the library does not know
    (`not`, `uniqueItems`, `oneOf` whose branches overlap, look-around in patterns ...) is refused, never ignored; the
    key `x-guidance` in a schema sets the library's own options. References lead into the schema itself only.
    grammar: in llguidance's dialect of Lark. disable_any_whitespace: JSON with one space after each comma and
    colon, and none elsewhere; more tokens are forced then, and so come faster. Otherwise up to 40 spaces and new lines
    in a row are allowed between its parts, as in indented JSON.

    What it does not do: a property that is not named in the schema may come twice, and numbers may be too large for a
    float.
    """

    json: Annotated[
        str | None,
        BeforeValidator(_schema_text),
        WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}, {"type": "null"}]}),
        Field(description="a JSON schema, as a mapping or as JSON text"),
    ] = None
    json_object: Annotated[Flag, Field(description="any JSON object")] = False
    regex: Annotated[str | None, Field(description="matched by the whole answer; no look-around")] = None
    choice: Annotated[tuple[str, ...] | None, Field(description="the answer is one of these")] = None
    grammar: Annotated[str | None, Field(description="a grammar in llguidance's dialect of Lark")] = None
    disable_any_whitespace: Annotated[Flag, Field(description="JSON in one line, spaced as json.dumps does")] = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("json", "json_object", "regex", "choice", "grammar") if self._is_given(name)]
        if len(given) != 1:
            names = " and ".join(given) if given else "none"
            raise ValueError(f"set exactly one of json, json_object, regex, choice and grammar, not {names}")
        if self.disable_any_whitespace and given[0] not in ("json", "json_object"):
            raise ValueError(f"disable_any_whitespace is for JSON, and {given[0]} is set; remove it")
        if self.choice is not None and (not self.choice or not all(self.choice)):
            raise ValueError(
                "choice is empty or holds an empty string, which no model can answer with; fill or remove it"
            )
        limit = MAX_SCHEMA_BYTES if given[0] == "json" else MAX_GRAMMAR_BYTES
        grammar = self.to_grammar()
        if len(grammar) > limit:
            raise ValueError(f"{given[0]} is {len(grammar)} characters long, more than {limit}; make it smaller")
        mistake = find_mistake(grammar)
        if mistake:
            raise ValueError(f"{given[0]} cannot be followed: {mistake}")
        return self

    def _is_given(self, name: str) -> bool:
        return getattr(self, name) not in (None, False)

    def to_grammar(self) -> str:
        """The constraint in the form that all of them share, llguidance's own."""
        if self.regex is not None:
            return LLMatcher.grammar_from_regex(self.regex)
        if self.choice is not None:
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(json.dumps(text) for text in self.choice)}")
        if self.grammar is not None:
            return LLMatcher.grammar_from_lark(self.grammar)
        schema = self.json if self.json is not None else '{"type": "object"}'
        if self.disable_any_whitespace:
            return LLMatcher.grammar_from_json_schema(schema, ONE_LINE)
        return LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": WHITESPACE})


@lru_cache(maxsize=64)
def find_mistake(grammar: str) -> str:
    """Why a grammar cannot be followed, in one line; empty if it can. Rows with the same constraint ask again."""
    is_error, messages = call_library(lambda: LLMatcher.validate_grammar_with_warnings(grammar, limits=LIMITS))
    return " ".join(messages[0].split()) if is_error else ""


def call_library(action: Callable[[], T]) -> T:
    """Run what recurses deeply, or may panic, in a thread of its own. ValueError for whatever it raises."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:  # a panic of the library is no Exception
            errors.append(error)

    # The size is of the whole process: another thread that starts just now only reserves more addresses than it needs.
    usual = threading.stack_size(COMPILER_STACK_BYTES)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(usual)
    thread.join()
    if errors:
        raise ValueError(f"{type(errors[0]).__name__}: {errors[0]}") from errors[0]
    return results[0]
