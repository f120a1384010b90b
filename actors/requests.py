"""What goes into an engine and what comes out: sampling parameters, requests, completions.

Knows no tensors, no files and no Ray. Everybody above `actors` speaks these types.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.structured_outputs import StructuredOutputs

FinishReason = Literal["stop", "length", "error"]

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy, as in vLLM."""

MAX_PRIORITY = 1 << 14
"""Priorities lie between this and minus this."""


class SamplingParams(BaseModel):
    """How the tokens of one row are chosen; names and meanings are vLLM's.

    `seed` is the seed of the whole job; a row that sets its own `seed` is sampled with exactly that one. With
    `structured_outputs` an answer ends where its form is complete, whatever `min_tokens` and `ignore_eos` say, and
    `max_tokens` or `stop` may end it before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    n: Annotated[int, Field(ge=1, le=128, description="completions per row")] = 1
    temperature: Annotated[float, Field(ge=0.0, le=100.0, description="0 is greedy")] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=-1, description="-1 and 0: all tokens")] = -1
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: Annotated[int, Field(ge=1)] = 256
    min_tokens: Annotated[int, Field(ge=0)] = 0
    logprobs: Annotated[int | None, Field(ge=0, le=20, description="top tokens to report per token")] = None
    structured_outputs: Annotated[
        StructuredOutputs | None, Field(description="the form of the answer: a JSON schema, a choice ...")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _accept_one_stop_string(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("stop"), str):
            return {**data, "stop": (data["stop"],)}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}; lower it")
        if any(not s for s in self.stop):
            raise ValueError("stop holds an empty string, which would end every answer at once; remove it")
        return self

    @property
    def has_penalties(self) -> bool:
        """Whether the logits of a token depend on the tokens before it beside what the model makes of them."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE


@dataclass(frozen=True, slots=True)
class Request:
    """A row inside the engine. `seed` is the row's own 64-bit seed, already derived from the job's. A lower `priority`
    comes sooner, as in vLLM, and takes places and pages from higher ones; it changes no answer."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    seed: int = 0
    priority: int = 0

    def __post_init__(self) -> None:
        if abs(self.priority) > MAX_PRIORITY:
            raise ValueError(f"priority={self.priority} is not between {-MAX_PRIORITY} and {MAX_PRIORITY}")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of a chosen token under the raw logits, and of the likeliest ones beside it."""

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(slots=True)
class Output:
    """One of a row's `n` completions. `token_ids` holds what was generated, a final stop token included;
    `text` ends before a stop string and leaves special tokens out."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    mean_logprob: float | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass(slots=True)
class Usage:
    """OpenAI's counts, and what the row cost. `device_seconds` over all rows and named overheads sum to the
    time that the device was held. Of the prompt tokens that were not cached, `evicted_tokens` had been computed by this
    engine before and were lost for want of pages; the others it had never seen behind the same beginning."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    device_seconds: float = 0.0
    time_to_first_token_s: float | None = None
    inter_token_s: float | None = None  # mean over the row's tokens after the first
    num_preemptions: int = 0
    evicted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class DrafterStats:
    """What one drafter of an engine has done so far. `failed` is why it was switched off; empty while it works."""

    name: str
    drafted_tokens: int
    accepted_tokens: int
    proposing_s: float
    failed: str = ""


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row has no answer. `kind` is a short stable word (see the README's table), `message` is for a person."""

    kind: str
    message: str


@dataclass(slots=True)
class Completion:
    """The answer to one Request; `outputs` is empty exactly when `error` is set."""

    request_id: str
    outputs: list[Output] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    error: RowError | None = None


class EngineError(RuntimeError):
    """The engine itself is broken (not a row): whoever holds it should build a new one and try the rows again."""


def derive_seed(*parts: int | str) -> int:
    """Mix any number of integers and strings into one seed in [0, 2**63)."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
