"""When a completion ends, and the text that it ends with."""

from __future__ import annotations

from typing import Any

from actors.requests import FinishReason
from actors.sequence import Sequence


def finish_reason_of(sequence: Sequence, eos_token_ids: tuple[int, ...], tokenizer: Any) -> FinishReason | None:
    """Judge a sequence by the token it just got: None while it goes on."""
    sampling = sequence.request.sampling
    token = sequence.token_ids[-1]
    if sequence.matcher is not None and sequence.matcher.is_done:
        return "stop"
    if sequence.num_generated >= sampling.min_tokens:
        if token in sampling.stop_token_ids or (not sampling.ignore_eos and token in eos_token_ids):
            return "stop"
        if sampling.stop and _ends_in_stop_string(sequence, tokenizer):
            return "stop"
    return "length" if len(sequence.token_ids) >= sequence.max_len else None


def text_of(sequence: Sequence, eos_token_ids: tuple[int, ...], tokenizer: Any) -> str:
    """The text of a finished sequence: without special tokens, the token it stopped at, or a stop string."""
    token_ids = sequence.output_token_ids
    sampling = sequence.request.sampling
    if sequence.finish_reason == "stop" and token_ids and token_ids[-1] in (*sampling.stop_token_ids, *eos_token_ids):
        token_ids = token_ids[:-1]
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if sequence.finish_reason == "stop":
        cuts = [at for at in (text.find(stop) for stop in sampling.stop) if at >= 0]
        text = text[: min(cuts)] if cuts else text
    return text


def banned_tokens(sequence: Sequence, num_drafts: int, eos_token_ids: tuple[int, ...]) -> list[int]:
    """Tokens that may not come after `num_drafts` further ones because `min_tokens` is not reached."""
    sampling = sequence.request.sampling
    if sequence.num_generated + num_drafts >= sampling.min_tokens:
        return []
    if sequence.matcher is not None:
        return [*sampling.stop_token_ids, *sequence.matcher.end_token_ids]
    return [*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_token_ids)]


def _ends_in_stop_string(sequence: Sequence, tokenizer: Any) -> bool:
    # A token is at least one byte, so a stop string that the newest token completes lies within as many tokens as it
    # has bytes; a few more, because the first character of a decoded window may be cut.
    sampling = sequence.request.sampling
    window = max(len(stop.encode()) for stop in sampling.stop) + 4
    first = max(sequence.num_prompt, len(sequence.token_ids) - window)
    tail = tokenizer.decode(sequence.token_ids[first:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return any(stop in tail for stop in sampling.stop)
