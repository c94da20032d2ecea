"""The link between host memory and the accelerator: its interface, and a debug mode that detects ordering errors.

Transfers are asynchronous. Until :meth:`Transfer.wait` has returned, the target must not be read and the source must
not be overwritten. Transfers in one direction run in the order in which they were submitted; transfers in different
directions are ordered only by waits.
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
    """A buffer was used while a transfer on it was running, or a transfer was never waited for."""


class Direction(Enum):
    """Direction of a transfer."""

    TO_HOST = "to host"
    TO_DEVICE = "to device"


@dataclass(frozen=True)
class Copy:
    """Copies ``source`` into ``target`` of the same shape, with any strides. With ``rows`` ``[B, H, n]``, copies these
    rows of a source ``[B, H, S, ...]`` into a target ``[B, H, n, ...]``."""

    source: Tensor
    target: Tensor
    rows: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes moved."""
        return self.target.numel() * self.target.element_size()

    def read(self) -> Tensor:
        """The tensor that the target will hold."""
        return self.source if self.rows is None else gather_rows(self.source, self.rows.to(self.source.device))

    def run(self) -> None:
        """Copy in the calling thread; both tensors are in host memory."""
        if self.rows is None or not (self.source.is_contiguous() and self.target.is_contiguous()):
            self.target.copy_(self.read())
            return
        heads, size = self.source.shape[0] * self.source.shape[1], self.source.shape[2]
        rows = self.rows.flatten(0, 1)
        if heads > 1:
            rows = rows + torch.arange(0, heads * size, size)[:, None]
        # Writes rows directly to the target, without an intermediate tensor.
        torch.index_select(self.source.flatten(0, 2), 0, rows.flatten(), out=self.target.flatten(0, 2))


class Meters:
    """Sums over the lifetime of a link, usable from any thread.

    Attributes:
        bytes: bytes moved in each direction.
        seconds_waited: seconds that callers were blocked in waits.
    """

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
        """Count a transfer of ``size`` bytes."""
        with self._lock:
            self.bytes[direction] += size

    def waited(self, seconds: float) -> None:
        """Count a wait of ``seconds``."""
        with self._lock:
            self.seconds_waited += seconds


class Transfer(ABC):
    """A transfer that was started; errors call it by its ``name``."""

    name = "copy"

    def __init__(self, meters: Meters) -> None:
        self._meters = meters

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether :meth:`wait` would return at once."""

    def wait(self) -> None:
        """Return when the target may be read and the source overwritten. May be called several times.

        Raises:
            OrderingError: with ``debug``, a buffer was used too early.
        """
        began = time.perf_counter()
        self._finish()
        self._meters.waited(time.perf_counter() - began)

    def order(self) -> None:
        """Order all work that is queued on the device from now on after this transfer. The host does not wait if the
        device can; it may then use the buffers only after :meth:`wait`."""
        self.wait()

    @abstractmethod
    def _finish(self) -> None: ...


@dataclass(frozen=True)
class Arriving:
    """A tensor that a transfer brings to the device; implements :class:`pqbench.method.Arrival`."""

    transfer: Transfer
    rows: Tensor

    def wait(self) -> Tensor:
        """Wait for the transfer, and return the tensor."""
        self.transfer.wait()
        return self.rows


class Link(ABC):
    """Moves rows in both directions and counts their bytes. Use it as a context manager, or :meth:`close` it.

    With ``debug``, the target of a transfer is filled with NaN when the transfer is submitted, and receives its bytes
    in ``wait``, the latest moment that is allowed. Code that reads too early therefore always reads NaN. If the source
    changed or the target was written to before the wait, :class:`OrderingError` is raised.

    Attributes:
        label: name of the link in tables.
        emulated: whether transfers take the time of a modelled link.
        pinned: whether host buffers must be page-locked.
        direct: whether kernels of the device read and write rows in host memory directly. The caller that launches such
            a kernel calls :meth:`reads`, and passes host buffers that it no longer needs to :meth:`release`.
    """

    label: str = "?"
    emulated: bool = False
    pinned: bool = False
    direct: bool = False

    def __init__(self, debug: bool = False) -> None:
        self.debug = debug
        self.meters = Meters()
        self._unwaited: set[Transfer] = set()  # kept alive until they are waited for

    def to_host(self, source: Tensor, target: Tensor, name: str = "copy") -> Transfer:
        """Start to copy a device tensor to the host."""
        return self.submit([Copy(source, target)], Direction.TO_HOST, name)

    def to_device(self, source: Tensor, target: Tensor, name: str = "copy") -> Transfer:
        """Start to copy a host tensor to the device."""
        return self.submit([Copy(source, target)], Direction.TO_DEVICE, name)

    def gather(self, source: Tensor, indices: Tensor, target: Tensor, name: str = "gather") -> Transfer:
        """Start to copy rows ``indices`` ``[B, H, n]`` of a host tensor ``[B, H, S, ...]`` into a device buffer
        ``[B, H, n, ...]``."""
        return self.submit([Copy(source, target, indices)], Direction.TO_DEVICE, name)

    def submit(
        self, copies: Sequence[Copy], direction: Direction, name: str = "copy", *, urgent: bool = False
    ) -> Transfer:
        """Start several copies as one transfer, which errors call ``name``. ``urgent`` means that the caller will wait
        at once, so that the transfer need not run in the background."""
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
        read or write. The link does not count their bytes. With ``debug``, they run in the wait."""
        if self.debug:
            return DeferredTransfer(work, f"{name} {direction.value}", self._unwaited)
        return self._launch(work, direction, uses)

    def reads(self) -> None:  # noqa: B027 - only needed where kernels read host memory directly
        """Tell the link that kernels on the current stream read host buffers directly."""

    def release(self, buffers: Sequence[Tensor]) -> None:  # noqa: B027
        """Free host buffers after all kernels that were launched so far are done."""

    def close(self) -> None:
        """Close the link.

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
            self._unwaited.clear()  # the current error explains them
        self.close()

    @abstractmethod
    def _start(self, copies: Sequence[Copy], direction: Direction, size: int, urgent: bool) -> Transfer:
        """Start a transfer of ``size`` bytes. With ``debug``, ``copies`` is empty and the transfer only takes the
        time."""

    @abstractmethod
    def _launch(self, work: Callable[[], None], direction: Direction, uses: Sequence[Tensor]) -> Transfer:
        """Start a transfer that kernels of the caller do."""


class GuardedTransfer(Transfer):
    """A transfer that delivers its bytes in the wait, as late as allowed, and detects earlier use of its buffers."""

    def __init__(self, inner: Transfer, copies: Sequence[Copy], name: str, unwaited: set[Transfer]) -> None:
        super().__init__(Meters())  # the inner transfer counts
        self._inner, self._copies, self.name, self._unwaited = inner, copies, name, unwaited
        with torch.inference_mode():  # inference tensors may also be used outside of inference mode
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
    """Work that is done in the wait, as late as possible."""

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
    """Fill a tensor with NaN, or with the largest integer, and return it."""
    return rows.fill_(float("nan") if rows.is_floating_point() else torch.iinfo(rows.dtype).max)


def poisoned(rows: Tensor) -> bool:
    """Whether rows still hold what :func:`poison` wrote."""
    return bool((rows.isnan() if rows.is_floating_point() else rows == torch.iinfo(rows.dtype).max).all())


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits; NaN equals itself here."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
