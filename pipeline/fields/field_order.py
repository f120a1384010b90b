"""In which order a prompt's named fields stand, so that neighbours in the plan begin alike as far as possible.

The greedy group recursion of Liu et al. 2024 (arXiv 2403.05821, algorithm 1): of all values, the one that saves most
when the rows which have it begin with it makes a group; its rows go on with their other fields, all other rows with all
of theirs. So each row has an order of its own. Columns that another one determines follow it. As there:

- a value counts with its whole text or not at all;
- groups are taken by what they save at once, not by what they leave for the others.

Unlike there all rows may be taken, since values keep their counts from group to group; what all of it saves is counted
by length, and where one order for all rows (there: the fallback on statistics) saves as much, that is taken; and rows
need no order, as plans sort them anyway. What is learnt is a function of a row's values: it is learnt from some rows
and holds for all, in any process, and rows whose values were not seen have the one order that is best for all. Knows no
files.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

MAX_GROUPS = 20_000
"""Values that an order knows, at most; it travels with the job, about 40 bytes for each."""

PUNCTUATION = 6
"""Characters of a field besides its name and value: quotes, colon, comma, new line."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class FieldOrder(BaseModel):
    """An order for every row. `fields`: those of the template; all else speaks of them by their index there.

    default: the order for what no group says. follows: per field, those that it determines. nodes: groups, the most
    important first, as (field, digest of its value, node of the rows in the group; -1 for the default order).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fields: tuple[str, ...]
    default: tuple[int, ...]
    follows: tuple[tuple[int, ...], ...]
    nodes: Annotated[tuple[tuple[tuple[int, str, int], ...], ...], Field(description="node 0 is where all rows begin")]

    def order_of(self, texts: Mapping[str, str]) -> list[str]:
        """The order of a row's fields, whose values are these texts."""
        order = self.order_by_digests([digest_of(texts[name]) for name in self.fields])
        return [self.fields[i] for i in order]

    def order_by_digests(self, digests: Sequence[str]) -> list[int]:
        """The order of the fields whose values have these digests, by their index."""
        left = dict.fromkeys(range(len(self.fields)))
        order: list[int] = []
        node = 0
        while node >= 0:
            found = [hit for i in left if (hit := self._lookups[node].get((i, digests[i]))) is not None]
            if not found:
                break
            _, first, node = min(found)
            taken = [first, *(i for i in self.follows[first] if i in left and i != first)]
            order += taken
            for i in taken:
                del left[i]
        return order + [i for i in self.default if i in left]

    @cached_property
    def _lookups(self) -> list[dict[tuple[int, str], tuple[int, int, int]]]:
        """Per node: (field, digest) to (rank, field, next node)."""
        return [
            {(column, digest): (rank, column, child) for rank, (column, digest, child) in enumerate(node)}
            for node in self.nodes
        ]


def digest_of(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def learn_field_order(columns: Mapping[str, Sequence[str]], max_groups: int = MAX_GROUPS) -> FieldOrder:
    """Learn from rows: their values' texts per field, all of one length. Holds some 100 bytes per value."""
    return _Learner(columns, max_groups).learn()


class _Learner:
    """Values by their codes: code_CN[c, n] is the value of field c in row n, among the field's different ones."""

    def __init__(self, columns: Mapping[str, Sequence[str]], max_groups: int) -> None:
        self._names = tuple(columns)
        self._max_groups = max_groups
        self._num_rows = len(next(iter(columns.values())))
        self._digests: list[list[str]] = []
        self._sizes: list[Floats] = []
        codes = []
        for name, texts in columns.items():
            known: dict[str, int] = {}
            codes.append(np.array([known.setdefault(text, len(known)) for text in texts], np.int64))
            self._digests.append([digest_of(text) for text in known])
            overhead = len(name.encode()) + PUNCTUATION
            self._sizes.append(np.array([overhead + len(text.encode("utf-8", "surrogatepass")) for text in known]))
        self._code_CN = np.array(codes).reshape(len(self._names), self._num_rows)
        self._follows = [self._determined_by(c) for c in range(len(self._names))]

    def learn(self) -> FieldOrder:
        nodes: list[list[tuple[int, str, int]]] = []
        num_groups = 0
        every = tuple(range(len(self._names)))
        # The largest groups first, should there be too many. (-rows, number, rows, fields left, where it is named)
        todo: list[tuple[int, int, Ints, tuple[int, ...], tuple[int, int] | None]] = []
        if self._num_rows:
            todo.append((-self._num_rows, 0, np.arange(self._num_rows), every, None))
        number = 0
        while todo and num_groups < self._max_groups:
            _, _, rows_R, fields, named_at = heapq.heappop(todo)
            groups: list[tuple[int, str, int]] = []
            for column, code, members_R in self._groups(rows_R, fields):
                if num_groups == self._max_groups:
                    break
                num_groups += 1
                rest = tuple(c for c in fields if c != column and c not in self._follows[column])
                if len(rest) > 1:
                    number += 1
                    heapq.heappush(todo, (-len(members_R), number, members_R, rest, (len(nodes), len(groups))))
                groups.append((column, self._digests[column][code], -1))
            if not groups:
                continue
            if named_at is not None:
                node, place = named_at
                nodes[node][place] = (*nodes[node][place][:2], len(nodes))
            nodes.append(groups)
        by_groups = FieldOrder(
            fields=self._names,
            default=self._best_on_average(),
            follows=tuple(self._follows),
            nodes=tuple(tuple(node) for node in nodes) or ((),),
        )
        for_all = by_groups.model_copy(update={"nodes": ((),)})
        return by_groups if self._saved(by_groups) > self._saved(for_all) else for_all

    def _saved(self, order: FieldOrder) -> int:
        """Characters that rows share with the one before, whole fields only, once they are sorted."""
        rows: list[list[tuple[int, int]]] = []
        for codes in self._code_CN.T.tolist():
            digests = [self._digests[c][code] for c, code in enumerate(codes)]
            rows.append([(c, codes[c]) for c in order.order_by_digests(digests)])
        rows.sort()
        saved = 0
        for before, row in itertools.pairwise(rows):
            for one, other in zip(before, row):
                if one != other:
                    break
                saved += int(self._sizes[one[0]][one[1]])
        return saved

    def _groups(self, rows_R: Ints, fields: Sequence[int]) -> Iterator[tuple[int, int, Ints]]:
        """Values in the order in which they take rows for themselves: (field, code, their rows).

        By the square of their length, as in the paper: a short value that many rows have would come first by its
        length, and tear the groups of long ones apart.
        """
        members: dict[tuple[int, int], Ints] = {}
        size_of: dict[tuple[int, int], float] = {}
        queue: list[tuple[float, int, int]] = []
        for column in fields:
            codes_R = self._code_CN[column, rows_R]
            order = codes_R.argsort(kind="stable")
            codes, starts, counts = np.unique(codes_R[order], return_index=True, return_counts=True)
            sizes = self._sizes[column][codes].astype(np.float64)
            for other in self._follows[column]:
                if other in fields and other != column:  # one value for all rows of a group, so any row's will do
                    sizes += self._sizes[other][self._code_CN[other, rows_R[order[starts]]]]
            for code, start, count, size in zip(codes.tolist(), starts.tolist(), counts.tolist(), sizes.tolist()):
                if count > 1:
                    members[column, code] = rows_R[order[start : start + count]]
                    size_of[column, code] = size
                    queue.append((-size * size * (count - 1), column, code))
        heapq.heapify(queue)
        is_left_N = np.zeros(self._num_rows, bool)
        is_left_N[rows_R] = True
        while queue:
            saved, column, code = heapq.heappop(queue)
            rows = members[column, code]
            left = rows[is_left_N[rows]]
            if len(left) < 2:
                continue
            now = -(size_of[column, code] ** 2) * (len(left) - 1)
            if now > saved:  # others took some of its rows since it was queued
                members[column, code] = left
                heapq.heappush(queue, (now, column, code))
                continue
            is_left_N[left] = False
            yield column, code, left

    def _determined_by(self, column: int) -> tuple[int, ...]:
        """Fields that have one value wherever this one has the same; of a field that never repeats nothing is known."""
        codes_N = self._code_CN[column]
        num_values = len(self._digests[column])
        if num_values == self._num_rows:
            return ()
        pairs = [
            len(np.unique(codes_N * len(self._digests[other]) + self._code_CN[other]))
            for other in range(len(self._names))
        ]
        return tuple(other for other, count in enumerate(pairs) if other != column and count == num_values)

    def _best_on_average(self) -> tuple[int, ...]:
        """One order for all: next comes the field that saves most behind those before it, with what it determines."""
        left, order = list(range(len(self._names))), []
        group_N = np.zeros(self._num_rows, np.int64)
        while left:
            best, best_saved, best_groups = left[0], -1.0, group_N
            for column in left:
                taken = [column, *(c for c in self._follows[column] if c in left)]
                keys_N = group_N * len(self._digests[column]) + self._code_CN[column]
                _, firsts, inverse_N, counts = np.unique(
                    keys_N, return_index=True, return_inverse=True, return_counts=True
                )
                size_N = sum(self._sizes[c][self._code_CN[c]] for c in taken)
                saved = float((np.asarray(size_N)[firsts] * (counts - 1)).sum()) if self._num_rows else 0.0
                if saved > best_saved:
                    best, best_saved, best_groups = column, saved, inverse_N.reshape(-1)
            taken = [best, *(c for c in self._follows[best] if c in left)]
            order += taken
            left = [c for c in left if c not in taken]
            group_N = best_groups
        return tuple(order)
