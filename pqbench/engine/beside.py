"""Where an index is built while the next layers of the prompt compute: on idle cores, or on a stream of the GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from pqbench.engine.clock import Event, Streams
from pqbench.kernels.backend import Kernels
from pqbench.kernels.threads import stay_alone, usable_cores

T = TypeVar("T")
_Result = TypeVar("_Result", covariant=True)


class Pending(Protocol[_Result]):
    """Work under way; a :class:`concurrent.futures.Future` is one."""

    def result(self) -> _Result:
        """What the work returned, ready for the caller's own work. Raises what the work raised."""


class Beside(ABC):
    """A place where work runs beside the prefill."""

    @abstractmethod
    def submit(self, work: Callable[[], T], device: torch.device, uses: Iterable[Tensor]) -> Pending[T]:
        """Start work on a device. It reads the tensors ``uses``, which the caller's own work has made so far."""

    def close(self) -> None:  # noqa: B027 - a stream needs no end
        """End the threads that were started for it."""


class IdleCores(Beside):
    """One background thread, which uses the cores that a model on the CPU leaves idle."""

    def __init__(self, cores: int, backend: Kernels) -> None:
        def begin() -> None:
            backend.use_threads(cores)
            stay_alone()

        self._thread = ThreadPoolExecutor(1, "index", initializer=begin)

    @classmethod
    def of(cls, backend: Kernels) -> IdleCores | None:
        """None where the model leaves no core idle. A team of threads is as slow as its slowest thread, so that work on
        the same cores would slow the prefill by more than the work takes afterwards."""
        cores = usable_cores() - torch.get_num_threads()
        return cls(cores, backend) if cores > 0 else None

    def submit(self, work: Callable[[], T], device: torch.device, uses: Iterable[Tensor]) -> Pending[T]:
        return self._thread.submit(work)

    def close(self) -> None:
        self._thread.shutdown()


class SideStream(Beside):
    """A second stream of the device. The calling thread queues the work there and goes on at once with the next layer,
    so that the device does both side by side.

    The work is queued by the caller's own thread. That keeps memory safe without counting who uses which tensor,
    because the allocator gives a freed block to the next work of the stream for which the block was allocated, and
    knows nothing of other streams:

    - What the work reads was allocated for the caller's stream. It may be freed as soon as the work is queued (an index
      lets go of what it learnt during prefill), so it is lent to the side stream, for which the allocator then waits.
    - What the work leaves behind was allocated for the side stream and is later read by the caller's. When it is freed,
      its block goes to the next work that is submitted here, and this begins by waiting for all that the caller has
      queued until then, the last reader included. With a second thread this order would not hold.

    The caller's stream reads the result after an event (:meth:`Ordered.result`), and no thread waits.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._sides: dict[torch.device, Any] = {}

    def submit(self, work: Callable[[], T], device: torch.device, uses: Iterable[Tensor]) -> Pending[T]:
        """See the base class. An error is kept until somebody asks for the result, as in a thread."""
        if device not in self._sides:
            self._sides[device] = self._streams.side(device)
        side, began, done = self._sides[device], self._streams.event(timed=False), self._streams.event(timed=False)
        began.record(self._streams.current(device))
        side.wait_event(began)
        for rows in uses:
            self._streams.lend(rows, side)
        outcome: Future[T] = Future()
        with self._streams.on(side):
            try:
                outcome.set_result(work())
            except Exception as error:  # noqa: BLE001 - kept for every later caller
                outcome.set_exception(error)
            done.record(side)
        return Ordered(outcome, done, self._streams, device)


class Ordered(Pending[T]):
    """The outcome of work on a side stream."""

    def __init__(self, outcome: Future[T], done: Event, streams: Streams, device: torch.device) -> None:
        self._outcome, self._done, self._streams, self._device = outcome, done, streams, device

    def result(self) -> T:
        """What the work returned. Everything that the caller queues from now on runs after the work."""
        self._streams.current(self._device).wait_event(self._done)
        return self._outcome.result()


class Finished(Pending[T]):
    """Work that the calling thread has done by itself."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._outcome: Future[T] = Future()
        try:
            self._outcome.set_result(work())
        except Exception as error:  # noqa: BLE001 - kept for every later caller
            self._outcome.set_exception(error)

    def result(self) -> T:
        """What the work returned. Raises what the work raised, every time."""
        return self._outcome.result()


def tensors_of(thing: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that an object, its attributes and their parts hold. Each tensor comes once."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    if isinstance(thing, Mapping):
        parts = list(thing.values())
    elif isinstance(thing, list | tuple):
        parts = list(thing)
    else:
        parts = list(getattr(thing, "__dict__", {}).values())
    for part in parts:
        yield from tensors_of(part, seen)
