"""The plan over a corpus: every row once, whatever the shards; folded and ordered as if all were one; found again."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import Letters

from actors.requests import Completion, Output, Usage, derive_seed
from pipeline.bill.pricing import Price
from pipeline.corpus.shared_slices import publish_shared_slice, read_shared_slices
from pipeline.corpus_plan import manifest as manifests
from pipeline.corpus_plan.countdown import Countdown
from pipeline.corpus_plan.key_ranges import choose_ranges
from pipeline.corpus_plan.manifest import (
    CORPUS,
    PLANS,
    CorpusManifest,
    find_manifest,
    plan_folder,
    plan_settings,
    planned_shards,
    read_manifest,
    read_slice,
)
from pipeline.corpus_plan.merging import merge_range
from pipeline.corpus_plan.planning import finish_plan, plan_corpus, remove_other_plans, remove_plans
from pipeline.corpus_plan.sorted_runs import sort_shard
from pipeline.job import Job, OutputSection, job_from_dict
from pipeline.prefix_plan import ROW_BITS, PlannedRow, Slice, plan_shard
from pipeline.results import publish_answers
from pipeline.shards import Shard, ShardError, list_shards
from pipeline.slices import SliceTimes, slice_table
from pipeline.storage import Storage

PRINT = "f" * 64
SMALL = {"run_weight": 400, "range_weight": 300}
"""Budgets at which a few rows make several runs and ranges."""


def make_job(sampling=None, plan=None, engine=None, **columns: Any) -> Job:
    return job_from_dict(
        {
            "input": {"path": "memory://in", **({"prompt_column": "prompt"} | columns)},
            "model": "m",
            "engine": engine or {},
            "output": {"path": "out"},
            "sampling": sampling or {},
            "plan": plan or {},
        }
    )


def write_shard(name: str, columns: dict[str, Any]) -> Shard:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, row_group_size=7)
    info = Storage(f"memory://in{uuid.uuid4().hex}").write_whole(f"{name}.parquet", sink.getvalue().to_pybytes())
    return Shard(name, info.uri, info.size_bytes, info.etag, len(next(iter(columns.values()))))


def write_shards(corpus: Sequence[Sequence[str | None]]) -> list[Shard]:
    """Shards named so that their order by name is not that of the list."""
    return [
        write_shard(f"s{97 * i % 100:02d}", {"prompt": pa.array(prompts, pa.string())})
        for i, prompts in enumerate(corpus)
    ]


def new_output() -> Storage:
    return Storage(f"memory://out{uuid.uuid4().hex}")


def slices_of(storage: Storage, manifest: CorpusManifest) -> list[Slice]:
    return [read_slice(storage, manifest, index) for index in range(len(manifest.slices))]


def rows_of(pieces: Sequence[Slice]) -> list[tuple[str, PlannedRow]]:
    return [(piece.shards[row.shard_index], row) for piece in pieces for row in piece.rows]


def places(piece: Slice, keys: Sequence[int]) -> list[tuple[str, int]]:
    return [(piece.shards[key >> ROW_BITS], key & ((1 << ROW_BITS) - 1)) for key in keys]


def text_of(row: PlannedRow) -> str:
    return "".join(map(chr, row.prompt_token_ids))


def common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


PROMPTS = st.none() | st.text("ab", max_size=6) | st.text("abc", max_size=40) | st.just("x" * 31)
CORPORA = st.lists(st.lists(PROMPTS, max_size=25), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    CORPORA,
    st.integers(1, 80),
    st.integers(1, 9),
    st.sampled_from([0.0, 1.0]),
    st.integers(50, 2000),
    st.integers(50, 2000),
)
def test_any_corpus_is_planned_as_if_all_its_shards_were_one(corpus, tokens, max_rows, temperature, run, range_):
    job = make_job(
        sampling={"temperature": temperature},
        plan={"slice_tokens": tokens, "max_rows_per_slice": max_rows},
        engine={"max_model_len": 30},
    )
    shards, storage = write_shards(corpus), new_output()
    manifest = plan_corpus(job, PRINT, shards, storage, Letters(), run_weight=run, range_weight=range_)
    pieces = slices_of(storage, manifest)
    rows = rows_of(pieces)
    prompts = {(shard.name, i): prompt for shard, column in zip(shards, corpus) for i, prompt in enumerate(column)}

    # Each row once, in a slice that says which shards it is for.
    answered = [place for piece in pieces for place in places(piece, piece.row_indices)]
    assert sorted(answered) == sorted(prompts)
    for piece, entry in zip(pieces, manifest.slices):
        named = [manifest.shards[number].name for number in entry.shards]
        assert sorted({name for name, _ in places(piece, piece.row_indices)}) == named == list(piece.shards)
        assert 0 < len(piece.rows) == entry.num_rows <= max_rows
        assert len({request.request_id for request in piece.requests(job.sampling)}) == sum(
            row.error is None for row in piece.rows
        )

    # The right tokens, in the order of the tokens, of equal ones by shard and row.
    good = {place: prompt for place, prompt in prompts.items() if prompt and len(prompt) < 30}
    for shard, row in rows:
        assert (row.error is None) == ((shard, row.row_index) in good)
        assert text_of(row) == good.get((shard, row.row_index), "")
        assert row.seed == derive_seed(0, shard, row.row_index)
    ordered = [(row.prompt_token_ids, shard, row.row_index) for shard, row in rows]
    assert ordered == sorted(ordered)

    # Duplicates are folded onto the first, across shards, if they are bound to get the same answer.
    folded = {
        (piece.shards[row.shard_index], row.row_index): places(piece, row.duplicates)
        for piece in pieces
        for row in piece.rows
        if row.duplicates
    }
    alike: dict[str, list[tuple[str, int]]] = {}
    for place in sorted(good):
        alike.setdefault(good[place], []).append(place)
    expected = {same[0]: same[1:] for same in alike.values() if len(same) > 1} if temperature == 0 else {}
    assert folded == expected

    # The totals, against counting the nodes of the corpus' prefix tree; and all sums agree.
    computed = [text_of(row) for _, row in rows if row.error is None]
    nodes = {text[: i + 1] for text in computed for i in range(len(text))}
    repeated = len(computed) - len(set(computed))  # an engine has to compute the last token of each of these again
    totals = manifest.totals
    assert totals.num_rows == len(prompts) and totals.num_error_rows == len(prompts) - len(good)
    assert totals.prompt_tokens == sum(map(len, computed)) == sum(s.prompt_tokens for s in manifest.slices)
    assert totals.achievable_prefix_tokens == totals.prompt_tokens - len(nodes) - repeated
    assert totals.achievable_prefix_tokens == sum(piece.achievable_prefix_tokens for piece in pieces)
    assert sum(s.computed_tokens for s in manifest.slices) == len(nodes) + repeated
    within = sum(len(same) - len({shard for shard, _ in same}) for same in alike.values()) if temperature == 0 else 0
    assert totals.num_duplicates_within == within
    assert totals.num_duplicates_across == sum(map(len, expected.values())) - within

    # What a slice shares with the one before.
    for before, piece, entry in zip(pieces, pieces[1:], list(manifest.slices)[1:]):
        last = text_of(before.rows[-1])
        shared = [min(common_prefix(last, text_of(row)), max(0, len(text_of(row)) - 1)) for row in piece.rows]
        assert entry.shared_with_previous == piece.rows[0].shared_prefix_tokens == shared[0]
        assert entry.shared_within <= min(shared)
        assert entry.shared_within == min(row.shared_prefix_tokens for row in piece.rows)
    if pieces:
        assert manifest.slices[0].shared_with_previous == manifest.slices[0].shared_within == 0

    # The same input, in whatever order its shards are listed, is the same plan; and it reads back as it was.
    again, other = (
        plan_corpus(job, PRINT, shards[::-1], new := new_output(), Letters(), run_weight=run, range_weight=range_),
        read_manifest(storage, manifest.folder),
    )
    assert again.plan_id == manifest.plan_id == other.plan_id
    assert slices_of(new, again) == pieces == slices_of(storage, other)
    assert (other.shards, other.totals, other.settings) == (manifest.shards, manifest.totals, manifest.settings)
    assert [str(entry) for entry in other.slices] == [str(entry) for entry in manifest.slices]


def test_a_row_has_the_seed_and_the_prompt_that_its_shards_own_plan_gives_it():
    columns = {
        "prompt": ["x", "y", "x", None, "z", "x"],
        "id": ["k1", None, "k1", "k3", "k4", "k5"],
        "s": ['{"seed": 5}', None, '{"seed": 5}', None, '{"max_tokens": 3}', '{"seed": 6}'],
    }
    job = make_job(sampling={"temperature": 1.0, "seed": 3}, id_column="id", sampling_column="s")
    shards = [write_shard(name, columns) for name in ("b", "a")]
    storage = new_output()
    manifest = plan_corpus(job, PRINT, shards, storage, Letters())
    planned = {
        (shard, row.row_index): (row.seed, row.prompt_token_ids, row.sampling_overrides, row.error)
        for shard, row in rows_of(slices_of(storage, manifest))
    }
    for shard in shards:
        for row in (row for piece in plan_shard(job, shard, Letters()) for row in piece.rows):
            own = (row.seed, row.prompt_token_ids, row.sampling_overrides, row.error)
            assert planned.get((shard.name, row.row_index), own) == own
    # Rows 0 and 2 have a seed of their own, the same in both shards: one of the four is computed.
    assert set(planned) == {("a", i) for i in (0, 1, 3, 4, 5)} | {("b", i) for i in (1, 3, 4)}
    assert (manifest.totals.num_duplicates_within, manifest.totals.num_duplicates_across) == (2, 2)


def test_a_group_scattered_over_shards_stands_together_and_is_computed_once():
    documents = [letter * 50 for letter in "abcdefgh"]
    corpus = [[document + str(shard) for document in documents] for shard in range(6)]
    job = make_job(plan={"slice_tokens": 56, "max_rows_per_slice": 100})
    shards, storage = write_shards(corpus), new_output()
    manifest = plan_corpus(job, PRINT, shards, storage, Letters())
    pieces = slices_of(storage, manifest)
    assert [{text_of(row)[0] for row in piece.rows} for piece in pieces] == [{letter} for letter in "abcdefgh"]
    assert all(len(piece.shards) == 6 for piece in pieces)
    assert manifest.totals.achievable_prefix_tokens == 8 * 5 * 50
    apart = sum(plan_shard(job, shard, Letters()).achievable_prefix_tokens for shard in shards)
    assert apart == 0, "within a shard nothing is shared: this is what the corpus plan is for"


def test_a_prefix_cut_by_a_slice_says_what_another_actor_would_have_to_compute_again():
    corpus = [["h" * 30 + letter + digit for digit in "0123456789"] for letter in "abcd"]
    job = make_job(plan={"slice_tokens": 60, "max_rows_per_slice": 5})
    storage = new_output()
    manifest = plan_corpus(job, PRINT, write_shards(corpus), storage, Letters(), **SMALL)
    assert len(manifest.slices) > 4
    for entry in list(manifest.slices)[1:]:
        assert entry.shared_with_previous in (30, 31) and entry.shared_within >= 30
        assert entry.shared_within <= entry.shared_with_previous
    assert sum(s.computed_tokens for s in manifest.slices) == 30 + 4 + 40


def test_ranges_hold_every_prompt_once_and_one_range_needs_only_its_part_of_a_run():
    corpus = [[f"{(i * 37 + shard) % 1000:03d}" + "t" * 20 for i in range(500)] for shard in range(4)]
    shards, storage, job = write_shards(corpus), new_output(), make_job()
    sorted_shards = [sort_shard(job, shard, storage, "_plan/x", Letters(), run_weight=12_000) for shard in shards]
    assert all(len(one.runs) == 4 for one in sorted_shards)
    ranges = choose_ranges(sorted_shards, 30_000)
    assert [r.low for r in ranges][1:] == [r.high for r in ranges][:-1]
    assert ranges[0].low is None and ranges[-1].high is None and 4 <= len(ranges) <= 8
    sizes = {run.path: run.offsets[-1] for one in sorted_shards for run in one.runs}
    assert all(sum(part.end - part.start for part in r.parts) < 0.8 * sum(sizes.values()) for r in ranges)
    plans = [merge_range(storage, "_plan/x", plan_settings(job.plan), r) for r in ranges]
    assert sum(plan.totals.num_rows for plan in plans) == 2000
    assert all(one.last_order < other.first_order for one, other in pairwise(plans))
    assert max(plan.totals.num_rows for plan in plans) < 2.5 * 2000 / len(plans), "ranges are about even"


def test_shards_without_rows_and_corpora_without_rows_have_plans():
    storage = new_output()
    manifest = plan_corpus(make_job(), PRINT, write_shards([[], ["x"], []]), storage, Letters())
    assert manifest.totals.num_rows == len(manifest.slices) == 1
    countdown = Countdown(manifest)
    assert countdown.empty_shards() == [manifest.shards[0].name, manifest.shards[1].name]
    assert countdown.finish(0) == [manifest.shards[2].name]
    nothing = plan_corpus(make_job(), PRINT, write_shards([[]]), storage, Letters())
    assert len(nothing.slices) == 0 and read_manifest(storage, nothing.folder).totals.num_rows == 0


def test_shards_may_have_different_other_columns():
    shards = [
        write_shard("a", {"prompt": ["x"], "more": [1]}),
        write_shard("b", {"other": ["?"], "prompt": ["y"]}),
    ]
    manifest = plan_corpus(make_job(), PRINT, shards, storage := new_output(), Letters())
    assert [text_of(row) for _, row in rows_of(slices_of(storage, manifest))] == ["x", "y"]


def test_shards_may_be_batch_files_whose_lines_have_several_prompts(tmp_path):
    def line(number: int, **body: Any) -> str:
        body = {"model": "m", "temperature": 0, "max_tokens": 3, **body}
        return json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body})

    for name in ("a", "b"):
        lines = [line(0, prompt="xy"), line(1, prompt=["x", "xyz"]), line(2, prompt="xy", max_tokens=4), "no JSON"]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    job = job_from_dict(
        {
            "input": {"path": str(tmp_path), "format": "openai_batch"},
            "model": "m",
            "engine": {"max_model_len": 50},
            "output": {"path": "out"},
        }
    )
    manifest = plan_corpus(job, PRINT, list_shards(job).good, storage := new_output(), Letters())
    (piece,) = slices_of(storage, manifest)
    assert (manifest.totals.num_rows, manifest.totals.num_error_rows) == (8, 2)
    assert sorted(places(piece, piece.row_indices)) == [(name, row) for name in "ab" for row in range(4)]
    folded = {(piece.shards[row.shard_index], row.row_index): places(piece, row.duplicates) for row in piece.rows}
    assert {place: others for place, others in folded.items() if others} == {("a", 0): [("b", 0)], ("a", 2): [("b", 2)]}
    requests = [request.request_id for request in piece.requests(job.sampling)]
    assert len(set(requests)) == len(requests) == 2 + 2 * 2, "a line of two prompts is two requests, and never folded"


@settings(max_examples=25, deadline=None)
@given(CORPORA, st.sampled_from([0.0, 1.0]), st.floats(0, 10))
def test_any_corpus_comes_back_shard_by_shard_row_by_row_and_to_the_last_second(corpus, temperature, idle_s):
    output = new_output()
    job = make_job(
        sampling={"temperature": temperature},
        plan={"slice_tokens": 60, "max_rows_per_slice": 5},
        engine={"max_model_len": 30},
    ).model_copy(update={"output": OutputSection(path=output.uri)})
    shards = write_shards(corpus)
    manifest = plan_corpus(job, PRINT, shards, output, Letters(), **SMALL)
    paths, spent = [], 0.0
    for piece in slices_of(output, manifest):
        completions = [answer(row) for row in piece.rows]
        spent += sum(completion.usage.device_seconds for completion in completions)
        table = slice_table(job.sampling, piece.rows, completions, Price(3600.0, ""))
        name = manifest.slice_name(piece.index)
        times = SliceTimes(idle_s=idle_s, usd_per_device_hour=3600.0)
        times.achievable_prefix_tokens = piece.achievable_prefix_tokens
        publish_shared_slice(output, piece, name, table, times, {})
        paths.append(name.path(CORPUS))
    names = [shard.name for shard in shards]
    found = read_shared_slices(job.sampling, output, paths, names)
    metrics = [publish_answers(job, shard, output, *found[shard.name], PRINT, 0.0) for shard in shards]
    for shard, prompts in zip(shards, corpus):
        with output.open_input(f"results/{shard.name}.parquet") as file:
            results = pq.ParquetFile(file).read().to_pylist()
        assert [row["prompt"] for row in results] == list(prompts)
        for row in results:
            is_good = bool(row["prompt"]) and len(row["prompt"]) < 30
            assert row["response"] == (row["prompt"][::-1] if is_good else None) and (row["error"] is None) == is_good
    assert sum(one.device_seconds for one in metrics) == pytest.approx(spent, rel=1e-12)
    assert sum(one.idle_seconds for one in metrics) == pytest.approx(idle_s * len(manifest.slices), rel=1e-12)
    assert sum(one.achievable_prefix_tokens for one in metrics) == manifest.totals.achievable_prefix_tokens
    duplicates = manifest.totals.num_duplicates_within + manifest.totals.num_duplicates_across
    assert sum(one.rows_duplicate for one in metrics) == duplicates
    assert sum(one.rows_error for one in metrics) == manifest.totals.num_error_rows


def answer(row: PlannedRow) -> Completion:
    """The prompt backwards, in a time that only this prompt takes."""
    if row.error is not None:
        return Completion(str(row.key), error=row.error)
    tokens = len(row.prompt_token_ids)
    usage = Usage(prompt_tokens=tokens, completion_tokens=1, device_seconds=1 / (3 + tokens))
    return Completion(str(row.key), [Output(0, text_of(row)[::-1], [1], "stop", -0.5)], usage)


# --- a saved plan ---------------------------------------------------------------------------------------------------


def plan_two() -> tuple[Job, list[Shard], Storage, CorpusManifest]:
    job, shards, storage = make_job(), write_shards([["x", "y"], ["x", "z"]]), new_output()
    return job, shards, storage, plan_corpus(job, PRINT, shards, storage, Letters())


def test_a_saved_plan_is_used_again_also_when_some_shards_are_published():
    job, shards, storage, manifest = plan_two()
    for to_do in (shards, shards[:1], []):
        found, reasons = find_manifest(storage, PRINT, job.plan, shards, to_do)
        assert found is not None and found.plan_id == manifest.plan_id and reasons == []
    found, reasons = find_manifest(storage, PRINT, job.plan, [*shards, replace(shards[0], name="done")], shards)
    assert found is not None, "a shard that was published before there was this plan is none of its business"


def test_a_plan_of_a_corpus_that_changed_since_is_not_used_and_the_reason_names_the_shards():
    job, shards, storage, _ = plan_two()
    first, second = sorted(shards, key=lambda shard: shard.name)

    def reason(listed: list[Shard], to_do: list[Shard]) -> str:
        found, (one,) = find_manifest(storage, PRINT, job.plan, listed, to_do)
        assert found is None
        return one

    changed = [replace(first, etag="other"), second]
    assert f"shard {first.name} is changed since" in reason(changed, changed)
    assert f"shard {second.name} is gone since" in reason([first], [first])
    more = [*shards, *(replace(first, name=f"new{i}") for i in range(5))]
    assert "shards new0, new1, new2 and 2 more are new since" in reason(more, more)


def test_a_plan_of_another_job_cut_or_version_is_not_used_and_the_reason_says_so(monkeypatch):
    job, shards, storage, manifest = plan_two()
    found, (reason,) = find_manifest(storage, "0" * 64, job.plan, shards, shards)
    assert found is None and "it is of another job" in reason
    other = make_job(plan={"slice_tokens": 5})
    found, (reason,) = find_manifest(storage, PRINT, other.plan, shards, shards)
    assert found is None and "it was made with plan.slice_tokens=65536" in reason
    monkeypatch.setattr(manifests, "VERSION", 99)
    found, (reason,) = find_manifest(storage, PRINT, job.plan, shards, shards)
    assert found is None and "is of version 2, this Shoal reads 99" in reason
    monkeypatch.undo()
    storage.write_whole(f"{manifest.folder}/manifest.parquet", b"PAR1 and then nothing")
    found, (reason,) = find_manifest(storage, PRINT, job.plan, shards, shards)
    assert found is None and "cannot be read" in reason


def test_a_plan_is_there_only_when_all_of_it_is():
    job, shards, storage = make_job(), write_shards([["x", "y"], ["x", "z"]]), new_output()
    plan = plan_settings(job.plan)
    folder = plan_folder(PRINT, plan, planned_shards(shards))
    sorted_shards = [sort_shard(job, shard, storage, folder, Letters()) for shard in shards]
    plans = [merge_range(storage, folder, plan, range_) for range_ in choose_ranges(sorted_shards)]
    assert find_manifest(storage, PRINT, job.plan, shards, shards) == (None, [])
    finish_plan(storage, folder, PRINT, plan, planned_shards(shards), plans)
    assert find_manifest(storage, PRINT, job.plan, shards, shards)[0] is not None
    assert not storage.list(f"{folder}/sorted"), "the sorted runs go once the slices are there"


def test_planning_that_was_killed_goes_on_with_the_shards_that_were_sorted():
    shard, storage, job = write_shards([["x", "y", "z" * 200, "y"] * 3])[0], new_output(), make_job()
    before = sort_shard(job, shard, storage, "_plan/x", Letters(), run_weight=500)
    assert len(before.runs) > 1
    assert sort_shard(job, shard, storage, "_plan/x", None, run_weight=500) == before, "without a tokenizer"
    assert sort_shard(job, shard, storage, "_plan/x", Letters(), run_weight=10**6) != before
    assert sort_shard(job, shard, storage, "_plan/x", Letters(), run_weight=500) == before


def test_sorted_rows_that_are_damaged_are_sorted_again():
    shard, storage, job = write_shards([["x", "y", "x"]])[0], new_output(), make_job()
    before = sort_shard(job, shard, storage, "_plan/x", Letters())
    (range_,) = choose_ranges([before])
    (run,) = before.runs
    whole = storage.read_bytes(run.path)
    storage.write_whole(run.path, bytes(len(whole)))
    with pytest.raises(ShardError, match=r"cannot be read.*run the same command again"):
        merge_range(storage, "_plan/x", plan_settings(job.plan), range_)
    assert sort_shard(job, shard, storage, "_plan/x", Letters()) == before
    assert storage.read_bytes(run.path) == whole
    assert merge_range(storage, "_plan/x", plan_settings(job.plan), range_).totals.num_rows == 3


def test_a_shard_that_changes_while_the_corpus_is_planned_is_an_error_that_names_it():
    shard = write_shard("a", {"prompt": ["x"]})
    with pytest.raises(ShardError, match="was changed since the run began"):
        sort_shard(make_job(), replace(shard, etag="other"), new_output(), "_plan/x", Letters())


def test_slices_of_a_plan_that_are_damaged_or_gone_are_an_error_with_the_way_out():
    _, _, storage, manifest = plan_two()
    path = manifest.slices[0].path
    storage.write_whole(path, bytes(len(storage.read_bytes(path))))
    with pytest.raises(ShardError, match="remove _plan in the output and run the same command again"):
        read_slice(storage, manifest, 0)
    storage.remove(path)
    with pytest.raises(ShardError, match="remove _plan in the output and run the same command again"):
        read_slice(storage, manifest, 0)


def test_what_no_plan_needs_any_more_is_removed_and_nothing_else():
    job, shards, storage, manifest = plan_two()
    old = plan_corpus(job, "0" * 64, shards, storage, Letters())
    for one in (manifest, old):
        storage.write_whole(one.slice_name(0).path(CORPUS), b"answers")
    storage.write_whole("_slices/s00/00000-of-00001-ffffffffffff-00000000-00000000.parquet", b"a shard's own")
    remove_other_plans(storage, manifest)
    assert {file.path.split("/")[1] for file in storage.list(PLANS)} == {manifest.folder.split("/")[1]}
    assert [f.path for f in storage.list(f"_slices/{CORPUS}")] == [manifest.slice_name(0).path(CORPUS)]
    remove_plans(storage)
    assert [f.path.split("/")[:2] for f in storage.list()] == [["_slices", "s00"]]


# --- counting down --------------------------------------------------------------------------------------------------


def test_a_shard_is_complete_with_its_last_slice_and_a_slice_goes_with_its_last_shard():
    corpus = [["a1", "b1", "c1"], ["b2", "c2"], ["c3"]]
    job = make_job(plan={"max_rows_per_slice": 1})
    manifest = plan_corpus(job, PRINT, write_shards(corpus), new_output(), Letters())
    names = {tuple(corpus[i]): f"s{97 * i % 100:02d}" for i in range(3)}
    a, b, c = (names[tuple(column)] for column in corpus)
    countdown = Countdown(manifest)
    order = [manifest.shards[s.shards[0]].name for s in manifest.slices]
    assert countdown.slices_to_do() == list(range(6)) and sorted(order) == sorted([a, a, a, b, b, c])
    ready = [countdown.finish(index) for index in range(6)]
    assert sorted(name for names in ready for name in names) == sorted([a, b, c])
    assert all(names == [] or index == max(countdown.slices_of(names[0])) for index, names in enumerate(ready))
    assert countdown.finish(5) == [], "a slice counts once, also if it comes twice"
    assert countdown.publish(b) == countdown.slices_of(b) and countdown.publish(b) == []


@settings(max_examples=30, deadline=None)
@given(CORPORA, st.randoms(use_true_random=False))
def test_counting_down_in_any_order_publishes_each_shard_once_and_frees_each_slice_once(corpus, random):
    job = make_job(plan={"slice_tokens": 30, "max_rows_per_slice": 4})
    manifest = plan_corpus(job, PRINT, write_shards(corpus), new_output(), Letters())
    published_before = {shard.name for shard in manifest.shards if random.random() < 0.3}
    countdown = Countdown(manifest, published_before)
    todo = countdown.slices_to_do()
    assert todo == [
        s.index for s in manifest.slices if any(manifest.shards[n].name not in published_before for n in s.shards)
    ]
    not_needed = set(range(len(manifest.slices))) - set(todo)
    ready = countdown.empty_shards()
    for index in not_needed:
        ready += countdown.finish(index)
    random.shuffle(todo)
    for index in todo:
        ready += countdown.finish(index)
    assert sorted(ready) == sorted({shard.name for shard in manifest.shards} - published_before)
    freed = [index for name in ready for index in countdown.publish(name)]
    assert sorted(freed) == sorted(todo)


def test_planning_again_over_the_shards_that_can_be_read_leaves_the_others_out():
    good, bad = write_shards([["x"], ["y"]])
    storage, job = new_output(), make_job()
    with pytest.raises(ShardError):
        plan_corpus(job, PRINT, [good, replace(bad, etag="gone")], storage, Letters())
    manifest = plan_corpus(job, PRINT, [good], storage, Letters())
    assert [shard.name for shard in manifest.shards] == [good.name]
    assert np.array_equal(manifest.slices[0].shards, [0])
