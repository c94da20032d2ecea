"""The link between host memory and the accelerator: what can be asked of it, and how ordering errors become visible.

Transfers are asynchronous. Until :meth:`Transfer.wait` has returned, the target holds nothing that may be read and the
source may not be overwritten. Transfers in one direction run in the order in which they were submitted; between the two
directions there is no order but that of waits.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from pqbench.kernels.buffers import gather_rows


class OrderingError(RuntimeError):
    """A buffer was touched while a transfer on it was under way, or a transfer was never waited for."""


class Direction(Enum):
    """Which way bytes go."""

    TO_HOST = "to host"
    TO_DEVICE = "to device"


@dataclass(frozen=True)
class Copy:
    """Copies ``source`` into ``target`` of the same shape, with any strides. With ``rows`` ``[B, H, n]``, those
    rows of a source ``[B, H, S, ...]`` go into a target ``[B, H, n, ...]``."""

    source: Tensor
    target: Tensor
    rows: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes moved."""
        return self.target.numel() * self.target.element_size()

    def read(self) -> Tensor:
        """The bytes that the target will hold."""
        return self.source if self.rows is None else gather_rows(self.source, self.rows.to(self.source.device))

    def run(self) -> None:
        """Move the bytes in the calling thread; both tensors lie in host memory."""
        if self.rows is None or not (self.source.is_contiguous() and self.target.is_contiguous()):
            self.target.copy_(self.read())
            return
        heads, size = self.source.shape[0] * self.source.shape[1], self.source.shape[2]
        rows = self.rows.flatten(0, 1)
        if heads > 1:
            rows = rows + torch.arange(0, heads * size, size)[:, None]
        # One pass: rows go straight to where they belong.
        torch.index_select(self.source.flatten(0, 2), 0, rows.flatten(), out=self.target.flatten(0, 2))


class Meters:
    """Sums over a link's life, from any thread; ``seconds_waited`` is the time callers were blocked in waits."""

    def __init__(self) -> None:
        self.bytes = dict.fromkeys(Direction, 0)
        self.seconds_waited = 0.0
        self._lock = threading.Lock()

    @property
    def to_host(self) -> int:
        """Bytes moved from the device so far."""
        return self.bytes[Direction.TO_HOST]

    @property
    def to_device(self) -> int:
        """Bytes moved to the device so far."""
        return self.bytes[Direction.TO_DEVICE]

    def count(self, size: int, direction: Direction) -> None:
        """Add a transfer of ``size`` bytes."""
        with self._lock:
            self.bytes[direction] += size

    def waited(self, seconds: float) -> None:
        """Add a wait."""
        with self._lock:
            self.seconds_waited += seconds


class Transfer(ABC):
    """Bytes under way; ``name`` is what an error calls it."""

    name = "copy"

    def __init__(self, meters: Meters) -> None:
        self._meters = meters

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether a wait would return at once."""

    def wait(self) -> None:
        """Return when the target may be read and the source overwritten; any number of times.

        Raises:
            OrderingError: with ``debug``, a buffer was touched too early.
        """
        began = time.perf_counter()
        self._finish()
        self._meters.waited(time.perf_counter() - began)

    def order(self) -> None:
        """Have what is queued on the device from now on come after this transfer, without waiting for it where the
        device itself can; the host may not yet touch what :meth:`wait` speaks of."""
        self.wait()

    @abstractmethod
    def _finish(self) -> None: ...


@dataclass(frozen=True)
class Arriving:
    """A tensor on its way: satisfies :class:`pqbench.method.Arrival`."""

    transfer: Transfer
    rows: Tensor

    def wait(self) -> Tensor:
        """The tensor, complete."""
        self.transfer.wait()
        return self.rows


class Link(ABC):
    """Moves rows both ways and counts the bytes. Use as a context manager, or :meth:`close` it.

    With ``debug`` a target is filled with NaN when a transfer is submitted and receives its bytes in ``wait``, the
    latest moment an honest link may take; a source that changed in between, or a target somebody wrote to, raises
    :class:`OrderingError`. Reading too early thus reads NaN, every time.

    Attributes:
        label: for tables.
        emulated: whether time on this link is a model's.
        pinned: whether host buffers must be page-locked.
        direct: whether kernels of the device read and write rows in host memory themselves. Whoever launches one calls
            :meth:`reads`, and hands host buffers that it is done with to :meth:`release`.
    """

    label: str = "?"
    emulated: bool = False
    pinned: bool = False
    direct: bool = False

    def __init__(self, debug: bool = False) -> None:
        self.debug = debug
        self.meters = Meters()
        self._unwaited: set[Transfer] = set()  # kept alive until somebody waits for them

    def to_host(self, source: Tensor, target: Tensor, name: str = "copy") -> Transfer:
        """Start copying a device tensor to the host."""
        return self.submit([Copy(source, target)], Direction.TO_HOST, name)

    def to_device(self, source: Tensor, target: Tensor, name: str = "copy") -> Transfer:
        """Start copying a host tensor to the device."""
        return self.submit([Copy(source, target)], Direction.TO_DEVICE, name)

    def gather(self, source: Tensor, indices: Tensor, target: Tensor, name: str = "gather") -> Transfer:
        """Start bringing rows ``indices`` ``[B, H, n]`` of a host tensor ``[B, H, S, ...]`` into a device buffer
        ``[B, H, n, ...]``."""
        return self.submit([Copy(source, target, indices)], Direction.TO_DEVICE, name)

    def submit(
        self, copies: Sequence[Copy], direction: Direction, name: str = "copy", *, urgent: bool = False
    ) -> Transfer:
        """Start several copies as one transfer; ``name`` is what an error calls it. ``urgent`` says that the caller
        waits right away, so that nothing is done to run beside it."""
        size = sum(copy.nbytes for copy in copies)
        self.meters.count(size, direction)
        if not self.debug:
            return self._start(copies, direction, size, urgent)
        inner = self._start([], direction, size, urgent)
        return GuardedTransfer(inner, copies, f"{name} {direction.value}", self._unwaited)

    def launch(
        self, work: Callable[[], None], direction: Direction, name: str = "copy", uses: Sequence[Tensor] = ()
    ) -> Transfer:
        """Run kernels of the caller as a transfer, beside the work that follows. ``uses`` are the tensors that they
        read or write. This link does not count their bytes. With ``debug`` the work is done in the wait."""
        if self.debug:
            return DeferredTransfer(work, f"{name} {direction.value}", self._unwaited)
        return self._launch(work, direction, uses)

    def reads(self) -> None:  # noqa: B027 - without a device that reads by itself, nothing is under way unnoticed
        """Kernels on the current stream read host buffers by themselves."""

    def release(self, buffers: Sequence[Tensor]) -> None:  # noqa: B027
        """Let go of host buffers once all kernels have read them that were launched so far."""

    def close(self) -> None:
        """End the link.

        Raises:
            OrderingError: with ``debug``, transfers were submitted and never waited for.
        """
        if self._unwaited:
            names = ", ".join(sorted({transfer.name for transfer in self._unwaited}))
            count = len(self._unwaited)
            self._unwaited.clear()
            raise OrderingError(f"{count} transfers were never waited for: {names}")

    def __enter__(self) -> Link:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._unwaited.clear()  # the error under way explains them
        self.close()

    @abstractmethod
    def _start(self, copies: Sequence[Copy], direction: Direction, size: int, urgent: bool) -> Transfer:
        """Begin to move ``size`` bytes. With debug there are no copies to make here; the transfer only takes its
        time."""

    @abstractmethod
    def _launch(self, work: Callable[[], None], direction: Direction, uses: Sequence[Tensor]) -> Transfer:
        """Begin a transfer that kernels do."""


class GuardedTransfer(Transfer):
    """A transfer that delivers as late as it may and notices who touched its buffers before."""

    def __init__(self, inner: Transfer, copies: Sequence[Copy], name: str, unwaited: set[Transfer]) -> None:
        super().__init__(Meters())  # the inner transfer counts
        self._inner, self._copies, self.name, self._unwaited = inner, copies, name, unwaited
        with torch.inference_mode():  # the tensors of a generation are inference tensors, and may be settled outside
            self._held = [copy.read().clone() for copy in copies]
            for copy in copies:
                poison(copy.target)
        unwaited.add(self)

    @property
    def done(self) -> bool:
        return not self._held

    @torch.inference_mode()
    def _finish(self) -> None:
        self._inner.wait()
        self._unwaited.discard(self)
        held, self._held = self._held, []
        for copy, value in zip(self._copies, held):  # noqa: B905 - empty once delivered
            if not same_bits(copy.read(), value):
                raise OrderingError(f"{self.name}: the source was overwritten before the transfer was waited for")
            if not poisoned(copy.target):
                raise OrderingError(f"{self.name}: the target was written to before the transfer was waited for")
            copy.target.copy_(value)


class DeferredTransfer(Transfer):
    """Work that is done only in the wait, which is as late as possible."""

    def __init__(self, work: Callable[[], None], name: str, unwaited: set[Transfer]) -> None:
        super().__init__(Meters())
        self._work: Callable[[], None] | None = work
        self.name, self._unwaited = name, unwaited
        unwaited.add(self)

    @property
    def done(self) -> bool:
        return self._work is None

    @torch.inference_mode()
    def _finish(self) -> None:
        self._unwaited.discard(self)
        work, self._work = self._work, None
        if work is not None:
            work()


def poison(rows: Tensor) -> Tensor:
    """Fill with NaN, or the largest integer, and return it."""
    return rows.fill_(float("nan") if rows.is_floating_point() else torch.iinfo(rows.dtype).max)


def poisoned(rows: Tensor) -> bool:
    """Whether rows still hold what :func:`poison` wrote."""
    return bool((rows.isnan() if rows.is_floating_point() else rows == torch.iinfo(rows.dtype).max).all())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits; NaN equals itself here."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
