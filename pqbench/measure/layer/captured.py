"""Steps of one layer that are replays of a captured one, as ``graphs=true`` decodes a whole model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pqbench.engine.cohort import Cohort
from pqbench.engine.graphs.engine import Engine, ready

STEPS = 3  # that come before the first replay: one that is not captured, the rehearsal, and the capture


class CapturedSteps:
    """The steps of a cohort, with places for the key and value ``[B, H, 1, D]`` and the query ``[B, H, G, D]``."""

    def __init__(self, cohort: Cohort, token: Sequence[Tensor]) -> None:
        self._places = [rows.clone() for rows in token]
        key, value, q = self._places

        def work() -> Tensor:
            cohort.store.writer.write(key, value)
            return cohort.attend_captured(q)

        self._engine = Engine([cohort], work)

    @classmethod
    def of(cls, cohort: Cohort, rows: int, token: Sequence[Tensor]) -> CapturedSteps | None:
        """For a cohort that will hold at most so many rows; None while its steps change their shape."""
        return cls(cohort, token) if ready([cohort], rows) else None

    def place(self, token: Sequence[Tensor]) -> None:
        """Put a step's key, value and query where the captured step reads them; a model makes them there."""
        for place, rows in zip(self._places, token, strict=True):
            place.copy_(rows)

    def step(self) -> Tensor:
        """The step of the token that was placed; the next one overwrites the result."""
        return self._engine.step()
