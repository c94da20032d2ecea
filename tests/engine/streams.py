"""Replaces the streams of a GPU: all work runs immediately on the CPU, and a log records the order in which it was
queued."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Stream:
    """A stream with a name."""

    def __init__(self, name: str, owner: Streams) -> None:
        self.name, self.owner = name, owner

    def wait_event(self, event: Event) -> None:
        """Work that is queued here from now on runs after the event."""
        self.owner.log.append(("waits", self.name, event.number))


class Event:
    """A point in a stream; its time is its number among all recorded events."""

    def __init__(self, number: int, owner: Streams) -> None:
        self.number, self.owner, self.time = number, owner, -1

    def record(self, stream: Stream) -> None:
        self.owner.recorded += 1
        self.time = self.owner.recorded
        self.owner.log.append(("records", stream.name, self.number))

    def query(self) -> bool:
        self.owner.queries += 1
        return self.time <= self.owner.passed

    def synchronize(self) -> None:
        self.owner.log.append(("synchronises", "host", self.number))
        self.owner.passed = max(self.owner.passed, self.time)

    def elapsed_time(self, end_event: Event) -> float:
        assert self.time <= self.owner.passed, "the device has not passed the first event"
        assert end_event.time <= self.owner.passed, "the device has not passed the last event"
        return float(end_event.time - self.time)


class Streams:
    """Implements :class:`pqbench.engine.clock.Streams`. An event has passed if the host has waited for it or for a
    later one, or if ``lag`` later events were recorded."""

    def __init__(self, lag: int | None = None) -> None:
        self.log: list[tuple[str, str, Any]] = []
        self.made = self.recorded = self.queries = 0
        self.lent: list[tuple[int, ...]] = []  # shapes
        self.answers = True
        self._passed, self._lag = 0, lag
        self._current = [Stream("main", self)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Streams:
        return self

    @property
    def passed(self) -> int:
        """The time of the last event that the device has passed."""
        return max(self._passed, 0 if self._lag is None else self.recorded - self._lag)

    @passed.setter
    def passed(self, time: int) -> None:
        self._passed = time

    def event(self, timed: bool) -> Event:
        self.made += 1
        return Event(self.made, self)

    def current(self, device: torch.device) -> Stream:
        return self._current[-1]

    def side(self, device: torch.device) -> Stream:
        return Stream("side", self)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def lend(self, rows: Tensor, stream: Stream) -> None:
        self.lent.append(tuple(rows.shape))

    def alive(self) -> bool:
        return self.answers

    def note(self, what: str, subject: object = None) -> None:
        """Log that work is queued now."""
        self.log.append((what, self._current[-1].name, subject))
