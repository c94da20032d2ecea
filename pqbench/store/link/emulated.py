"""A link that takes the time of a PCIe link with a given bandwidth and latency, with one queue per direction."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pqbench.errors import ConfigError
from pqbench.store.link.base import Copy, Direction, Meters, Transfer
from pqbench.store.link.local import Lane, LocalLink, Task


@dataclass(frozen=True)
class Speed:
    """Speed of a link: a transfer takes ``latency`` seconds, and then moves ``bandwidth`` bytes per second."""

    name: str
    bandwidth: float
    latency: float

    def seconds(self, size: int) -> float:
        """Seconds that a transfer of ``size`` bytes takes."""
        return self.latency + size / self.bandwidth


# Bandwidth of copies of several MB, about 78 % of the line rate; latency of one asynchronous copy.
PRESETS: Mapping[str, Speed] = MappingProxyType(
    {
        "pcie3": Speed("PCIe 3.0 x16", 12.3e9, 10e-6),
        "pcie4": Speed("PCIe 4.0 x16", 24.6e9, 10e-6),
        "pcie5": Speed("PCIe 5.0 x16", 49.2e9, 10e-6),
    }
)
_LATE = 1e-3  # seconds; a longer delay comes from a busy machine, not from the sleep
_NUMBERS = re.compile(r"([0-9]*\.?[0-9]+)\s*GB/s(?:\s*\+\s*([0-9]*\.?[0-9]+)\s*us)?")


def speed(name: str) -> Speed:
    """The speed of a preset, or of a name such as ``20GB/s`` or ``20GB/s+5us`` (the default latency is 10 us).

    Raises:
        ConfigError: the name is neither of these.
    """
    if name in PRESETS:
        return PRESETS[name]
    numbers = _NUMBERS.fullmatch(name)
    if numbers is None or float(numbers[1]) <= 0:
        raise ConfigError(
            f"there is no link {name!r}: use local, cuda, {', '.join(PRESETS)} or numbers such as 20GB/s or 20GB/s+5us"
        )
    return Speed(name, float(numbers[1]) * 1e9, 1e-6 * float(numbers[2] or 10))


class Clock:
    """Computes when transfers of each direction end.

    A sleep ends about 60 us late, and the caller then submits its next transfer late by the same time. That transfer is
    therefore treated as if it had been submitted earlier by this time, so that the errors do not add up.
    """

    def __init__(self, speed: Speed) -> None:
        self.speed = speed
        self._free = dict.fromkeys(Direction, 0.0)  # when the last transfer of a direction ends
        self._late = 0.0  # seconds by which the caller is late
        self._lock = threading.Lock()

    def book(self, direction: Direction, size: int) -> float:
        """Queue a transfer of ``size`` bytes. Returns its end in seconds of ``time.perf_counter``."""
        with self._lock:
            start = max(time.perf_counter() - self._late, self._free[direction])
            self._free[direction] = start + self.speed.seconds(size)
            return self._free[direction]

    def sleep_until(self, end: float, entered: float, moved: float) -> None:
        """Block a caller that began to wait at ``entered`` until ``end``; the real copy was done at ``moved``. All
        three are in seconds of ``time.perf_counter``."""
        left = end - time.perf_counter()
        if left > 0:
            time.sleep(left)
        released = time.perf_counter() if left > 0 else entered
        with self._lock:
            ideal = max(entered - self._late, end, moved)
            self._late = min(max(0.0, released - ideal), _LATE)


class EmulatedTransfer(Transfer):
    """A transfer that is done when the bytes were copied and the modelled time has passed."""

    def __init__(self, meters: Meters, lane: Lane, task: Task, clock: Clock, end: float) -> None:
        super().__init__(meters)
        self._lane, self._task, self._clock, self._end = lane, task, clock, end

    @property
    def done(self) -> bool:
        return self._task.done and time.perf_counter() >= self._end

    def _finish(self) -> None:
        entered = time.perf_counter()
        self._lane.wait(self._task)
        self._clock.sleep_until(self._end, entered, self._task.ended)


class EmulatedLink(LocalLink):
    """Local copies that take at least the time of the modelled link. The bytes are really copied; if memory is slower
    than the modelled link, a transfer takes the time of the copy."""

    emulated = True

    def __init__(self, speed: Speed, debug: bool = False) -> None:
        super().__init__(debug)
        self.speed = speed
        self.label = f"emulated {speed.name}"
        self._clock = Clock(speed)

    def _start(self, copies: Sequence[Copy], direction: Direction, size: int, urgent: bool) -> Transfer:
        end = self._clock.book(direction, size)
        lane, task = self._enqueue(copies, direction, urgent)
        return EmulatedTransfer(self.meters, lane, task, self._clock, end)
