"""OpenAI Batch files as shards: their lines as rows, with the interface of a Parquet file, and rendered as the endpoint
renders requests.

A row is a line that is not blank; one that cannot be read is an error row. Reading is streamed: a line and a batch of
rows are in memory, never the file. Called through `pipeline.shards` and `pipeline.prompts`.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa

from actors.requests import SamplingParams
from pipeline.job import Job, JobError
from pipeline.openai_api.batch_lines import (
    MAX_LINE_BYTES,
    BatchLine,
    check_line,
    custom_id_of,
    load_line,
    read_body,
    read_requests,
    repeated_custom_id,
)
from pipeline.openai_api.errors import ApiError
from pipeline.openai_api.reading import RequestReader

SCHEMA = pa.schema([(name, pa.string()) for name in ("custom_id", "method", "url", "body")])
"""What a line's columns are; `body` is JSON text. Null where the line does not have it."""

LINE, PROBLEM = "_line", "_problem"
"""Further columns for those who ask for them: the line's bytes, and what is wrong with it as an object of a batch (code
and message as JSON text; null if nothing is)."""

_HIDDEN = (pa.field(LINE, pa.binary()), pa.field(PROBLEM, pa.string()))
_BUFFER_BYTES = 4 << 20
_BATCH_BYTES = 8 << 20
_SKIP_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


class RawLine(NamedTuple):
    """A line that is not blank, without its end. `number` counts all lines of the file from 1; of one that is too long
    there is no more than the beginning, one byte longer than allowed."""

    number: int
    data: bytes


def read_lines(file: BinaryIO, *, is_gzip: bool = False) -> Iterator[RawLine]:
    """The lines of a file that are not blank. OSError if it cannot be read, or is no whole gzip file."""
    buffered: Any = io.BufferedReader(cast(io.RawIOBase, file), _BUFFER_BYTES)
    source = gzip.GzipFile(fileobj=buffered) if is_gzip else buffered
    try:
        yield from _split(source)
    except (EOFError, zlib.error) as error:
        raise OSError(f"the gzip file is damaged or cut off: {error}") from error
    finally:
        if not file.closed:
            buffered.detach()  # the file is its owner's to close


def _split(source: Any) -> Iterator[RawLine]:
    number = 0
    while data := source.readline(MAX_LINE_BYTES + 1):
        number += 1
        is_cut = len(data) > MAX_LINE_BYTES and not data.endswith(b"\n")
        if is_cut:
            rest = source.readline(_SKIP_BYTES)
            while rest and not rest.endswith(b"\n"):
                rest = source.readline(_SKIP_BYTES)
        if number == 1:
            data = data.removeprefix(_BOM)
        if not data.isspace() and data:
            yield RawLine(number, data if is_cut else data.rstrip(b"\r\n"))


@dataclass(frozen=True, slots=True)
class _Metadata:
    """Of a Parquet file's metadata what readers here ask for; all rows are one row group."""

    num_rows: int

    def row_group(self, index: int) -> _Metadata:
        return self


class JsonlFile:
    """One file, read like a `pyarrow.parquet.ParquetFile` with the columns of `SCHEMA`.

    file: open for reading, seekable; num_rows: as it was counted before.
    """

    schema_arrow = SCHEMA
    num_row_groups = 1

    def __init__(self, file: BinaryIO, num_rows: int, *, is_gzip: bool) -> None:
        self.metadata = _Metadata(num_rows)
        self._file = file
        self._is_gzip = is_gzip

    def iter_batches(
        self, batch_size: int, row_groups: Sequence[int] | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """All rows, at most `batch_size` and some megabytes at a time. Besides those of `SCHEMA`, `columns` may name
        LINE and PROBLEM."""
        fields = [*SCHEMA, *_HIDDEN]
        names = SCHEMA.names if columns is None else columns
        chosen = [field for field in fields if field.name in names]
        wants_body = any(field.name == "body" for field in chosen)
        seen: dict[str, int] = {}
        rows: list[dict[str, Any]] = []
        num_bytes = 0
        self._file.seek(0)
        for line in read_lines(self._file, is_gzip=self._is_gzip):
            rows.append(_read_row(line, seen, wants_body=wants_body))
            num_bytes += len(line.data)
            if len(rows) == batch_size or num_bytes >= _BATCH_BYTES:
                yield _to_batch(rows, chosen)
                rows, num_bytes = [], 0
        if rows:
            yield _to_batch(rows, chosen)


def _to_batch(rows: list[dict[str, Any]], fields: Sequence[pa.Field]) -> pa.RecordBatch:
    # With a column more than asked for, for a batch without any would not know how many rows it has.
    everything = pa.schema([*fields, pa.field("", pa.null())])
    return pa.RecordBatch.from_pylist(rows, everything).select([field.name for field in fields])


def _read_row(line: RawLine, seen: dict[str, int], *, wants_body: bool) -> dict[str, Any]:
    """A line's values by column. `seen`: custom_ids so far and their lines; this one's is added."""
    row: dict[str, Any] = {LINE: line.data}
    try:
        value = load_line(line.data)
        row["custom_id"] = custom_id = custom_id_of(value)
        row |= {name: _text(value.get(name)) for name in ("method", "url")}
        if wants_body and "body" in value:
            row["body"] = json.dumps(value["body"])
        check_line(value)
        if custom_id in seen:
            raise repeated_custom_id(seen[custom_id])
        seen[str(custom_id)] = line.number
    except ApiError as error:
        row[PROBLEM] = json.dumps({"code": error.code, "message": f"{error} (line {line.number})"})
    return row


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and not any("\ud800" <= sign <= "\udfff" for sign in value) else None


@dataclass(frozen=True, slots=True)
class RenderedLine:
    """A line's prompts and how they are answered. `overrides`: what differs from the job's sampling, and the further
    prompts if there are several, as JSON text (`PlannedRow.sampling_overrides`)."""

    prompts: list[list[int]]
    sampling: SamplingParams
    overrides: str
    custom_id: str


class LineRenderer:
    """Renders and tokenises the lines of one job, by the endpoint's own code.

    tokenizer: transformers'. JobError if nothing says how long a row may be.
    """

    columns = (LINE, PROBLEM)

    def __init__(self, job: Job, tokenizer: Any) -> None:
        max_model_len = job.resolved.max_model_len if job.resolved else job.engine.max_model_len
        if max_model_len is None:
            raise JobError(
                "engine.max_model_len: the model's config.json does not say it, and without it a line that sets no "
                "max_tokens has no end; set it"
            )
        self._base = job.sampling
        self._base_values = job.sampling.model_dump(mode="json")
        self._model = job.lines_model_name
        self._reader = RequestReader(
            job.prompt,
            tokenizer,
            max_model_len=max_model_len,
            # The seed of a job is mixed with each row's id; only a line's own is taken as it is.
            defaults={key: getattr(job.sampling, key) for key in job.sampling.model_fields_set - {"seed"}},
        )

    def render(self, rows: pa.RecordBatch) -> list[RenderedLine | ApiError]:
        """One result per row of a batch with `columns`, in order."""
        lines, problems = rows.column(LINE).to_pylist(), rows.column(PROBLEM).to_pylist()
        return [self._render(line, problem) for line, problem in zip(lines, problems)]

    def _render(self, data: Any, problem: str | None) -> RenderedLine | ApiError:
        if problem is not None:
            known = json.loads(problem)
            return ApiError(400, known["message"], code=known["code"])
        try:
            line: BatchLine = check_line(load_line(data))
            body = read_body(line, self._model)
            requests = read_requests(self._reader, body)
        except ApiError as error:
            return error
        sampling = requests[0].sampling
        own = {
            key: value
            for key, value in sampling.model_dump(mode="json").items()
            if value != self._base_values[key] or (key == "seed" and body.seed is not None)
        }
        if body.seed is None:
            own.pop("seed", None)  # drawn by the reader, for answers that nobody asks for twice
            sampling = sampling.model_copy(update={"seed": self._base.seed})
        prompts = [list(request.prompt_token_ids) for request in requests]
        if len(prompts) > 1:
            own["more_prompts"] = prompts[1:]
        return RenderedLine(prompts, sampling, json.dumps(own, sort_keys=True), line.custom_id)
