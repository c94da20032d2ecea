"""Steps of one layer that are replays of a captured one, as ``graphs=true`` decodes a whole model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pqbench.engine.cohort import Group
from pqbench.engine.graphs.engine import Engine, ready

STEPS = 3  # before a step is nothing but a replay: one that is not captured, the rehearsal, the capture


class CapturedSteps:
    """The steps of a group, with places for the key and value ``[B, H, 1, D]`` and the query ``[B, H, G, D]``."""

    def __init__(self, group: Group, token: Sequence[Tensor]) -> None:
        self._places = [rows.clone() for rows in token]
        key, value, q = self._places

        def work() -> Tensor:
            group.store.writer.write(key, value)
            return group.attend_captured(q)

        self._engine = Engine([group], work)

    @classmethod
    def of(cls, group: Group, rows: int, token: Sequence[Tensor]) -> CapturedSteps | None:
        """For a group that will hold at most so many rows; None while its steps change their shape."""
        return cls(group, token) if ready([group], rows) else None

    def place(self, token: Sequence[Tensor]) -> None:
        """Put a step's key, value and query where the captured step reads them; a model makes them there."""
        for place, rows in zip(self._places, token, strict=True):
            place.copy_(rows)

    def step(self) -> Tensor:
        """The step of the token that was placed; the next one overwrites the result."""
        return self._engine.step()
