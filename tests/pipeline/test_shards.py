"""Shards: what is found, what is refused, and that one bad file does not concern the others."""

import os
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.job import Job, JobError, job_from_dict
from pipeline.shards import ShardError, list_shards, open_shard
from pipeline.storage import Storage


def make_job(path, **input_section) -> Job:
    columns = input_section or {"prompt_column": "prompt"}
    paths = [str(one) for one in path] if isinstance(path, list) else str(path)
    return job_from_dict({"input": {"path": paths, **columns}, "model": "m", "output": {"path": "out"}})


def write(path: Path, columns: dict | pa.Table | None = None, rows: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if columns is None:
        columns = {"prompt": [f"prompt {i}" for i in range(rows)]}
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path)
    return path


def names(job: Job) -> list[str]:
    return sorted(shard.name for shard in list_shards(job).good)


def reasons(job: Job) -> dict[str, str]:
    return dict(list_shards(job).bad)


def refusal(job: Job) -> str:
    with pytest.raises(JobError) as caught:
        list_shards(job)
    return str(caught.value)


def test_a_file_a_glob_a_folder_and_a_list_all_find_their_files(tmp_path):
    for name in ("a", "b", "deep/c"):
        write(tmp_path / f"{name}.parquet")
    (tmp_path / "readme.txt").write_text("no shard")
    assert names(make_job(tmp_path / "a.parquet")) == ["a"]
    assert names(make_job(tmp_path / "[ab].parquet")) == ["a", "b"]
    assert names(make_job(tmp_path)) == ["a", "b", "c"]
    assert names(make_job(f"{tmp_path}/")) == ["a", "b", "c"]
    assert names(make_job([tmp_path / "b.parquet", tmp_path / "deep", tmp_path / "?.parquet"])) == ["a", "b", "c"]


def test_a_file_whose_name_looks_like_a_glob_is_found_by_its_name(tmp_path):
    write(tmp_path / "a[1].parquet")
    write(tmp_path / "a1.parquet")
    assert names(make_job(tmp_path / "a[1].parquet")) == ["a_1_"]


def test_the_bookkeeping_of_other_programs_in_a_folder_is_no_input(tmp_path):
    for name in ("a", "_hidden", ".b", "_slices/c"):
        write(tmp_path / f"{name}.parquet")
    assert names(make_job(tmp_path)) == ["a"]


def test_an_output_below_the_input_folder_is_not_read_again(tmp_path):
    write(tmp_path / "a.parquet")
    write(tmp_path / "out" / "results" / "b.parquet")
    job = job_from_dict(
        {
            "input": {"path": str(tmp_path), "prompt_column": "prompt"},
            "model": "m",
            "output": {"path": f"{tmp_path}/out"},
        }
    )
    assert names(job) == ["a"]


def test_shards_carry_rows_size_and_version_and_come_largest_first(tmp_path):
    write(tmp_path / "small.parquet", rows=1)
    write(tmp_path / "large.parquet", rows=5000)
    first, second = list_shards(make_job(tmp_path)).good
    assert (first.name, first.num_rows, second.name, second.num_rows) == ("large", 5000, "small", 1)
    assert first.size_bytes == (tmp_path / "large.parquet").stat().st_size
    write(tmp_path / "small.parquet", rows=2)
    assert list_shards(make_job(tmp_path)).good[1].etag != second.etag


def test_shards_in_a_store_are_found_like_local_ones():
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": ["a", "b"]}), table)
    Storage("memory://shards-in-a-store").write_whole("in/x.parquet", table.getvalue().to_pybytes())
    for path in (
        "memory://shards-in-a-store/in",
        "memory://shards-in-a-store/in/*.parquet",
        "memory://shards-in-a-store/in/x.parquet",
    ):
        (shard,) = list_shards(make_job(path)).good
        assert (shard.name, shard.num_rows) == ("x", 2)
        with open_shard(shard) as file:
            assert file.read()["prompt"].to_pylist() == ["a", "b"]


def test_an_empty_shard_is_a_shard_with_no_rows(tmp_path):
    write(tmp_path / "empty.parquet", {"prompt": pa.array([], pa.string())})
    (shard,) = list_shards(make_job(tmp_path)).good
    assert shard.num_rows == 0


def test_truncated_and_foreign_files_are_bad_with_a_reason_and_the_others_are_good(tmp_path):
    whole = write(tmp_path / "good.parquet").read_bytes()
    (tmp_path / "truncated.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.parquet").write_text("this is not Parquet at all, but a text")
    (tmp_path / "nothing.parquet").write_bytes(b"")
    job = make_job(tmp_path)
    assert names(job) == ["good"]
    assert reasons(job).keys() == {"truncated", "text", "nothing"}
    for name, reason in reasons(job).items():
        assert f"{name}.parquet" in reason and "cannot be read as Parquet" in reason


def test_a_column_missing_in_one_shard_is_bad_for_that_shard_only(tmp_path):
    write(tmp_path / "good.parquet")
    write(tmp_path / "other.parquet", {"text": ["a"], "id": [1]})
    job = make_job(tmp_path)
    assert names(job) == ["good"]
    assert (
        "other.parquet: input.prompt_column: column 'prompt' is not there; the columns are text, id"
        in (reasons(job)["other"])
    )


def test_a_column_missing_in_all_shards_is_the_jobs_mistake(tmp_path):
    write(tmp_path / "a.parquet", {"text": ["a"]})
    message = refusal(make_job(tmp_path))
    assert "none of 1 files can be used" in message
    assert "column 'prompt' is not there; the columns are text" in message


@pytest.mark.parametrize(
    ("columns", "key"),
    [
        ({"prompt_column": "p", "id_column": "i"}, "input.id_column"),
        ({"prompt_column": "p", "sampling_column": "s"}, "input.sampling_column"),
        ({"prompt_column": "p", "passthrough": ["x"]}, "input.passthrough"),
        ({"messages_column": "m"}, "input.messages_column"),
    ],
)
def test_every_named_column_must_be_there(tmp_path, columns, key):
    write(tmp_path / "a.parquet", {"p": ["a"]})
    assert key in refusal(make_job(tmp_path, **columns))


def test_the_columns_of_a_template_must_be_there(tmp_path):
    write(tmp_path / "a.parquet", {"p": ["a"]})
    job = job_from_dict(
        {
            "input": {"path": str(tmp_path)},
            "prompt": {"template": "{{ p }} {{ q }}"},
            "model": "m",
            "output": {"path": "out"},
        }
    )
    assert "prompt.template: column 'q' is not there" in refusal(job)


MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@pytest.mark.parametrize(
    ("kind", "columns", "fits"),
    [
        (pa.string(), {"prompt_column": "c"}, True),
        (pa.large_string(), {"prompt_column": "c"}, True),
        (pa.binary(), {"prompt_column": "c"}, True),
        (pa.dictionary(pa.int32(), pa.string()), {"prompt_column": "c"}, True),
        (pa.null(), {"prompt_column": "c"}, True),
        (pa.int64(), {"prompt_column": "c"}, False),
        (pa.list_(pa.string()), {"prompt_column": "c"}, False),
        (MESSAGES, {"prompt_column": "c"}, False),
        (MESSAGES, {"messages_column": "c"}, True),
        (pa.string(), {"messages_column": "c"}, True),
        (pa.list_(pa.string()), {"messages_column": "c"}, False),
        (pa.list_(pa.struct([("role", pa.string())])), {"messages_column": "c"}, False),
        (pa.int32(), {"prompt_column": "p", "id_column": "c"}, True),
        (pa.binary(16), {"prompt_column": "p", "id_column": "c"}, True),
        (pa.float64(), {"prompt_column": "p", "id_column": "c"}, False),
        (pa.struct([("n", pa.int32())]), {"prompt_column": "p", "sampling_column": "c"}, True),
        (pa.int32(), {"prompt_column": "p", "sampling_column": "c"}, False),
    ],
)
def test_column_types_are_checked_from_the_footer(tmp_path, kind, columns, fits):
    write(tmp_path / "a.parquet", pa.table({"p": pa.array(["a"]), "c": pa.array([None], kind)}))
    job = make_job(tmp_path, **columns)
    if fits:
        assert names(job) == ["a"]
    else:
        assert "column 'c' holds" in refusal(job) and ", should be" in refusal(job)


def test_a_column_that_stands_twice_is_refused(tmp_path):
    write(tmp_path / "a.parquet", pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]))
    assert "column 'prompt' stands 2 times" in refusal(make_job(tmp_path))


def test_no_shard_at_all_names_the_glob(tmp_path):
    assert f"{tmp_path}/*.parquet matches no Parquet file" in refusal(make_job(tmp_path / "*.parquet"))
    assert "nowhere matches no Parquet file" in refusal(make_job(tmp_path / "nowhere"))
    write(tmp_path / "a.parquet")
    assert "none-*.parquet matches no" in refusal(make_job([tmp_path / "a.parquet", tmp_path / "none-*.parquet"]))


def test_two_shards_of_the_same_name_are_refused_with_both_places(tmp_path):
    one, two = write(tmp_path / "x" / "a.parquet"), write(tmp_path / "y" / "a.parquet")
    message = refusal(make_job(tmp_path))
    assert str(one) in message and str(two) in message and "rename one" in message


def test_shard_names_are_safe_as_names_of_results(tmp_path):
    for name in ("a b?c", "Fragen-äöü", "_x"):
        write(tmp_path / f"{name}.parquet")
    paths = sorted(tmp_path.iterdir())
    assert names(make_job(paths)) == ["Fragen-äöü", "a_b_c", "x"]


def test_a_shard_that_changed_since_it_was_listed_is_not_read(tmp_path):
    path = write(tmp_path / "a.parquet")
    (shard,) = list_shards(make_job(tmp_path)).good
    write(path, rows=4)
    with pytest.raises(ShardError, match=r"a\.parquet was changed since the run began"), open_shard(shard):
        pass
    path.unlink()
    with pytest.raises(ShardError, match="is gone"), open_shard(shard):
        pass


def test_a_thousand_shards_are_listed_quickly_and_leave_little_in_memory(tmp_path):
    first = write(tmp_path / "0000.parquet", {"prompt": ["x" * 100] * 100})
    for number in range(1, 1000):
        os.link(first, tmp_path / f"{number:04}.parquet")
    list_shards(make_job(tmp_path / "00*.parquet"))
    before, started = psutil.Process().memory_info().rss, time.monotonic()
    shards = list_shards(make_job(tmp_path)).good
    assert len(shards) == 1000 and {shard.num_rows for shard in shards} == {100}
    assert time.monotonic() - started < 20
    assert psutil.Process().memory_info().rss - before < 32 * 2**20
