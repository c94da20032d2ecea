"""Places where an index is built while the next layers are prefilled: idle CPU cores, or a second stream of the GPU."""

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
    """Work in progress. A :class:`concurrent.futures.Future` has this interface too."""

    def result(self) -> _Result:
        """What the work returned. Everything that the caller does next may use it. Raises the exception that the work
        raised."""


class Beside(ABC):
    """A place where work runs beside the prefill."""

    @abstractmethod
    def submit(self, work: Callable[[], T], device: torch.device, uses: Iterable[Tensor]) -> Pending[T]:
        """Start work on a device. ``uses`` are the tensors that the work reads; the caller has computed or queued all
        of them."""

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
        """None when the model leaves no core idle. A team of threads is as slow as its slowest thread. Building the
        index on the same cores would therefore slow the prefill by more time than building it afterwards takes."""
        cores = usable_cores() - torch.get_num_threads()
        return cls(cores, backend) if cores > 0 else None

    def submit(self, work: Callable[[], T], device: torch.device, uses: Iterable[Tensor]) -> Pending[T]:
        return self._thread.submit(work)

    def close(self) -> None:
        self._thread.shutdown()


class SideStream(Beside):
    """A second stream of the device. The calling thread queues the work there and continues at once with the next
    layer, so that the device does both at the same time.

    The work is queued by the caller's own thread. This keeps memory safe without tracking which stream uses which
    tensor. The allocator gives a freed block to the next work of the stream for which the block was allocated, and it
    does not know of other streams:

    - Tensors that the work reads were allocated for the caller's stream. They may be freed as soon as the work is
      queued (an index drops what it learnt during prefill). They are therefore lent to the side stream, and the
      allocator waits for that stream before it uses their memory again.
    - Tensors that the work returns were allocated for the side stream and are later read by the caller's stream. When
      such a tensor is freed, its block goes to the next work that is submitted here. That work first waits for
      everything that the caller has queued until then, the last reader included. With a second thread this order would
      not hold.

    The caller's stream waits for an event before it reads the result (:meth:`Ordered.result`). No thread waits.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._sides: dict[torch.device, Any] = {}

    def submit(self, work: Callable[[], T], device: torch.device, uses: Iterable[Tensor]) -> Pending[T]:
        """See the base class. As with a thread, an error is kept until somebody asks for the result."""
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
    """Work that the calling thread has already done."""

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
