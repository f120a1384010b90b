"""Completions of the engine become OpenAI's answers: whole, or in the chunks of a stream.

Both kinds of answers have the same four methods, so whoever streams need not know which it is. Choices are numbered
through: prompt 0 has the first n, prompt 1 the next n.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from actors.requests import Completion, FinishReason, Output, TokenLogprob, Usage

LOWEST_LOGPROB = -9999.0
"""OpenAI's word for minus infinity, which JSON does not have."""


def usage_of(usages: Sequence[Usage]) -> dict[str, Any]:
    """OpenAI's counts, summed over a request's prompts."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
    }


class _Answer(ABC):
    """One response: its id and time, and a place for what its choices need from chunk to chunk. `line_id` and
    `created` are given where an answer is written down a second time."""

    whole_object: str
    chunk_object: str

    def __init__(
        self, model: str, prefix: str, fingerprint: str | None, line_id: str | None, created: int | None
    ) -> None:
        self.id = f"{prefix}-{line_id or secrets.token_hex(12)}"
        created = int(time.time()) if created is None else created
        self._head = {"created": created, "model": model, "system_fingerprint": fingerprint}

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The answer at once; completions in the order of the prompts, none with an error."""
        outputs = [output for completion in completions for output in completion.outputs]
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        usage = usage_of([completion.usage for completion in completions])
        return {"id": self.id, "object": self.whole_object, **self._head, "choices": choices, "usage": usage}

    def usage_chunk(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """The chunk without choices that ends a stream whose reader asked for it."""
        return {**self._chunk_head(), "choices": [], "usage": usage_of(usages)}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._chunk_head(), "choices": [choice]}

    def _chunk_head(self) -> dict[str, Any]:
        return {"id": self.id, "object": self.chunk_object, **self._head}

    @abstractmethod
    def _choice(self, index: int, output: Output) -> dict[str, Any]: ...


class ChatAnswer(_Answer):
    whole_object: Literal["chat.completion"] = "chat.completion"
    chunk_object: Literal["chat.completion.chunk"] = "chat.completion.chunk"

    def __init__(
        self, model: str, fingerprint: str | None = None, *, line_id: str | None = None, created: int | None = None
    ) -> None:
        super().__init__(model, "chatcmpl", fingerprint, line_id, created)

    def opening_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        """What a stream begins with: the role of each choice."""
        return [
            self._chunk(_chat_delta(index, {"role": "assistant", "content": "", "refusal": None}))
            for index in range(num_choices)
        ]

    def text_chunk(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """More text of a choice, with the log probabilities of the tokens that came meanwhile."""
        return self._chunk(_chat_delta(index, {"content": text}, _chat_logprobs(logprobs)))

    def last_chunk(self, index: int, finish_reason: FinishReason) -> dict[str, Any]:
        """The end of a choice."""
        return self._chunk(_chat_delta(index, {}, finish_reason=finish_reason))

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": _chat_logprobs(output.logprobs),
            "finish_reason": output.finish_reason,
        }


class TextAnswer(_Answer):
    whole_object: Literal["text_completion"] = "text_completion"
    chunk_object: Literal["text_completion"] = "text_completion"

    def __init__(
        self, model: str, fingerprint: str | None = None, *, line_id: str | None = None, created: int | None = None
    ) -> None:
        super().__init__(model, "cmpl", fingerprint, line_id, created)
        self._offsets: Counter[int] = Counter()  # by choice: characters of the tokens whose logprobs are out

    def opening_chunks(self, num_choices: int) -> list[dict[str, Any]]:
        return []

    def text_chunk(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        return self._chunk(_text_choice(index, text, self._text_logprobs(index, logprobs), None))

    def last_chunk(self, index: int, finish_reason: FinishReason) -> dict[str, Any]:
        return self._chunk(_text_choice(index, "", None, finish_reason))

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        return _text_choice(index, output.text, self._text_logprobs(index, output.logprobs), output.finish_reason)

    def _text_logprobs(self, index: int, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        offsets = []
        for token in logprobs:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.token)
        return {
            "tokens": [token.token for token in logprobs],
            "token_logprobs": [_finite(token.logprob) for token in logprobs],
            "top_logprobs": [{text: _finite(logprob) for _, text, logprob in token.top} for token in logprobs],
            "text_offset": offsets,
        }


def _chat_delta(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: FinishReason | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _text_choice(
    index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: FinishReason | None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _chat_logprobs(logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    content = [
        {
            **_token(token.token, token.logprob),
            "top_logprobs": [_token(text, logprob) for _, text, logprob in token.top],
        }
        for token in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    # A token that is part of a character only has no text of its own; its bytes are not known here.
    bytes_of = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
    return {"token": text, "logprob": _finite(logprob), "bytes": bytes_of}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
