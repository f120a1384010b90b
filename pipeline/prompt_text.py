"""Texts and OpenAI-style messages become the tokens that a model reads, or a BadPrompt that says why not.

What a row and a request to the endpoint have in common. Knows no columns and no HTTP. Called by `pipeline.prompts` and
by the endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.requests import RowError
from pipeline.job import PromptSection

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

_MESSAGE_CHARACTERS = 500


class BadPrompt(Exception):  # noqa: N818
    """Carries a RowError to where the row, or the request, is given up."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        shown = message if len(message) <= _MESSAGE_CHARACTERS else message[: _MESSAGE_CHARACTERS - 3] + "..."
        self.error = RowError(kind, shown.encode("utf-8", "backslashreplace").decode())


class PromptWriter:
    """Writes prompts for one tokenizer (of transformers) by one `prompt` section of settings."""

    def __init__(self, prompt: PromptSection, tokenizer: Any) -> None:
        self._prompt = prompt
        self._tokenizer = tokenizer

    def apply_chat_template(self, messages: list[dict[str, Any]]) -> str:
        """The text of messages that `read_messages` gave; BadPrompt when the template refuses them."""
        prompt = self._prompt
        if prompt.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": prompt.system}, *messages]
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=prompt.add_generation_prompt,
                **prompt.chat_template_kwargs,
            )
        except Exception as error:  # a template is a program: a role out of order ends in whatever it raises
            raise BadPrompt("template_error", f"chat template: {type(error).__name__}: {error}") from error
        return encodable(str(text))

    def tokenise(self, texts: Sequence[str], *, is_chat: bool) -> list[list[int]]:
        """Token ids per text, in one call of the tokenizer.

        A chat template writes its own special tokens, so none are added to its text.
        """
        encoded: list[list[int]] = self._tokenizer(
            list(texts),
            add_special_tokens=not is_chat,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return encoded if is_chat else [self._without_second_bos(text, ids) for text, ids in zip(texts, encoded)]

    def _without_second_bos(self, text: str, ids: list[int]) -> list[int]:
        """A prompt that begins with the BOS text already would get a second one from the tokenizer."""
        bos, bos_id = self._tokenizer.bos_token, self._tokenizer.bos_token_id
        return ids[1:] if bos and text.startswith(bos) and ids[:2] == [bos_id, bos_id] else ids


def encodable(text: str) -> str:
    """The text itself; BadPrompt if it cannot be UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadPrompt(
            "invalid_text", f"the prompt has half a surrogate pair at character {error.start}; it is no valid text"
        ) from error
    return text


def read_messages(value: Any) -> list[dict[str, Any]]:
    """Messages with plain text contents, as chat templates want them; BadPrompt if `value` is none."""
    if not isinstance(value, list):
        raise BadPrompt("invalid_messages", f"messages is of type {type(value).__name__}, should be a list")
    if not value:
        raise BadPrompt("empty_prompt", "messages is an empty list")
    messages = [_read_message(message, number) for number, message in enumerate(value)]
    if not any(message["content"] or message.get("tool_calls") for message in messages):
        raise BadPrompt("empty_prompt", "all messages are empty")
    return messages


def _read_message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadPrompt(
            "invalid_messages", f"message {number} is of type {type(message).__name__}, should be a mapping"
        )
    given = {key: value for key, value in message.items() if value is not None}  # a struct has all keys in all rows
    role = given.get("role")
    if role not in ROLES:
        raise BadPrompt("invalid_messages", f"message {number} has role {role!r}, should be one of {', '.join(ROLES)}")
    if "content" not in given and not given.get("tool_calls"):
        raise BadPrompt("invalid_messages", f"message {number} has no content")
    return {**given, "content": _read_content(given.get("content", ""), number)}


def _read_content(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadPrompt(
            "invalid_messages",
            f"content of message {number} is of type {type(content).__name__}, should be text or a list of text parts",
        )
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise BadPrompt("invalid_messages", f"part {index} of message {number} is no text part; only text is read")
    return "\n".join(text for text in texts if isinstance(text, str))
