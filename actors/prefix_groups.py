"""Finds the prefix groups of a step: which requests share which of their first pages, and in what order to run them.

Knows page numbers only. Shared pages are attended to once per group instead of once per request.
"""

from __future__ import annotations

from collections.abc import Sequence

from kernels.attention_batch import PrefixGroup

NESTING_PAGES = 8
"""What a group inside of another costs, in pages read: it is a partial result more to merge for each of its tokens."""


def group_by_prefix(
    page_tables: Sequence[Sequence[int]], num_shareable: Sequence[int]
) -> tuple[list[int], list[PrefixGroup]]:
    """Return the order in which to run requests, and groups whose indices refer to that order.

    num_shareable[b]: how many of request b's first pages are full and precede all of its query tokens. Of nested
    prefixes (a system prompt, below it documents) those levels become groups that save the most page reads in all.
    """
    prefixes = [tuple(table[:count]) for table, count in zip(page_tables, num_shareable)]
    order = sorted(range(len(prefixes)), key=lambda request: prefixes[request])
    _, groups = _best_groups([prefixes[request] for request in order], 0, len(order), 0, 0)
    return order, groups


def _best_groups(
    prefixes: list[tuple[int, ...]], start: int, stop: int, depth: int, taken: int
) -> tuple[int, list[PrefixGroup]]:
    """The best groups of sorted prefixes [start, stop), and pages saved.

    They agree on their first `depth` pages, of which the first `taken` are in a group around them already.
    """
    if stop - start < 2:
        return 0, []
    first, last = prefixes[start], prefixes[stop - 1]
    while depth < min(len(first), len(last)) and first[depth] == last[depth]:
        depth += 1
    saved, groups = _best_below(prefixes, start, stop, depth, taken)
    saved_here = (stop - start - 1) * (depth - taken) - (NESTING_PAGES if taken else 0)
    if saved_here > 0:
        saved_inside, inside = _best_below(prefixes, start, stop, depth, depth)
        if saved_here + saved_inside >= saved:
            return saved_here + saved_inside, [PrefixGroup(start, stop - start, first[taken:depth], taken), *inside]
    return saved, groups


def _best_below(
    prefixes: list[tuple[int, ...]], start: int, stop: int, depth: int, taken: int
) -> tuple[int, list[PrefixGroup]]:
    """The best groups among those of [start, stop) that also agree on the page behind the first `depth`."""
    total, groups, begin = 0, [], start
    while begin < stop:
        end = begin + 1
        if len(prefixes[begin]) > depth:
            while end < stop and prefixes[end][depth] == prefixes[begin][depth]:
                end += 1
            saved, found = _best_groups(prefixes, begin, end, depth + 1, taken)
            total += saved
            groups += found
        begin = end
    return total, groups
