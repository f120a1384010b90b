"""The order of a prompt's fields: against all orders there are on small tables, and what it does to prompts."""

from __future__ import annotations

import itertools
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.weights.checkpoint import load_tokenizer
from pipeline.fields.field_gain import FILE, learn_from_shards, measure_gain, settle_field_order
from pipeline.fields.field_order import PUNCTUATION, FieldOrder, learn_field_order
from pipeline.job import JobError, load_job
from pipeline.prefix_plan import plan_shard
from pipeline.shards import list_shards
from pipeline.storage import Storage

TEMPLATE = 'Is it worth watching?\n{{ fields("review", "rating", "film", "synopsis") }}\n'

Table = list[dict[str, str]]


def saved(table: Table, orders: list[list[str]]) -> int:
    """Characters of whole fields that rows share with the row before, once sorted."""
    rows = sorted([(name, row[name]) for name in order] for row, order in zip(table, orders))
    total = 0
    for before, row in itertools.pairwise(rows):
        for one, other in zip(before, row):
            if one != other:
                break
            total += len(one[0]) + len(one[1]) + PUNCTUATION
    return total


def learnt(table: Table) -> FieldOrder:
    return learn_field_order({name: [row[name] for row in table] for name in table[0]})


def tables(num_rows: st.SearchStrategy[int], num_fields: st.SearchStrategy[int]) -> st.SearchStrategy[Table]:
    def of_size(size: tuple[int, int]) -> st.SearchStrategy[Table]:
        values = st.sampled_from(["", "a", "bb", "a long value indeed", "another, which is longer still"])
        row = st.fixed_dictionaries({f"field {i}": values for i in range(size[1])})
        return st.lists(row, min_size=size[0], max_size=size[0])

    return st.tuples(num_rows, num_fields).flatmap(of_size)


@given(tables(st.integers(1, 30), st.integers(1, 5)))
@settings(max_examples=100, deadline=None)
def test_each_field_stands_exactly_once_in_each_row_and_nothing_is_lost_by_learning(table):
    order = learnt(table)
    orders = [order.order_of(row) for row in table]
    assert all(sorted(one) == sorted(table[0]) for one in orders)
    best_for_all = [order.fields[i] for i in order.default]
    assert saved(table, orders) >= saved(table, [best_for_all] * len(table))
    strangers = dict.fromkeys(table[0], "never seen")
    assert order.order_of(strangers) == best_for_all


@given(tables(st.integers(2, 4), st.integers(2, 3)))
@settings(max_examples=60, deadline=None)
def test_no_order_saves_more_than_the_best_of_all(table):
    every = [list(order) for order in itertools.permutations(table[0])]
    best = max(saved(table, list(orders)) for orders in itertools.product(every, repeat=len(table)))
    order = learnt(table)
    assert saved(table, [order.order_of(row) for row in table]) <= best


def test_on_small_tables_the_recursion_is_nearly_as_good_as_the_best_of_all():
    """Greedy is not optimal. Over 60 tables of four rows and three fields, against 6^4 orders each: 90 % and more."""
    rng = random.Random(3)
    got = possible = 0
    for _ in range(60):
        sizes = [rng.randint(1, 3) for _ in range(3)]
        table = [{f"f{c}": "x" * rng.randint(1, sizes[c]) * (10 * c + 1) for c in range(3)} for _ in range(4)]
        every = [list(order) for order in itertools.permutations(table[0])]
        possible += max(saved(table, list(orders)) for orders in itertools.product(every, repeat=4))
        order = learnt(table)
        got += saved(table, [order.order_of(row) for row in table])
    assert possible > 0
    assert got >= 0.9 * possible


def test_rows_of_two_kinds_get_an_order_each():
    """Half the rows share their question and half their document: no one order serves both."""
    rng = random.Random(1)

    def word() -> str:
        return "".join(rng.choice("abcdef") for _ in range(40))

    question, document = word(), word()
    table = [{"question": question, "document": word()} for _ in range(20)]
    table += [{"question": word(), "document": document} for _ in range(20)]
    order = learnt(table)
    assert order.order_of(table[0]) == ["question", "document"]
    assert order.order_of(table[-1]) == ["document", "question"]
    size = 40 + len("question") + PUNCTUATION
    assert saved(table, [order.order_of(row) for row in table]) == 2 * 19 * size


def test_what_a_value_determines_follows_it():
    rng = random.Random(2)
    synopses = {f"film {i}": "".join(rng.choice("abc ") for _ in range(60)) for i in range(10)}
    table = [
        {"review": f"review number {n}", "film": film, "seen": rng.choice(["yes", "no"]), "synopsis": text}
        for n, (film, text) in enumerate(list(synopses.items()) * 6)
    ]
    orders = [learnt(table).order_of(row) for row in table]
    assert all(set(order[:2]) == {"film", "synopsis"} and order[-1] == "review" for order in orders)


def test_learning_ends_at_the_most_groups_and_an_order_is_read_as_it_was_written():
    """Half of the rows have their own `a` and share `b`, the others the reverse."""
    table = [
        {"a": f"shared by two {i // 2}" if i % 40 < 20 else f"own {i}", "b": "b" * 30 if i % 40 >= 20 else f"{i}"}
        for i in range(200)
    ]
    columns = {name: [row[name] for row in table] for name in "ab"}
    whole, capped = learn_field_order(columns), learn_field_order(columns, max_groups=3)
    assert sum(map(len, capped.nodes)) <= 3 < sum(map(len, whole.nodes))
    again = FieldOrder.model_validate_json(whole.model_dump_json())
    assert [again.order_of(row) for row in table] == [whole.order_of(row) for row in table]


# --- prompts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def films(write_corpus, write_job):
    """20 films with 10 reviews each, scattered over two shards; a job whose template puts the review first."""
    rng = random.Random(5)
    rows = []
    for film in range(20):
        synopsis = "".join(rng.choice("abcdefgh ") for _ in range(120))
        rows += [
            {
                "film": f"film {film}",
                "synopsis": synopsis,
                "rating": rng.randint(1, 5),
                "review": f"{rng.random():.12f}",
            }
            for _ in range(10)
        ]
    rng.shuffle(rows)
    write_corpus({"a": pa.Table.from_pylist(rows[:100]), "b": pa.Table.from_pylist(rows[100:])})
    return rows, write_job(input={"prompt_column": None}, prompt={"template": TEMPLATE}, plan={"reorder_fields": True})


def test_a_prompt_has_every_field_once_as_json_whatever_the_order(films, tmp_path):
    rows, path = films
    job = load_job(str(path)).resolve()
    shards = list_shards(job).good
    job = settle_field_order(job, shards, Storage(job.output.path), keep=True)
    tokenizer = load_tokenizer(job.model)
    found = []
    for shard in shards:
        for slice_ in plan_shard(job, shard, tokenizer):
            for row in slice_.rows:
                text = tokenizer.decode(row.prompt_token_ids)
                assert text.startswith("Is it worth watching?")
                pairs = json.loads(text[text.index("{") : text.rindex("}") + 1], object_pairs_hook=list)
                assert [name for name, _ in pairs[:2]] in (["synopsis", "film"], ["film", "synopsis"])
                found.append(dict(pairs))
    key = lambda row: row["review"]  # noqa: E731
    assert sorted(found, key=key) == sorted(rows, key=key)


def test_the_gain_is_that_of_the_plans(films):
    """Per shard, each film's synopsis is computed once instead of for each of its reviews."""
    _, path = films
    job = load_job(str(path)).resolve()
    shards = list_shards(job).good
    tokenizer = load_tokenizer(job.model)
    reordered = settle_field_order(job, shards, Storage(job.output.path), keep=False)
    written = reordered.model_copy(
        update={
            "plan": job.plan.model_copy(update={"reorder_fields": False}),
            "resolved": job.resolved and job.resolved.model_copy(update={"field_order": None}),
        }
    )

    def achievable(one) -> float:
        plans = [plan_shard(one, shard, tokenizer) for shard in shards]
        return sum(p.achievable_prefix_tokens for p in plans) / sum(p.prompt_tokens for p in plans)

    gain = measure_gain(reordered, tokenizer, shards)
    assert gain.as_written == pytest.approx(achievable(written))
    assert gain.reordered == pytest.approx(achievable(reordered))
    assert gain.reordered > 0.5 > gain.as_written
    assert measure_gain(written, tokenizer, shards) == gain, "told before it is switched on"


def test_an_output_keeps_its_order_when_shards_are_added(films, write_corpus):
    _, path = films
    job = load_job(str(path)).resolve()
    output = Storage(job.output.path)
    first = settle_field_order(job, list_shards(job).good, output, keep=True)
    rng = random.Random(6)
    new = [
        {"film": f"{rng.random()}", "synopsis": f"{rng.random()}", "rating": 1, "review": "always the same " * 9}
        for _ in range(500)
    ]
    write_corpus({"c": pa.Table.from_pylist(new)})
    shards = list_shards(job).good
    assert settle_field_order(job, shards, output, keep=True) == first
    assert learn_from_shards(job, shards) != first.resolved.field_order
    assert first.fingerprint() == job.fingerprint()
    assert "plan.reorder_fields" in first.fingerprint_fields()
    output.write_whole(FILE, output.read_bytes(FILE).replace(b'"version": 1', b'"version": 9'))
    with pytest.raises(JobError, match="it is of version 9"):
        settle_field_order(job, shards, output, keep=True)


def test_a_sample_of_row_groups_is_enough_to_learn_from(films, tmp_path):
    rows, path = films
    for file in (tmp_path / "in").glob("*.parquet"):
        file.unlink()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "one.parquet", row_group_size=20)
    job = load_job(str(path)).resolve()
    order = learn_from_shards(job, list_shards(job).good, num_rows=60)
    texts = {name: json.dumps(rows[0][name]) for name in order.fields}
    assert order.order_of(texts)[-1] == "review"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"prompt": {"template": "{{ review }} {{ film }}"}}, 'write them as {{ fields("title", "review") }}'),
        ({"prompt": {"template": '{{ fields("review") }}'}}, "needs columns whose order has no meaning"),
        ({"prompt": {"template": '{{ fields("a", "a") }}'}}, "names a column twice"),
        ({"prompt": {"template": "{{ fields(review, film) }}"}}, "as texts"),
        ({"prompt": {"template": '{{ fields("a", "b") }}{{ fields("c", "d") }}'}}, "more than once"),
        ({"prompt": {"template": '{{ fields("a", "b") }}{{ fields }}'}}, "rename the column"),
        ({"prompt": {}, "input": {"prompt_column": "review"}}, "needs columns whose order has no meaning"),
    ],
)
def test_a_prompt_whose_fields_cannot_change_places_is_refused(sections, said, write_job):
    path = write_job(**{"input": {"prompt_column": None}, "plan": {"reorder_fields": True}, **sections})
    with pytest.raises(JobError) as refused:
        load_job(str(path))
    assert said in " ".join(str(refused.value).split())


# --- beside the paper's own recursion -------------------------------------------------------------------------------


def recursion_of_the_paper(table: Table) -> list[list[str]]:
    """Algorithm 1 of arXiv 2403.05821 to the letter, without its limits of depth: an order for each row.

    Of all values left, the one whose squared length, with what it determines, times its rows less one is largest; then
    its rows without these fields, and the other rows with all fields.
    """
    names = list(table[0])
    determines = {
        one: [
            other
            for other in names
            if other != one
            and len({row[one] for row in table}) < len(table)
            and len({(row[one], row[other]) for row in table}) == len({row[one] for row in table})
        ]
        for one in names
    }
    orders: list[list[str]] = [[] for _ in table]

    def order_rows(rows: list[int], fields: list[str]) -> None:
        while rows:
            groups: dict[tuple[str, str], list[int]] = {}
            for name in fields:
                for i in rows:
                    groups.setdefault((name, table[i][name]), []).append(i)

            def gain(item: tuple[tuple[str, str], list[int]], fields: list[str] = fields) -> float:
                (name, _), members = item
                taken = [name, *(other for other in determines[name] if other in fields)]
                length = sum(len(one) + len(table[members[0]][one]) + PUNCTUATION for one in taken)
                return length**2 * (len(members) - 1)

            (name, _), members = max(groups.items(), key=gain)
            taken = [name, *(other for other in determines[name] if other in fields and other != name)]
            if len(members) < 2:
                for i in rows:
                    orders[i] += fields
                return
            for i in members:
                orders[i] += taken
            rest = [field for field in fields if field not in taken]
            if rest:
                order_rows(members, rest)
            rows = [i for i in rows if i not in set(members)]

    order_rows(list(range(len(table))), names)
    return orders


def generated(kind: str, num_rows: int = 240) -> Table:
    """Reviews of films, products of shops, or mails of which each has one long part in common with others."""
    rng = random.Random(kind)
    texts = ["".join(rng.choices("abcdefgh ", k=rng.randrange(80, 400))) for _ in range(60)]
    rows = []
    for i in range(num_rows):
        if kind == "reviews":  # a film determines its synopsis
            film = min(int(rng.expovariate(0.2)), 19)
            stars = str(rng.randrange(1, 6))
            rows.append(
                {"review": f"{i} {texts[i % 7][:60]}", "stars": stars, "film": f"film {film}", "plot": texts[film]}
            )
        elif kind == "products":  # three fields of several lengths that have nothing to do with each other
            brand, kind_of, shop = rng.randrange(12), rng.randrange(6), rng.randrange(30)
            rows.append(
                {"id": str(i), "brand": texts[brand], "kind": texts[20 + kind_of][:90], "shop": texts[30 + shop][:70]}
            )
        else:  # half the rows have a thread in common, half a signature; never both
            thread, signature = texts[i % 9], texts[40 + i % 11]
            own = f"mail {i} " + "".join(rng.choices("xyz", k=60))
            rows.append({"thread": thread, "signature": own} if i % 2 else {"thread": own, "signature": signature})
    return rows


@pytest.mark.parametrize(
    "kind, as_written, one_for_all, ours, papers",
    [("reviews", 0.0, 71.8, 71.8, 71.8), ("products", 0.0, 67.2, 67.2, 67.2), ("mails", 34.2, 35.8, 70.0, 70.0)],
)
def test_groups_have_orders_of_their_own_and_save_what_the_papers_recursion_does(
    kind, as_written, one_for_all, ours, papers
):
    table = generated(kind)
    order = learnt(table)
    everything = sum(len(name) + len(value) + PUNCTUATION for row in table for name, value in row.items())
    shares = [
        round(100 * saved(table, orders) / everything, 1)
        for orders in (
            [list(table[0])] * len(table),
            [[order.fields[i] for i in order.default]] * len(table),
            [order.order_of(row) for row in table],
            recursion_of_the_paper(table),
        )
    ]
    assert shares == pytest.approx([as_written, one_for_all, ours, papers], abs=0.5)
