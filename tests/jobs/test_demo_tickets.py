"""The ticket generator: the same from the same seed, gold that the text supports, a corpus with honest blemishes."""

import json
import re
from collections import Counter

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.demo.main import JOB_FILE
from jobs.demo.tickets import INSTRUCTION, PROBLEMS, PRODUCTS, URGENCIES, make_tickets, write_corpus

ORDER_FORMATS = re.compile(r"[A-Z]-\d{5}|[A-Z]{2}\d{6}|\d{2}-\d{5}")


def test_the_same_seed_gives_the_same_tickets_and_another_seed_gives_others():
    assert make_tickets(50, seed=3) == make_tickets(50, seed=3)
    assert not set(make_tickets(50, seed=3)) & set(make_tickets(50, seed=4))


def test_a_longer_list_starts_with_the_shorter_one():
    assert make_tickets(80, seed=3)[:30] == make_tickets(30, seed=3)


def test_every_order_number_stands_in_its_ticket_once_and_in_a_known_format():
    orders = [(json.loads(t.gold)["order"], t.text) for t in make_tickets(3000, seed=5)]
    for order, text in orders:
        if order is not None:
            assert ORDER_FORMATS.fullmatch(order), order
            assert text.count(order) == 1, text
    without = sum(order is None for order, _ in orders)
    assert 0.05 < without / len(orders) < 0.12


def test_gold_uses_only_the_labels_that_the_instruction_names():
    golds = [json.loads(ticket.gold) for ticket in make_tickets(3000, seed=6)]
    assert {gold["product"] for gold in golds} == set(PRODUCTS)
    assert {gold["problem"] for gold in golds} == set(PROBLEMS)
    assert {gold["urgency"] for gold in golds} == set(URGENCIES)
    for label in (*PRODUCTS, *PROBLEMS, *URGENCIES):
        assert re.search(rf"\b{label}\b", INSTRUCTION), label


def test_no_placeholder_is_left_in_a_ticket():
    for ticket in make_tickets(5000, seed=7):
        assert "{" not in ticket.text and "}" not in ticket.text, ticket.text


def test_tickets_are_varied_enough_that_none_repeats():
    texts = Counter(ticket.text for ticket in make_tickets(5000, seed=8))
    assert len(texts) > 4950


def test_numbers_that_are_not_the_order_number_are_common():
    tickets = [ticket for ticket in make_tickets(1000, seed=9) if '"order": null' not in ticket.gold]
    misleading = sum(len(ORDER_FORMATS.findall(ticket.text)) > 1 for ticket in tickets)
    assert misleading / len(tickets) > 0.2


def test_the_corpus_has_every_row_once_with_duplicates_and_bad_rows(tmp_path):
    paths = write_corpus(tmp_path, num_rows=1501, num_shards=4, seed=1)
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    assert [row["id"] for row in rows] == [f"ticket-{i:06d}" for i in range(1501)]
    bad = [row for row in rows if not row["ticket"]]
    assert 1 <= len(bad) <= 30
    assert all(row["gold"] is None for row in bad)
    good = [row for row in rows if row["ticket"]]
    assert all(json.loads(row["gold"])["product"] in PRODUCTS for row in good)
    repeated = len(good) - len({row["ticket"] for row in good})
    assert 0.02 < repeated / len(good) < 0.09


def test_writing_the_same_corpus_again_leaves_its_files_alone(tmp_path):
    before = [(path, path.stat().st_mtime_ns) for path in write_corpus(tmp_path, num_rows=40)]
    assert [(path, path.stat().st_mtime_ns) for path in write_corpus(tmp_path, num_rows=40)] == before
    changed = write_corpus(tmp_path, num_rows=44)
    assert all(pq.read_table(path).num_rows == 11 for path in changed)


def test_a_smaller_corpus_leaves_no_shard_of_a_larger_one_behind(tmp_path):
    write_corpus(tmp_path, num_rows=40, num_shards=5)
    paths = write_corpus(tmp_path, num_rows=40, num_shards=3)
    assert sorted(tmp_path.iterdir()) == paths


def test_the_job_file_gives_the_model_the_instruction_that_it_was_trained_with():
    assert yaml.safe_load(JOB_FILE.read_text())["prompt"]["system"] == INSTRUCTION


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_corpus_of_a_few_rows_has_no_empty_shard(tmp_path, num_rows):
    paths = write_corpus(tmp_path, num_rows=num_rows, num_shards=4)
    assert [pq.read_table(path).num_rows for path in paths] == [1] * num_rows
