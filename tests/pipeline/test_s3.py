"""Input and output in object storage: an S3 server process on loopback, and drivers that are killed or stopped."""

from __future__ import annotations

import json
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from driver import Driver, undisturbed_responses

from jobs.run import run
from jobs.status import status
from pipeline.bill.ledger import read_metrics, read_runs
from pipeline.job import load_job
from pipeline.slices import list_slices
from pipeline.storage import Storage

pytestmark = pytest.mark.usefixtures("ray_cluster")

BUCKET = "corpus"


@pytest.fixture
def bucket(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    storage = Storage(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    filesystem = storage._filesystem()
    if not filesystem.exists(BUCKET):
        filesystem.mkdir(BUCKET)
    yield storage


def upload(bucket: Storage, name: str, prompts: list[str | None]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(len(prompts)), "prompt": pa.array(prompts, pa.string())}), sink)
    bucket.write_whole(f"in/{name}.parquet", sink.getvalue().to_pybytes())


def read(output: Storage, path: str) -> pa.Table:
    with output.open_input(path) as source:
        return pq.ParquetFile(source).read()


def write_s3_job(write_job, bucket: Storage, **sections) -> Path:
    return write_job(input={"path": f"{bucket.uri}/in"}, output={"path": f"{bucket.uri}/out"}, **sections)


def test_a_killed_driver_and_the_same_command_again_end_alike_on_s3(bucket, write_job, s3_environment):
    upload(bucket, "a", [f"Question {i}: {'why? ' * (i % 7)}" for i in range(60)])
    upload(bucket, "b", ["one", None, ""])
    job = write_s3_job(
        write_job,
        bucket,
        sampling={"max_tokens": 150, "temperature": 0.8, "seed": 7},
        engine={"max_num_seqs": 8},
        plan={"max_rows_per_slice": 6},
    )
    output = Storage(f"{bucket.uri}/out")
    with Driver(job, env=s3_environment) as driver:
        driver.wait_until(lambda: len(list_slices(output).get("a", {})) >= 2)
        driver.process.send_signal(signal.SIGKILL)
    found = sum(len(names) for names in list_slices(output).values())
    before = sum(row["num_slices"] for row in read_metrics(output) if output.exists(f"results/{row['shard']}.parquet"))
    assert run(str(job), []) == 0
    (record,) = read_runs(output)
    num_slices = sum(row["num_slices"] for row in read_metrics(output))
    assert record.num_slices_found == found >= 2
    assert record.num_slices_computed == num_slices - found - before > 0
    results = read(output, "results/a.parquet")
    assert results["id"].to_pylist() == list(range(60))
    assert results["response"].to_pylist() == undisturbed_responses(load_job(str(job)).resolve())["a"]
    assert [row["kind"] for row in read(output, "errors/b.parquet")["error"].to_pylist()] == [
        "null_prompt",
        "empty_prompt",
    ]
    assert not output.list("_slices") and output.exists("_SUCCESS")


def test_a_run_on_s3_is_extended_and_its_status_read(bucket, write_job, fake_workers, capsys):
    upload(bucket, "a", ["one", "two", None])
    job, workers = str(write_s3_job(write_job, bucket)), fake_workers()
    assert run(job, [], new_worker=workers) == 0
    upload(bucket, "b", ["three"])
    assert run(job, [], new_worker=workers) == 0
    assert sorted(workers.asked()[:2]) == ["a/0", "a/1"] and workers.asked()[2:] == ["b/0"]
    output = Storage(f"{bucket.uri}/out")
    assert json.loads(output.read_bytes("_SUCCESS"))["bill"]["rows"] == 4
    capsys.readouterr()
    assert status(f"{bucket.uri}/out") == 0
    said = capsys.readouterr().out
    assert "complete" in said and "4: 3 answered, 1 errors" in said and "hush" not in said


def test_two_drivers_that_start_at_once_agree_on_one_run_json(bucket):
    output = Storage(f"{bucket.uri}/out")
    assert [output.create_exclusive("run.json", b"1"), output.create_exclusive("run.json", b"2")] == [True, False]


def test_a_folder_whose_first_object_comes_while_it_is_listed_is_not_taken_for_a_file(bucket, monkeypatch):
    filesystem = bucket._filesystem()
    monkeypatch.setattr(bucket, "_filesystem", lambda: filesystem)
    bucket.write_whole("folder/late", b"x")
    folder = filesystem.info(f"{BUCKET}/{bucket.uri.rpartition('/')[2]}/folder")
    assert folder["type"] == "directory"
    monkeypatch.setattr(filesystem, "find", lambda path, detail: {folder["name"]: folder})
    assert bucket.list("folder") == []
