"""The plan of a shard: every row once, the same each time, ordered so that shared prefixes are computed once."""

import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import Letters

from actors.requests import RowError, SamplingParams, derive_seed
from pipeline.job import Job, job_from_dict
from pipeline.prefix_plan import PlannedRow, ShardPlan, Slice, cut_at_borders, plan_shard, shared_prefix_lengths
from pipeline.shards import Shard, ShardError, list_shards
from pipeline.storage import Storage

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
STORIES = SHARED / "models" / "stories260K"


def make_job(path, sampling=None, plan=None, engine=None, model="m", **columns) -> Job:
    return job_from_dict(
        {
            "input": {"path": str(path), **({"prompt_column": "prompt"} | columns)},
            "model": str(model),
            "engine": engine or {},
            "output": {"path": "out"},
            "sampling": sampling or {},
            "plan": plan or {},
        }
    )


def plan_of(columns: dict, **settings_) -> ShardPlan:
    """Plan one shard with these columns, held in memory."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, row_group_size=100)
    info = Storage("memory://plans").write_whole("part.parquet", sink.getvalue().to_pybytes())
    shard = Shard("part", info.uri, info.size_bytes, info.etag, len(next(iter(columns.values()))))
    return plan_shard(make_job(info.uri, **settings_), shard, Letters())


def rows_of(plan: ShardPlan) -> list[PlannedRow]:
    return [row for piece in plan for row in piece.rows]


def texts(plan: ShardPlan) -> list[str]:
    return ["".join(map(chr, row.prompt_token_ids)) for row in rows_of(plan)]


def common_prefix(a, b) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


PROMPTS = st.lists(st.none() | st.text("ab", max_size=6) | st.text("abc", max_size=40), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(PROMPTS, st.integers(1, 60), st.integers(1, 9), st.sampled_from([0.0, 1.0]))
def test_every_row_is_in_exactly_one_slice_once_and_two_plans_are_the_same(prompts, tokens, rows, temperature):
    columns = {"prompt": pa.array(prompts, pa.string())}
    arguments = {
        "plan": {"slice_tokens": tokens, "max_rows_per_slice": rows},
        "sampling": {"temperature": temperature},
        "engine": {"max_model_len": 30},
    }
    plan = plan_of(columns, **arguments)
    slices = list(plan)
    assert sorted(index for piece in slices for index in piece.row_indices) == list(range(len(prompts)))
    assert [piece.index for piece in slices] == list(range(plan.num_slices))
    assert all(piece.num_slices == plan.num_slices and 0 < len(piece.rows) <= rows for piece in slices)

    for row in rows_of(plan):
        mine = prompts[row.row_index]
        assert (row.error is None) == (bool(mine) and len(mine) < 30)
        if row.error is None:
            assert "".join(map(chr, row.prompt_token_ids)) == mine
        assert all(prompts[other] == mine and other > row.row_index for other in row.duplicates)
    again = plan_of(columns, **arguments)
    assert [piece.rows for piece in again] == [piece.rows for piece in slices]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=12), min_size=1, max_size=30))
def test_achievable_prefix_tokens_are_what_the_prefix_tree_saves(prompts):
    plan = plan_of({"prompt": prompts})
    unique = sorted(set(prompts))
    nodes = {prompt[: i + 1] for prompt in unique for i in range(len(prompt))}
    assert plan.prompt_tokens == sum(map(len, unique))
    assert plan.achievable_prefix_tokens == plan.prompt_tokens - len(nodes)
    assert plan.achievable_prefix_tokens == sum(piece.achievable_prefix_tokens for piece in plan)


def test_rows_are_ordered_by_token_ids():
    plan = plan_of({"prompt": ["b", "ab", "a", "aa", "ü", "ba"]})
    assert texts(plan) == ["a", "aa", "ab", "b", "ba", "ü"]


def test_the_last_token_of_a_prompt_is_never_counted_as_shared():
    rows = [np.array(ids, np.int32) for ids in ([1, 2, 3], [1, 2, 3], [1, 2, 3, 4], [2], [2])]
    assert shared_prefix_lengths(rows).tolist() == [0, 2, 3, 0, 0]


def test_greedy_duplicates_are_computed_once():
    plan = plan_of({"prompt": ["x", "y", "x", "x"]})
    assert {row.row_index: row.duplicates for row in rows_of(plan)} == {0: [2, 3], 1: []}
    assert (plan.num_rows, plan.num_duplicate_rows) == (4, 2)


def test_sampled_duplicates_are_all_computed_each_with_its_own_noise():
    plan = plan_of({"prompt": ["x", "x", "x"]}, sampling={"temperature": 1.0})
    assert [row.duplicates for row in rows_of(plan)] == [[], [], []]
    assert len({row.seed for row in rows_of(plan)}) == 3


def test_sampled_duplicates_with_the_same_seed_of_their_own_are_computed_once():
    own = ['{"seed": 5}', '{"seed": 6}', '{"seed": 5}', None]
    plan = plan_of({"prompt": ["x"] * 4, "s": own}, sampling={"temperature": 1.0}, sampling_column="s")
    assert {row.row_index: (row.duplicates, row.seed) for row in rows_of(plan)} == {
        0: ([2], 5),
        1: ([], 6),
        3: ([], derive_seed(0, "part", 3)),
    }


def test_duplicates_with_different_sampling_are_not_folded():
    own = ['{"max_tokens": 5}', None, '{"max_tokens": 256}', '{"seed": 3}']
    plan = plan_of({"prompt": ["x"] * 4, "s": own}, sampling_column="s")
    # 256 is the default said aloud, and a greedy row has no use for a seed.
    assert {row.row_index: row.duplicates for row in rows_of(plan)} == {0: [], 1: [2, 3]}


def test_error_rows_are_never_folded():
    plan = plan_of({"prompt": [None, "", None]})
    assert [(row.row_index, row.duplicates) for row in rows_of(plan)] == [(0, []), (1, []), (2, [])]
    assert plan.num_error_rows == 3


def test_a_row_with_an_id_keeps_its_noise_wherever_it_stands():
    one = plan_of({"prompt": ["x", "y"], "id": ["k1", "k2"]}, id_column="id", sampling={"seed": 4})
    other = plan_of({"prompt": ["y", "z", "x"], "id": ["k2", "k3", "k1"]}, id_column="id", sampling={"seed": 4})
    first = {text: row.seed for text, row in zip(texts(one), rows_of(one))}
    second = {text: row.seed for text, row in zip(texts(other), rows_of(other))}
    assert first == {"x": derive_seed(4, "k1"), "y": derive_seed(4, "k2")}
    assert first.items() <= second.items()


def test_a_slice_ends_where_a_prefix_group_ends():
    groups = [letter * 50 + digits for letter in "abcd" for digits in ("11", "12", "13", "14", "21", "22", "23")]
    random.Random(0).shuffle(groups)
    plan = plan_of({"prompt": groups}, plan={"slice_tokens": 65, "max_rows_per_slice": 100})
    firsts = [{chr(row.prompt_token_ids[0]) for row in piece.rows} for piece in plan]
    assert firsts == [{"a"}, {"b"}, {"c"}, {"d"}]


def test_slices_are_near_their_target_and_never_have_more_rows_than_allowed():
    generator = np.random.default_rng(0)
    computed, shared = generator.integers(1, 50, 5000), generator.integers(0, 30, 5000).astype(np.int32)
    borders = cut_at_borders(computed, shared, 1000, 10_000)
    sizes = [int(computed[a:b].sum()) for a, b in pairwise(borders)]
    assert all(700 <= size <= 1250 for size in sizes[:-1])
    assert max(b - a for a, b in pairwise(cut_at_borders(computed, shared, 1000, 7))) <= 7
    assert cut_at_borders(np.array([10**9, 10**9]), np.zeros(2, np.int32), 5, 5) == [0, 1, 2]


def test_a_shard_without_rows_has_no_slices():
    plan = plan_of({"prompt": pa.array([], pa.string())})
    assert (plan.num_slices, plan.num_rows, list(plan)) == (0, 0, [])


def test_a_slice_survives_its_way_to_another_process():
    rows = [
        PlannedRow(3, [1, 2, 70_000], None, 2**63 - 1),
        PlannedRow(0, [5], '{"n": 2}', 0, duplicates=[7, 9]),
        PlannedRow(1, [], None, 5, RowError("null_prompt", "the prompt is null")),
    ]
    piece = Slice("part-ü", "etag", 1, 4, rows, "plan", 12)
    assert Slice.from_bytes(piece.to_bytes()) == piece
    assert Slice.from_bytes(Slice("s", "e", 0, 1, []).to_bytes()).rows == []
    assert piece.row_indices == [0, 1, 3, 7, 9]


def test_a_slices_requests_carry_each_rows_own_sampling_and_leave_errors_out():
    own = [None, '{"max_tokens": 3, "stop": ["a", "b"]}', None]
    plan = plan_of({"prompt": ["x", "y", None], "s": own}, sampling_column="s", sampling={"max_tokens": 9})
    base = SamplingParams(max_tokens=9)
    (piece,) = plan
    requests = {request.request_id: request for request in piece.requests(base)}
    assert requests.keys() == {"0", "1"}
    assert requests["0"].sampling is base
    assert (requests["1"].sampling.max_tokens, requests["1"].sampling.stop) == (3, ("a", "b"))
    assert requests["1"].prompt_token_ids == [ord("y")] and requests["1"].seed == derive_seed(0, "part", 1)


def test_the_plans_id_changes_with_the_rows_and_the_cut_and_with_nothing_else():
    plan = plan_of({"prompt": ["b", "a", "c"]})
    uri = plan.shard.uri
    same = plan_shard(make_job(uri, engine={"page_size": 8}), plan.shard, Letters())
    cut = plan_shard(make_job(uri, plan={"max_rows_per_slice": 1}), plan.shard, Letters())
    seeded = plan_shard(make_job(uri, sampling={"seed": 1}), plan.shard, Letters())
    written_anew = plan_of({"prompt": ["b", "a", "c"]})
    assert same.plan_id == plan.plan_id and next(iter(same)).plan_id == plan.plan_id
    assert len({one.plan_id for one in (plan, cut, seeded, written_anew)}) == 4


def test_a_shard_with_a_damaged_page_is_a_shard_error(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [f"prompt number {i}" for i in range(1000)]}), path, compression="gzip")
    data = bytearray(path.read_bytes())
    data[100:600] = bytes(500)
    path.write_bytes(data)
    (shard,) = list_shards(make_job(path)).good
    with pytest.raises(ShardError, match=r"a\.parquet cannot be read beyond row"):
        plan_shard(make_job(path), shard, Letters())


def test_ten_thousand_rows_of_three_hundred_tokens_are_planned_in_seconds():
    generator = random.Random(0)
    heads = ["".join(generator.choices("abcdefgh", k=250)) for _ in range(20)]
    prompts = [generator.choice(heads) + "".join(generator.choices("abcdefgh", k=50)) for _ in range(10_000)]
    started = time.monotonic()
    plan = plan_of({"prompt": prompts})
    assert sum(len(piece.rows) for piece in plan) == 10_000
    assert plan.achievable_prefix_tokens > 9_900 * 250
    assert time.monotonic() - started < 20  # 2 s on an idle core


@pytest.mark.skipif(not STORIES.exists(), reason="needs shared/models beside the checkout")
@pytest.mark.parametrize(
    ("folder", "columns"),
    [
        ("gsm8k_test_cot8", {"prompt_column": "prompt", "id_column": "id"}),
        ("mgsm_11lang", {"prompt_column": "prompt", "id_column": "id"}),
        ("mt_bench", {"messages_column": "messages"}),
    ],
)
def test_real_corpora_are_planned_with_each_row_once(folder, columns):
    from actors.weights.checkpoint import load_tokenizer

    if not (SHARED / "corpora" / folder).exists():
        pytest.skip("needs shared/corpora beside the checkout")
    tokenizer = load_tokenizer(str(STORIES))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    columns = {"prompt_column": None, **columns}
    job = make_job(SHARED / "corpora" / folder, model=STORIES, engine={"max_model_len": 4096}, **columns).resolve()
    for shard in list_shards(job).good[:3]:
        plan = plan_shard(job, shard, tokenizer)
        rows = pq.read_table(shard.uri).to_pylist()
        assert sorted(index for piece in plan for index in piece.row_indices) == list(range(len(rows)))
        ordered = [row.prompt_token_ids for row in rows_of(plan) if row.error is None]
        assert ordered == sorted(ordered)
        if columns["prompt_column"]:
            for row in rows_of(plan)[:20]:
                assert row.prompt_token_ids == tokenizer(rows[row.row_index]["prompt"])["input_ids"]
        if folder == "gsm8k_test_cot8":
            assert plan.achievable_prefix_tokens > 0.85 * plan.prompt_tokens
