"""How much two sequences of tokens have in common at their beginning."""

from __future__ import annotations

from collections.abc import Sequence


def num_in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning. Mostly one is the beginning of the other, which is found by one comparison."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    for i in range(length):
        if a[i] != b[i]:
            return i
    return length
