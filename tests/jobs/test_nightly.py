"""`shoal nightly` from the outside: night after night, killed, refused, too late, dear, and with nothing to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from driver import Driver
from fake_worker import answer_to

import jobs.nightly
from jobs import cli
from jobs.nightly import EXIT_HELD, EXIT_UNUSUAL, NightlySettings, foretell, nightly, show_history
from jobs.run import run
from pipeline.job import FingerprintMismatch, load_job
from pipeline.lease import FOLDER as LEASE_FOLDER
from pipeline.lease import Lease, acquire
from pipeline.night.history import (
    KILLED,
    LEASE_LOST,
    LIMIT,
    NOTHING_NEW,
    STOPPED,
    SUCCESS,
    Night,
    read_nights,
    write_night,
)
from pipeline.night.leftovers import MIN_AGE_S, remove_leftovers
from pipeline.shards import list_shards
from pipeline.storage import Storage

REPOSITORY = Path(jobs.nightly.__file__).resolve().parents[1]


@pytest.fixture
def output(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "out"))


def read_results(output: Storage) -> dict[str, pa.Table]:
    return {file.stem: pq.read_table(file) for file in sorted(Path(output.uri, "results").glob("*.parquet"))}


def outcomes(output: Storage) -> list[str]:
    return [night.outcome for night in read_nights(output)]


def make_old(folder: Path, age_s: float = 600.0) -> None:
    """As if everything in the folder had been written so long ago; the store's clock is the file system's."""
    then = time.time() - age_s
    for file in folder.rglob("*"):
        if file.is_file():
            os.utime(file, (then, then))


# --- what is new --------------------------------------------------------------------------------------------------


def test_each_night_answers_what_is_new_or_changed_and_vanished_shards_keep_their_results(
    ray_cluster, write_corpus, write_job, fake_workers, output, capsys
):
    folder = write_corpus({"a": ["one", "two"], "b": ["three"]})
    job, workers = str(write_job()), fake_workers()
    assert nightly(job, [], new_worker=workers) == 0
    assert len(workers.asked()) == 3
    assert "2 new and 0 changed shards with 3 rows" in capsys.readouterr().out

    write_corpus({"b": ["four", None], "c": ["five"]})
    (folder / "a.parquet").unlink()
    assert nightly(job, [], new_worker=workers) == 0
    said = capsys.readouterr().out
    assert len(workers.asked()) == 5, "the two new rows that have a prompt, and no other"
    assert "1 new and 1 changed shards with 3 rows" in said and "changed: b" in said
    assert "gone from the input: a, 1 in all; their results stay, unless --remove-vanished" in said
    answers = {name: table["response"].to_pylist() for name, table in read_results(output).items()}
    assert answers == {
        "a": [answer_to("one"), answer_to("two")],
        "b": [answer_to("four"), None],
        "c": [answer_to("five")],
    }

    assert nightly(job, [], NightlySettings(remove_vanished=True), new_worker=workers) == 0
    assert set(read_results(output)) == {"b", "c"} and not output.exists("metrics/a.parquet")
    assert len(workers.asked()) == 5, "nothing is computed to remove something"
    assert output.exists("_SUCCESS")

    first, second, third = read_nights(output)
    assert (first.shards_new, first.rows, first.rows_error, first.shards_published) == (2, 3, 0, 2)
    assert (second.shards_new, second.shards_changed, second.shards_vanished) == (1, 1, 1)
    assert (second.rows, second.rows_error, second.outcome) == (3, 1, SUCCESS)
    assert (
        third.outcome == NOTHING_NEW
        and third.rows == 0
        and "removed the results of shards whose input is gone: 1" in third.notes[0]
    )
    assert first.cost_usd > 0 and first.versions["shoal"] and first.fingerprint == load_job(job).resolve().fingerprint()


def test_a_night_that_finds_nothing_new_needs_neither_torch_nor_ray_and_leaves_a_row(
    ray_cluster, write_corpus, write_job, fake_workers, output
):
    write_corpus({"a": ["one", "two"]})
    job = str(write_job())
    assert nightly(job, [], new_worker=fake_workers()) == 0
    heavy = {"torch", "ray", "transformers", "tokenizers"}
    code = (
        "import sys, jobs.cli\n"
        f"sys.argv = ['shoal', 'nightly', {job!r}]\n"
        "try: jobs.cli.main()\n"
        f"finally: print('heavy', sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "nothing new; last success" in done.stdout and "heavy []" in done.stderr
    _, night = read_nights(output)
    assert (night.outcome, night.exit_code, night.cost_usd, night.device_s) == (NOTHING_NEW, 0, 0.0, 0.0)


def test_a_night_after_one_that_published_all_but_its_summary_finishes_it(
    ray_cluster, write_corpus, write_job, fake_workers, output, monkeypatch
):
    write_corpus({"a": ["one"]})
    job = str(write_job())
    assert run(job, [], new_worker=fake_workers()) == 0
    output.remove("_SUCCESS")
    monkeypatch.setattr("jobs.run.start_ray", lambda: pytest.fail("there is nothing to compute"))
    assert nightly(job, []) == 0
    assert output.exists("_SUCCESS") and outcomes(output) == [NOTHING_NEW]


def test_a_changed_job_is_refused_with_what_changed_and_answers_all_again_only_when_told(
    ray_cluster, write_corpus, write_job, fake_workers, output
):
    write_corpus({"a": ["one"], "b": ["two"]})
    job, workers = str(write_job()), fake_workers()
    assert nightly(job, [], new_worker=workers) == 0
    changed = ["sampling.max_tokens=9"]
    with pytest.raises(FingerprintMismatch) as refused:
        nightly(job, changed, new_worker=workers)
    said = str(refused.value)
    assert "sampling.max_tokens: 8 -> 9" in said and "another output.path" in said and "--recompute" in said
    assert len(workers.asked()) == 2 and outcomes(output) == [SUCCESS]

    assert nightly(job, changed, NightlySettings(recompute=True), new_worker=workers) == 0
    assert len(workers.asked()) == 4
    assert nightly(job, changed, NightlySettings(recompute=True), new_worker=workers) == 0
    assert len(workers.asked()) == 4, "--recompute of the same job computes nothing again"
    assert outcomes(output) == [SUCCESS, SUCCESS, NOTHING_NEW]
    with pytest.raises(FingerprintMismatch, match="9 -> 8"):
        nightly(job, [], new_worker=workers)


def test_an_input_that_is_not_there_is_a_failed_night_and_the_lease_is_free_again(
    write_corpus, write_job, output, monkeypatch, capsys
):
    write_corpus({"a": ["one"]})
    job = write_job(input={"path": "nowhere"})
    monkeypatch.setattr(sys, "argv", ["shoal", "nightly", str(job)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and "matches no Parquet file" in capsys.readouterr().err
    (night,) = read_nights(output)
    assert (night.outcome, night.exit_code) == ("failed", 2) and "matches no Parquet file" in night.reason
    acquire(output, "the next")


# --- the lease ----------------------------------------------------------------------------------------------------


def test_a_second_night_is_refused_with_its_own_exit_code_and_named_holder(
    write_corpus, write_job, output, capsys, monkeypatch
):
    write_corpus({"a": ["one"]})
    monkeypatch.setattr("pipeline.lease.WAIT_STEP_S", 0.01)
    with acquire(output, "shoal nightly first.yaml") as lease:
        assert nightly(str(write_job()), []) == EXIT_HELD
        said = capsys.readouterr().err
        assert f"shoal nightly first.yaml on {lease.holder.host}" in said and lease.holder.started_at in said
        assert nightly(str(write_job()), [], NightlySettings(wait_s=0.05)) == EXIT_HELD
        assert "waiting for at most 0.05 s" in capsys.readouterr().out
    assert read_nights(output) == [], "a night that was refused is none"


def test_a_night_that_has_lost_its_lease_stops_before_it_publishes_more(
    ray_cluster, write_corpus, write_job, fake_workers, output, monkeypatch, capsys
):
    write_corpus({"a": [f"prompt {i}" for i in range(60)]})
    job, workers = str(write_job(pool={"max_slices_in_flight": 1})), fake_workers(delay_s=0.2)
    asked = iter(range(1000))
    # Held when the night begins and while Ray starts; lost once slices are computed.
    monkeypatch.setattr(Lease, "is_lost", property(lambda lease: bool(workers.asked()) and next(asked) >= 2))
    assert nightly(job, [], new_worker=workers) == EXIT_HELD
    assert "the lease on the output was lost" in capsys.readouterr().err
    assert outcomes(output) == [LEASE_LOST]
    assert not output.exists("_SUCCESS") and read_results(output) == {}
    monkeypatch.undo()
    make_old(Path(output.uri, LEASE_FOLDER))
    assert nightly(job, [], new_worker=workers) == 0
    assert read_results(output)["a"]["id"].to_pylist() == list(range(60))


# --- killed, stopped, limited -------------------------------------------------------------------------------------


def test_after_a_kill_the_next_night_continues_and_each_row_is_there_once(
    ray_cluster, write_corpus, write_job, output, capsys
):
    shards = {name: [f"Question {name} {i}: {'why? ' * (i % 7)}" for i in range(60)] for name in "ab"}
    write_corpus(shards)
    job = write_job(
        sampling={"max_tokens": 120, "temperature": 0.8, "seed": 7},
        engine={"max_num_seqs": 8},
        plan={"max_rows_per_slice": 8, "scope": "shard"},
    )
    with Driver(job, command="nightly") as driver:
        driver.wait_until(lambda: len(list(Path(output.uri).glob("_slices/*/*.parquet"))) >= 2)
        driver.process.send_signal(signal.SIGKILL)
    num_found = len(list(Path(output.uri).glob("_slices/*/*.parquet")))
    assert num_found >= 2 and outcomes(output) == ["running"]

    assert nightly(str(job), []) == EXIT_HELD, "for all that is known the first night may still live"
    make_old(Path(output.uri, LEASE_FOLDER))
    output.write_whole(f"_slices/a/00000-of-00001-{'0' * 12}-{'0' * 8}-{'0' * 8}.parquet", b"of another job")
    half = Path(output.uri, "results", f".a.parquet.{'0' * 32}.tmp")
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"half")
    make_old(half.parent, MIN_AGE_S + 60)
    capsys.readouterr()
    assert nightly(str(job), []) == 0
    said = capsys.readouterr().out
    assert "was killed; continuing" in said
    assert "removed 1 slices of an older input or job, or of finished shards, 1 half-written files" in said

    for name, table in read_results(output).items():
        assert table["id"].to_pylist() == list(range(60)), name
        assert table["prompt"].to_pylist() == shards[name]
    assert set(read_results(output)) == {"a", "b"} and not half.exists()
    killed, second = read_nights(output)
    assert (killed.outcome, second.outcome) == (KILLED, SUCCESS)
    assert 0 < second.rows < 120, "what the killed night had published was not computed again"
    assert second.rows <= 120 - 2 * 1 and second.shards_published == 2


@pytest.mark.slow  # that a run drains is tested of `shoal run`
def test_sigterm_ends_a_night_as_stopped_and_frees_the_lease_at_once(write_corpus, write_job, output):
    write_corpus({"a": [f"Question {i}" for i in range(300)]})
    job = write_job(sampling={"max_tokens": 200}, engine={"max_num_seqs": 2}, plan={"max_rows_per_slice": 4})
    with Driver(job, command="nightly") as driver:
        driver.wait_until(lambda: len(list(Path(output.uri).glob("_slices/*/*.parquet"))) >= 1)
        driver.process.send_signal(signal.SIGTERM)
        assert driver.wait() == 143, driver.log.read_text()
    (night,) = read_nights(output)
    assert (night.outcome, night.exit_code) == (STOPPED, 143) and night.rows >= 4
    assert night.cost_usd > 0
    acquire(output, "the next")


def test_a_night_that_reaches_its_budget_says_so_and_the_next_goes_on(
    ray_cluster, write_corpus, write_job, fake_workers, output
):
    write_corpus({"a": [f"prompt {i}" for i in range(40)]})
    job, workers = str(write_job(limits={"budget_usd": 1e-9})), fake_workers(delay_s=0.2)
    assert nightly(job, [], new_worker=workers) == 4
    assert nightly(job, ["limits.budget_usd=null"], new_worker=workers) == 0
    first, second = read_nights(output)
    assert (first.outcome, second.outcome) == (LIMIT, SUCCESS)
    assert 0 < first.rows < 40 and first.rows + second.rows == 40, "each row is counted on the night that computed it"
    assert "limits.budget_usd" in first.reason and len(workers.asked()) == 40


def test_the_drafters_index_goes_from_night_to_night(ray_cluster, write_corpus, write_job, fake_workers, output):
    job, workers = str(write_job()), fake_workers(drafts=True)
    for night, words in enumerate((["first"], ["second"], ["third"])):
        write_corpus({f"shard{night}": words})
        assert nightly(job, [], new_worker=workers) == 0
    (file,) = output.list("_drafts")
    assert set(output.read_bytes(file.path).split()[1:]) == {b"first", b"second", b"third"}
    assert all(night.drafted_tokens == 10 and night.acceptance_rate == 0.6 for night in read_nights(output))


# --- leftovers ----------------------------------------------------------------------------------------------------


def test_leftovers_go_and_what_can_be_continued_or_is_not_ours_stays(write_corpus, write_job, output):
    write_corpus({"a": ["one"], "b": ["two"], "done": ["three"]})
    job = load_job(str(write_job())).resolve()
    shards = list_shards(job).good
    from pipeline.slices import SliceName, _short_hash

    fingerprint = job.fingerprint()
    etags = {shard.name: shard.etag for shard in shards}

    def slice_of(shard: str, **changes) -> str:
        known = {"job": fingerprint[:12], "input": _short_hash(etags.get(shard, "")), "plan": "0" * 8}
        return SliceName(0, 2, **{**known, **changes}).path(shard)

    stays = [slice_of("a"), slice_of("unreadable"), slice_of("_corpus", input="0" * 8)]
    stays += ["_drafts/x.index", "_plan/x", "_runs/r.json", "_slices/notes/mine.txt", f"{LEASE_FOLDER}/00000001.json"]
    goes = [slice_of("a", job="0" * 12), slice_of("b", input="0" * 8), slice_of("done"), slice_of("vanished")]
    goes += [slice_of("_corpus", job="0" * 12), f"run.json.probe-{'0' * 32}", f"{LEASE_FOLDER}/clock-{'0' * 32}"]
    for path in [*stays, *goes]:
        output.write_whole(path, b"x")
    young = Path(output.uri, f".x.{'0' * 32}.tmp")
    young.write_bytes(b"half")
    Path(output.uri, ".other.tmp").write_bytes(b"not ours")
    make_old(Path(output.uri), MIN_AGE_S + 60)
    os.utime(young)
    removed = remove_leftovers(output, shards, {"done"}, fingerprint, ["unreadable"])
    assert sorted(file.path for file in output.list()) == sorted(stays)
    assert (removed.slices, removed.probes, removed.unfinished) == (5, 2, 0)
    assert young.exists() and Path(output.uri, ".other.tmp").exists()


# --- as usual, or not ---------------------------------------------------------------------------------------------


def usual_nights(output: Storage, fingerprint: str, *, rows: int = 400) -> None:
    for number in range(6):
        started_at = datetime.now(UTC) - timedelta(days=7 - number)
        night = Night(f"{started_at:%Y%m%dT%H%M%SZ}-{number}", f"{started_at:%Y-%m-%d}", started_at, outcome=SUCCESS)
        night.finished_at, night.exit_code, night.fingerprint = started_at + timedelta(minutes=9), 0, fingerprint
        night.rows, night.prompt_tokens, night.completion_tokens = rows, 9 * rows, 5 * rows
        night.busy_s, night.rows_usd = 1e6 * rows, 1e3 * rows
        write_night(output, night)


def test_a_night_that_is_not_as_usual_is_named_and_red_only_if_asked(
    ray_cluster, write_corpus, write_job, fake_workers, output, capsys
):
    write_corpus({"a": [f"prompt {i}" for i in range(80)]})
    job, workers = str(write_job()), fake_workers()
    usual_nights(output, load_job(job).resolve().fingerprint())
    assert nightly(job, [], new_worker=workers) == 0
    said = capsys.readouterr().err
    assert "shoal: tonight is not as usual: cost of 1,000 rows: $" in said
    assert "usually $1e+06" in said and "by the last 6 nights" in said
    night = read_nights(output)[-1]
    assert night.outcome == SUCCESS and any(text.startswith("cost of 1,000 rows") for text in night.warnings)
    write_corpus({"b": [f"prompt {i}" for i in range(80)]})
    assert nightly(job, [], NightlySettings(strict=True), new_worker=workers) == EXIT_UNUSUAL
    assert show_history(job, [], 3) == 0
    table = capsys.readouterr().out
    assert table.count("success !") == 2 and table.count("success") == 3 and "cost of 1,000 rows" in table


def test_a_dry_run_says_what_is_new_and_its_price_and_writes_nothing(
    ray_cluster, write_corpus, write_job, fake_workers, output, tmp_path, capsys
):
    write_corpus({"a": [f"prompt {i}" for i in range(40)]})
    job = str(write_job())
    assert foretell(job, []) == 0
    said = capsys.readouterr().out
    assert "1 new and 0 changed shards with 40 rows" in said and "prompt tokens" in said
    assert "no device time without a night before" in said and not (tmp_path / "out").exists()
    assert nightly(job, []) == 0  # the real engine, which leaves its device's step times
    write_corpus({"b": [f"question {i}" for i in range(20)]})
    before = {file.path: file.etag for file in output.list()}
    capsys.readouterr()
    assert foretell(job, []) == 0
    said = capsys.readouterr().out
    assert "to answer: 1 new and 0 changed shards with 20 rows; done before: 1" in said
    assert "at the price of the last 1 nights: $" in said
    assert "of device time, " in said and "answers of 8 tokens as in the nights before" in said
    assert {file.path: file.etag for file in output.list()} == before


def test_the_history_of_an_output_without_nights_is_empty(write_corpus, write_job, tmp_path, capsys):
    write_corpus({"a": ["one"]})
    assert show_history(str(write_job()), [], 5) == 0
    assert "none yet" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_nights_on_s3_are_alike(ray_cluster, s3_environment, write_corpus, write_job, fake_workers, monkeypatch):
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    bucket = Storage("s3://nights/out")
    if not bucket._filesystem().exists("nights"):
        bucket._filesystem().mkdir("nights")
    write_corpus({"a": ["one", "two"]})
    job, workers = str(write_job(output={"path": bucket.uri})), fake_workers()
    assert nightly(job, [], new_worker=workers) == 0
    assert nightly(job, [], new_worker=workers) == 0
    with acquire(bucket, "another"):
        assert nightly(job, [], new_worker=workers) == EXIT_HELD
    assert outcomes(bucket) == [SUCCESS, NOTHING_NEW] and len(workers.asked()) == 2
    assert [file.path for file in bucket.list(LEASE_FOLDER)] == [f"{LEASE_FOLDER}/00000003.json"]
