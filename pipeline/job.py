"""The job file: what to answer, with which model, how, where to, and within which limits.

One frozen model of the whole YAML, its defaults, its checks, and the fingerprint of everything that changes results.
Knows no Ray and loads no weights. Read by everything in `pipeline` and `jobs`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import jinja2
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic.json_schema import SkipJsonSchema

from actors.config import EngineConfig
from actors.requests import SamplingParams
from pipeline.fields.field_order import FieldOrder
from pipeline.fields.template_fields import TemplateColumns, read_template
from pipeline.settings_file import JobError, merge_settings, parse_override, read_yaml
from pipeline.storage import Storage, StorageError, absolute_uri, public_uri

FINGERPRINT_VERSION = 1
"""Raised whenever a new Shoal answers the same job differently."""

NAMED_MODELS = ("demo",)
"""Words that stand for a model directory, and for its draft model's in `speculative_config.model`; `resolve` is told
where each is."""

ENGINE_FIELDS_WITHOUT_EFFECT_ON_RESULTS = frozenset(
    {
        "model",  # its identity counts, not its place
        "tokenizer",
        "device",
        "page_size",
        "num_pages",
        "kv_cache_bytes",
        "gpu_memory_utilization",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enable_prefix_caching",
        "enable_prefix_groups",
        "enforce_eager",
        "async_scheduling",
        "num_threads",
        "speculative_config",
    }
)
"""All other engine fields are in the fingerprint, so a new one is there until somebody says otherwise."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_WHOLE_BYTES = 2**23
_SAMPLE_BYTES = 2**16
_NUM_SAMPLES = 16


JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")


class FingerprintMismatch(ValueError):  # noqa: N818  (the word of the documentation)
    """The output belongs to another job; the message says which fields differ."""


class _Section(BaseModel):
    """What all sections share: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class InputSection(_Section):
    """Where the rows are and which columns matter. Name `prompt_column` or `messages_column`, or give
    `prompt.template` over named columns. Files in OpenAI's Batch format say all of that themselves."""

    path: Annotated[str | tuple[str, ...], Field(description="URI of a file or folder, a glob, or a list of these")]
    format: Annotated[
        Literal["parquet", "openai_batch"] | None,
        Field(description="default: openai_batch if the path ends in .jsonl or .jsonl.gz, else parquet"),
    ] = None
    served_model_name: Annotated[
        str | None,
        Field(description="what the lines of a Batch file call the model; default: the last part of its place"),
    ] = None
    prompt_column: Annotated[str | None, Field(description="column of texts")] = None
    messages_column: Annotated[
        str | None, Field(description="column of OpenAI-style messages: a list of structs, or JSON text")
    ] = None
    id_column: Annotated[
        str | None, Field(description="seeds a row's sampling noise; without it the shard's name and row number do")
    ] = None
    sampling_column: Annotated[
        str | None, Field(description="a row's own sampling parameters: a struct, or JSON text; null for none")
    ] = None
    passthrough: Annotated[
        Literal["all", "none"] | tuple[str, ...], Field(description="input columns to repeat in the results")
    ] = "all"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.path:
            raise ValueError("path is empty; name at least one file, folder or glob")
        paths = (self.path,) if isinstance(self.path, str) else self.path
        are_jsonl = {path.lower().endswith(JSONL_SUFFIXES) for path in paths}
        if self.format is None and len(are_jsonl) > 1:
            raise ValueError("path names both .jsonl files and others; one run reads one format")
        if self.served_model_name is not None and not self.is_batch_jsonl:
            raise ValueError("served_model_name is for Batch files (.jsonl), whose lines name a model; remove it")
        if self.prompt_column and self.messages_column:
            raise ValueError(
                f"prompt_column={self.prompt_column!r} and messages_column={self.messages_column!r} are both set; "
                "keep the one that holds the prompts"
            )
        columns = {"prompt_column", "messages_column", "id_column", "sampling_column"}
        if self.is_batch_jsonl and (named := sorted(name for name in columns if getattr(self, name))):
            raise ValueError(f"{', '.join(named)}: lines of a Batch file say by themselves what is what; remove it")
        return self

    @property
    def is_batch_jsonl(self) -> bool:
        """Whether the files are OpenAI Batch JSONL."""
        if self.format is not None:
            return self.format == "openai_batch"
        paths = (self.path,) if isinstance(self.path, str) else self.path
        return all(path.lower().endswith(JSONL_SUFFIXES) for path in paths)


class PromptSection(_Section):
    """How a row becomes the text that the model reads."""

    chat_template: Annotated[
        bool | None, Field(description="wrap in the tokenizer's chat template; default: for messages_column only")
    ] = None
    system: Annotated[
        str | None, Field(description="system message for rows without their own; needs the chat template")
    ] = None
    template: Annotated[str | None, Field(description="jinja2 text over column names, instead of prompt_column")] = None
    add_generation_prompt: bool = True
    chat_template_kwargs: Annotated[
        dict[str, JsonValue], Field(description="further variables for the chat template")
    ] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.template is not None:
            try:
                columns = self.template_columns
            except jinja2.TemplateError as error:
                raise ValueError(f"template is not valid jinja2: {error}") from error
            if not columns:
                raise ValueError("template names no column, so all rows would be the same; write {{ column }}")
        return self

    @cached_property
    def _template_columns(self) -> TemplateColumns:
        return TemplateColumns(()) if self.template is None else read_template(self.template)

    @property
    def template_columns(self) -> tuple[str, ...]:
        """The columns that the template reads, by name."""
        return self._template_columns.columns

    @property
    def template_fields(self) -> tuple[str, ...]:
        """Those that it writes by `{{ fields(...) }}`, in whose place any order will do."""
        return self._template_columns.fields


class PoolSection(_Section):
    """How many engines, and what each holds of the cluster."""

    num_actors: Annotated[
        Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]],
        Field(description="a number, or [min, max] to grow and shrink with the work"),
    ] = 1
    num_gpus: Annotated[
        float | None, Field(ge=0, description="per actor; default: 1 where the engine runs on CUDA, else 0")
    ] = None
    num_cpus: Annotated[float, Field(ge=0, description="per actor")] = 1.0
    max_slices_in_flight: Annotated[
        int, Field(ge=1, le=64, description="per actor, so that its batch never drains at a slice's border")
    ] = 4

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.num_actors, tuple) and self.num_actors[0] > self.num_actors[1]:
            raise ValueError(f"num_actors={list(self.num_actors)} has its minimum above its maximum; swap them")
        return self


class OutputSection(_Section):
    path: Annotated[str, Field(min_length=1, description="folder for results, local or any fsspec URI")]


class LimitsSection(_Section):
    """When a run ends early, with valid output that the same command continues."""

    max_error_fraction: Annotated[
        float, Field(ge=0.0, le=1.0, description="exit 3 above this share of error rows; 1 is never")
    ] = 1.0
    budget_usd: Annotated[float | None, Field(gt=0, description="exit 4 once this much is spent")] = None
    deadline_s: Annotated[float | None, Field(gt=0, description="exit 4 after this many seconds")] = None


class PricingSection(_Section):
    usd_per_device_hour: Annotated[
        float | None, Field(ge=0, description="of one GPU, or of one CPU worker; default: a list price of the device")
    ] = None
    currency: Literal["USD"] = "USD"


class PlanSection(_Section):
    """What is planned together, and how that is cut into slices, the units of work, of retry and of checkpoint."""

    scope: Annotated[
        Literal["auto", "shard", "corpus"],
        Field(description="plan each shard by itself, or all as one corpus; auto: what a sample says is cheaper"),
    ] = "auto"
    slice_tokens: Annotated[
        int, Field(ge=1, description="prompt tokens per slice, those shared with the row before not counted")
    ] = 65536
    max_rows_per_slice: Annotated[int, Field(ge=1)] = 256
    reorder_fields: Annotated[
        bool,
        Field(description="order the columns of {{ fields(...) }} per row so that prompts share most; changes prompts"),
    ] = False
    mix: Annotated[
        Literal["auto", "off"],
        Field(description="auto: long prompts among long answers, in slices where step times say that it is faster"),
    ] = "auto"


class QualitySection(_Section):
    """Compare the model with a reference on a sample of the job's own prompts, and refuse to run if it is too far off.
    Figures are those of the answers' tokens. Not part of the fingerprint: a check changes no result."""

    reference: Annotated[
        str,
        Field(min_length=1, description="Hugging Face directory of the model to be as good as, run as it is stored"),
    ]
    max_kl: Annotated[float | None, Field(gt=0, description="mean KL(reference || model), nats per token")] = None
    min_top1: Annotated[
        float | None, Field(ge=0, le=1, description="share of tokens where both find the same one likeliest")
    ] = None
    min_exact_match: Annotated[float | None, Field(ge=0, le=1, description="share of greedy answers alike")] = None
    sample: Annotated[int, Field(ge=1, description="rows drawn from the corpus")] = 64
    max_tokens: Annotated[int, Field(ge=1, description="at most so many of an answer, and of sampling.max_tokens")] = (
        128
    )
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_kl is None and self.min_top1 is None and self.min_exact_match is None:
            raise ValueError("no limit is set; set at least one of max_kl (such as 0.05), min_top1, min_exact_match")
        return self


class Resolved(_Section):
    """What `resolve` found out about the model; travels with the output in run.json."""

    model_identity: str
    tokenizer_identity: str
    max_model_len: Annotated[int | None, Field(description="tokens per row; None: only the engine will know")] = None
    field_order: Annotated[
        FieldOrder | None, Field(description="kept in field_order.json; None: as written", exclude=True)
    ] = None


class Job(_Section):
    """One corpus, one model, one output."""

    input: InputSection
    prompt: PromptSection = PromptSection()
    model: Annotated[
        str, Field(description="Hugging Face directory (a path or any fsspec URI), or the word demo: the shipped model")
    ]
    engine: Annotated[EngineConfig, Field(description="engine.model is filled from model")]
    sampling: SamplingParams = SamplingParams()
    pool: PoolSection = PoolSection()
    output: OutputSection
    limits: LimitsSection = LimitsSection()
    pricing: PricingSection = PricingSection()
    plan: PlanSection = PlanSection()
    quality: QualitySection | None = None
    resolved: SkipJsonSchema[Resolved | None] = None

    @model_validator(mode="before")
    @classmethod
    def _name_the_model_once(cls, data: Any) -> Any:
        """`model` at the top and `engine.model` are one setting; either place will do."""
        if not isinstance(data, dict):
            return data
        engine = data.get("engine") or {}
        if not isinstance(engine, dict):
            return data
        model = data.get("model", engine.get("model"))
        if model is None:
            return {**data, "engine": {"model": "", **engine}}  # `model` is then reported as missing, once
        if engine.get("model", model) != model:
            raise ValueError(f"model={model!r} and engine.model={engine['model']!r} differ; keep model only")
        return {**data, "model": model, "engine": {**engine, "model": model}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        sources = {
            "input.prompt_column": self.input.prompt_column,
            "input.messages_column": self.input.messages_column,
            "prompt.template": self.prompt.template,
        }
        given = [name for name, value in sources.items() if value is not None]
        if self.is_batch_jsonl:
            if self.prompt.template is not None or self.prompt.chat_template is not None:
                raise ValueError("prompt.template and prompt.chat_template: a Batch file's url says that; remove it")
        elif len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"exactly one of {', '.join(sources)} says what the prompt is; found {found}")
        if self.input.messages_column and self.prompt.chat_template is False:
            raise ValueError(
                "prompt.chat_template=false, but input.messages_column needs a chat template; "
                "remove it, or name a prompt_column"
            )
        if self.prompt.system is not None and not self.uses_chat_template and not self.is_batch_jsonl:
            raise ValueError(
                "prompt.system needs the chat template; set prompt.chat_template: true, "
                "or put the text into prompt.template"
            )
        if self.plan.reorder_fields and len(self.prompt.template_fields) < 2:
            raise ValueError(
                "plan.reorder_fields=true needs columns whose order has no meaning, and the prompt names none: write "
                'them as {{ fields("title", "review") }} in prompt.template, which makes a JSON object of them'
            )
        if self.limits.budget_usd is not None and self.pricing.usd_per_device_hour == 0:
            raise ValueError(
                f"limits.budget_usd={self.limits.budget_usd} can never be reached at "
                "pricing.usd_per_device_hour=0; set the price"
            )
        return self

    @property
    def uses_chat_template(self) -> bool:
        if self.prompt.chat_template is None:
            return self.input.messages_column is not None
        return self.prompt.chat_template

    @property
    def is_batch_jsonl(self) -> bool:
        """Whether the input is OpenAI Batch files, whose lines have their own routes and sampling."""
        return self.input.is_batch_jsonl

    @property
    def lines_model_name(self) -> str:
        """What the lines of a Batch file have to call the model."""
        return self.input.served_model_name or self.model.rstrip("/").rsplit("/", 1)[-1]

    @property
    def answer_shape(self) -> SamplingParams:
        """Sampling that asks for the columns which results have. Lines of a Batch file may ask for any number of
        completions and for log-probabilities, so their results always have lists, and a column for these."""
        return self.sampling.model_copy(update={"n": 2, "logprobs": 0}) if self.is_batch_jsonl else self.sampling

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The columns that a prompt is made of."""
        one = self.input.prompt_column or self.input.messages_column
        return (one,) if one else self.prompt.template_columns

    @property
    def input_paths(self) -> tuple[str, ...]:
        return (self.input.path,) if isinstance(self.input.path, str) else self.input.path

    def resolve(self, named_models: Mapping[str, str] | None = None) -> Job:
        """A new job with every derived value filled in: places absolute, words replaced, the model identified.

        named_models: where the directory of each word in NAMED_MODELS is, and with `/draft` behind the word, its draft
        model's. Reads a few small pieces of the model's files; JobError if there is no model. Resolving twice changes
        nothing.
        """
        here = Path.cwd()
        places = named_models or {}
        model = locate_model("model", self.model, places, here)
        tokenizer = locate_model("engine.tokenizer", self.engine.tokenizer or model, places, here)
        speculative = self.engine.speculative_config
        if speculative.model is not None:
            drafts = {word: places[f"{word}/draft"] for word in NAMED_MODELS if f"{word}/draft" in places}
            draft = locate_model("engine.speculative_config.model", speculative.model, drafts, here)
            speculative = speculative.model_copy(update={"model": draft})
        quality = self.quality
        if quality is not None:
            reference = locate_model("quality.reference", quality.reference, places, here)
            quality = quality.model_copy(update={"reference": reference})
        config = _read_model_config(model)
        resolved = Resolved(
            model_identity=identify_model(model),
            tokenizer_identity=identify_tokenizer(tokenizer),
            max_model_len=self.engine.max_model_len or _own_max_model_len(config),
        )
        own: dict[str, Any] = {"path": tuple(absolute_uri(path, here) for path in self.input_paths)}
        prompt = self.prompt
        if self.is_batch_jsonl:
            own |= {"format": "openai_batch", "served_model_name": self.lines_model_name}
        else:
            own["format"] = "parquet"
            prompt = prompt.model_copy(update={"chat_template": self.uses_chat_template})
        return self.model_copy(
            update={
                "input": self.input.model_copy(update=own),
                "prompt": prompt,
                "model": model,
                "engine": self.engine.model_copy(
                    update={"model": model, "tokenizer": tokenizer, "speculative_config": speculative}
                ),
                "output": OutputSection(path=absolute_uri(self.output.path, here)),
                "quality": quality,
                "resolved": resolved,
            }
        )

    def fingerprint_fields(self) -> dict[str, JsonValue]:
        """Everything that changes results, flat: dotted key to value. Needs a resolved job."""
        if self.resolved is None:
            raise ValueError("the fingerprint needs the model's identity; call resolve() first")
        sections = {
            "input": self.input.model_dump(mode="json", exclude={"path"}),
            "prompt": self.prompt.model_dump(mode="json"),
            "engine": self.engine.model_dump(mode="json", exclude=set(ENGINE_FIELDS_WITHOUT_EFFECT_ON_RESULTS)),
            "sampling": self.sampling.model_dump(mode="json"),
        }
        if self.is_batch_jsonl:  # what is not set is OpenAI's default there, not the job's
            own = sorted(self.sampling.model_fields_set)
            sections["sampling"] = self.sampling.model_dump(mode="json", include={"seed", *own})
        else:
            del sections["input"]["served_model_name"]  # which Parquet jobs of earlier versions did not have
        fields: dict[str, JsonValue] = {
            f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()
        }
        fields["model"] = self.resolved.model_identity
        fields["tokenizer"] = self.resolved.tokenizer_identity
        fields["engine.max_model_len"] = self.resolved.max_model_len
        if self.engine.deterministic:  # sums over a context are cut at pages
            fields["engine.page_size"] = self.engine.page_size
        if self.plan.reorder_fields:  # what the order is, the output keeps
            fields["plan.reorder_fields"] = True
        fields["shoal.fingerprint_version"] = FINGERPRINT_VERSION
        return dict(sorted(fields.items()))

    def fingerprint(self) -> str:
        """sha256 over `fingerprint_fields`: the same job gives the same results under the same fingerprint."""
        return _digest(self.fingerprint_fields())


def diff_fingerprints(old: Mapping[str, JsonValue], new: Mapping[str, JsonValue]) -> list[str]:
    """One line per field that differs, `key: old -> new`, for the message of a FingerprintMismatch."""
    return [
        f"{key}: {_show(old.get(key))} -> {_show(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def load_job(path: str, overrides: Sequence[str] = ()) -> Job:
    """Read a job file and lay `key.subkey=value` overrides (values are YAML) over it; JobError if it is not valid.

    Relative places in the file are relative to the file, those in an override to the current folder. Instead of a job
    file, a Batch file (.jsonl): the job is then that input, answered into `<its name>-answers` in the current folder.
    """
    if path.lower().endswith(JSONL_SUFFIXES):
        name = path.rstrip("/").rsplit("/", 1)[-1].split(".jsonl")[0] or "batch"
        data = _anchor_places({"input": {"path": path}, "output": {"path": f"{name}-answers"}}, Path.cwd())
    else:
        data = _anchor_places(read_yaml(path), Path(path).absolute().parent)
    for override in overrides:
        data = merge_settings(data, _anchor_places(parse_override(override), Path.cwd()))
    return job_from_dict(data, path)


def job_from_dict(data: Mapping[str, Any], source: str = "job") -> Job:
    """Check a mapping and make a Job of it; JobError with one line per mistake."""
    if data.get("resolved") is not None:
        raise JobError(f"{source}: resolved is filled in by Shoal; remove it")
    try:
        return Job.model_validate(data)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in explain_validation_error(error, Job))
        raise JobError(f"{source}: the job is not valid\n{lines}") from error


def job_schema() -> dict[str, Any]:
    """The JSON Schema of the job file."""
    schema = Job.model_json_schema()
    schema["required"] = [key for key in schema["required"] if key != "engine"]
    engine = schema["$defs"]["EngineConfig"]
    engine["required"] = [key for key in engine.get("required", []) if key != "model"]
    if not engine["required"]:
        del engine["required"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Shoal job"}


def explain_validation_error(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One readable line per key with a mistake: what is wrong with which value, what is allowed."""
    reasons: dict[str, list[str]] = {}
    for mistake in error.errors(include_url=False):
        location = [part for part in mistake["loc"] if not _is_union_branch(part)]
        if mistake["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            reason = f"unknown key (value {_show(mistake['input'])}); {_nearest_key(location, model)}"
        elif mistake["type"] == "missing":
            reason = "missing, and there is no default; set it"
        elif mistake["type"] == "value_error":
            reason = mistake["msg"].removeprefix("Value error, ")
        else:
            reason = f"{mistake['msg'].replace('Input should', 'should')}, is {_show(mistake['input'])}"
        reasons.setdefault(".".join(str(part) for part in location), []).append(reason)
    return [
        f"{key}: {'; or '.join(dict.fromkeys(several))}" if key else "; ".join(several)
        for key, several in reasons.items()
    ]


def identify_model(uri: str) -> str:
    """A short digest of a model directory that changes with its configuration or weights, and not with its place.

    Of a safetensors file beyond 8 MiB it reads the header and 16 samples spread over the data, no more.
    """
    storage = Storage(uri)
    files = {file.path: file for file in storage.list()}
    weights = sorted(path for path in files if path.endswith(".safetensors") and "/" not in path)
    parts: list[JsonValue] = [
        [name, _digest_bytes(storage.read_bytes(name))]
        for name in ("config.json", "generation_config.json")
        if name in files
    ]
    parts += [[name, *_identify_weights(storage, name, files[name].size_bytes)] for name in weights]
    return _digest(parts)


def identify_tokenizer(uri: str) -> str:
    """A short digest of the tokenizer's files, its chat template among them."""
    storage = Storage(uri)
    names = {file.path for file in storage.list()}
    return _digest([[name, _digest_bytes(storage.read_bytes(name))] for name in _TOKENIZER_FILES if name in names])


def _identify_weights(storage: Storage, name: str, size_bytes: int) -> list[JsonValue]:
    if size_bytes <= _WHOLE_BYTES:
        return [size_bytes, _digest_bytes(storage.read_bytes(name))]
    (prefix,) = storage.read_ranges(name, [(0, 8)])
    header_end = min(8 + int.from_bytes(prefix, "little"), size_bytes)
    step = (size_bytes - header_end) // _NUM_SAMPLES
    samples = [header_end + i * step for i in range(_NUM_SAMPLES)]
    ranges = [(0, header_end), *((start, min(start + _SAMPLE_BYTES, size_bytes)) for start in samples)]
    return [size_bytes, *(_digest_bytes(piece) for piece in storage.read_ranges(name, ranges))]


def locate_model(key: str, model: str, named_models: Mapping[str, str], base: Path) -> str:
    """The absolute place of a model that the setting `key` names by path, URI or one of NAMED_MODELS."""
    if model not in NAMED_MODELS:
        return absolute_uri(model, base)
    if model not in named_models:
        raise JobError(f"{key}: {model!r} is a word for a shipped model, and its directory was not given here")
    return absolute_uri(named_models[model], base)


def _read_model_config(model: str) -> dict[str, Any]:
    place = public_uri(model)
    try:
        text = Storage(model).read_bytes("config.json")
    except FileNotFoundError as error:
        raise JobError(
            f"model: {place} has no config.json; give a Hugging Face model directory, local or in a store "
            f"(download one first; names on a hub are not looked up), or one of the words {', '.join(NAMED_MODELS)}"
        ) from error
    except StorageError as error:
        raise JobError(f"model: {error}") from error
    try:
        config = json.loads(text)
    except ValueError as error:
        raise JobError(f"model: config.json in {place} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise JobError(f"model: config.json in {place} holds a {type(config).__name__}, not a mapping")
    return config


def _own_max_model_len(config: Mapping[str, Any]) -> int | None:
    """The engine's own default where config.json says it; where only a default of transformers does, None."""
    limit = config.get("max_position_embeddings")
    return limit if isinstance(limit, int) else None


def _anchor_places(data: dict[str, Any], base: Path) -> dict[str, Any]:
    """Make the relative places in a job's raw data absolute."""

    def anchor(place: Any) -> Any:
        if isinstance(place, list):
            return [anchor(one) for one in place]
        if not isinstance(place, str) or not place or place in NAMED_MODELS:
            return place
        return absolute_uri(place, base)

    anchored = dict(data)
    if "model" in data:
        anchored["model"] = anchor(data["model"])
    places = {"input": ("path",), "output": ("path",), "engine": ("model", "tokenizer"), "quality": ("reference",)}
    for section, keys in places.items():
        values = data.get(section)
        if isinstance(values, dict):
            anchored[section] = {key: anchor(v) if key in keys else v for key, v in values.items()}
    engine = anchored.get("engine")
    if isinstance(engine, dict) and isinstance(engine.get("speculative_config"), dict):
        speculative = engine["speculative_config"]
        if "model" in speculative:
            speculative = {**speculative, "model": anchor(speculative["model"])}
        anchored["engine"] = {**engine, "speculative_config": speculative}
    return anchored


def _nearest_key(location: Sequence[int | str], model: type[BaseModel]) -> str:
    known = list(_fields_at(location[:-1], model))
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]}?"
    return f"known keys here: {', '.join(known)}"


def _fields_at(location: Iterable[int | str], model: type[BaseModel]) -> Iterable[str]:
    for part in location:
        field = model.__pydantic_fields__.get(str(part))
        annotation = field.annotation if field else None
        options = [annotation, *get_args(annotation)]
        inner = [option for option in options if hasattr(option, "__pydantic_fields__")]
        if not inner:
            return []
        model = inner[0]
    return [name for name in model.__pydantic_fields__ if name != "resolved"]


def _is_union_branch(part: int | str) -> bool:
    """Pydantic puts the tried branch of a union into the location, such as `literal['all','none']`."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "constrained-int"))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _digest(value: Any) -> str:
    return _digest_bytes(json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False).encode())


def _digest_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
