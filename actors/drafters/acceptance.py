"""How likely draft tokens are accepted, learnt from which of them were.

A table of cells: drafters put tokens that they trust alike into one cell, and each cell counts how many of its tokens
were judged and accepted, old ones fading. The chance of a cell is conditional: that a token is accepted given that all
before it in its draft were. Knows no tokens and no drafters; `actors.drafters.drafting` updates it.
"""

from __future__ import annotations

from collections.abc import Sequence

MEMORY_TOKENS = 512
"""About so many judged tokens of a cell count; older ones have faded to a third and less."""

MIN_SURVIVAL = 0.02
"""A draft is not continued once the chance that all of it is accepted falls below this."""

WEAK_CHANCE = 0.5
"""A drafter's piece ends before a token with less chance, unless it starts with it: another may know more there."""

PRIOR_TOKENS = 4.0
"""How many judged tokens the first guess of a cell is worth."""


NESTED_PRIOR_TOKENS = 3.0
"""How many judged tokens the estimate of the cell above is worth in a nested one."""


class Acceptance:
    """`chances[cell]` is the estimate of a cell, in (0, 1); of a nested one, `nested_chance(cell)` is."""

    def __init__(self) -> None:
        self.chances: list[float] = []
        self._accepted: list[float] = []
        self._judged: list[float] = []
        self._above: list[int] = []
        self._fade = 1.0 - 1.0 / MEMORY_TOKENS

    def add_cells(self, priors: Sequence[float]) -> int:
        """Append a cell for each first guess of a chance, in (0, 1); returns the number of the first of them."""
        first = len(self.chances)
        self.chances += priors
        self._accepted += [PRIOR_TOKENS * prior for prior in priors]
        self._judged += [PRIOR_TOKENS] * len(priors)
        self._above += [-1] * len(priors)
        return first

    def add_nested_cells(self, above: Sequence[int]) -> int:
        """Append cells that start with the estimates of others, and are counted there too."""
        first = len(self.chances)
        self.chances += [0.0] * len(above)
        self._accepted += [0.0] * len(above)
        self._judged += [0.0] * len(above)
        self._above += above
        return first

    def nested_chance(self, cell: int) -> float:
        """The estimate of a nested cell: its own counts, and that of the cell above for a few more."""
        hits = self._accepted[cell] + NESTED_PRIOR_TOKENS * self.chances[self._above[cell]]
        return hits / (self._judged[cell] + NESTED_PRIOR_TOKENS)

    def update(self, cell: int, accepted: bool) -> None:
        """Count a judged token. The first guess fades like everything else."""
        hits = self._accepted[cell] * self._fade
        judged = self._judged[cell] * self._fade + 1.0
        if accepted:
            hits += 1.0
        self._accepted[cell], self._judged[cell] = hits, judged
        above = self._above[cell]
        if above >= 0:
            self.update(above, accepted)
            return
        # Half a token of doubt: a cell that never failed is not certain, one that never held is not hopeless.
        self.chances[cell] = (hits + 0.25) / (judged + 0.5)
