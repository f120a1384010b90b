"""How drafters are combined, judged and switched off, and whether chances come true."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence as SequenceOf

import pytest

from actors.config import SpeculativeConfig
from actors.drafters.acceptance import Acceptance
from actors.drafters.drafting import Draft, Speculator, make_speculator
from actors.requests import Request, SamplingParams
from actors.sequence import Sequence


class Scripted:
    """Says what its script has for the newest token, all with one chance, and counts how often it is asked."""

    def __init__(self, name: str, acceptance: Acceptance, script: dict[int, list[int]], chance: float = 0.9) -> None:
        self.name, self.script, self.chance = name, script, chance
        self.cell = acceptance.add_cells([chance])
        self.num_asked = 0
        self.finished: list[Sequence] = []

    def propose(self, sequences: SequenceOf[Sequence], drafts: SequenceOf[Draft], limits: SequenceOf[int]) -> None:
        self.num_asked += len(sequences)
        for sequence, draft, limit in zip(sequences, drafts, limits):
            newest = (sequence.token_ids + draft.token_ids)[-1]
            tokens = self.script.get(newest, [])[: max(limit - len(draft.token_ids), 0)]
            draft.token_ids += tokens
            draft.cells += [self.cell] * len(tokens)
            draft.chances += [self.chance] * len(tokens)

    def finish(self, sequence: Sequence) -> None:
        self.finished.append(sequence)


class Broken(Scripted):
    """Raises in the middle of an extension once it has been asked `num_good` times."""

    num_good = 0

    def propose(self, sequences: SequenceOf[Sequence], drafts: SequenceOf[Draft], limits: SequenceOf[int]) -> None:
        if self.num_good == 0:
            drafts[0].token_ids.append(1)
            raise RuntimeError("out of ideas")
        self.num_good -= 1
        super().propose(sequences, drafts, limits)


def new_sequence(*tokens: int) -> Sequence:
    return Sequence(Request("row", list(tokens), SamplingParams(max_tokens=100)), 0, 1000)


def is_parallel(draft: Draft) -> bool:
    return len(draft.token_ids) == len(draft.cells) == len(draft.chances) == len(draft.sources)


def test_without_drafters_drafts_are_empty() -> None:
    drafts = Speculator().propose([new_sequence(1), new_sequence(2)], [4, 0])
    assert [draft.token_ids for draft in drafts] == [[], []]


def test_the_draft_that_is_expected_to_bring_most_is_taken() -> None:
    acceptance = Acceptance()
    short_and_sure = Scripted("a", acceptance, {1: [10, 11], 2: [10]}, chance=0.75)
    long_and_unsure = Scripted("b", acceptance, {1: [20, 21, 22, 23], 2: [20, 21, 22, 23]}, chance=0.6)
    first, second = Speculator([short_and_sure, long_and_unsure], acceptance).propose(
        [new_sequence(1), new_sequence(2)], [4, 4]
    )
    assert (first.token_ids, first.sources) == ([10, 11], [0, 0])  # 0.75 + 0.56 against 0.6 + 0.36 + 0.22 + 0.13
    assert (second.token_ids, second.sources) == ([20, 21, 22, 23], [1, 1, 1, 1])


def test_pieces_of_different_drafters_are_chained_up_to_the_limit() -> None:
    acceptance = Acceptance()
    template = Scripted("a", acceptance, {1: [10, 11], 21: [12, 13]})
    numbers = Scripted("b", acceptance, {11: [20, 21]})
    speculator = Speculator([template, numbers], acceptance)
    whole, cut, none = speculator.propose([new_sequence(1), new_sequence(1), new_sequence(1)], [16, 5, 0])
    assert whole.token_ids == [10, 11, 20, 21, 12, 13]
    assert whole.sources == [0, 0, 1, 1, 0, 0]
    assert cut.token_ids == [10, 11, 20, 21, 12]
    assert none.token_ids == []
    assert all(is_parallel(draft) for draft in (whole, cut, none))


def test_where_a_drafter_is_sure_the_next_is_not_asked() -> None:
    acceptance = Acceptance()
    second = Scripted("b", acceptance, {})
    Speculator([Scripted("a", acceptance, {1: [10]}, chance=0.95), second], acceptance).propose([new_sequence(1)], [1])
    assert second.num_asked == 0
    Speculator([Scripted("a", acceptance, {1: [10]}, chance=0.5), second], acceptance).propose([new_sequence(1)], [1])
    assert second.num_asked == 1


def test_an_expensive_drafter_says_only_what_the_cheap_ones_do_not_know_and_only_if_allowed() -> None:
    acceptance = Acceptance()
    cheap = Scripted("a", acceptance, {1: [10], 31: [11], 2: [12]})
    expensive = Scripted("draft_model", acceptance, {10: [30, 31, 32]})
    speculator = Speculator([cheap, expensive], acceptance, expensive=["draft_model"])
    sequences, limits = [new_sequence(1), new_sequence(2)], [4, 1]
    quick = speculator.propose(sequences, limits, ask_expensive=False)
    assert [draft.token_ids for draft in quick] == [[10], [12]]
    assert expensive.num_asked == 0
    slow = speculator.propose(sequences, limits)
    assert [draft.token_ids for draft in slow] == [[10, 30, 31, 11], [12]]
    assert slow[0].sources == [0, 1, 1, 0]
    assert expensive.num_asked == 1


def test_a_weak_guess_stays_when_the_expensive_drafter_knows_nothing_better() -> None:
    acceptance = Acceptance()
    cheap = Scripted("a", acceptance, {1: [10, 11]}, chance=0.4)
    expensive = Scripted("draft_model", acceptance, {})
    draft = Speculator([cheap, expensive], acceptance, expensive=["draft_model"]).propose([new_sequence(1)], [4])[0]
    assert draft.token_ids[:1] == [10]
    assert is_parallel(draft)


@pytest.mark.parametrize("num_good", [0, 1])
def test_a_drafter_that_raises_is_switched_off_with_one_warning_and_the_others_go_on(
    num_good: int, caplog: pytest.LogCaptureFixture
) -> None:
    acceptance = Acceptance()
    good = Scripted("good", acceptance, {1: [10], 10: [11]}, chance=0.6)
    broken = Broken("broken", acceptance, {1: [50, 51]}, chance=0.7)
    broken.num_good = num_good
    speculator = Speculator([good, broken], acceptance)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            draft = speculator.propose([new_sequence(1)], [4])[0]
            assert is_parallel(draft)
            assert draft.token_ids
    assert draft.token_ids == [10, 11]
    assert speculator.failed == {"broken": "RuntimeError: out of ideas"}
    assert len(caplog.records) == 1
    sequence = new_sequence(1)
    speculator.finish(sequence)
    assert good.finished == [sequence]
    assert broken.finished == []


def test_a_drafter_that_cannot_learn_is_switched_off_too() -> None:
    class Forgetful(Scripted):
        def finish(self, sequence: Sequence) -> None:
            raise KeyError("where was I")

    acceptance = Acceptance()
    speculator = Speculator([Forgetful("forgetful", acceptance, {1: [10]})], acceptance)
    speculator.finish(new_sequence(1))
    assert "forgetful" in speculator.failed
    assert speculator.propose([new_sequence(1)], [4])[0].token_ids == []


def test_tokens_are_counted_for_whoever_guessed_them() -> None:
    acceptance = Acceptance()
    speculator = Speculator(
        [Scripted("a", acceptance, {1: [10, 11]}), Scripted("b", acceptance, {11: [20]})], acceptance
    )
    draft = speculator.propose([new_sequence(1)], [4])[0]
    speculator.count(draft, num_admitted=3, num_accepted=1)
    speculator.count(draft, num_admitted=2, num_accepted=2)
    assert (speculator.counts["a"].num_drafted, speculator.counts["a"].num_accepted) == (4, 3)
    assert (speculator.counts["b"].num_drafted, speculator.counts["b"].num_accepted) == (1, 0)
    assert speculator.counts["a"].num_ns > 0


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.97])
def test_a_chance_moves_to_the_observed_rate_and_follows_when_that_changes(rate: float) -> None:
    acceptance = Acceptance()
    cell = acceptance.add_cells([0.5])
    rng = random.Random(1)
    for _ in range(3000):
        acceptance.update(cell, rng.random() < rate)
    assert acceptance.chances[cell] == pytest.approx(rate, abs=0.06)
    for _ in range(3000):
        acceptance.update(cell, rng.random() < 1 - rate)
    assert acceptance.chances[cell] == pytest.approx(1 - rate, abs=0.06)
    assert 0 < acceptance.chances[cell] < 1


def test_a_nested_cell_starts_as_the_one_above_and_then_goes_its_own_way() -> None:
    acceptance = Acceptance()
    above = acceptance.add_cells([0.8])
    first = acceptance.add_nested_cells([above] * 2)
    assert acceptance.nested_chance(first) == pytest.approx(0.8)
    for _ in range(100):
        acceptance.update(first, False)
        acceptance.update(first + 1, True)
    assert acceptance.nested_chance(first) < 0.05
    assert acceptance.nested_chance(first + 1) > 0.9
    assert 0.3 < acceptance.chances[above] < 0.7


def test_only_tokens_up_to_the_first_wrong_one_are_judged() -> None:
    acceptance = Acceptance()
    cells = acceptance.add_cells([0.5] * 4)
    draft = Draft([10, 11, 12, 13], list(range(cells, cells + 4)), [0.5] * 4, [0] * 4)
    Speculator(acceptance=acceptance).observe(draft, [10, 99, 12])
    right, wrong, *unknown = acceptance.chances[cells : cells + 4]
    assert right > 0.5 > wrong
    assert unknown == [0.5, 0.5]


def templated_row(rng: random.Random) -> tuple[list[int], list[int]]:
    """A prompt that holds a number after a mark, and an answer of a fixed form with a label and that number in it."""
    number = [rng.randrange(100, 110) for _ in range(6)]
    filler = [rng.randrange(200, 400) for _ in range(rng.randrange(10, 40))]
    prompt = [*filler[:5], 50, *number, *filler[5:], 7, 8]
    return prompt, [20, 21, 22, rng.choice((30, 30, 30, 31)), 23, 24, 25, *number, 26, 1]


def test_on_a_templated_corpus_drafts_are_long_and_their_chances_come_true() -> None:
    rng = random.Random(5)
    speculator = make_speculator(SpeculativeConfig())
    num_steps = num_tokens = 0
    survived: dict[int, list[tuple[float, bool]]] = {}
    for row in range(400):
        prompt, answer = templated_row(rng)
        sequence = Sequence(Request(str(row), prompt, SamplingParams(max_tokens=64)), 0, 1000)
        while sequence.num_generated < len(answer):
            rest = answer[sequence.num_generated :]
            draft = speculator.propose([sequence], [min(16, len(rest))])[0]
            num_right = next((i for i, (a, b) in enumerate(zip(draft.token_ids, rest)) if a != b), len(draft.token_ids))
            if row >= 100:
                num_steps += 1
                num_tokens += min(num_right + 1, len(rest))
                survival = 1.0
                for i, chance in enumerate(draft.chances):
                    survival *= chance
                    survived.setdefault(min(int(survival * 4), 3), []).append((survival, i < num_right))
            new = rest[: num_right + 1]
            speculator.observe(draft, new)
            for token in new:
                sequence.append(token, 0.0)
        speculator.finish(sequence)
    assert speculator.failed == {}
    assert num_tokens / num_steps > 3.5
    for bucket in survived.values():
        if len(bucket) > 200:
            expected = sum(survival for survival, _ in bucket) / len(bucket)
            observed = sum(held for _, held in bucket) / len(bucket)
            assert observed == pytest.approx(expected, abs=0.12)


def test_the_configuration_names_the_drafters() -> None:
    def names(method: str) -> list[str]:
        return [drafter.name for drafter in make_speculator(SpeculativeConfig(method=method)).drafters]

    assert names("auto") == names("combined") == ["grammar", "corpus", "ngram"]
    assert names("ngram") == ["grammar", "ngram"]
    assert names("corpus") == ["grammar", "corpus"]
    assert names("none") == []
