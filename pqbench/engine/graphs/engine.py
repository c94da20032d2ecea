"""Device work of layers captured once and replayed, and what the host does before and after each replay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pqbench.engine.cohort import Group
from pqbench.engine.graphs.base import Graph, Work, graph
from pqbench.engine.graphs.numbers import Numbers
from pqbench.errors import ModelError, PqbenchError
from pqbench.kernels.backend import kernels
from pqbench.method import Plan


def ready(groups: Sequence[Group], rows: int) -> bool:
    """Get groups ready to be captured, with buffers for ``rows`` rows in all; False while some are not of the shape
    that their further steps will have."""
    able = [group.state.reserve(group.store, rows) for group in groups]
    if all(able):
        for group in groups:
            group.store.writer.reserve(rows)
    return all(able)


class Engine:
    """Steps of groups that are :func:`ready`, each of one layer, as one graph.

    A step is: the host's part of every group (waits, codes for tokens that leave the window, numbers), one copy that
    brings all numbers to the device, the replay, and what is due now and then (tokens on their way to the host). The
    first step rehearses, the second captures.
    """

    def __init__(self, groups: Sequence[Group], work: Work) -> None:
        """``work`` is what of a step is captured. It calls :meth:`pqbench.store.base.Writer.write` and
        :meth:`pqbench.engine.cohort.Group.attend_captured` of every group."""
        self._groups, self._work = groups, work
        device = groups[0].store.device
        self._graph: Graph = graph(device, kernels(device, groups[0].state.geometry.backend))
        self._numbers: Numbers | None = None
        self._rehearsed = False
        self._result: Tensor | None = None
        self._places: list[int] = []

    @property
    def captured(self) -> bool:
        """Whether the next step is nothing but a replay."""
        return self._result is not None

    def step(self) -> Tensor:
        """Do a step; what the work takes must be in its place. The next step overwrites the result.

        Raises:
            ModelError: the work cannot be captured.
        """
        plans, numbers = [], []
        for group in self._groups:
            group.store.writer.prepare(1)
            plan = group.state.plan(group.store, group.store.length + 1)
            plans.append(plan)
            numbers += [group.store.length, group.store.length + 1, *plan.numbers]
        if self._numbers is None:
            self._numbers = self._numbered(plans)
        self._numbers.send(numbers)
        result = self._run()
        for group, plan in zip(self._groups, plans, strict=True):
            group.store.writer.written(1)
            group.replayed(plan)
        return result

    def _numbered(self, plans: Sequence[Plan]) -> Numbers:
        """Numbers on the device, and each group told which of them are its own."""
        counts = [2 + len(plan.numbers) for plan in plans]
        numbers, first = Numbers(sum(counts), self._groups[0].store.device), 0
        for group, count in zip(self._groups, counts, strict=True):
            group.store.extent.number, group.length, *own = numbers.views(first, count)
            group.state.numbers, first = own, first + count
        return numbers

    def _run(self) -> Tensor:
        if not self._rehearsed:
            self._rehearsed = True
            return self._graph.rehearse(self._whole)
        if self._result is None:
            self._places = self._addresses()
            try:
                self._result = self._graph.capture(self._whole)
            except PqbenchError:
                raise
            except RuntimeError as error:
                raise ModelError(f"a decode step cannot be captured, use graphs=false: {error}") from error
        if self._addresses() != self._places:
            raise RuntimeError("a buffer has moved since the step that reads it was captured")
        self._graph.replay()
        return self._result

    def _whole(self) -> Tensor:
        """What needs no query, for all groups; then the work."""
        for group in self._groups:
            group.state.prefetch(group.store)
        return self._work()

    def _addresses(self) -> list[int]:
        """Where everything lies that steps share."""
        return [
            tensor.data_ptr() for group in self._groups for tensor in (*group.store.writer.fixed, *group.state.fixed)
        ]
