"""Finds the prefix groups of a step: which requests share which of their first pages, and in what order to run them.

Knows page numbers only. Shared pages are attended to once per group instead of once per request.
"""

from __future__ import annotations

from collections.abc import Sequence

from kernels.attention_batch import PrefixGroup


def group_by_prefix(
    page_tables: Sequence[Sequence[int]], num_shareable: Sequence[int]
) -> tuple[list[int], list[PrefixGroup]]:
    """Return the order in which to run requests, and disjoint groups whose indices refer to that order.

    num_shareable[b]: how many of request b's first pages are full and precede all of its query tokens. Of nested
    prefixes (a system prompt, below it documents) that level is taken at which the most page reads are saved.
    """
    prefixes = [tuple(table[:count]) for table, count in zip(page_tables, num_shareable)]
    order = sorted(range(len(prefixes)), key=lambda request: prefixes[request])
    ordered = [prefixes[request] for request in order]
    _, groups = _best_groups(ordered, 0, len(ordered), 0)
    return order, groups


def _best_groups(prefixes: list[tuple[int, ...]], start: int, stop: int, depth: int) -> tuple[int, list[PrefixGroup]]:
    """The best groups of sorted prefixes [start, stop), which agree on their first `depth` pages, and pages saved."""
    if stop - start < 2:
        return 0, []
    first, last = prefixes[start], prefixes[stop - 1]
    while depth < min(len(first), len(last)) and first[depth] == last[depth]:
        depth += 1
    saved_as_one = (stop - start - 1) * depth

    saved_below, groups_below = 0, []
    begin = start
    while begin < stop:
        end = begin + 1
        if len(prefixes[begin]) > depth:
            while end < stop and prefixes[end][depth] == prefixes[begin][depth]:
                end += 1
            saved, groups = _best_groups(prefixes, begin, end, depth + 1)
            saved_below += saved
            groups_below += groups
        begin = end
    if saved_as_one and saved_as_one >= saved_below:
        return saved_as_one, [PrefixGroup(start, stop - start, first[:depth])]
    return saved_below, groups_below
