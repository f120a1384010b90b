"""The endpoint's settings: which model, how it answers, who may ask, and how much. Sections are those of the job file
where they mean the same. Knows no Ray; read by `jobs.serve` and everything here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from actors.config import EngineConfig
from actors.requests import SamplingParams
from pipeline.job import NAMED_MODELS, PromptSection, explain_validation_error, locate_model
from pipeline.settings_file import JobError, merge_settings, parse_override, read_yaml
from pipeline.storage import absolute_uri


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class AccessSection(_Section):
    """Who may ask. Without keys everybody may, which has to be said unless only this machine can."""

    api_key_file: Annotated[str | None, Field(description="per line a key, or sha256: and its digest")] = None
    api_key_env: Annotated[
        str | None, Field(description="variable with keys, separated by commas, where the endpoint is started")
    ] = None
    allow_anonymous: bool = False


class RequestLimits(_Section):
    """What one request may ask for, and how many may wait for how long. Beyond the last two, 429 with Retry-After."""

    max_body_bytes: Annotated[int, Field(ge=1024)] = 4 << 20
    body_timeout_s: Annotated[float, Field(gt=0, description="for the whole body to arrive")] = 30.0
    max_prompt_tokens: Annotated[int | None, Field(ge=1, description="default: what the context holds")] = None
    max_choices: Annotated[int, Field(ge=1, description="completions of one request: its prompts times n")] = 128
    stream_interval_s: Annotated[
        float, Field(ge=0, le=10, description="between two pieces of a stream at least; faster tokens share one")
    ] = 0.02
    max_queue: Annotated[
        int, Field(ge=0, description="completions that may wait beside engine.max_num_seqs that run, per replica")
    ] = 64
    max_queue_s: Annotated[
        float, Field(ge=0, description="and only while a place is expected within so many seconds; 0: nobody waits")
    ] = 0.5


class ReplicaSection(_Section):
    """How many engines. min 0: none while nobody asks, and the first to ask waits for one to start."""

    min: Annotated[int, Field(ge=0)] = 1
    max: Annotated[int, Field(ge=1)] = 1
    num_gpus: Annotated[
        float | None, Field(ge=0, description="per replica; default: 1 where the engine runs on CUDA, else 0")
    ] = None
    num_cpus: Annotated[float, Field(ge=0, description="per replica")] = 1.0
    idle_s: Annotated[float, Field(ge=0, description="without work, before a replica is ended")] = 300.0
    drain_s: Annotated[float, Field(ge=0, description="for running requests, when a replica is ended")] = 60.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}; swap them")
        return self


class BatchSection(_Section):
    """/v1/files and /v1/batches. What they hold outlives the endpoint, so they need a place for it."""

    storage: Annotated[
        str | None, Field(description="folder, local or any fsspec URI, of this endpoint alone; none: no batches")
    ] = None
    max_file_bytes: Annotated[int, Field(ge=1024, description="of one file")] = 200 << 20
    max_requests: Annotated[int, Field(ge=1, description="lines of one batch")] = 50_000
    max_storage_bytes: Annotated[int, Field(ge=1024, description="of all files; beyond them no uploads")] = 20 << 30
    upload_timeout_s: Annotated[float, Field(gt=0, description="for a whole file to arrive")] = 600.0
    keep_s: Annotated[
        float, Field(ge=3600, description="until files expire that say nothing of it, and batches are forgotten")
    ] = 30 * 86400.0
    max_num_seqs: Annotated[
        int | None,
        Field(ge=1, description="completions of batches that run at once; default: half of engine.max_num_seqs"),
    ] = None


class EndpointConfig(_Section):
    """One model, online."""

    model: Annotated[
        str, Field(description="Hugging Face directory (a path or any fsspec URI), or the word demo: the shipped model")
    ]
    served_model_name: Annotated[
        str | None, Field(description="what clients call it; default: the last part of its place")
    ] = None
    engine: EngineConfig
    prompt: PromptSection = PromptSection()
    sampling: Annotated[SamplingParams, Field(description="for what a request leaves open; only keys set here")] = (
        SamplingParams()
    )
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    access: AccessSection = AccessSection()
    limits: RequestLimits = RequestLimits()
    replicas: ReplicaSection = ReplicaSection()
    batches: BatchSection = BatchSection()

    @model_validator(mode="before")
    @classmethod
    def _name_the_model_once(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("engine") or {}, dict):
            return data
        return {**data, "engine": {**(data.get("engine") or {}), "model": data.get("model") or ""}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompt.template is not None or self.prompt.chat_template is not None:
            raise ValueError(
                "prompt.template and prompt.chat_template are a job's: here a client says by the route what it sends"
            )
        if self.limits.max_choices > self.num_places:
            raise ValueError(
                f"limits.max_choices={self.limits.max_choices} would never find room beside "
                f"engine.max_num_seqs={self.engine.max_num_seqs} and limits.max_queue={self.limits.max_queue}; lower it"
            )
        if self.batches.storage is not None and self.replicas.min == 0:
            raise ValueError(
                "batches.storage is set and replicas.min is 0: an engine that ends while nobody asks would leave "
                "batches undone; set replicas.min: 1, or leave batches out"
            )
        return self

    @property
    def num_places(self) -> int:
        """Completions that may run or wait in one replica."""
        return self.engine.max_num_seqs + self.limits.max_queue

    @property
    def name(self) -> str:
        return self.served_model_name or self.model.rstrip("/").rsplit("/", 1)[-1]

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The keys of `sampling` that somebody set."""
        return {key: getattr(self.sampling, key) for key in self.sampling.model_fields_set}

    def resolve(self, named_models: Mapping[str, str]) -> EndpointConfig:
        """A new configuration with absolute places, and the name that clients use."""
        here = Path.cwd()
        model = locate_model("model", self.model, named_models, here)
        tokenizer = locate_model("engine.tokenizer", self.engine.tokenizer or model, named_models, here)
        speculative = self.engine.speculative_config
        if speculative.model is not None:
            drafts = {word: named_models[f"{word}/draft"] for word in NAMED_MODELS}
            draft = locate_model("engine.speculative_config.model", speculative.model, drafts, here)
            speculative = speculative.model_copy(update={"model": draft})
        engine = self.engine.model_copy(
            update={"model": model, "tokenizer": tokenizer, "speculative_config": speculative}
        )
        batches = self.batches
        if batches.storage is not None:
            batches = batches.model_copy(update={"storage": absolute_uri(batches.storage, here)})
        return self.model_copy(
            update={"model": model, "engine": engine, "served_model_name": self.name, "batches": batches}
        )


def load_endpoint(path: str | None, settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> EndpointConfig:
    """Read an endpoint's file, if any, and lay `settings` and `key.subkey=value` overrides over it; JobError if the
    result is not valid. A relative model, or storage of batches, in the file is relative to the file."""
    data: dict[str, Any] = {}
    if path is not None:
        data = read_yaml(path)
        base = Path(path).absolute().parent
        if isinstance(data.get("model"), str) and data["model"] not in NAMED_MODELS:
            data["model"] = absolute_uri(data["model"], base)
        batches = data.get("batches")
        if isinstance(batches, dict) and isinstance(batches.get("storage"), str):
            data["batches"] = {**batches, "storage": absolute_uri(batches["storage"], base)}
    data = merge_settings(data, settings)
    for override in overrides:
        data = merge_settings(data, parse_override(override))
    try:
        return EndpointConfig.model_validate(data)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in explain_validation_error(error, EndpointConfig))
        raise JobError(f"{path or 'the endpoint'}: the settings are not valid\n{lines}") from error
