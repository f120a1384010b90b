"""The CPU's paged attention against float64, over mixtures of decode, chunks, groups and scattered pages."""

import random
from dataclasses import replace

import pytest
import torch
from attention_cases import CASES, make_case, reference

from kernels.attention_batch import PrefixGroup
from kernels.cpu_attention import paged_attention_cpu


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_float64(name):
    q, k, v, batch = make_case(1, **CASES[name])
    expected = reference(q, k, v, batch, 0.25)
    actual = paged_attention_cpu(q, k, v, batch, 0.25)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=2e-5)


def test_bfloat16_is_as_close_as_its_rounding():
    q, k, v, batch = make_case(2, **CASES["a group of decodes and chunks"], dtype=torch.bfloat16)
    expected = reference(q, k, v, batch, 0.25)
    actual = paged_attention_cpu(q, k, v, batch, 0.25)
    torch.testing.assert_close(actual.double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("window", [1, 7, 16])
def test_a_sliding_window_hides_what_is_older(window):
    q, k, v, batch = make_case(3, [(1, 20), (9, 30), (5, 5)], scattered=True)
    expected = reference(q, k, v, batch, 0.25, window)
    actual = paged_attention_cpu(q, k, v, batch, 0.25, window)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("scattered", [False, True])
def test_a_group_inside_of_a_group_attends_behind_it(scattered):
    lengths = [(1, 50), (9, 60), (1, 44), (2, 70), (1, 9)]
    q, k, v, batch = make_case(4, lengths, shared=[(0, 4, 4)], scattered=scattered)
    (group,) = batch.groups
    outer = PrefixGroup(0, 4, group.page_ids[:1])
    nested = [outer, PrefixGroup(1, 2, group.page_ids[1:], 1)]
    actual = paged_attention_cpu(q, k, v, replace(batch, groups=nested, cache={}), 0.25)
    torch.testing.assert_close(actual.double(), reference(q, k, v, batch, 0.25), atol=2e-6, rtol=2e-5)


def test_random_mixtures_equal_float64():
    rng = random.Random(0)
    for seed in range(40):
        lengths = []
        for _ in range(rng.randint(1, 7)):
            queries = rng.choice([1, 1, 1, 2, 5, 12])
            lengths.append((queries, queries + rng.randint(0, 40)))
        shared, first = [], 0
        while first + 1 < len(lengths):
            count = rng.randint(2, 3)
            members = lengths[first : first + count]
            pages = min((context - queries) // 8 for queries, context in members)
            if pages and len(members) > 1:
                shared.append((first, len(members), rng.randint(1, pages)))
            first += count
        q, k, v, batch = make_case(seed, lengths, shared=shared, scattered=rng.random() < 0.5)
        torch.testing.assert_close(
            paged_attention_cpu(q, k, v, batch, 0.25).double(),
            reference(q, k, v, batch, 0.25),
            atol=3e-6,
            rtol=2e-5,
        )
