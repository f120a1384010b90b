"""How likely draft tokens are accepted, learnt from which of them were.

A table of cells: drafters put tokens that they trust alike into one cell, and each cell counts how many of its tokens
were judged and accepted, old ones fading. The chance of a cell is conditional: that a token is accepted given that all
before it in its draft were. Knows no tokens and no drafters; `actors.drafting` updates it.
"""

from __future__ import annotations

from collections.abc import Sequence

MEMORY_TOKENS = 512
"""About so many judged tokens of a cell count; older ones have faded to a third and less."""

MIN_SURVIVAL = 0.02
"""A draft is not continued once the chance that all of it is accepted falls below this."""

PRIOR_TOKENS = 4.0
"""How many judged tokens the first guess of a cell is worth."""


class Acceptance:
    """`chances[cell]` is the estimate, in (0, 1); read it, do not write it."""

    def __init__(self) -> None:
        self.chances: list[float] = []
        self._accepted: list[float] = []
        self._judged: list[float] = []
        self._fade = 1.0 - 1.0 / MEMORY_TOKENS

    def add_cells(self, priors: Sequence[float]) -> int:
        """Append a cell for each first guess of a chance, in (0, 1); returns the number of the first of them."""
        first = len(self.chances)
        self.chances += priors
        self._accepted += [PRIOR_TOKENS * prior for prior in priors]
        self._judged += [PRIOR_TOKENS] * len(priors)
        return first

    def update(self, cell: int, accepted: bool) -> None:
        """Count a judged token. The first guess fades like everything else."""
        hits = self._accepted[cell] * self._fade
        judged = self._judged[cell] * self._fade + 1.0
        if accepted:
            hits += 1.0
        self._accepted[cell], self._judged[cell] = hits, judged
        # Half a token of doubt: a cell that never failed is not certain, one that never held is not hopeless.
        self.chances[cell] = (hits + 0.25) / (judged + 0.5)
