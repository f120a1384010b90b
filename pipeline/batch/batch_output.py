"""OpenAI's output file and error file of a shard that was a Batch file: `batch_output/<shard>.jsonl` and
`batch_output/<shard>_errors.jsonl`, together a line per line; and in `errors/<shard>.jsonl` the failed lines as they
were (of one that was too long its beginning), ready to be the input of another run.

Made of the shard's results at the merge, before they are published. Knows no Ray; called by `pipeline.results`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.requests import Completion, Output, RowError, TokenLogprob, Usage
from pipeline.batch.batch_jsonl import LINE
from pipeline.job import Job
from pipeline.openai_api.answers import ChatAnswer, TextAnswer
from pipeline.openai_api.batch_lines import CHAT_URL, answer_line, api_error_of, to_jsonl
from pipeline.shards import Shard, ShardError, open_shard
from pipeline.storage import Storage

BATCH_OUTPUT, FAILED_LINES = "batch_output", "errors"
_BATCH_ROWS = 1024
_ANSWER_COLUMNS = (
    "response",
    "finish_reason",
    "error",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "logprobs",
)


def publish_batch_output(job: Job, shard: Shard, output: Storage, results: bytes) -> None:
    """Write the files of a shard, each whole; of those without a line there is none. results: its results file.

    Ids are those of the row under this job, so writing them again gives the same. Nothing for a job over Parquet.
    """
    if not job.is_batch_jsonl:
        return
    answered, failed, again = bytearray(), bytearray(), bytearray()
    writer = _LineWriter(job, shard)
    num_rows = 0
    with open_shard(shard) as source:
        lines = (
            line
            for batch in source.iter_batches(_BATCH_ROWS, columns=["custom_id", "url", LINE])
            for line in batch.to_pylist()
        )
        for answer in _answers(results):
            line = next(lines)
            text = to_jsonl(writer.write(num_rows, line, answer))
            if answer["error"] is None:
                answered += text
            else:
                failed += text
                again += line[LINE] + b"\n"
            num_rows += 1
    if num_rows != shard.num_rows:
        raise ShardError(f"its results have {num_rows} rows and the input has {shard.num_rows}")
    files = {
        f"{BATCH_OUTPUT}/{shard.name}.jsonl": answered,
        f"{BATCH_OUTPUT}/{shard.name}_errors.jsonl": failed,
        f"{FAILED_LINES}/{shard.name}.jsonl": again,
    }
    for path, data in files.items():
        if data:
            output.write_whole(path, bytes(data))
        else:
            output.remove(path)


def _answers(results: bytes) -> Any:
    table = pq.ParquetFile(pa.BufferReader(results))
    for batch in table.iter_batches(_BATCH_ROWS, columns=list(_ANSWER_COLUMNS)):
        yield from batch.to_pylist()


class _LineWriter:
    """Writes answers as the endpoint would have."""

    def __init__(self, job: Job, shard: Shard) -> None:
        assert job.resolved is not None
        self._model = job.lines_model_name
        self._fingerprint = f"shoal-{job.resolved.model_identity[:12]}"
        self._seed = f"{job.fingerprint()}\x1f{shard.name}\x1f{shard.etag}"
        self._created = int(time.time())

    def write(self, row: int, line: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
        line_id = hashlib.blake2b(f"{self._seed}\x1f{row}".encode(), digest_size=12).hexdigest()
        if answer["error"] is not None:
            error = api_error_of(RowError(**answer["error"]))
            return answer_line(line_id, line["custom_id"], error.status, error.body)
        kind = ChatAnswer if line["url"] == CHAT_URL else TextAnswer
        writer = kind(self._model, self._fingerprint, line_id=line_id, created=self._created)
        return answer_line(line_id, line["custom_id"], 200, writer.whole([_completion(answer)]))


def _completion(answer: Mapping[str, Any]) -> Completion:
    """What the engine gave, as far as the columns of the results keep it."""
    usage = Usage(answer["prompt_tokens"], answer["cached_tokens"], answer["completion_tokens"])
    logprobs = answer["logprobs"] or [None] * len(answer["response"])
    outputs = [
        Output(index, text, [], reason, logprobs=None if tokens is None else [_token(token) for token in tokens])
        for index, (text, reason, tokens) in enumerate(zip(answer["response"], answer["finish_reason"], logprobs))
    ]
    return Completion("", outputs, usage)


def _token(token: Mapping[str, Any]) -> TokenLogprob:
    top = tuple((one["token_id"], one["token"], one["logprob"]) for one in token["top"])
    return TokenLogprob(token["token_id"], token["token"], token["logprob"], top)
