"""The nine steps, and how they share the time there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

LIMIT = 525.0  # seconds that all steps together may take where one command has ten minutes


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        number: its place in the order of running.
        name: the module of :mod:`gpucheck.steps` that does it.
        title: what it finds out, for the summary.
        seconds: the time it may take on a GPU.
        least: with less time than this it is not begun.
        importance: 1 for what is skipped last.
        proves: whether it compares with what is right. A step that only measures and runs out of time has shown
            nothing wrong.
        elastic: whether it has more to measure when earlier steps leave time over.
    """

    number: int
    name: str
    title: str
    seconds: float
    least: float
    importance: int
    proves: bool = True
    elastic: bool = False

    @property
    def file(self) -> str:
        """Name of its result."""
        return f"{self.number}_{self.name}.json"


STEPS = (
    Step(0, "machine", "versions, card, driver, PCIe link, free memory", 60, 10, 1),
    Step(1, "kernels", "every kernel against its definition", 70, 30, 2),
    Step(2, "stores", "host stores over the link against the device store", 35, 20, 5),
    Step(3, "tokens", "the same tokens over every tier, with and without overlap, by every body", 45, 25, 4),
    Step(4, "bandwidth", "kernel times against bytes over bandwidth; gather from host memory", 50, 30, 6, proves=False),
    Step(5, "attention", "one layer's decode step", 65, 35, 7, proves=False),
    Step(6, "latency", "seconds per token of a model of 8B shape", 185, 60, 3, proves=False, elastic=True),
    Step(7, "profile", "launches, synchronisations and host time of three host steps", 30, 20, 8, proves=False),
    Step(8, "memcheck", "compute-sanitizer memcheck on six kernels", 25, 15, 9),
)


def scaled(step: Step, limit: float) -> Step:
    """A step with more time where the whole check has more than :data:`LIMIT`; with less its steps keep theirs, and
    some are skipped."""
    factor = max(1.0, limit / LIMIT)
    return replace(step, seconds=step.seconds * factor)


def granted(step: Step, later: Sequence[Step], left: float) -> float:
    """Seconds that ``step`` may take now, when ``later`` steps wait and ``left`` seconds remain: its own limit at most,
    and so little that the later steps of more importance keep theirs. 0: skip it. An elastic step also gets what nobody
    behind it could use."""
    reserved = sum(other.seconds for other in later if other.importance < step.importance)
    seconds = min(step.seconds, left - reserved)
    if step.elastic:
        seconds = max(seconds, left - sum(other.seconds for other in later))
    return seconds if seconds >= min(step.least, step.seconds) else 0.0
