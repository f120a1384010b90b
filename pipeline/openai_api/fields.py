"""The fields of a request, as OpenAI and vLLM name them: those that are obeyed, ignored and refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from pipeline.openai_api.errors import ApiError

IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""They change no answer here. A response says in a header which of them it ignored."""

REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1.0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""They would change the answer and are not supported: only null and these values, which change nothing, pass."""

MAX_STOP_STRINGS = 4  # OpenAI's

T = TypeVar("T")

_Few = Annotated[list[T], Field(fail_fast=True)]
"""A list of which the first wrong item is enough: a million of them would make a million mistakes."""


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Fields):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextPart(_Fields):
    type: Literal["text"]
    text: str


class SchemaFormat(_Fields):
    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(_Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class Message(_Fields):
    """Further fields (name, tool_calls ...) go to the chat template as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | _Few[TextPart] | None = None


class SamplingFields(_Fields):
    """What both kinds of requests have. Null is as good as left out; ranges are those of a job's `sampling`."""

    model: str
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Annotated[dict[str, Any] | None, Field(description="as in a job's sampling")] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(SamplingFields):
    prompt: str | _Few[str] | _Few[int] | _Few[_Few[int]]
    logprobs: int | None = None


class ChatRequest(SamplingFields):
    messages: Annotated[_Few[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


def ignored_fields(request: SamplingFields) -> list[str]:
    """The names of fields that have no effect here; ApiError for one that would have to have one."""
    ignored = []
    for name, value in (request.model_extra or {}).items():
        if name in IGNORED:
            ignored.append(name)
        elif name not in REFUSED:
            raise ApiError(400, f"{_shorten(name)}: unknown field", param=_shorten(name), code="unknown_parameter")
        elif value is not None and not any(value == neutral for neutral in REFUSED[name]):
            raise ApiError(
                400, f"{name} is not supported by this server; leave it out", param=name, code="unsupported_parameter"
            )
    if request.stream_options is not None:
        if not request.stream:
            raise ApiError(
                400, "stream_options goes with stream: true only", param="stream_options", code="invalid_value"
            )
        if request.stream_options.include_obfuscation:
            ignored.append("stream_options.include_obfuscation")
    return sorted(ignored)


def _shorten(name: str) -> str:
    return name if len(name) <= 64 else f"{name[:61]}..."
