"""What the store of every tier offers to a layer: reading, adding and fetching rows, and counting their bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pqbench.kernels.number import Number
from pqbench.method import Arrival


@dataclass(frozen=True)
class Present:
    """An :class:`pqbench.method.Arrival` whose tensor is on the device already."""

    rows: Tensor

    def wait(self) -> Tensor:
        """Return the tensor at once."""
        return self.rows


@dataclass
class Extent:
    """How far a store reaches; the parts of one store share it.

    Attributes:
        length: rows held.
        seen: tokens appended so far, dropped ones included.
        number: in a captured step, an int32 tensor with one element on the device, the number of tokens held before
            the write; None otherwise.
    """

    length: int
    seen: int
    number: Tensor | None = None


class Usage:
    """Bytes of one store: those that it holds, those that it moved over a link, and those of keys that a method read.

    Reading a sum that is counted on the device may wait for the device.

    Attributes:
        opening_bytes: bytes moved to the device once, for the index and for the rows that the device holds from the
            start. They do not count as traffic of decoding.
        key_bytes_read: bytes of the keys that were read through the :class:`pqbench.method.KV` interface so far. They
            are computed from shapes, so that counting them neither waits for the device nor launches a kernel.
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
        """Bytes of the blocks that entered the block cache; they are part of :attr:`bytes_to_device`."""
        return 0

    @property
    def cache_lookups(self) -> int:
        """Rows that were asked for and are neither sinks nor in the window, over all heads; 0 without a block cache."""
        return 0

    @property
    def cache_hits(self) -> int:
        """How many of the :attr:`cache_lookups` were found in the block cache."""
        return 0

    @property
    def link_bytes(self) -> int:
        """Bytes moved between host and device so far, in both directions."""
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
        """Called when the index is built: all bytes moved until then become opening bytes."""


class Writer(ABC):
    """Adds rows to a store in three parts: :meth:`prepare`, :meth:`write`, which can be captured in a CUDA graph, and
    :meth:`written`."""

    def __init__(self, extent: Extent) -> None:
        self.extent = extent

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows ``[B, H, n, D]``."""
        self.prepare(keys.shape[2])
        self.write(keys, values)
        self.written(keys.shape[2])

    @abstractmethod
    def prepare(self, count: int) -> None:
        """Before ``count`` rows are written: make room for them, and wait for transfers that still read that memory.

        Raises:
            RuntimeError: a younger store of the same prompt writes into the memory that both share.
        """

    @abstractmethod
    def write(self, keys: Tensor, values: Tensor) -> None:
        """Write rows ``[B, H, n, D]`` after the rows held. This only launches work on the device.

        The number of the first row is :attr:`Extent.length`. If :attr:`Extent.number` is set, the device reads the
        number from that tensor when it does the work. A graph is captured in this way and replayed between
        :meth:`prepare` and :meth:`written`.
        """

    @abstractmethod
    def written(self, count: int) -> None:
        """After ``count`` rows were written: count them, and start transfers of new rows when there are enough."""

    @abstractmethod
    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows in all, so that no buffer moves before there are more."""

    @property
    @abstractmethod
    def fixed(self) -> list[Tensor]:
        """Buffers that must not move while a captured step reads and writes them."""


class Reading(ABC):
    """The part of a store that a method reads; it implements :class:`pqbench.method.KV`.

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
        """Keys of rows ``[B, H, n]`` on the device, ``[B, H, n, D]``. Rows that are not on the device cross the link,
        as for :meth:`Store.fetch`."""

    def stored_keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Keys of rows ``start`` to ``stop`` where they are stored, ``[B, H, n, D]``; nothing is moved."""
        return self.keys(start, stop)

    def bring(self, rows: Tensor) -> Arrival:
        """Start to bring a tensor from host memory to the device; the caller does not wait."""
        return Present(rows.to(self.device, non_blocking=True))  # does not wait for page-locked memory

    def fetch_ahead(self, rows: Tensor, count: Number) -> None:  # noqa: B027 - rows are on the device anyway
        """See :meth:`pqbench.method.KV.fetch_ahead`. The work is queued on the current stream; the caller must order
        the step's :meth:`Store.fetch` after it."""

    def _read(self, keys: Tensor) -> Tensor:
        """Count the bytes of keys that a method reads, and return the keys."""
        self.usage.key_bytes_read += keys.nbytes
        return keys


class Store(Reading):
    """Keys and values of one layer for one cohort, whose sequences have equal length.

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
            anew: bool ``[B, H]``; all heads that are not set ask for the rows that were given to :meth:`fetch_ahead`.

        Returns:
            keys and values ``[B, H, R, D]`` on the device, and the places ``[B, H, n]`` of the rows that were asked for
            among the R rows, in the order of ``indices``; None means all R rows. If :attr:`Extent.number` is set, R is
            the capacity of the buffer, and None means the rows held. All tensors are valid until the next call.
        """

    @abstractmethod
    def keep(self, indices: Tensor) -> Store:
        """A store on the device that holds only rows ``[B, H, n]``, in that order, for an evicting method."""

    @abstractmethod
    def arrange(self, indices: Tensor) -> Store:
        """A store on the same tier with the same rows in the order of ``indices`` ``[B, H, length]``, each once, so
        that rows that are asked for together can be adjacent. Possible only before the first append; new tokens come
        after these rows."""

    def after_prefill(self, rows: Tensor | None, evicts: bool) -> Store:
        """The store that a method decodes with, where ``rows`` is what the method returned from
        :meth:`pqbench.method.LayerState.finish_prefill`: only these rows if it evicts, otherwise all in this order.

        Raises:
            RuntimeError: a method that does not evict returned some of the rows.
        """
        if rows is None:
            return self
        if not evicts and rows.shape[2] != self.length:
            raise RuntimeError(f"a method answered {rows.shape[2]} of {self.length} rows: return all, or set evicts")
        return self.keep(rows) if evicts else self.arrange(rows)

    def separate(self) -> None:
        """Stop sharing memory with other stores of the same prompt, so that several of them can add rows."""

    def settle(self) -> None:
        """Wait for all transfers of this store."""

    def drop(self, indices: Tensor) -> None:
        """Remove rows ``[B, H, e]``; see :func:`pqbench.kernels.buffers.swap_remove` for the order of the others.

        Raises:
            RuntimeError: the rows cannot be removed in place.
        """
        raise RuntimeError("drop() on the host tier: what an evicting method keeps lies on the device, see keep()")
