"""Steps of one layer that replay a captured step, as a whole model does with ``graphs=true``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pqbench.engine.cohort import Cohort
from pqbench.engine.graphs.engine import Engine, ready

STEPS = 3  # steps before the first replay: one without a graph, the rehearsal, and the capture


class CapturedSteps:
    """The steps of a cohort, with tensors that every replay reads: the key and value ``[B, H, 1, D]`` and the query
    ``[B, H, G, D]``."""

    def __init__(self, cohort: Cohort, token: Sequence[Tensor]) -> None:
        self._places = [rows.clone() for rows in token]
        key, value, q = self._places

        def work() -> Tensor:
            cohort.store.writer.write(key, value)
            return cohort.attend_captured(q)

        self._engine = Engine([cohort], work)

    @classmethod
    def of(cls, cohort: Cohort, rows: int, token: Sequence[Tensor]) -> CapturedSteps | None:
        """The captured steps of a cohort that will hold at most ``rows`` rows; None while the shapes of its steps still
        change."""
        return cls(cohort, token) if ready([cohort], rows) else None

    def place(self, token: Sequence[Tensor]) -> None:
        """Copy a step's key, value and query to where the captured step reads them. In a model, the captured step
        itself computes them."""
        for place, rows in zip(self._places, token, strict=True):
            place.copy_(rows)

    def step(self) -> Tensor:
        """Do the step of the token that was placed. The next step overwrites the result."""
        return self._engine.step()
