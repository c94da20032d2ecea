"""How long things take, on the host and on a GPU that works through a queue: marks are set now and read later.

A GPU runs behind the program that feeds it. To read a clock it would have to be waited for, and that alone would cost
more than many of the things that are timed. So :meth:`Clock.mark` puts an event into the queue, and the seconds between
two events are read when somebody asks for a sum, after the run.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import record_function

SAMPLED = 8  # a step in so many has the times of its phases taken where that costs time itself
PREFIX = "pqbench::"  # of the names of spans in the record of a profiler
_OPEN = 64  # spans that wait to be read before those that the device has passed are

Mark = Any  # what a clock gave; only that clock can read it


class Event(Protocol):
    """A point in the queue of a device: the part of :class:`torch.cuda.Event` that is used."""

    def record(self, stream: Any) -> None:
        """Put it behind everything in the stream so far."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Return when the device has passed it."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds to a later event; the device must have passed both."""


class Streams(Protocol):
    """What is asked of a device that works through queues ("streams"). :class:`CudaStreams`, or a stand-in that shows
    on a machine without a GPU in which order things are queued."""

    def event(self, timed: bool) -> Event:
        """A new event; one that is not ``timed`` only orders streams."""

    def current(self, device: torch.device) -> Any:
        """The stream that the calling thread's work on the device goes to."""

    def side(self, device: torch.device) -> Any:
        """Another stream of the device."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """The calling thread's work goes to ``stream`` inside."""

    def lend(self, rows: Tensor, stream: Any) -> None:
        """Work queued on ``stream`` uses ``rows`` too: their memory must not be given to anybody before it is done."""

    def alive(self) -> bool:
        """Whether the device still answers after an error. Waits for it."""


class CudaStreams:
    """Those of CUDA."""

    def event(self, timed: bool) -> Event:
        """See :class:`Streams`."""
        event: Event = torch.cuda.Event(enable_timing=timed)
        return event

    def current(self, device: torch.device) -> Any:
        """See :class:`Streams`."""
        return torch.cuda.current_stream(device)

    def side(self, device: torch.device) -> Any:
        """See :class:`Streams`."""
        return torch.cuda.Stream(device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """See :class:`Streams`. Also makes the stream's device the current one."""
        return torch.cuda.stream(stream)

    def lend(self, rows: Tensor, stream: Any) -> None:
        """See :class:`Streams`."""
        rows.record_stream(stream)

    def alive(self) -> bool:
        """See :class:`Streams`. An error such as an illegal access ends the process's CUDA context: from then on every
        call answers with that error. Running out of memory does not."""
        if not torch.cuda.is_initialized():
            return True
        try:
            for number in range(torch.cuda.device_count()):
                torch.cuda.synchronize(number)
        except RuntimeError:  # of which torch.AcceleratorError is a kind
            return False
        return True


class Clock(ABC):
    """Sets marks, and tells the seconds between two of them.

    Attributes:
        every: the phases of one step in so many are timed, see :meth:`samples`.
    """

    every: int = 1

    @abstractmethod
    def mark(self) -> Mark:
        """This point of the work queued so far."""

    @abstractmethod
    def passed(self, mark: Mark) -> bool:
        """Whether :meth:`seconds` up to this mark would answer at once."""

    @abstractmethod
    def seconds(self, first: Mark, last: Mark) -> float:
        """Seconds between two marks. Waits for the device, and takes both marks back."""

    def spans(self, name: str, listed: bool = False) -> Spans:
        """The seconds of one part of the work, see :class:`Spans`. The name is for clocks that show it to somebody."""
        return Spans(self, listed)

    def samples(self, step: int) -> bool:
        """Whether the phases of the step with this number, from 0, are timed: the second one and every further
        ``every``-th. The first is unlike the others, since it fills what later ones find there."""
        return step % self.every == min(1, self.every - 1)


class HostClock(Clock):
    """Wall clock of the host."""

    def mark(self) -> Mark:
        return time.perf_counter()

    def passed(self, mark: Mark) -> bool:
        return True

    def seconds(self, first: Mark, last: Mark) -> float:
        return float(last - first)


class EventClock(Clock):
    """Time of one device: a mark is an event in the calling thread's current stream there.

    To record an event takes the host a few microseconds, and a step with phases has ten in each layer: that is why only
    a step in :data:`SAMPLED` has them.
    """

    def __init__(self, streams: Streams, device: torch.device, every: int = SAMPLED) -> None:
        self.every = every
        self._streams, self._device = streams, device
        self._spare: list[Event] = []

    def mark(self) -> Mark:
        event = self._spare.pop() if self._spare else self._streams.event(timed=True)
        event.record(self._streams.current(self._device))
        return event

    def passed(self, mark: Mark) -> bool:
        return bool(mark.query())

    def seconds(self, first: Mark, last: Mark) -> float:
        last.synchronize()
        milliseconds = float(first.elapsed_time(last))
        self._spare += [first, last]
        return milliseconds / 1e3


class Spans(AbstractContextManager[None]):
    """The seconds spent inside: ``with spans: ...``, any number of times, but not within each other.

    Few marks wait to be read at any time, however many spans there are.
    """

    def __init__(self, clock: Clock, listed: bool = False) -> None:
        """With ``listed`` every span is kept, else their sum alone."""
        self._clock, self._listed = clock, listed
        self._open: deque[tuple[Mark, Mark]] = deque()
        self._began: Mark = None
        self._each: list[float] = []
        self._total = 0.0

    def __enter__(self) -> None:
        self._began = self._clock.mark()

    def __exit__(self, *error: object) -> None:
        self._open.append((self._began, self._clock.mark()))
        while len(self._open) > _OPEN and self._clock.passed(self._open[0][1]):
            self._read()

    @property
    def each(self) -> list[float]:
        """Seconds of every span so far, where they are listed. Waits for the device."""
        self._settle()
        return list(self._each)

    @property
    def total(self) -> float:
        """Seconds of all spans so far. Waits for the device."""
        self._settle()
        return self._total

    def _settle(self) -> None:
        while self._open:
            self._read()

    def _read(self) -> None:
        seconds = self._clock.seconds(*self._open.popleft())
        self._total += seconds
        if self._listed:
            self._each.append(seconds)


class NamedClock(Clock):
    """Another clock, whose spans bear their names in what a torch profiler records. Every step has its phases."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def mark(self) -> Mark:
        return self._clock.mark()

    def passed(self, mark: Mark) -> bool:
        return self._clock.passed(mark)

    def seconds(self, first: Mark, last: Mark) -> float:
        return self._clock.seconds(first, last)

    def spans(self, name: str, listed: bool = False) -> Spans:
        return NamedSpans(name, self, listed)


class NamedSpans(Spans):
    """Spans that a torch profiler records as :data:`PREFIX` and their name."""

    def __init__(self, name: str, clock: Clock, listed: bool) -> None:
        super().__init__(clock, listed)
        self._name = PREFIX + name
        self._entered: record_function | None = None

    def __enter__(self) -> None:
        self._entered = record_function(self._name)
        self._entered.__enter__()
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._entered is not None:
            self._entered.__exit__(None, None, None)


def streams_of(device: torch.device, given: Streams | None = None) -> Streams | None:
    """The streams of a device, None where it has none; ``given`` ones instead if there are any."""
    return CudaStreams() if given is None and device.type == "cuda" else given


def clock_of(device: torch.device, streams: Streams | None = None, every: int = SAMPLED, named: bool = False) -> Clock:
    """The clock of a device whose streams are :func:`streams_of` it; ``named`` for a run under a torch profiler."""
    clock = HostClock() if streams is None else EventClock(streams, device, every)
    return NamedClock(clock) if named else clock
