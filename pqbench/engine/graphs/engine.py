"""Decode steps of layers as one captured graph, and what the host does before and after each replay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pqbench.engine.cohort import Cohort
from pqbench.engine.graphs.base import Graph, Work
from pqbench.engine.graphs.cuda import CudaGraph
from pqbench.engine.graphs.numbers import Numbers
from pqbench.engine.graphs.software import SoftwareGraph
from pqbench.errors import ModelError, PqbenchError
from pqbench.kernels.backend import kernels
from pqbench.method import Plan


def ready(cohorts: Sequence[Cohort], rows: int) -> bool:
    """Prepare cohorts for the capture, with buffers for ``rows`` rows in all. Returns False while a cohort does not yet
    have the shape that it will have in all further steps."""
    able = [cohort.reserve(rows) for cohort in cohorts]
    if all(able):
        for cohort in cohorts:
            cohort.store.writer.reserve(rows)
    return all(able)


class Engine:
    """Runs the decode steps of cohorts that are :func:`ready`, one cohort for each layer, as one graph.

    In each step the host first does its part for every cohort: it waits where it must, encodes tokens that leave the
    window, and computes numbers. One copy brings all numbers to the device, and the graph is replayed. After that the
    host does work that is only due from time to time, such as sending tokens to the host store. The first step
    rehearses the work and the second one captures it.
    """

    def __init__(self, cohorts: Sequence[Cohort], work: Work) -> None:
        """``work`` is the part of a step that is captured. It calls :meth:`pqbench.store.base.Writer.write` and
        :meth:`pqbench.engine.cohort.Cohort.attend_captured` of every cohort."""
        self._cohorts, self._work = cohorts, work
        device = cohorts[0].store.device
        backend = kernels(device, cohorts[0].state.geometry.backend)
        self._graph: Graph = CudaGraph(device) if device.type == "cuda" else SoftwareGraph(backend)
        self._numbers: Numbers | None = None
        self._rehearsed = False
        self._result: Tensor | None = None
        self._places: list[int] = []

    @property
    def captured(self) -> bool:
        """Whether the next step only replays the graph."""
        return self._result is not None

    def step(self) -> Tensor:
        """Do a step. The tensors that the work reads must be filled before. The next step overwrites the result.

        Raises:
            ModelError: the work cannot be captured.
        """
        plans, numbers = [], []
        for cohort in self._cohorts:
            cohort.store.writer.prepare(1)
            plan = cohort.plan()
            plans.append(plan)
            numbers += [cohort.store.length, cohort.store.length + 1, *plan.numbers]
        if self._numbers is None:
            self._numbers = self._numbered(plans)
        self._numbers.send(numbers)
        result = self._run()
        for cohort, plan in zip(self._cohorts, plans, strict=True):
            cohort.store.writer.written(1)
            cohort.replayed(plan)
        return result

    def _numbered(self, plans: Sequence[Plan]) -> Numbers:
        """Make room for the numbers on the device, and tell each cohort which of them are its own."""
        counts = [2 + len(plan.numbers) for plan in plans]
        numbers, first = Numbers(sum(counts), self._cohorts[0].store.device), 0
        for cohort, count in zip(self._cohorts, counts, strict=True):
            cohort.store.extent.number, cohort.length, *own = numbers.views(first, count)
            cohort.state.numbers, first = own, first + count
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
        """For all cohorts, do what needs no query; then do the work."""
        for cohort in self._cohorts:
            cohort.prefetch()
        return self._work()

    def _addresses(self) -> list[int]:
        """The addresses of all tensors that the steps share."""
        return [
            tensor.data_ptr()
            for cohort in self._cohorts
            for tensor in (*cohort.store.writer.fixed, *cohort.state.fixed)
        ]
