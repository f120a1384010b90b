"""Where answers copy from, learnt from earlier answers: cues, starts, ends, and what is saved of them."""

from __future__ import annotations

import json
import random

from actors.drafters.acceptance import Acceptance
from actors.drafters.learned_copies import MAX_CUES, MAX_PLACES, CopiedFrom, LearnedCopies
from actors.drafters.prompt_lookup import to_code_points

PLACE = [20, 21, 22, 23]
END = [90, 91]


def make_row(rng: random.Random) -> tuple[list[int], list[int]]:
    """A prompt with two numbers in it, and the answer: the one behind a cue. 400 + d starts a number there, d here."""
    wanted, other = ([rng.randrange(10) for _ in range(6)] for _ in range(2))
    cue = rng.choice(([50, 51], [52, 53]))
    filler = [rng.randrange(200, 300) for _ in range(20)]
    number, decoy = [400 + wanted[0], *wanted[1:]], [400 + other[0], *other[1:]]
    prompt = [*filler[:6], 60, 61, *decoy, *filler[6:12], *cue, *number, *filler[12:], 60, 61, *decoy]
    return prompt, [*wanted, *END]


def taught(num_rows: int = 80) -> tuple[LearnedCopies, random.Random]:
    rng = random.Random(1)
    copies = LearnedCopies(Acceptance())
    for _ in range(num_rows):
        prompt, answer = make_row(rng)
        copies.learn(PLACE, answer, to_code_points(prompt))
    return copies, rng


def share_right(copies: LearnedCopies, rng: random.Random, num_rows: int = 200) -> float:
    num_right = 0
    for _ in range(num_rows):
        prompt, answer = make_row(rng)
        guess = copies.propose([1, 2, *PLACE], CopiedFrom(to_code_points(prompt)), 6)
        if guess is not None:
            tokens, cells, chances = guess
            assert len(tokens) == len(cells) == len(chances) <= 6
            num_right += tokens == answer[:6]
    return num_right / num_rows


def test_the_number_behind_the_cue_is_copied_and_the_decoy_is_not() -> None:
    copies, rng = taught()
    assert share_right(copies, rng) > 0.9


def test_nothing_is_copied_at_another_place_or_without_a_cue() -> None:
    copies, rng = taught()
    prompt, _ = make_row(rng)
    assert copies.propose([20, 21, 22, 99], CopiedFrom(to_code_points(prompt)), 8) is None
    assert copies.propose(PLACE, CopiedFrom(to_code_points(list(range(200, 240)))), 8) is None
    assert LearnedCopies(Acceptance()).propose(PLACE, CopiedFrom(to_code_points(prompt)), 8) is None


def test_a_copy_ends_where_copies_end_and_goes_on_with_what_follows_one() -> None:
    acceptance = Acceptance()
    rng = random.Random(2)
    copies = LearnedCopies(acceptance)
    for _ in range(150):
        prompt, answer = make_row(rng)
        guess = copies.propose(PLACE, CopiedFrom(to_code_points(prompt)), 8)
        for token, cell, expected in zip(*(guess[:2] if guess else ([], [])), answer):
            acceptance.update(cell, token == expected)
            if token != expected:
                break
        copies.learn(PLACE, answer, to_code_points(prompt))
    prompt, answer = make_row(rng)
    guess = copies.propose(PLACE, CopiedFrom(to_code_points(prompt)), 8)
    assert guess is not None
    assert guess[0] == [*answer[:6], END[0]]


def test_memory_is_bounded_by_places_and_cues() -> None:
    rng = random.Random(3)
    copies = LearnedCopies(Acceptance())
    for i in range(3000):
        number = [rng.randrange(1000, 50_000) for _ in range(4)]
        prompt = [1, rng.randrange(100), rng.randrange(100), *number, 5]
        copies.learn([i % 200, 7, 8, 9], number, to_code_points(prompt))
    places, _ = copies.to_list()
    assert len(places) == MAX_PLACES
    assert max(len(cues) for _, _, cues in places) <= MAX_CUES


def test_saved_as_json_and_loaded_it_copies_the_same() -> None:
    copies, _ = taught()
    loaded = LearnedCopies(Acceptance())
    loaded.merge_list(json.loads(json.dumps(copies.to_list())))
    loaded.merge_list(json.loads(json.dumps(copies.to_list())))  # known already
    assert loaded.to_list() == copies.to_list()
    assert share_right(loaded, random.Random(9)) == share_right(copies, random.Random(9)) > 0.9
