"""How long work takes, on the host and on a GPU. Marks are set while the work runs and are read afterwards.

A GPU works through a queue and runs behind the program that fills the queue. To read the time at once, the program
would have to wait for the GPU, and that wait would take longer than much of the work that is timed. Therefore
:meth:`Clock.mark` puts an event into the queue, and the seconds between two events are read after the run, when
somebody asks for a sum.
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

SAMPLED = 8  # where timing the phases costs time itself, they are timed in one of this many steps
PREFIX = "pqbench::"  # begins the names of spans in the record of a profiler
_OPEN = 64  # once more spans than this wait to be read, those that the device has passed are read

Mark = Any  # only the clock that made a mark can read it


class Event(Protocol):
    """A point in the queue of a device. The methods are those of :class:`torch.cuda.Event` that pqbench uses."""

    def record(self, stream: Any) -> None:
        """Put the event behind everything that is in the stream so far."""

    def query(self) -> bool:
        """Whether the device has passed the event."""

    def synchronize(self) -> None:
        """Return when the device has passed the event."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds to a later event; the device must have passed both."""


class Streams(Protocol):
    """A device that works through queues ("streams"): :class:`CudaStreams`, or a stand-in with which tests check the
    order of queued work on a machine without a GPU."""

    def event(self, timed: bool) -> Event:
        """A new event. One that is not ``timed`` only orders the work of streams."""

    def current(self, device: torch.device) -> Any:
        """The stream that receives the calling thread's work on the device."""

    def side(self, device: torch.device) -> Any:
        """Another stream of the device."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Inside this context the calling thread's work goes to ``stream``."""

    def lend(self, rows: Tensor, stream: Any) -> None:
        """Tell the allocator that work queued on ``stream`` uses ``rows``: their memory is not used again before that
        work is done."""

    def alive(self) -> bool:
        """Whether the device still answers after an error. Waits for it."""


class CudaStreams:
    """The streams of CUDA."""

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
        call fails with that error. Running out of memory does not end the context."""
        if not torch.cuda.is_initialized():
            return True
        try:
            for number in range(torch.cuda.device_count()):
                torch.cuda.synchronize(number)
        except RuntimeError:  # torch.AcceleratorError is a subclass
            return False
        return True


class Clock(ABC):
    """Sets marks and measures the seconds between two of them.

    Attributes:
        every: the phases of one in this many steps are timed, see :meth:`samples`.
    """

    every: int = 1

    @abstractmethod
    def mark(self) -> Mark:
        """Mark the end of the work that is queued so far."""

    @abstractmethod
    def passed(self, mark: Mark) -> bool:
        """Whether :meth:`seconds` up to this mark would answer without waiting."""

    @abstractmethod
    def seconds(self, first: Mark, last: Mark) -> float:
        """Seconds between two marks. Waits for the device. Both marks may be used again afterwards, so they must not be
        read a second time."""

    def spans(self, name: str, listed: bool = False) -> Spans:
        """A timer for one part of the work, see :class:`Spans`. Only a :class:`NamedClock` uses the name."""
        return Spans(self, listed)

    def samples(self, step: int) -> bool:
        """Whether the phases of the step with this number, counted from 0, are timed. These are the second step and
        every ``every``-th step after it. The first step is not typical, because it prepares what later steps find
        ready. With ``every`` 1 all steps are timed."""
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

    Recording an event takes the host a few microseconds, and a step whose phases are timed records ten in each layer.
    That is why the phases of only one step out of :data:`SAMPLED` are timed.
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
    """Measures the seconds spent inside ``with spans: ...``. It may be entered any number of times, but not while it is
    already entered.

    Only a few marks wait to be read at any time, however many spans there are.
    """

    def __init__(self, clock: Clock, listed: bool = False) -> None:
        """With ``listed`` the seconds of every span are kept, otherwise only their sum."""
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
        """Seconds of every span so far; empty unless ``listed``. Waits for the device."""
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
    """Wraps another clock and gives its spans names in the record of a torch profiler. The phases of every step are
    timed."""

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
    """Spans that a torch profiler records under :data:`PREFIX` followed by their name."""

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
    """The streams of a device, or the ``given`` ones if there are any. None for a device without streams."""
    return CudaStreams() if given is None and device.type == "cuda" else given


def clock_of(device: torch.device, streams: Streams | None = None, every: int = SAMPLED, named: bool = False) -> Clock:
    """The clock of a device with these streams, see :func:`streams_of`; ``named`` for a run under a torch profiler."""
    clock = HostClock() if streams is None else EventClock(streams, device, every)
    return NamedClock(clock) if named else clock
