"""Storage: whole or not at all, in a local folder, in memory, and in an S3 server on loopback."""

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.storage import Storage, StorageError, absolute_uri, public_uri, split_glob, split_uri

BUCKET = "shoal-storage-test"


@pytest.fixture(scope="session")
def s3_endpoint():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def s3(s3_endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage = Storage(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    filesystem = storage._filesystem()
    if not filesystem.exists(BUCKET):
        filesystem.mkdir(BUCKET)
    return storage


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return Storage(str(tmp_path / "root") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_what_is_written_whole_reads_back_and_is_listed_with_its_size(storage):
    written = storage.write_whole("a/b.bin", b"hello")
    assert storage.read_bytes("a/b.bin") == b"hello"
    assert storage.exists("a/b.bin") and not storage.exists("a/c.bin") and not storage.exists("a")
    (listed,) = storage.list()
    assert listed == written == storage.info("a/b.bin")
    assert (listed.path, listed.size_bytes) == ("a/b.bin", 5) and listed.uri == storage.uri_of("a/b.bin")


def test_a_folder_that_is_not_there_lists_as_empty(storage):
    assert storage.list("nowhere") == [] and storage.list() == []
    assert storage.info("nowhere/x") is None


def test_a_list_is_by_path_at_any_depth_and_of_this_folder_only(storage):
    for path in ("b/2", "b/1/x", "a", "bc/1"):
        storage.write_whole(path, b"x")
    assert [file.path for file in storage.list()] == ["a", "b/1/x", "b/2", "bc/1"]
    assert [file.path for file in storage.list("b")] == ["b/1/x", "b/2"]


def test_a_glob_finds_files_and_no_folders(storage):
    for path in ("in/a.parquet", "in/b.txt", "in/deep/c.parquet", "in/d.parquet/x"):
        storage.write_whole(path, b"x")
    assert [file.path for file in storage.glob("in/*.parquet")] == ["in/a.parquet"]
    assert [file.path for file in storage.glob("in/**/*.parquet")] == ["in/a.parquet", "in/deep/c.parquet"]


def test_another_version_has_another_etag(storage):
    first = storage.write_whole("x", b"one")
    time.sleep(0.01)
    assert storage.write_whole("x", b"two").etag != first.etag


def test_an_empty_object_can_be_written(storage):
    assert storage.write_whole("empty", b"").size_bytes == 0
    assert storage.read_bytes("empty") == b""


def test_of_many_writers_exactly_one_creates(storage):
    def create(number: int) -> bool:
        return storage.create_exclusive("run.json", b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert sum(won) == 1
    assert storage.read_bytes("run.json") == b"%d" % won.index(True)
    assert [file.path for file in storage.list()] == ["run.json"]
    assert storage.enforces_create("run.json")


def test_a_file_opened_for_input_can_be_read_at_any_place(storage):
    info = storage.write_whole("x", bytes(range(100)))
    for size in (None, info.size_bytes):
        with storage.open_input("x", size) as file:
            file.seek(90)
            assert file.read(5) == bytes(range(90, 95))
            assert file.seek(0, 2) == 100
    assert storage.read_ranges("x", [(0, 2), (98, 100)]) == [b"\0\1", b"bc"]


def test_removing_twice_is_no_error_and_a_tree_goes_whole(storage):
    for path in ("keep/1", "go/1", "go/2/3"):
        storage.write_whole(path, b"x")
    storage.remove("keep/1")
    storage.remove("keep/1")
    storage.remove_tree("go")
    storage.remove_tree("go")
    assert storage.list() == []
    with pytest.raises(StorageError, match="refused to remove everything"):
        storage.remove_tree("")


def test_reading_what_is_not_there_says_file_not_found(storage):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("nowhere")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a/", "a\0b"])
def test_a_path_out_of_the_root_is_refused(tmp_path, path):
    storage = Storage(str(tmp_path))
    for action in (storage.read_bytes, storage.exists, storage.remove, storage.uri_of, storage.list):
        with pytest.raises(StorageError, match="no path below"):
            action(path)
    with pytest.raises(StorageError, match="no path below"):
        storage.write_whole(path, b"x")


def test_storage_survives_pickling(storage):
    storage.write_whole("x", b"1")
    if storage.protocol != "memory":
        assert pickle.loads(pickle.dumps(storage)).read_bytes("x") == b"1"


def test_readers_of_a_local_file_see_the_old_or_the_new_and_never_a_part(tmp_path):
    storage = Storage(str(tmp_path))
    versions = [bytes([letter]) * 300_000 for letter in b"ab"]
    storage.write_whole("x", versions[0])
    stop = threading.Event()
    torn: list[int] = []

    def read() -> None:
        while not stop.is_set():
            data = (tmp_path / "x").read_bytes()
            if data not in versions:
                torn.append(len(data))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(30):
        storage._replace_local(tmp_path / "x", versions[number % 2])
    stop.set()
    reader.join()
    assert torn == []


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    storage.write_whole("x", b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (storage.write_whole, storage.create_exclusive):
        with pytest.raises(StorageError, match=r"x: .*No space left on device"):
            write("x", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert storage.read_bytes("x") == b"old"


def test_what_a_killed_writer_left_behind_is_not_listed_and_goes_with_the_tree(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write_whole("a/x", b"1")
    (tmp_path / "a" / ".y.0123.tmp").write_bytes(b"half")
    assert [file.path for file in storage.list()] == ["a/x"]
    storage.remove_tree("a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda data: data[:-1], "found 4 bytes"), (lambda data: b"?" + data[1:], "reads back other bytes")],
)
def test_a_store_that_keeps_other_bytes_is_found_out(storage, monkeypatch, damage, message):
    if storage.is_local:
        replace = storage._replace_local
        monkeypatch.setattr(storage, "_replace_local", lambda target, data: replace(target, damage(data)))
    else:
        put = storage._put
        monkeypatch.setattr(storage, "_put", lambda path, data, mode: put(path, damage(data), mode))
    with pytest.raises(StorageError, match=message):
        storage.write_whole("x", b"hello")


def test_a_store_that_ignores_the_condition_is_named_once_and_asked_first(s3, monkeypatch, caplog):
    put = Storage._put
    monkeypatch.setattr(s3, "_put", lambda path, data, mode: put(s3, path, data, "overwrite"))
    assert s3.create_exclusive("run.json", b"1") is True
    assert s3.create_exclusive("run.json", b"2") is False
    assert s3.read_bytes("run.json") == b"1"
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "ignores 'If-None-Match: *'" in caplog.text
    assert [file.path for file in s3.list()] == ["run.json"]


def test_an_object_that_marks_an_empty_folder_is_no_file(s3):
    s3.write_whole("in/a.parquet", b"x")
    for marker in ("in/", "in/sub/"):
        s3._filesystem().call_s3("put_object", Bucket=BUCKET, Key=f"{s3._root.partition('/')[2]}/{marker}")
    assert [file.path for file in s3.list()] == ["in/a.parquet"]
    assert [file.path for file in Storage(f"{s3.uri}/in").list()] == ["a.parquet"]
    assert [file.path for file in s3.glob("in/*")] == ["in/a.parquet"]
    assert [file.path for file in s3.glob("**")] == ["in/a.parquet"]


def test_a_large_object_is_one_put(s3, monkeypatch):
    calls: list[str] = []
    filesystem = s3._filesystem()
    call = type(filesystem)._call_s3

    async def record(self, method, *arguments, **options):
        calls.append(str(method))
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(type(filesystem), "_call_s3", record)
    data = bytes(101 * 2**20)  # s3fs alone would go multipart from 100 MiB on
    assert s3.write_whole("large", data).size_bytes == len(data)
    assert [name for name in calls if "put" in name or "upload" in name] == ["put_object"]
    s3.remove("large")


def test_a_bucket_that_is_not_there_is_named_and_no_secret_is_told(s3):
    with pytest.raises(StorageError) as caught:
        Storage("s3://no-such-bucket-here/x").write_whole("a", b"1")
    assert "no-such-bucket-here/x/a" in str(caught.value) and "does the bucket exist?" in str(caught.value)
    assert "hush-hush" not in str(caught.value)


def test_an_endpoint_where_nobody_answers_is_a_storage_error(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageError) as caught:
        Storage("s3://bucket/x").read_bytes("a")
    assert "check AWS_ENDPOINT_URL_S3" in str(caught.value) and "hush-hush" not in str(caught.value)


def test_an_output_that_is_a_file_is_refused_with_its_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*/file/x"):
        Storage(str(tmp_path / "file")).write_whole("x", b"1")
    with pytest.raises(StorageError, match=r"cannot write .*/file/a/x"):
        Storage(str(tmp_path / "file")).create_exclusive("a/x", b"1")


def test_an_unknown_protocol_is_refused():
    with pytest.raises(StorageError, match="nosuch"):
        Storage("nosuch://bucket/x")


def test_uris_are_split_and_made_absolute():
    assert absolute_uri("a/../b", Path("/base")) == "/base/b"
    assert absolute_uri("s3://b/k", Path("/base")) == absolute_uri("s3a://b/k", Path("/base")) == "s3://b/k"
    assert absolute_uri("file:///a/b", Path("/base")) == "/a/b"
    assert Storage("file:///tmp/x").uri == "/tmp/x"
    for uri in ("/tmp/x/y.parquet", "s3://b/y.parquet", "memory://b/k/y.parquet"):
        storage, name = split_uri(uri)
        assert name == "y.parquet" and storage.uri_of(name).removeprefix("memory:///") in uri
    storage, pattern = split_glob("/data/2025/*/part-?.parquet")
    assert (storage.uri, pattern) == ("/data/2025", "*/part-?.parquet")
    with pytest.raises(StorageError, match="names no file"):
        split_uri("s3://bucket")


def test_credentials_in_a_uri_are_not_shown():
    assert public_uri("ftp://me:secret@host/x") == "ftp://***@host/x"
