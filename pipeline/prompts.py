"""A row of a shard becomes the tokens that the model reads, or an error that says why not.

Columns in, token ids out; no exception leaves here for anything that a row holds. Knows no files and no slices.
Called by `pipeline.prefix_plan`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.sandbox
import pyarrow as pa
from pydantic import ValidationError

from actors.requests import RowError, SamplingParams
from pipeline.batch.batch_jsonl import LineRenderer, RenderedLine
from pipeline.fields.template_fields import FIELDS, value_text, write_fields
from pipeline.job import Job, JobError, explain_validation_error
from pipeline.openai_api.batch_lines import row_error_of
from pipeline.openai_api.errors import ApiError
from pipeline.prompt_text import BadPrompt, PromptWriter, encodable, read_messages


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """One row's prompt, or its error. `overrides` is the row's own sampling as JSON text with sorted keys, and
    `sampling` the job's with these laid over it; `id` seeds the row's noise."""

    token_ids: Sequence[int]
    sampling: SamplingParams
    overrides: str | None = None
    id: str | int | None = None
    error: RowError | None = None
    has_more_prompts: bool = False


class Renderer:
    """Renders and tokenises the rows of one job.

    tokenizer: a transformers tokenizer. JobError if it has no chat template and the job needs one.
    """

    def __init__(self, job: Job, tokenizer: Any) -> None:
        self._job = job
        self._lines = LineRenderer(job, tokenizer) if job.is_batch_jsonl else None
        self._writer = PromptWriter(job.prompt, tokenizer)
        self._max_model_len = job.resolved.max_model_len if job.resolved else job.engine.max_model_len
        self._template = _compile_template(job.prompt.template) if job.prompt.template is not None else None
        self._order = job.resolved.field_order if job.resolved else None
        assert self._order is not None or not job.plan.reorder_fields, "settle_field_order comes before any prompt"
        self._overrides: dict[str, SamplingParams] = {}
        if job.uses_chat_template and not getattr(tokenizer, "chat_template", None):
            raise JobError(
                f"prompt.chat_template: the tokenizer of {job.engine.tokenizer or job.model} has no chat template; "
                "name another engine.tokenizer, or use prompt_column or prompt.template with chat_template: false"
            )

    @property
    def columns(self) -> list[str]:
        """The input columns that rendering reads."""
        if self._lines is not None:
            return list(self._lines.columns)
        job = self._job
        columns = [*job.prompt_columns, job.input.id_column, job.input.sampling_column]
        return list(dict.fromkeys(column for column in columns if column))

    def render(self, rows: pa.RecordBatch) -> list[RenderedRow]:
        """Render and tokenise a batch with (at least) `columns`; one result per row, in order."""
        if self._lines is not None:
            return [self._finish_line(line) for line in self._lines.render(rows)]
        values = {name: _read_column(rows.column(name)) for name in self.columns}
        texts = [self._write_prompt({name: column[i] for name, column in values.items()}) for i in range(len(rows))]
        prompts = self._tokenise(texts)
        ids = values[self._job.input.id_column] if self._job.input.id_column else [None] * len(rows)
        own = values[self._job.input.sampling_column] if self._job.input.sampling_column else [None] * len(rows)
        return [self._finish(prompt, row_id, overrides) for prompt, row_id, overrides in zip(prompts, ids, own)]

    def _finish_line(self, line: RenderedLine | ApiError) -> RenderedRow:
        if isinstance(line, ApiError):
            return RenderedRow([], self._job.sampling, error=row_error_of(line))
        return RenderedRow(
            line.prompts[0], line.sampling, line.overrides, line.custom_id, has_more_prompts=len(line.prompts) > 1
        )

    def _write_prompt(self, row: Mapping[str, Any]) -> str | RowError:
        try:
            if self._template is not None:
                text = self._fill_template(row)
            elif self._job.input.messages_column:
                return self._writer.apply_chat_template(_read_messages(row[self._job.input.messages_column]))
            else:
                text = _read_prompt(row[self._job.prompt_columns[0]])
            if not text:
                raise BadPrompt("empty_prompt", "the prompt is empty")
            if self._job.uses_chat_template:
                return self._writer.apply_chat_template([{"role": "user", "content": text}])
            return encodable(text)
        except BadPrompt as bad:
            return bad.error

    def _fill_template(self, row: Mapping[str, Any]) -> str:
        assert self._template is not None
        columns = {name: _decoded(name, row[name]) for name in self._job.prompt.template_columns}
        names = self._job.prompt.template_fields
        try:
            if names:
                texts = {name: value_text(columns[name]) for name in names}
                written = write_fields(names if self._order is None else self._order.order_of(texts), texts)
                columns[FIELDS] = lambda *_: written
            return self._template.render(columns)
        except BadPrompt:
            raise
        except Exception as error:  # the template is the user's program over the user's data: anything can happen
            raise BadPrompt("template_error", f"prompt.template: {type(error).__name__}: {error}") from error

    def _tokenise(self, texts: Sequence[str | RowError]) -> list[Sequence[int] | RowError]:
        """Token ids per text, in one call of the tokenizer; errors stay where they are."""
        good = [text for text in texts if isinstance(text, str)]
        if not good:
            return [text for text in texts if isinstance(text, RowError)]
        encoded = self._writer.tokenise(good, is_chat=self._job.uses_chat_template)
        queue = iter(encoded)
        return [next(queue) if isinstance(text, str) else text for text in texts]

    def _finish(self, prompt: Sequence[int] | RowError, row_id: Any, own_sampling: Any) -> RenderedRow:
        try:
            if isinstance(prompt, RowError):
                raise BadPrompt(prompt.kind, prompt.message)
            overrides, sampling = self._merge_sampling(own_sampling)
            self._check_length(prompt)
            return RenderedRow(prompt, sampling, overrides, _read_id(row_id))
        except BadPrompt as bad:
            return RenderedRow([], self._job.sampling, error=bad.error)

    def _check_length(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise BadPrompt("empty_prompt", "the prompt has no tokens")
        limit = self._max_model_len
        if limit is not None and len(prompt) + 1 > limit:
            raise BadPrompt(
                "prompt_too_long",
                f"the prompt has {len(prompt)} tokens, and with one to answer max_model_len={limit} is exceeded; "
                "shorten it or raise engine.max_model_len",
            )

    def _merge_sampling(self, value: Any) -> tuple[str | None, SamplingParams]:
        overrides = _read_overrides(value)
        if not overrides:
            return None, self._job.sampling
        key = _canonical_json(overrides)
        if key not in self._overrides:
            self._overrides[key] = _merge_checked(self._job.sampling, overrides)
        return key, self._overrides[key]


def _merge_checked(base: SamplingParams, overrides: Mapping[str, Any]) -> SamplingParams:
    """Lay a row's own parameters over the job's; the row is bad if the result is not valid."""
    try:
        merged = SamplingParams.model_validate({**base.model_dump(), **overrides})
    except ValidationError as error:
        raise BadPrompt("invalid_sampling", "; ".join(explain_validation_error(error, SamplingParams))) from error
    if merged.n > 1 and base.n == 1:
        raise BadPrompt(
            "invalid_sampling",
            f"n={merged.n}, but the job's sampling.n is 1, so a response is one text; "
            "set sampling.n above 1 in the job, then rows may have any n",
        )
    if merged.logprobs is not None and base.logprobs is None:
        raise BadPrompt(
            "invalid_sampling",
            f"logprobs={merged.logprobs}, but the job's sampling.logprobs is not set, so results have no column for "
            "them; set it in the job (0 is enough), then rows may have any number",
        )
    return merged


@dataclass(frozen=True, slots=True)
class _Undecodable:
    """Stands for a value with text in it that is not UTF-8."""

    reason: str


def field_texts(name: str, column: pa.Array) -> list[str]:
    """The texts that `fields(...)` writes for a column; null for what is no valid text: such rows are errors anyway."""
    texts = []
    for value in _read_column(column):
        try:
            texts.append(value_text(_decoded(name, value)))
        except BadPrompt:
            texts.append(value_text(None))
    return texts


def _read_column(column: pa.Array) -> list[Any]:
    """Python values; Parquet does not check that text is UTF-8, so a bad value is found only here."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_read_value(value) for value in column]


def _read_value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return _Undecodable(f"not valid UTF-8: {error.reason} at byte {error.start}")


def _decoded(name: str, value: Any) -> Any:
    """The value with bytes as text."""
    if isinstance(value, _Undecodable):
        raise BadPrompt("invalid_text", f"column {name!r} is {value.reason}")
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadPrompt(
            "invalid_text", f"column {name!r} is not valid UTF-8: {error.reason} at byte {error.start}"
        ) from error


def _read_prompt(value: Any) -> str:
    value = _decoded("prompt", value)
    if value is None:
        raise BadPrompt("null_prompt", "the prompt is null")
    if not isinstance(value, str):
        raise BadPrompt("wrong_type", f"the prompt is of type {type(value).__name__}, should be text")
    return value


def _read_messages(value: Any) -> list[dict[str, Any]]:
    """OpenAI-style messages with plain text contents, from a list or from JSON text."""
    value = _decoded("messages", value)
    if value is None:
        raise BadPrompt("null_prompt", "messages is null")
    if isinstance(value, str):
        if not value:
            raise BadPrompt("empty_prompt", "messages is empty")
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadPrompt("invalid_messages", f"messages is not valid JSON: {error}") from error
    return read_messages(value)


def _read_overrides(value: Any) -> dict[str, Any]:
    """A row's own sampling: a struct, in which null means not set, or JSON text."""
    value = _decoded("sampling", value)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadPrompt("invalid_sampling", f"the row's sampling is not valid JSON: {error}") from error
    elif isinstance(value, dict):
        value = {key: one for key, one in value.items() if one is not None}
    if value is None or value == "":
        return {}
    if not isinstance(value, dict):
        raise BadPrompt(
            "invalid_sampling", f"the row's sampling is of type {type(value).__name__}, should be a mapping"
        )
    return value


def _canonical_json(overrides: dict[str, Any]) -> str:
    try:
        # The keys of a JSON schema below keep their order: it is the order in which answers have them.
        return json.dumps(dict(sorted(overrides.items())), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadPrompt("invalid_sampling", f"the row's sampling cannot be written as JSON: {error}") from error


def _read_id(value: Any) -> str | int | None:
    if isinstance(value, _Undecodable):
        raise BadPrompt("invalid_text", f"the row's id is {value.reason}")
    if isinstance(value, bytes):
        return value.hex()
    return value if value is None or isinstance(value, int) else str(value)


def _compile_template(source: str) -> jinja2.Template:
    """The user's template, sandboxed: it sees its columns and changes nothing."""

    def refuse_null(value: Any) -> Any:
        if value is None:
            raise BadPrompt("null_prompt", "prompt.template writes a column that is null; test it with {% if %}")
        return value

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        finalize=refuse_null,
        keep_trailing_newline=True,
        autoescape=False,  # prompts are no HTML
    )
    return environment.from_string(source)
