"""The engine's settings, with vLLM's names. One frozen model; unknown keys are errors.

Composed into the job file by `pipeline.job`; read by everything in `actors`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


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
    kv_cache_dtype: Literal["auto"] = "auto"
    max_model_len: Annotated[int | None, Field(ge=1, description="tokens per row; default: the model's own")] = None
    page_size: Annotated[int, Field(ge=1, le=256, description="token slots per page")] = 64
    num_pages: Annotated[int | None, Field(ge=2, description="default: from kv_cache_bytes or free memory")] = None
    kv_cache_bytes: Annotated[int | None, Field(ge=1)] = None
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    max_num_seqs: Annotated[int, Field(ge=1, description="requests in one step")] = 256
    max_num_batched_tokens: Annotated[int, Field(ge=1, description="tokens in one step")] = 4096
    enable_prefix_caching: bool = True
    enable_prefix_groups: Annotated[bool, Field(description="attend pages shared within a step once")] = True
    num_threads: Annotated[int | None, Field(ge=1, description="CPU threads of torch; default: torch's own")] = None
