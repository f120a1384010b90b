"""A corpus plan in an object store: whole writes and ranged reads only, and few of them."""

from __future__ import annotations

import uuid
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from letters import Letters

from actors.requests import Completion, Output, Usage
from pipeline.bill.pricing import Price
from pipeline.corpus.shared_slices import publish_shared_slice, read_shared_slices
from pipeline.corpus.slice_objects import SliceObjects
from pipeline.corpus_plan.manifest import find_manifest, read_manifest, read_slice
from pipeline.corpus_plan.planning import plan_corpus, remove_plans
from pipeline.job import job_from_dict
from pipeline.shards import list_shards
from pipeline.slices import SliceTimes, slice_table
from pipeline.storage import Storage

PRINT = "f" * 64


@pytest.fixture
def bucket(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Storage:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    storage = Storage(f"s3://corpus/{uuid.uuid4().hex}")
    filesystem = storage._filesystem()
    if not filesystem.exists("corpus"):
        filesystem.mkdir("corpus")
    return storage


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many requests of each kind the store got."""
    counts: Counter[str] = Counter()
    call = s3fs.S3FileSystem._call_s3

    async def count(self, method, *args, **kwargs):
        counts[method] += 1
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", count)
    return counts


def test_a_corpus_is_planned_in_an_object_store_and_read_with_few_requests(bucket, requests):
    prompts = {f"s{i}": [f"{n:02d}" * 10 + str(i) for n in range(40)] for i in range(5)}
    for name, column in prompts.items():
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"prompt": column}), sink)
        bucket.write_whole(f"in/{name}.parquet", sink.getvalue().to_pybytes())
    job = job_from_dict(
        {
            "input": {"path": f"{bucket.uri}/in", "prompt_column": "prompt"},
            "model": "m",
            "output": {"path": f"{bucket.uri}/out"},
            "plan": {"max_rows_per_slice": 20},
        }
    )
    shards, output = list_shards(job).good, Storage(f"{bucket.uri}/out")
    manifest = plan_corpus(job, PRINT, shards, output, Letters())
    assert [file.path for file in output.list()] == [
        f"{manifest.folder}/manifest.parquet",
        f"{manifest.folder}/slices/00000-00000.arrows",
    ]
    assert find_manifest(output, PRINT, job.plan, shards, shards)[0] is not None

    again = read_manifest(output, manifest.folder)
    requests.clear()
    pieces = [read_slice(output, again, index) for index in range(len(again.slices))]
    assert requests == {"get_object": len(pieces)}, "one request for a slice"
    texts = sorted("".join(map(chr, row.prompt_token_ids)) for piece in pieces for row in piece.rows)
    assert texts == sorted(text for column in prompts.values() for text in column)

    sizes = {}
    for piece in pieces:
        answers = [
            Completion(str(row.key), [Output(0, str(row.key), [1], "stop", -0.5)], Usage(1, 0, 1)) for row in piece.rows
        ]
        name = manifest.slice_name(piece.index)
        table = slice_table(job.sampling, piece.rows, answers, Price(1.0, ""))
        file = publish_shared_slice(output, piece, name, table, SliceTimes(), {})
        sizes[file.path] = file.size_bytes
    for groups in ([list(prompts)], [[name] for name in prompts]):
        requests.clear()
        with SliceObjects(output, sizes, are_read_again=len(groups) > 1) as objects:
            for names in groups:
                found = read_shared_slices(job.sampling, output, list(sizes), names, {}, objects)
                assert all(sorted(found[name][0]["row_index"].to_pylist()) == list(range(40)) for name in names)
        assert requests == {"get_object": len(sizes)}, "one request for a slice, whatever the number of shards"
    remove_plans(output)
    assert output.list() == []
