"""The index over answers: what it drafts, how much memory it takes, and how it is saved."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from actors.drafters.acceptance import Acceptance
from actors.drafters.corpus_index import (
    ENTRY_BYTES,
    MAX_LEARNING_SHARE,
    MAX_LOADED_COUNT,
    NUM_FREE_ANSWERS,
    CorpusIndex,
)
from actors.drafters.drafting import Draft
from actors.requests import Request, SamplingParams
from actors.sequence import Sequence

TEMPLATE_END = [7, 8]
ANSWER = [20, 21, 22, 23, 24, 25, 1]


def finished(prompt: list[int], answer: list[int]) -> Sequence:
    sequence = Sequence(Request("row", prompt, SamplingParams(max_tokens=1000)), 0, 10_000)
    for token in answer:
        sequence.append(token, 0.0)
    return sequence


def draft_after(index: CorpusIndex, tokens: list[int], limit: int = 16) -> list[int]:
    draft = Draft()
    index.propose([finished(tokens, [])], [draft], [limit])
    assert len(draft.token_ids) == len(draft.cells) == len(draft.chances) <= limit
    return draft.token_ids


def random_answers(num_answers: int, seed: int, vocabulary: int = 5000, length: int = 30) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(100, vocabulary) for _ in range(length)] for _ in range(num_answers)]


def filled(num_answers: int = 60, max_bytes: int = 1 << 22) -> CorpusIndex:
    index = CorpusIndex(Acceptance(), max_bytes, identity="tokenizer A")
    rng = random.Random(3)
    for _ in range(num_answers):
        middle = rng.choice([[30, 31], [40, 41, 42], [50]])
        index.learn([rng.randrange(100, 200), *TEMPLATE_END, 20, 21, *middle, 24, 25, 1], 3)
    return index


def test_the_whole_answer_is_drafted_from_the_end_of_the_prompt_on() -> None:
    index = CorpusIndex(Acceptance())
    for first in range(100, 110):
        index.finish(finished([first, *TEMPLATE_END], ANSWER))
    assert draft_after(index, [999, *TEMPLATE_END]) == ANSWER
    assert draft_after(index, [999, *TEMPLATE_END], limit=3) == ANSWER[:3]
    assert draft_after(index, [999, *TEMPLATE_END, *ANSWER[:4]]) == ANSWER[4:]


def test_nothing_is_drafted_where_nothing_is_known() -> None:
    assert draft_after(CorpusIndex(Acceptance()), [1, 2, 3]) == []
    assert draft_after(filled(), [60, 61, 62]) == []


def test_a_longer_context_decides_where_a_shorter_one_is_ambiguous() -> None:
    index = CorpusIndex(Acceptance())
    for _ in range(20):
        index.learn([5, 70, 71, 50, 51, 1], 1)
        index.learn([6, 80, 81, 50, 52, 1], 1)
    assert draft_after(index, [5, 70, 71, 50])[:1] == [51]
    assert draft_after(index, [6, 80, 81, 50])[:1] == [52]


def test_the_most_frequent_next_token_wins_even_if_another_came_first() -> None:
    index = CorpusIndex(Acceptance())
    for token in [60, 60, *[61] * 10]:
        index.learn([5, token], 1)
    assert draft_after(index, [5]) == [61]


def test_memory_stays_within_the_bound_and_frequent_contexts_survive_rare_ones() -> None:
    max_bytes = 1 << 17
    index = CorpusIndex(Acceptance(), max_bytes)
    for answer in random_answers(400, seed=1):
        index.learn([1, *TEMPLATE_END, *ANSWER], 3)
        index.learn([1, 2, *answer], 2)
        assert index.num_bytes <= max_bytes
        assert index.num_entries <= max_bytes // ENTRY_BYTES
    assert index.num_entries > max_bytes // ENTRY_BYTES // 4
    assert draft_after(index, [999, *TEMPLATE_END]) == ANSWER


def test_entries_take_no_more_memory_than_is_said() -> None:
    answers = random_answers(1500, seed=2, vocabulary=100_000)
    tracemalloc.start()
    index = CorpusIndex(Acceptance())
    before = tracemalloc.get_traced_memory()[0]
    for answer in answers:
        index.learn([1, 2, *answer], 2)
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert index.num_entries > 20_000
    assert taken <= index.num_bytes


def test_saved_and_loaded_it_drafts_the_same() -> None:
    index = filled()
    loaded = CorpusIndex(Acceptance(), 1 << 22, identity="tokenizer A")
    assert loaded.merge_bytes(index.to_bytes())
    assert loaded.num_entries == index.num_entries
    assert loaded.num_answers == index.num_answers
    for tail in ([9, *TEMPLATE_END], [20, 21], [30, 31], [40, 41], [20, 21, 50], [24]):
        assert draft_after(loaded, tail) == draft_after(index, tail)
    assert draft_after(loaded, [9, *TEMPLATE_END])[:2] == [20, 21]


def test_a_merge_adds_the_counts_of_both_and_keeps_the_bound() -> None:
    first, second = CorpusIndex(Acceptance()), CorpusIndex(Acceptance())
    for _ in range(3):
        first.learn([5, 60, 70], 1)
    for _ in range(9):
        second.learn([5, 61, 71], 1)
    assert first.merge_bytes(second.to_bytes())
    assert draft_after(first, [5])[:1] == [61]
    assert draft_after(first, [60]) == [70]

    big = CorpusIndex(Acceptance())
    for answer in random_answers(200, seed=4):
        big.learn([1, 2, *answer], 2)
    small = CorpusIndex(Acceptance(), 1 << 16)
    assert small.merge_bytes(big.to_bytes())
    assert small.num_bytes <= 1 << 16


def test_what_saved_indexes_have_in_common_does_not_grow_from_night_to_night_until_nothing_new_is_learnt() -> None:
    saved = CorpusIndex(Acceptance())
    for _ in range(200):
        saved.learn([1, 2, 3], 0)
    files = [saved.to_bytes()]
    for _ in range(4):  # nights
        workers = [CorpusIndex(Acceptance()) for _ in range(4)]
        assert all(worker.merge_bytes(file) for worker in workers for file in files)
        files = [worker.to_bytes() for worker in workers]
    loaded = CorpusIndex(Acceptance())
    assert all(loaded.merge_bytes(file) for file in files)
    for _ in range(len(files) * MAX_LOADED_COUNT + 1):
        loaded.learn([1, 2, 7], 0)
    assert draft_after(loaded, [9, 2])[:1] == [7]


def copying_row(rng: random.Random) -> tuple[list[int], list[int]]:
    number = [rng.randrange(1000, 1100) for _ in range(5)]
    filler = [rng.randrange(200, 400) for _ in range(20)]
    return [*filler[:9], 50, 51, *number, *filler[9:], *TEMPLATE_END], [20, 21, 22, 23, *number, 24, 25, 1]


def test_a_number_of_the_row_is_copied_from_behind_its_cue_also_after_saving_and_loading() -> None:
    rng = random.Random(8)
    index = CorpusIndex(Acceptance())
    for _ in range(100):
        prompt, answer = copying_row(rng)
        index.finish(finished(prompt, answer))
    loaded = CorpusIndex(Acceptance())
    assert loaded.merge_bytes(index.to_bytes())
    for _ in range(20):
        prompt, answer = copying_row(rng)
        sequence = finished(prompt, answer[:4])
        for tested in (index, loaded):
            draft = Draft()
            tested.propose([sequence], [draft], [16])
            assert draft.token_ids[:5] == answer[4:9]
            assert draft.chances[0] > 0.2


def test_an_empty_index_is_saved_and_loaded() -> None:
    assert CorpusIndex(Acceptance()).merge_bytes(CorpusIndex(Acceptance()).to_bytes())


@pytest.mark.parametrize("position", [0, 5, 25, 60, -200, -8])
def test_changed_bytes_are_refused_with_a_reason(position: int, caplog: pytest.LogCaptureFixture) -> None:
    data = bytearray(filled().to_bytes())
    data[position] ^= 0x11
    index = CorpusIndex(Acceptance(), identity="tokenizer A")
    with caplog.at_level(logging.WARNING):
        assert not index.merge_bytes(bytes(data))
    assert index.num_entries == 0
    assert "is not used: " in caplog.text


@pytest.mark.parametrize("data", [b"", b"PAR1", b"shoal corpus index\n", b"shoal corpus index\n[]\n", b"\x00" * 1000])
def test_foreign_or_truncated_bytes_are_refused(data: bytes) -> None:
    assert not CorpusIndex(Acceptance()).merge_bytes(data)
    whole = filled().to_bytes()
    for end in (30, len(whole) // 2, len(whole) - 1):
        assert not CorpusIndex(Acceptance(), identity="tokenizer A").merge_bytes(whole[:end])


@pytest.mark.parametrize(("key", "value"), [("version", 99), ("hash_probe", [1, 2]), ("identity", "tokenizer B")])
def test_an_index_of_another_tokenizer_version_or_hash_is_refused(
    key: str, value: object, caplog: pytest.LogCaptureFixture
) -> None:
    magic, line, arrays = filled().to_bytes().split(b"\n", 2)
    header = {**json.loads(line), key: value}
    data = b"\n".join([magic, json.dumps(header).encode(), arrays])
    with caplog.at_level(logging.WARNING):
        assert not CorpusIndex(Acceptance(), identity="tokenizer A").merge_bytes(data)
    assert key in caplog.text


def test_an_index_saved_by_another_process_is_understood(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from actors.drafters.acceptance import Acceptance\n"
        "from actors.drafters.corpus_index import CorpusIndex\n"
        "index = CorpusIndex(Acceptance())\n"
        "for _ in range(9): index.learn([7, 8, 20, 21, 22], 2)\n"
        "Path(sys.argv[1]).write_bytes(index.to_bytes())\n"
    )
    path = tmp_path / "index"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=environment)
    index = CorpusIndex(Acceptance())
    assert index.merge_bytes(path.read_bytes())
    assert draft_after(index, [7, 8]) == [20, 21, 22]


def test_learning_keeps_to_its_share_of_the_time() -> None:
    now = 0

    def clock() -> int:  # each look at the clock takes 10 us, so an answer costs 10 us to learn
        nonlocal now
        now += 10_000
        return now

    index = CorpusIndex(Acceptance(), clock=clock)
    for _ in range(3000):
        index.finish(finished([1, *TEMPLATE_END], ANSWER))
        now += 100_000
    assert index.num_skipped > 0
    assert index.num_answers + index.num_skipped == 3000
    assert index.num_answers > NUM_FREE_ANSWERS
    assert index.learning_ns < 1.1 * MAX_LEARNING_SHARE * now
