"""A corpus that changes in mid-run: what is answered stays answered, and only other rows are planned again."""

from __future__ import annotations

import random
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_worker import FakeWorkers, answer_to
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import Letters

from actors.requests import Completion, Output, Usage
from jobs.run import run
from pipeline.bill.ledger import read_bill, read_metrics, read_runs
from pipeline.bill.pricing import Price
from pipeline.corpus.shared_slices import answered_rows, publish_shared_slice, read_shared_slices
from pipeline.corpus_plan.carrying import find_carried, kept_answers
from pipeline.corpus_plan.countdown import Countdown
from pipeline.corpus_plan.manifest import CORPUS, PLANS, Carried, CorpusManifest, find_manifest, read_slice
from pipeline.corpus_plan.planning import plan_corpus, remove_other_plans
from pipeline.job import Job, job_from_dict
from pipeline.prefix_plan import PlannedRow
from pipeline.results import publish_answers
from pipeline.shards import Shard, ShardError
from pipeline.slices import SliceTimes, list_slices, slice_table
from pipeline.storage import Storage

PRINT = "f" * 64
SECONDS, IDLE_S = 1.0, 0.5
"""What each computed row costs, and each slice besides."""


class Corpus:
    """Shards in memory that may change, an output, and a run over them in this process that can stop anywhere."""

    def __init__(self) -> None:
        self.output = Storage(f"memory://out{uuid.uuid4().hex}")
        self.texts: dict[str, list[str]] = {}
        self.shards: dict[str, Shard] = {}
        self.published: set[str] = set()
        self.asked: Counter[str] = Counter()
        self.spent_s = self.billed_s = 0.0
        self.job: Job = job_from_dict(
            {
                "input": {"path": "memory://in", "prompt_column": "prompt"},
                "model": "m",
                "output": {"path": self.output.uri},
                "plan": {"max_rows_per_slice": 4},
            }
        )

    def put(self, name: str, texts: list[str]) -> None:
        """A new shard, or another version of one."""
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"prompt": pa.array(texts, pa.string())}), sink)
        info = Storage(f"memory://in{uuid.uuid4().hex}").write_whole(f"{name}.parquet", sink.getvalue().to_pybytes())
        self.texts[name] = texts
        self.shards[name] = Shard(name, info.uri, info.size_bytes, info.etag, len(texts))
        self.published.discard(name)

    def remove(self, name: str) -> None:
        del self.texts[name], self.shards[name]
        self.published.discard(name)

    @property
    def to_do(self) -> list[Shard]:
        return [shard for name, shard in self.shards.items() if name not in self.published]

    def plan(self) -> CorpusManifest:
        listed = list(self.shards.values())
        manifest, _ = find_manifest(self.output, PRINT, self.job.plan, listed, self.to_do)
        if manifest is None:
            slices = list_slices(self.output, CORPUS).get(CORPUS, {})
            carried = find_carried(self.output, PRINT, listed, self.to_do, slices)
            manifest = plan_corpus(self.job, PRINT, self.to_do, self.output, Letters(), carried=carried)
            remove_other_plans(self.output, manifest)
        return manifest

    def run(self, num_slices: int, num_shards: int) -> CorpusManifest:
        """Answer at most so many slices, then publish at most so many of the shards that are complete."""
        manifest = self.plan()
        done = list_slices(self.output, CORPUS).get(CORPUS, {})
        countdown = Countdown(manifest, self.published)
        ready = countdown.empty_shards()
        for index in countdown.slices_to_do():
            path = manifest.slice_name(index).path(CORPUS)
            if path not in done and num_slices > 0:
                num_slices -= 1
                self._answer(manifest, index)
            elif path not in done:
                continue
            ready += countdown.finish(index)
        carried = manifest.carried
        names = ready[:num_shards]
        before = {path for name in names for path in carried.paths_by_shard().get(name, [])}
        paths = sorted(before | {manifest.slice_name(i).path(CORPUS) for n in names for i in countdown.slices_of(n)})
        answers = read_shared_slices(self.job.sampling, self.output, paths, names, kept_answers(carried))
        for name in names:
            metrics = publish_answers(self.job, self.shards[name], self.output, *answers[name], PRINT, 0.0)
            self.billed_s += metrics.device_seconds + metrics.lost_seconds + metrics.idle_seconds
            self.published.add(name)
        return manifest

    def _answer(self, manifest: CorpusManifest, index: int) -> None:
        piece = read_slice(self.output, manifest, index)
        self.spent_s += IDLE_S + SECONDS * len(piece.rows)
        table = slice_table(self.job.sampling, piece.rows, [self._answer_to(row) for row in piece.rows], Price(1.0, ""))
        times = SliceTimes(idle_s=IDLE_S, usd_per_device_hour=1.0)
        publish_shared_slice(self.output, piece, manifest.slice_name(index), table, times, {})

    def _answer_to(self, row: PlannedRow) -> Completion:
        text = "".join(map(chr, row.prompt_token_ids))
        self.asked[text] += 1
        usage = Usage(prompt_tokens=len(text), completion_tokens=1, device_seconds=SECONDS)
        return Completion(str(row.key), [Output(0, text[::-1], [1], "stop", -0.5)], usage)

    def results(self) -> dict[str, list[str]]:
        tables = {}
        for name in self.published:
            with self.output.open_input(f"results/{name}.parquet") as file:
                tables[name] = pq.ParquetFile(file).read()["response"].to_pylist()
        return tables


TEXTS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=9)
CHANGES = st.lists(
    st.tuples(st.sampled_from("abcde"), st.none() | TEXTS, st.integers(0, 5), st.integers(0, 2)), max_size=5
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from("abcde"), TEXTS, min_size=1), CHANGES)
def test_whatever_changes_and_wherever_a_run_stops_every_row_is_answered_from_its_own_text(first, changes):
    corpus = Corpus()
    for name, texts in first.items():
        corpus.put(name, texts)
    corpus.run(num_slices=3, num_shards=1)
    for name, texts, num_slices, num_shards in changes:
        if texts is not None:
            corpus.put(name, texts)
        elif name in corpus.shards and len(corpus.shards) > 1:
            corpus.remove(name)
        corpus.run(num_slices, num_shards)
    corpus.run(10**6, 10**6)
    assert corpus.results() == {name: [text[::-1] for text in texts] for name, texts in corpus.texts.items()}


def test_new_shards_leave_every_answered_row_answered_and_the_bill_whole():
    corpus = Corpus()
    words = [f"{letter}{i:02d}" for i in range(10) for letter in "pq"]
    corpus.put("a", words[::2])
    corpus.put("b", [*words[1::2], words[0]])
    first = corpus.run(num_slices=3, num_shards=0)
    assert len(first.slices) == 5 and corpus.asked.total() == 12
    for number in range(3):  # more shards each time, before what was there is done
        corpus.put(f"new{number}", [f"{number}{word}" for word in words[:6]])
        plan = corpus.run(num_slices=1, num_shards=1)
        assert plan.carried.generation == number + 1
        assert plan.totals.num_rows_carried + plan.totals.num_rows == sum(shard.num_rows for shard in plan.shards)
    corpus.run(10**6, 10**6)
    assert corpus.published == set(corpus.shards)
    assert set(corpus.asked.values()) == {1}, "no row is asked twice"
    assert corpus.asked.total() == 20 + 3 * 6
    assert corpus.results() == {name: [text[::-1] for text in texts] for name, texts in corpus.texts.items()}
    assert corpus.billed_s == pytest.approx(corpus.spent_s, rel=1e-12)


def test_a_shard_that_changes_or_goes_leaves_what_it_cost_to_those_answered_with_it():
    corpus = Corpus()
    for name in "abcd":
        corpus.put(name, [f"{i}{name}" for i in range(6)])  # each slice has a row of every shard
    corpus.run(num_slices=4, num_shards=0)
    asked = corpus.asked.total()
    assert asked == 16
    corpus.remove("a")
    corpus.put("b", ["other"])
    plan = corpus.run(num_slices=0, num_shards=0)
    assert len(plan.carried.slices) == 4 and plan.totals.num_rows_carried == 8
    corpus.remove("c")
    plan = corpus.run(10**6, 10**6)
    assert plan.carried.generation == 2 and plan.totals.num_rows_carried == 4
    assert corpus.published == {"b", "d"} and corpus.results()["b"] == ["rehto"]
    assert corpus.asked.total() == asked + 1 + 2, "the changed shard's row, and two of the shard that stayed"
    assert corpus.billed_s == pytest.approx(corpus.spent_s, rel=1e-12) and corpus.spent_s >= 19 * SECONDS


def test_a_shard_with_results_that_goes_has_its_share_and_leaves_none():
    corpus = Corpus()
    corpus.put("a", ["1a", "2a"])
    corpus.put("b", ["1b", "2b", *(f"9b{i}" for i in range(4))])
    corpus.run(num_slices=1, num_shards=1)
    assert corpus.published == {"a"}
    corpus.remove("a")
    corpus.put("c", ["1c"])
    corpus.run(10**6, 10**6)
    assert corpus.billed_s == pytest.approx(corpus.spent_s, rel=1e-12)
    assert corpus.asked.total() == 9


def test_another_cut_of_the_slices_keeps_the_answers_too():
    corpus = Corpus()
    corpus.put("a", [f"{i}" for i in range(9)])
    corpus.run(num_slices=1, num_shards=0)
    corpus.job = corpus.job.model_copy(update={"plan": corpus.job.plan.model_copy(update={"max_rows_per_slice": 2})})
    corpus.run(10**6, 10**6)
    assert set(corpus.asked.values()) == {1} and corpus.published == {"a"}


def test_a_plan_whose_carried_answers_are_gone_does_not_hold_and_what_is_left_is_carried_on():
    corpus = Corpus()
    corpus.put("a", [f"{i}" for i in range(12)])
    corpus.run(num_slices=2, num_shards=0)
    corpus.put("b", ["x"])
    plan = corpus.run(num_slices=1, num_shards=0)
    gone, kept = (one.path for one in plan.carried.slices)
    corpus.output.remove(gone)
    listed = list(corpus.shards.values())
    found, (reason,) = find_manifest(corpus.output, PRINT, corpus.job.plan, listed, listed)
    assert found is None and "1 slices that were answered before it are gone" in reason
    again = corpus.plan()
    assert [one.path for one in again.carried.slices][1:] == [kept] and again.totals.num_rows_carried == 8
    corpus.run(10**6, 10**6)
    assert corpus.published == {"a", "b"} and max(corpus.asked.values()) == 2
    assert sum(count == 2 for count in corpus.asked.values()) == 4, "the rows of the slice that is gone"


def test_planning_again_that_was_killed_takes_up_the_same_folder():
    corpus = Corpus()
    corpus.put("a", [f"{i}" for i in range(12)])
    corpus.run(num_slices=2, num_shards=0)
    corpus.put("b", ["x"])
    listed = list(corpus.shards.values())
    slices = list_slices(corpus.output, CORPUS)[CORPUS]
    carried = find_carried(corpus.output, PRINT, listed, listed, slices)
    first = plan_corpus(corpus.job, PRINT, listed, corpus.output, Letters(), carried=carried)
    corpus.output.remove(f"{first.folder}/manifest.parquet")
    assert corpus.plan().folder == first.folder
    nothing = plan_corpus(corpus.job, PRINT, listed, corpus.output, Letters(), carried=Carried())
    assert nothing.folder != first.folder


def test_a_damaged_slice_of_an_earlier_plan_is_removed_with_the_way_out():
    corpus = Corpus()
    corpus.put("a", [f"{i}" for i in range(5)])
    corpus.run(num_slices=1, num_shards=0)
    (path,) = list_slices(corpus.output, CORPUS)[CORPUS]
    assert sorted(answered_rows(corpus.output, [path], "a").tolist()) == [0, 1, 2, 3]
    corpus.output.write_whole(path, corpus.output.read_bytes(path)[:-9])
    with pytest.raises(ShardError, match="run the same command again"):
        answered_rows(corpus.output, [path], "a")
    assert not corpus.output.exists(path)


def test_plans_of_another_job_leave_nothing():
    corpus = Corpus()
    corpus.put("a", [f"{i}" for i in range(5)])
    corpus.run(num_slices=1, num_shards=0)
    listed, slices = list(corpus.shards.values()), list_slices(corpus.output, CORPUS)[CORPUS]
    assert find_carried(corpus.output, "0" * 64, listed, listed, slices) == Carried()
    changed = [replace(listed[0], etag="other")]
    assert find_carried(corpus.output, PRINT, changed, changed, slices).slices == ()


# --- on a real Ray --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_with_a_new_and_a_changed_shard_asks_nothing_again_that_was_answered(
    write_corpus, write_job, tmp_path, capsys
):
    rng = random.Random(3)
    documents = [f"Document {i}: {'abc ' * 12}" for i in range(4)]
    shards = {
        f"s{n}": [f"{rng.choice(documents)} Question {n} {i}?" for i in range(k)] for n, k in enumerate((16, 16, 2))
    }
    write_corpus(shards)
    job, workers = str(write_job(limits={"budget_usd": 1e-9})), FakeWorkers(tmp_path / "asked.log", delay_s=0.2)
    assert run(job, ["pool.max_slices_in_flight=1", "plan.scope=auto"], new_worker=workers) == 4
    num_before = len(workers.asked())
    assert num_before > 2 and list((tmp_path / "out" / "_slices" / CORPUS).iterdir())
    assert not list((tmp_path / "out").glob("results/*"))
    capsys.readouterr()
    later = {"s2": ["another question"], "s3": [f"{documents[0]} Question 3 {i}?" for i in range(5)]}
    write_corpus(later)
    shards |= later
    assert run(job, ["limits.budget_usd=null"], new_worker=workers) == 0
    assert "scope corpus (auto: a part of it was answered as one corpus)" in capsys.readouterr().out
    num_rows = sum(map(len, shards.values()))
    assert num_rows <= len(workers.asked()) <= num_rows + 2, "all once, but for what the changed shard had before"
    output = Storage(str(tmp_path / "out"))
    for name, rows in shards.items():
        table = pq.read_table(tmp_path / "out" / "results" / f"{name}.parquet")
        assert table["id"].to_pylist() == list(range(len(rows)))
        assert table["response"].to_pylist() == [answer_to(row) for row in rows]
    assert not output.list(PLANS) and not output.list("_slices")
    bill = read_bill(output)
    assert bill.rows == bill.rows_ok == num_rows
    assert sum(row["rows_in"] for row in read_metrics(output)) == bill.rows
    _, second = read_runs(output)
    assert second.scope == "corpus" and second.num_slices_found > 0
    assert Path(tmp_path / "out" / "_SUCCESS").exists()
