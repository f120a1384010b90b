"""A deterministic job gives the same bytes with one actor, with two, and killed and continued with other settings."""

from __future__ import annotations

import signal

import pyarrow.parquet as pq
import pytest
from driver import Driver

from jobs.run import run

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow, pytest.mark.timeout(600)]


def read_answers(output):
    """Of each shard, the responses and the log-probabilities by their bits."""
    answers = {}
    for file in sorted((output / "results").glob("*.parquet")):
        table = pq.read_table(file, columns=["id", "response", "mean_logprob"])
        logprobs = [None if x is None else x.hex() for x in table["mean_logprob"].to_pylist()]
        answers[file.stem] = list(zip(table["id"].to_pylist(), table["response"].to_pylist(), logprobs))
    return answers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_actors_batches_and_a_kill_change_no_byte(dtype, write_corpus, write_job, tmp_path):
    write_corpus({name: [f"Question {name} {i}: {'why? ' * (i % 7)}" for i in range(60)] for name in "ab"})

    def write(name, num_actors, **engine):
        return write_job(
            f"{name}.yaml",
            sampling={"max_tokens": 60, "temperature": 0.8, "seed": 7},
            engine={"dtype": dtype, "deterministic": True, **engine},
            plan={"max_rows_per_slice": 8},
            pool={"num_actors": num_actors},
            output={"path": name},
        )

    assert run(str(write("one", 1, max_num_seqs=16)), []) == 0
    assert run(str(write("two", 2, max_num_seqs=3, max_num_batched_tokens=40)), []) == 0
    killed = write("killed", 1, max_num_seqs=2)
    with Driver(killed) as driver:
        driver.wait_until(lambda: len(list((tmp_path / "killed" / "_slices").rglob("*.parquet"))) >= 3)
        driver.process.send_signal(signal.SIGKILL)
    assert not list((tmp_path / "killed" / "results").glob("*"))
    continued = write("killed", 2, max_num_seqs=64, enable_prefix_caching=False)
    assert run(str(continued), []) == 0

    expected = read_answers(tmp_path / "one")
    assert [len(rows) for rows in expected.values()] == [60, 60]
    assert read_answers(tmp_path / "two") == expected
    assert read_answers(tmp_path / "killed") == expected
