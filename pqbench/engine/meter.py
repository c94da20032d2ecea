"""What the decode steps of one cohort in one layer did: tokens attended to, bytes of the index, seconds by phase."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from pqbench.engine.clock import Clock
from pqbench.method import Selection

PHASES = ("select", "fetch", "attend", "append")
_UNTIMED = nullcontext()


class Meter:
    """Counts of every step of one cohort in one layer. The meter waits for the device only when a sum is read.

    Attributes:
        steps: number of steps.
        timed: number of steps whose phases were timed, see :meth:`pqbench.engine.clock.Clock.samples`.
        index_bytes: bytes of the index that all steps read: those that the methods declare, and the keys that their
            selections read through the store.
        counts: tokens per KV head that each step attended to; None where only the device knows the number.
        held: rows that the store held in each step.
        ragged: float64 ``[]`` on the device, the sum of the numbers that only the device knows, each a mean over
            sequences and KV heads; None while there are none.
        excess: int64 ``[B, H]`` on the device, over the steps whose numbers only the device knows: the most tokens that
            a KV head attended to beyond the limit of the step, negative where it stayed below; None while there are no
            such steps with a limit.
    """

    def __init__(self, clock: Clock) -> None:
        self.steps = self.timed = self.index_bytes = 0
        self.counts: list[int | None] = []
        self.held: list[int] = []
        self.ragged: Tensor | None = None
        self.excess: Tensor | None = None
        self._clock, self._sampled, self._attended = clock, False, 0
        self._phases = {phase: clock.spans(phase) for phase in PHASES}

    def begin(self) -> None:
        """A step begins."""
        self._sampled = self._clock.samples(self.steps)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time the enclosed work as a phase of the step, if the phases of this step are timed."""
        return self._phases[name] if self._sampled else _UNTIMED

    def count(self, selection: Selection, held: int, index_bytes: int, limit: int | None = None) -> None:
        """Add one step. Rows that no query head of a KV head sees are padding and are not counted. ``limit`` is the
        largest number of tokens that a KV head may attend to, needed where only the device knows that number."""
        self.timed += self._sampled
        if selection.visible is None:
            self._add(held if selection.indices is None else selection.indices.shape[2], held, index_bytes)
            return
        seen = selection.visible.any(2).sum(-1)  # [B, H]
        mean = seen.mean(dtype=torch.float64)
        self.ragged = mean if self.ragged is None else self.ragged + mean
        if limit is not None:
            beyond = seen - limit
            self.excess = beyond if self.excess is None else torch.maximum(self.excess, beyond)
        self._add(None, held, index_bytes)

    def replayed(self, attended: int, held: int, index_bytes: int) -> None:
        """Add one step that a graph has replayed. Its phases cannot be timed."""
        self._add(attended, held, index_bytes)

    @property
    def attended(self) -> float:
        """Tokens per KV head attended to, summed over all steps. Waits for the device if only the device knows them."""
        return self._attended + (0.0 if self.ragged is None else float(self.ragged))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the timed steps by phase (:data:`PHASES`). Waits for the device."""
        return {phase: spans.total for phase, spans in self._phases.items()}

    def _add(self, attended: int | None, held: int, index_bytes: int) -> None:
        self.steps += 1
        self.index_bytes += index_bytes
        self.counts.append(attended)
        self.held.append(held)
        self._attended += attended or 0
