"""The nine steps, and how they share the available time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

LIMIT = 525.0  # seconds for all steps together, where one command may take ten minutes


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        number: its place in the order of the steps.
        name: the module of :mod:`gpucheck.steps` that runs it.
        title: its subject, for the summary.
        seconds: the time that it may take on a GPU.
        least: the least time with which it is started.
        importance: 1 for the step that is skipped last.
        proves: whether it compares results with correct ones. If a step only measures, it is not a fault that it runs
            out of time.
        elastic: whether it can measure more if earlier steps leave time.
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
        """File name of its result."""
        return f"{self.number}_{self.name}.json"


STEPS = (
    Step(0, "machine", "versions, card, driver, PCIe link, free memory", 60, 10, 1),
    Step(1, "kernels", "every kernel against its definition", 70, 30, 2),
    Step(2, "stores", "host stores over the link against the device store", 35, 20, 5),
    Step(3, "tokens", "the same tokens over every tier, with and without overlap, by every backend", 45, 25, 4),
    Step(4, "bandwidth", "kernel times against bytes over bandwidth; gather from host memory", 50, 30, 6, proves=False),
    Step(5, "attention", "one layer's decode step", 65, 35, 7, proves=False),
    Step(6, "latency", "seconds per token of a model of 8B shape", 185, 60, 3, proves=False, elastic=True),
    Step(7, "profile", "launches, synchronisations and host time of three host steps", 30, 20, 8, proves=False),
    Step(8, "memcheck", "compute-sanitizer memcheck on six kernels", 25, 15, 9),
)


def scaled(step: Step, limit: float) -> Step:
    """A step with more time if the whole check has more than :data:`LIMIT`. If it has less, the times of the steps stay
    the same and some steps are skipped."""
    factor = max(1.0, limit / LIMIT)
    return replace(step, seconds=step.seconds * factor)


def granted(step: Step, later: Sequence[Step], left: float) -> float:
    """Seconds that ``step`` may take now, if ``later`` steps wait and ``left`` seconds remain; 0 means that it is
    skipped. They are at most its own limit, and leave enough for later steps that are more important. An elastic step
    also gets the time that no later step could use."""
    reserved = sum(other.seconds for other in later if other.importance < step.importance)
    seconds = min(step.seconds, left - reserved)
    if step.elastic:
        seconds = max(seconds, left - sum(other.seconds for other in later))
    return seconds if seconds >= min(step.least, step.seconds) else 0.0
