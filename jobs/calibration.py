"""Prompts to calibrate on, as token ids: rows of Parquet files or of a job file's corpus, rendered as a run would.

An answer may follow each prompt (a results file has them in `response`): the model then also sees the text that it will
write itself. Called by `jobs.quantize`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from actors.weights.checkpoint import load_tokenizer
from jobs.run import named_models
from pipeline.fields.field_gain import settle_field_order
from pipeline.job import Job, JobError, job_from_dict, load_job
from pipeline.prompts import Renderer
from pipeline.shards import Shard, list_shards, open_shard
from pipeline.storage import Storage

PROMPT_COLUMNS = ("messages", "prompt", "text")
"""Taken in this order where no column is named."""

BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class CalibrationColumns:
    """Where a Parquet file has its prompts; all None: the first of PROMPT_COLUMNS that it has."""

    prompt: str | None = None
    messages: str | None = None
    response: str | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Token ids per row, and what the model card says of them."""

    name: str
    sequences: list[list[int]]

    def split(self, held_out_share: float = 0.125) -> tuple[list[list[int]], list[list[int]]]:
        """Rows to calibrate on and rows to judge by: every eighth; none of the second when there are only a few."""
        every = round(1 / held_out_share)
        if len(self.sequences) < every:
            return self.sequences, []
        used = [ids for i, ids in enumerate(self.sequences) if i % every != every - 1]
        return used, self.sequences[every - 1 :: every]


def read_calibration(
    source: str, model: str, *, num_rows: int, max_tokens: int, columns: CalibrationColumns, seed: int = 0
) -> Calibration:
    """A random sample of rows, each cut to max_tokens; rows that cannot be rendered are left out.

    source: Parquet files (a path, folder, glob or URI), or a job file (.yaml) whose corpus and prompt settings are used
    with this model. JobError when nothing usable is found.
    """
    job = _calibration_job(source, model, columns)
    tokenizer = load_tokenizer(job.engine.tokenizer or model)
    shards = sorted(list_shards(job).good, key=lambda shard: shard.name)
    job = settle_field_order(job, shards, Storage(job.output.path), keep=False)
    renderer = Renderer(job, tokenizer)
    wanted = _sample(shards, num_rows, seed)
    sequences = []
    for rows in _read_rows(shards, wanted, [*renderer.columns, *([columns.response] if columns.response else [])]):
        answers = rows.column(columns.response).to_pylist() if columns.response else [None] * len(rows)
        for row, answer in zip(renderer.render(rows), answers):
            if row.error is None:
                ids = list(row.token_ids)
                if isinstance(answer, str):
                    ids += tokenizer(answer, add_special_tokens=False)["input_ids"]
                sequences.append(ids[:max_tokens])
    if not sequences:
        raise JobError(f"{source}: none of the {len(wanted)} rows read can be a prompt; name other columns or rows")
    return Calibration(Path(source).name, sequences)


def _calibration_job(source: str, model: str, columns: CalibrationColumns) -> Job:
    if source.endswith((".yaml", ".yml")):
        return load_job(source, [f"model={model}"]).resolve(named_models())
    if columns.prompt is not None or columns.messages is not None:
        return _job_over(source, model, columns.prompt, columns.messages)
    reasons = []
    for name in PROMPT_COLUMNS:
        job = _job_over(source, model, *((None, name) if name == "messages" else (name, None)))
        try:
            list_shards(job)
        except JobError as error:
            reasons.append(str(error))
        else:
            return job
    raise JobError(
        f"--calibrate {source}: none of the columns {', '.join(PROMPT_COLUMNS)} can be read as prompts; "
        f"name one with --prompt-column or --messages-column ({reasons[0]})"
    )


def _job_over(source: str, model: str, prompt: str | None, messages: str | None) -> Job:
    fields = {"path": source, "prompt_column": prompt, "messages_column": messages}
    job = job_from_dict({"input": fields, "model": model, "output": {"path": "unused"}}, "--calibrate")
    return job.resolve(named_models())


def _sample(shards: Sequence[Shard], num_rows: int, seed: int) -> list[int]:
    """Sorted row numbers over all shards."""
    total = sum(shard.num_rows for shard in shards)
    return sorted(random.Random(seed).sample(range(total), min(num_rows, total)))


def _read_rows(shards: Sequence[Shard], wanted: Sequence[int], columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The wanted rows, batch by batch; shards and batches without one are not decoded further."""
    first, queue = 0, list(wanted)
    for shard in shards:
        here = [row - first for row in queue if first <= row < first + shard.num_rows]
        first += shard.num_rows
        if not here:
            continue
        start = 0
        with open_shard(shard) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=list(dict.fromkeys(columns))):
                inside = [row - start for row in here if start <= row < start + len(batch)]
                start += len(batch)
                if inside:
                    yield batch.take(pa.array(inside))
