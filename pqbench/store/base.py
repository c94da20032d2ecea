"""What every KV tier offers to a layer: rows to read, rows to add, rows to fetch, and the bytes that this takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pqbench.kernels.number import Number
from pqbench.method import Arrival


@dataclass(frozen=True)
class Present:
    """An :class:`pqbench.method.Arrival` that has already arrived."""

    rows: Tensor

    def wait(self) -> Tensor:
        """The tensor."""
        return self.rows


@dataclass
class Extent:
    """How far a store reaches; the parts of one store share it.

    Attributes:
        length: rows held.
        seen: tokens appended so far, dropped ones included.
        number: in a captured step, an int32 tensor with one element on the device: the tokens held before the write.
            None otherwise.
    """

    length: int
    seen: int
    number: Tensor | None = None


class Usage:
    """Bytes of one store: what it holds, what it has moved over a link, and how many bytes of keys a method has read.

    Sums over what a device has done may wait for the device when they are asked for.

    Attributes:
        opening_bytes: bytes moved to the device once, for the index and for the rows that the device holds from the
            start. They are no traffic of decoding.
        key_bytes_read: bytes of the keys that were read through the :class:`pqbench.method.KV` interface so far. They
            follow from shapes alone, so that counting them neither waits for the device nor launches anything.
    """

    def __init__(self) -> None:
        self.opening_bytes = 0
        self.key_bytes_read = 0

    @property
    def bytes_to_device(self) -> int:
        """Bytes that decoding has moved from the host to the device."""
        return 0

    @property
    def bytes_to_host(self) -> int:
        """Bytes that decoding has moved from the device to the host."""
        return 0

    @property
    def bytes_admitted(self) -> int:
        """Bytes of the blocks that a cache has let in; they are part of :attr:`bytes_to_device`."""
        return 0

    @property
    def cache_lookups(self) -> int:
        """With a cache, rows that were asked for and that neither sinks nor window held, over all heads."""
        return 0

    @property
    def cache_hits(self) -> int:
        """Those of the :attr:`cache_lookups` that the cache held."""
        return 0

    @property
    def link_bytes(self) -> int:
        """Bytes moved between host and device so far, both ways."""
        return self.bytes_to_device + self.bytes_to_host

    @property
    def device_bytes(self) -> int:
        """Bytes of keys and values on the accelerator."""
        return 0

    @property
    def host_bytes(self) -> int:
        """Bytes of keys and values in host memory."""
        return 0

    def open(self) -> None:
        """The index is built: bytes moved so far are counted as opening bytes from now on."""


class Writer(ABC):
    """Adds rows to a store, in three parts, of which the middle one can be captured in a CUDA graph."""

    def __init__(self, extent: Extent) -> None:
        self.extent = extent

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows ``[B, H, n, D]``."""
        self.prepare(keys.shape[2])
        self.write(keys, values)
        self.written(keys.shape[2])

    @abstractmethod
    def prepare(self, count: int) -> None:
        """Before ``count`` rows are written: make room for them, and wait for whatever still reads that room."""

    @abstractmethod
    def write(self, keys: Tensor, values: Tensor) -> None:
        """Write rows ``[B, H, n, D]`` behind those held. This is work of the device alone.

        The first row gets the number :attr:`Extent.length`. Where :attr:`Extent.number` is set, it gets the number
        that this tensor holds when the work is done. A graph is captured with such a number, and it is replayed between
        :meth:`prepare` and :meth:`written`.
        """

    @abstractmethod
    def written(self, count: int) -> None:
        """Count the ``count`` rows that were written, and start the work that is due from time to time."""

    @abstractmethod
    def reserve(self, rows: int) -> None:
        """Have room for ``rows`` rows in all, so that no buffer moves before there are more."""

    @property
    @abstractmethod
    def fixed(self) -> list[Tensor]:
        """Buffers that must not move while a captured step reads and writes them."""


class Reading(ABC):
    """The part of a store that a method reads; satisfies :class:`pqbench.method.KV`.

    Attributes:
        device: where queries and fetched rows are.
        usage: counts the bytes of the keys that are read here.
    """

    def __init__(self, extent: Extent, device: torch.device, usage: Usage) -> None:
        self.extent, self.device, self.usage = extent, device, usage

    @property
    def length(self) -> int:
        """Rows held."""
        return self.extent.length

    @property
    def seen(self) -> int:
        """Tokens appended so far, dropped ones included."""
        return self.extent.seen

    @property
    @abstractmethod
    def positions(self) -> Tensor:
        """Position of every row, int64 ``[B, H, length]``."""

    @abstractmethod
    def keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Keys of rows ``start`` to ``stop``, ``[B, H, n, D]``."""

    @abstractmethod
    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Values of rows ``start`` to ``stop``, ``[B, H, n, D]``."""

    @abstractmethod
    def keys_at(self, rows: Tensor) -> Tensor:
        """Keys of rows ``[B, H, n]`` on the device, ``[B, H, n, D]``. Rows that are not there cross the link, as for
        :meth:`Store.fetch`."""

    def stored_keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Keys of rows ``start`` to ``stop`` where they lie, ``[B, H, n, D]``; nothing is moved."""
        return self.keys(start, stop)

    def bring(self, rows: Tensor) -> Arrival:
        """Ask for a tensor in host memory. It crosses the link, if there is one, while the caller goes on."""
        return Present(rows.to(self.device, non_blocking=True))  # page-locked memory is not waited for

    def fetch_ahead(self, rows: Tensor, count: Number) -> None:  # noqa: B027 - rows are on the device anyway
        """See :meth:`pqbench.method.KV.fetch_ahead`. This orders nothing but the current stream; the step's
        :meth:`Store.fetch` must come after it."""

    def _read(self, keys: Tensor) -> Tensor:
        """Count the bytes of keys that a method reads, and pass them on."""
        self.usage.key_bytes_read += keys.nbytes
        return keys


class Store(Reading):
    """Keys and values of one layer for sequences of equal length.

    Attributes:
        writer: adds rows.
    """

    def __init__(self, extent: Extent, device: torch.device, usage: Usage, writer: Writer) -> None:
        super().__init__(extent, device, usage)
        self.writer = writer

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows ``[B, H, n, D]``."""
        self.writer.append(keys, values)

    @abstractmethod
    def fetch(
        self, indices: Tensor | None, count: Number | None = None, anew: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Bring rows to the device.

        Args:
            indices: the rows ``[B, H, n]``; None for all.
            count: only the first ``count`` of the n rows are needed; None for all.
            anew: bool ``[B, H]``; heads that are not set here ask for the rows that :meth:`fetch_ahead` was given.

        Returns:
            keys and values ``[B, H, R, D]`` on the device, and which of these R rows are the ones that were asked for,
            in that order: ``[B, H, n]``. None stands for all R rows; where :attr:`Extent.number` is set, R is the room
            there is and None stands for as many as are held. All are valid until the next call.
        """

    @abstractmethod
    def keep(self, indices: Tensor) -> Store:
        """A store on the device that holds only rows ``[B, H, n]``, in that order, for a method that evicts."""

    @abstractmethod
    def arrange(self, indices: Tensor) -> Store:
        """The same rows in the order of ``indices`` ``[B, H, length]``, each once, on the same tier. Possible only
        before the first append; new tokens follow behind. Rows that are asked for together can so lie side by side."""

    def after_prefill(self, rows: Tensor | None, evicts: bool) -> Store:
        """The store that a method decodes with, after it has built its index and answered ``rows``: only those rows if
        it evicts, otherwise all rows in that order; see :meth:`pqbench.method.LayerState.finish_prefill`."""
        if rows is None:
            return self
        if not evicts and rows.shape[2] != self.length:
            raise RuntimeError(f"a method answered {rows.shape[2]} of {self.length} rows: return all, or set evicts")
        return self.keep(rows) if evicts else self.arrange(rows)

    def separate(self) -> None:
        """Stop sharing memory that another store of the same prompt may write to, so that both go on side by side."""

    def settle(self) -> None:
        """Wait for every transfer under way."""

    def drop(self, indices: Tensor) -> None:
        """Remove rows ``[B, H, e]``; see :func:`pqbench.kernels.buffers.swap_remove` for the order of the others.

        Raises:
            RuntimeError: the rows cannot be removed in place.
        """
        raise RuntimeError("drop() on the host tier: what an evicting method keeps lies on the device, see keep()")
