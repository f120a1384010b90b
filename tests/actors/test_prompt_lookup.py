"""Prompt lookup against a plain search of all n-grams, and its confidence."""

from __future__ import annotations

import random

import pytest

from actors.drafters.acceptance import Acceptance
from actors.drafters.drafting import Draft, Speculator
from actors.drafters.prompt_lookup import COPIED_PER_AGREED, MAX_AGREED, PromptLookup
from actors.requests import Request, SamplingParams
from actors.sequence import Sequence


def new_sequence(prompt: list[int], output: list[int] | None = None) -> Sequence:
    sequence = Sequence(Request("row", prompt, SamplingParams(max_tokens=1000)), 0, 10_000)
    for token in output or []:
        sequence.append(token, 0.0)
    return sequence


def look_up(tokens: list[int], shortest: int, longest: int, num_wanted: int) -> list[int]:
    """The definition, by brute force: latest place of the longest suffix, and what followed."""
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        suffix = tokens[-size:]
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == suffix:
                return tokens[start + size : start + size + num_wanted]
    return []


@pytest.mark.parametrize("alphabet", [(3, 4, 5), (0, 0xFEFF, 0xD800, 0xDC00), tuple(range(150_000, 150_004))])
@pytest.mark.parametrize(("shortest", "longest"), [(1, 4), (2, 3), (3, 3)])
def test_a_draft_is_what_followed_the_latest_match_of_the_longest_ngram(
    alphabet: tuple[int, ...], shortest: int, longest: int
) -> None:
    rng = random.Random(7)
    drafter = PromptLookup(Acceptance(), shortest, longest)
    num_found = 0
    for _ in range(200):
        prompt = rng.choices(alphabet, k=rng.randrange(1, 30))
        sequence = new_sequence(prompt)
        for _ in range(5):  # the kept string grows with the sequence
            sequence.append(rng.choice(alphabet), 0.0)
            draft = Draft()
            drafter.propose([sequence], [draft], [6])
            expected = look_up(sequence.token_ids, shortest, longest, 6)
            assert draft.token_ids == expected[: len(draft.token_ids)]
            assert len(draft.token_ids) >= min(len(expected), COPIED_PER_AGREED)
            num_found += bool(draft.token_ids)
    assert num_found > 100


def test_ngrams_longer_than_confidence_tells_apart_are_looked_up_too() -> None:
    acceptance = Acceptance()
    speculator = Speculator([PromptLookup(acceptance, 1, 2 * MAX_AGREED)], acceptance)
    words = list(range(100, 100 + 2 * MAX_AGREED))
    draft = speculator.propose([new_sequence([*words, 5, 6, 7, *words])], [3])[0]
    assert draft.token_ids == [5, 6, 7]
    assert speculator.failed == {}


def test_a_single_token_that_agrees_is_followed_by_few() -> None:
    drafter = PromptLookup(Acceptance())
    drafts = [Draft(), Draft()]
    drafter.propose(
        [new_sequence([7, *range(10, 40), 7]), new_sequence([6, 7, *range(10, 40), 6, 7])], drafts, [16, 16]
    )
    assert [len(draft.token_ids) for draft in drafts] == [COPIED_PER_AGREED, 2 * COPIED_PER_AGREED]


def test_a_draft_goes_on_from_where_another_one_ends_and_keeps_its_limit() -> None:
    drafter = PromptLookup(Acceptance())
    sequence = new_sequence([10, 11, 12, 13, 14, 15, 2, 3])
    draft = Draft([10, 11], [0, 0], [0.9, 0.9])
    drafter.propose([sequence], [draft], [5])
    assert draft.token_ids == [10, 11, 12, 13, 14]
    assert len(draft.cells) == len(draft.chances) == 5
    drafter.propose([sequence], [draft], [5])
    assert len(draft.token_ids) == 5


def test_a_place_where_copies_fail_gets_little_chance_while_others_keep_theirs() -> None:
    acceptance = Acceptance()
    speculator = Speculator([PromptLookup(acceptance)], acceptance)
    branch = [20, 21, 22, 30, 31, 32, 33, 5, 20, 21, 22]
    copy = [40, 41, 42, 43, 44, 45, 46, 5, 40, 41, 42]
    for _ in range(30):
        draft = speculator.propose([new_sequence(branch)], [4])[0]
        speculator.observe(draft, [99])  # never what the prompt says
        speculator.observe(speculator.propose([new_sequence(copy)], [4])[0], [43, 44, 45, 46])
    failing = speculator.propose([new_sequence(branch)], [4])[0]
    holding = speculator.propose([new_sequence(copy)], [4])[0]
    assert failing.chances[0] < 0.1
    assert holding.chances[0] > 0.9


def test_nothing_is_kept_of_a_finished_sequence() -> None:
    drafter = PromptLookup(Acceptance())
    sequence = new_sequence([1, 2, 3, 1])
    drafter.propose([sequence], [Draft()], [3])
    assert sequence.drafting
    drafter.finish(sequence)
    assert not sequence.drafting
