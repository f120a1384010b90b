"""The engine's settings, with vLLM's names. One frozen model; unknown keys are errors.

Composed into the job file by `pipeline.job`; read by everything in `actors`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SpeculativeConfig(BaseModel):
    """Speculative decoding, with vLLM's names. It changes the speed and never a token.

    "auto" drafts from the prompt, from what the corpus has answered and, if `model` is given, with a draft model, and
    takes as many tokens of each draft as pay by the measured step times, down to none. The other methods always take
    as many as there are, up to `num_speculative_tokens`: "ngram" from the prompt, "corpus" from earlier answers,
    "draft_model", and "combined" from all of these.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    method: Literal["auto", "none", "ngram", "corpus", "draft_model", "combined"] = "auto"
    model: Annotated[
        str | None, Field(description="Hugging Face directory of a draft model with the same tokenizer")
    ] = None
    num_speculative_tokens: Annotated[int, Field(ge=1, le=64, description="draft tokens per request and step")] = 16
    prompt_lookup_min: Annotated[int, Field(ge=1, description="shortest n-gram looked up")] = 1
    prompt_lookup_max: Annotated[int, Field(ge=1, description="longest n-gram looked up")] = 4
    corpus_index_bytes: Annotated[int, Field(ge=1 << 16, description="bound of the index over answers")] = 64 << 20
    quantization: Annotated[Literal["auto", "none", "int4"], Field(description="of the draft model")] = "int4"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min={self.prompt_lookup_min} is above prompt_lookup_max={self.prompt_lookup_max}"
                "; swap them"
            )
        if self.method == "draft_model" and self.model is None:
            raise ValueError("method is draft_model and no model is named; set speculative_config.model")
        if self.model is not None and self.method in ("none", "ngram", "corpus"):
            raise ValueError(
                f"method={self.method!r} uses no draft model, yet model={self.model!r} is set; "
                "use method draft_model, combined or auto, or remove the model"
            )
        return self


class EngineConfig(BaseModel):
    """Everything that an engine needs to know before it sees a request."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Annotated[str, Field(description="Hugging Face directory: a local path or any fsspec URI")]
    tokenizer: Annotated[str | None, Field(description="where the tokenizer is, when not beside the model")] = None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(
            description="of activations; auto: the checkpoint's on a GPU; on a CPU bfloat16 if it has the instructions"
        ),
    ] = "auto"
    quantization: Annotated[
        Literal["auto", "none", "int4"],
        Field(description="auto: as the checkpoint is; int4: round a 16-bit checkpoint to nearest at load"),
    ] = "auto"
    group_size: Annotated[Literal[32, 64, 128], Field(description="weights per scale, for int4 made at load")] = 32
    linear_compute: Annotated[
        Literal["auto", "int4", "dense"],
        Field(description="on a CPU: multiply packed int4, a dense copy, or whichever was measured to be faster"),
    ] = "auto"
    kv_cache_dtype: Annotated[
        Literal["auto", "bf16", "int8", "fp8"],
        Field(description="of keys and values; auto: the activations'; int8, fp8: a scale per token and head"),
    ] = "auto"
    deterministic: Annotated[
        bool,
        Field(
            description="the same bytes for any batch, order, number of actors, cache, speculation or resume; slower"
        ),
    ] = False
    speculative_config: SpeculativeConfig = SpeculativeConfig()
    max_model_len: Annotated[int | None, Field(ge=1, description="tokens per row; default: the model's own")] = None
    page_size: Annotated[int, Field(ge=1, le=256, description="token slots per page")] = 64
    num_pages: Annotated[int | None, Field(ge=2, description="default: from kv_cache_bytes or free memory")] = None
    kv_cache_bytes: Annotated[int | None, Field(ge=1)] = None
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    max_num_seqs: Annotated[int, Field(ge=1, description="requests in one step")] = 256
    max_num_batched_tokens: Annotated[
        int | None,
        Field(ge=1, description="tokens in one step; default: as many as raise tokens per second, at most 4096"),
    ] = None
    enable_prefix_caching: bool = True
    enable_prefix_groups: Annotated[bool, Field(description="attend pages shared within a step once")] = True
    enforce_eager: Annotated[bool, Field(description="launch each kernel instead of capturing CUDA graphs")] = False
    async_scheduling: Annotated[
        bool | None,
        Field(description="prepare the next step while the device computes one; default: on CUDA, not on a CPU"),
    ] = None
    num_threads: Annotated[int | None, Field(ge=1, description="CPU threads of torch; default: torch's own")] = None
