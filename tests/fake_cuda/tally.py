"""Counts of a run on fake CUDA tensors: launches, copies, synchronisations and faults, each with its line of code."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
OURS = (f"{ROOT}/pqbench/", f"{ROOT}/methods/")
TRITON, TORCH, COPY, SYNC = "triton launch", "torch launch", "memcpy", "synchronisation"
KINDS = (TRITON, TORCH, COPY, SYNC)


MOST = 4000  # copies of one part of a run; with more, something is copied row by row


class RunawayError(Exception):
    """One part of a run made so many copies that the rest would take minutes."""


def caller() -> str:
    """The innermost running line of the project, such as ``pqbench/engine/cohort.py:94``; ``model`` inside
    transformers, ``test`` elsewhere."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            return f"{name.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        if "/transformers/" in name:
            return "model"
        frame = frame.f_back
    return "test"


@dataclass
class Counts:
    """The number of events by kind, place and name. Events of the model itself are counted separately."""

    events: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # kind, place, what
    copies: int = 0  # those of the model included

    def of(self, *kinds: str, without: tuple[str, ...] = ()) -> int:
        """The number of events of these kinds in our code, except in files whose paths begin with one of
        ``without``."""
        return sum(
            count
            for (kind, place, _), count in self.events.items()
            if kind in kinds and place != "model" and not place.startswith(without)
        )

    @property
    def launches(self) -> int:
        """The number of kernels of Triton and torch that our code launched."""
        return self.of(TRITON, TORCH)

    def listed(self, *kinds: str) -> str:
        """One line for each place, for the message of an assertion."""
        found = sorted((k, p, w, n) for (k, p, w), n in self.events.items() if k in kinds and p != "model")
        return "\n".join(f"  {kind} at {place}: {what} x {count}" for kind, place, what, count in found)


@dataclass
class Tally:
    """Counts of the present part of a run, and the faults of the whole run.

    Attributes:
        faults: what would fail or be wrong on a real GPU, and how often it happened.
        host_work: operations on large tensors in host memory, with the number of elements of the largest.
        keys: the specialisations with which each kernel was launched.
        streams: launches by the name of their stream and their own name.
        stream: the name of the current stream.
    """

    counts: Counts = field(default_factory=Counts)
    faults: Counter[str] = field(default_factory=Counter)
    host_work: dict[str, int] = field(default_factory=dict)
    keys: dict[str, set[object]] = field(default_factory=dict)
    streams: Counter[tuple[str, str]] = field(default_factory=Counter)
    stream: str = "default"
    _recorded: int = 0  # events so far
    _all_reached: int = 0  # events that have passed, whatever their stream
    _reached: dict[str, int] = field(default_factory=dict)  # in each stream, the last event known to have passed

    def add(self, kind: str, what: str) -> None:
        """Count one event at the running line of the project."""
        self.counts.events[kind, caller(), what] += 1
        self.counts.copies += kind == COPY
        if self.counts.copies > MOST:
            self.fault(f"more than {MOST} copies at once")
            raise RunawayError(f"more than {MOST} copies at {caller()}")

    def wait(self, what: str, stream: str | None = None, event: int | None = None) -> None:
        """Count a wait of the host for an event of a stream, by default for all work of the current stream. Events that
        the host knows to have passed are not counted."""
        stream, last = stream or self.stream, self._recorded if event is None else event
        if event is None or last > max(self._reached.get(stream, 0), self._all_reached):
            self.add(SYNC, what)
            self._reached[stream] = last

    def wait_for_all(self, what: str) -> None:
        """Count a wait of the host for all streams."""
        self.add(SYNC, what)
        self._all_reached = self._recorded

    def record(self) -> int:
        """The number of an event that is recorded now; later events have larger numbers."""
        self._recorded += 1
        return self._recorded

    def known(self, stream: str, event: int) -> None:
        """Note that the host knows that an event has passed."""
        self._reached[stream] = max(event, self._reached.get(stream, 0))

    def fault(self, what: str) -> None:
        """Note something that would fail on a GPU."""
        self.faults[f"{caller()}: {what}"] += 1

    def on_host(self, what: str, size: int) -> None:
        """Note an operation of ``size`` elements in host memory."""
        name = f"{caller()}: {what}"
        self.host_work[name] = max(size, self.host_work.get(name, 0))

    @contextmanager
    def part(self) -> Iterator[Counts]:
        """Count events inside this block separately."""
        before, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            before.events.update(self.counts.events)
            self.counts = before
