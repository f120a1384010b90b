"""A request of OpenAI's becomes requests of the engine: rendered, tokenised, and checked as a row of a corpus is.

Called by the endpoint, in a thread: a long prompt takes a while to tokenise.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from actors.requests import Request, SamplingParams
from pipeline.job import PromptSection
from pipeline.openai_api.errors import ApiError, error_of_fields, error_of_row
from pipeline.openai_api.fields import ChatRequest, CompletionRequest, SamplingFields
from pipeline.prompt_text import BadPrompt, PromptWriter, encodable, read_messages

OPENAI_DEFAULTS = {"temperature": 1.0}
"""Where OpenAI's differ from a job's. An answer's length is bounded by the context (chat), or by 16 tokens (text)."""

TEXT_MAX_TOKENS = 16

_PLAIN = [
    name for name in SamplingFields.model_fields if name in SamplingParams.model_fields and name != "structured_outputs"
]


class RequestReader:
    """Reads requests for one model.

    tokenizer: transformers'; defaults: sampling for what a request leaves open; max_choices: completions that one
    request may ask for, its prompts times n.
    """

    def __init__(
        self,
        prompt: PromptSection,
        tokenizer: Any,
        *,
        max_model_len: int,
        max_prompt_tokens: int | None = None,
        max_choices: int = 128,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self._writer = PromptWriter(prompt, tokenizer)
        self._has_chat_template = bool(getattr(tokenizer, "chat_template", None))
        self._max_model_len = max_model_len
        self._max_prompt_tokens = max_prompt_tokens
        self._max_choices = max_choices
        self._defaults = {**OPENAI_DEFAULTS, **(defaults or {})}

    def read_chat(self, request: ChatRequest) -> list[Request]:
        """The one engine request of a chat; ApiError for whatever is wrong with it."""
        if not self._has_chat_template:
            raise ApiError(400, "this model's tokenizer has no chat template; use /v1/completions", code="no_chat")
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(
                400, "top_logprobs goes with logprobs: true only", param="top_logprobs", code="invalid_value"
            )
        if request.max_completion_tokens is not None and request.max_tokens is not None:
            raise ApiError(
                400,
                "max_tokens and max_completion_tokens are both set; keep one",
                param="max_tokens",
                code="invalid_value",
            )
        try:
            messages = read_messages([message.model_dump(exclude_unset=True) for message in request.messages])
            token_ids = self._writer.tokenise([self._writer.apply_chat_template(messages)], is_chat=True)
        except BadPrompt as bad:
            raise _about("messages", bad) from bad
        own = {"logprobs": request.top_logprobs or 0} if request.logprobs else {}
        names = {"logprobs": "top_logprobs"}
        if request.max_completion_tokens is not None:
            own["max_tokens"] = request.max_completion_tokens
            names["max_tokens"] = "max_completion_tokens"
        return self._ask(request, token_ids, own, names, "messages")

    def read_completion(self, request: CompletionRequest) -> list[Request]:
        """One engine request per prompt; ApiError for whatever is wrong with any of them."""
        prompt = request.prompt
        if isinstance(prompt, str):
            token_ids = self._tokenise([prompt])
        elif not prompt:
            raise ApiError(400, "prompt is an empty list", param="prompt", code="empty_prompt")
        elif isinstance(prompt[0], str):
            self._check_choices(len(prompt), request.n or 1)
            token_ids = self._tokenise([text for text in prompt if isinstance(text, str)])
        elif isinstance(prompt[0], int):
            token_ids = [[token for token in prompt if isinstance(token, int)]]
        else:
            token_ids = [tokens for tokens in prompt if isinstance(tokens, list)]
        own = {} if request.logprobs is None else {"logprobs": request.logprobs}
        if request.max_tokens is None and "max_tokens" not in self._defaults:
            room = self._max_model_len - max(len(tokens) for tokens in token_ids)
            own["max_tokens"] = max(1, min(TEXT_MAX_TOKENS, room))
        return self._ask(request, token_ids, own, {}, "prompt")

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        try:
            if not all(texts):
                raise BadPrompt("empty_prompt", "the prompt is empty")
            return self._writer.tokenise([encodable(text) for text in texts], is_chat=False)
        except BadPrompt as bad:
            raise _about("prompt", bad) from bad

    def _ask(
        self,
        request: SamplingFields,
        token_ids: list[list[int]],
        own: Mapping[str, Any],
        names: Mapping[str, str],
        prompt_field: str,
    ) -> list[Request]:
        """`own` is laid over the request's fields; `names` says what the client calls a sampling parameter."""
        longest = max(len(tokens) for tokens in token_ids)
        self._check_prompts(min(len(tokens) for tokens in token_ids), longest, prompt_field)
        given = {name: value for name in _PLAIN if (value := getattr(request, name)) is not None} | dict(own)
        if form := _read_form(request):
            given["structured_outputs"] = form
        if request.structured_outputs is None and form:
            names = {**names, "structured_outputs": "response_format"}
        room = self._max_model_len - longest
        settings = {"max_tokens": room, **self._defaults, **given}
        if "max_tokens" not in given:
            settings["max_tokens"] = min(settings["max_tokens"], room)
        sampling = _check_sampling(settings, names)
        if sampling.max_tokens > room:
            field = names.get("max_tokens", "max_tokens")
            raise ApiError(
                400,
                f"the prompt has {longest} tokens and {field} is {sampling.max_tokens}; this model's context holds "
                f"{self._max_model_len}. Shorten the prompt or lower {field}",
                param=field,
                code="context_length_exceeded",
            )
        self._check_choices(len(token_ids), sampling.n)
        has_seed = "seed" in settings
        return [
            Request(str(number), tokens, sampling, sampling.seed if has_seed else secrets.randbelow(2**63))
            for number, tokens in enumerate(token_ids)
        ]

    def _check_choices(self, num_prompts: int, n: int) -> None:
        if num_prompts * n > self._max_choices:
            raise ApiError(
                400,
                f"{num_prompts} prompts with n={n} are more than the {self._max_choices} completions of one request",
                param="n" if n > 1 else "prompt",
                code="too_many_completions",
            )

    def _check_prompts(self, shortest: int, longest: int, field: str) -> None:
        limit = self._max_model_len - 1
        if self._max_prompt_tokens is not None:
            limit = min(limit, self._max_prompt_tokens)
        if shortest == 0:
            raise ApiError(400, "a prompt has no tokens", param=field, code="empty_prompt")
        if longest > limit:
            raise ApiError(
                400,
                f"the prompt has {longest} tokens and at most {limit} are allowed; shorten it",
                param=field,
                code="context_length_exceeded",
            )


def _about(field: str, bad: BadPrompt) -> ApiError:
    error = error_of_row(bad.error)
    error.param = field
    return error


def _read_form(request: SamplingFields) -> dict[str, Any] | None:
    """The form of the answer that a request asks for, in the words of a job's sampling."""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return request.structured_outputs
    if request.structured_outputs is not None:
        raise ApiError(
            400,
            "response_format and structured_outputs are both set; keep one",
            param="response_format",
            code="invalid_value",
        )
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.json_schema is None:
        raise ApiError(
            400,
            "response_format.json_schema is missing",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    return {"json": wanted.json_schema.schema_}


def _check_sampling(settings: Mapping[str, Any], names: Mapping[str, str]) -> SamplingParams:
    try:
        return SamplingParams.model_validate(settings)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_input=False, include_context=False)
        named = [
            {**mistake, "loc": (names.get(str(mistake["loc"][0]), mistake["loc"][0]), *mistake["loc"][1:])}
            if mistake["loc"]
            else {**mistake, "loc": (mistake["msg"].removeprefix("Value error, ").split("=")[0].split(" ")[0],)}
            for mistake in mistakes
        ]
        raise error_of_fields(named) from None
