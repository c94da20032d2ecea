"""What every KV tier offers to a layer: append, fetch, drop, and meters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pqbench.kernels.backend import Number
from pqbench.kernels.buffers import gather_rows
from pqbench.method import Arrival


@dataclass(frozen=True)
class Present:
    """An :class:`pqbench.method.Arrival` that is there already."""

    rows: Tensor

    def wait(self) -> Tensor:
        """The tensor."""
        return self.rows


class Store(ABC):
    """Keys and values of one layer for sequences of equal length; satisfies :class:`pqbench.method.KV`."""

    opening_bytes: int = 0  # moved to the device once: for the index, and for the rows held from the start
    number: Tensor | None = None  # see :meth:`write`

    @property
    def bytes_to_device(self) -> int:
        """Bytes that decoding has moved over the link. Like the other sums, it may wait for a device that counts."""
        return 0

    @property
    def bytes_to_host(self) -> int:
        """The same in the other direction."""
        return 0

    @property
    def bytes_admitted(self) -> int:
        """Of those to the device, blocks that a cache let in."""
        return 0

    @property
    def cache_lookups(self) -> int:
        """Rows asked for that neither sinks nor window held, all heads together, where there is a cache."""
        return 0

    @property
    def cache_hits(self) -> int:
        """Those among them that the cache held."""
        return 0

    @property
    def link_bytes(self) -> int:
        """Bytes moved between host and device so far, both ways."""
        return self.bytes_to_device + self.bytes_to_host

    @property
    @abstractmethod
    def length(self) -> int:
        """Rows held."""

    @property
    @abstractmethod
    def seen(self) -> int:
        """Tokens appended so far, dropped ones included."""

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

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where queries and fetched rows are."""

    def keys_at(self, rows: Tensor) -> Tensor:
        """Keys of rows ``[B, H, n]`` on the device, ``[B, H, n, D]``; those that are not there cross the link, as for
        :meth:`fetch`."""
        keys, _, places = self.fetch(rows)
        return keys if places is None else gather_rows(keys, places)

    def stored_keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Keys of rows ``start`` to ``stop`` where they lie, ``[B, H, n, D]``; nothing is moved."""
        return self.keys(start, stop)

    def bring(self, rows: Tensor) -> Arrival:
        """Ask for a tensor in host memory; it crosses the link, if there is one, while the caller goes on."""
        return Present(rows.to(self.device, non_blocking=True))  # what is page-locked is not waited for

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add rows ``[B, H, n, D]``."""
        self.prepare(keys.shape[2])
        self.write(keys, values)
        self.written(keys.shape[2])

    @abstractmethod
    def prepare(self, count: int) -> None:
        """Before ``count`` rows are written: make room for them, and wait for what still reads that room."""

    @abstractmethod
    def write(self, keys: Tensor, values: Tensor) -> None:
        """Write rows ``[B, H, n, D]`` behind those held: work of the device alone, which a CUDA graph can repeat.

        The first of them is number :attr:`length`, or, where :attr:`number` is set, what that holds when the work is
        done: an int32 tensor with one element on the device, the tokens held before the write. A graph is captured
        with it, and replayed between :meth:`prepare` and :meth:`written`.
        """

    @abstractmethod
    def written(self, count: int) -> None:
        """``count`` rows were written: count them, and start what is due now and then."""

    @abstractmethod
    def reserve(self, rows: int) -> None:
        """Have room for ``rows`` rows in all, so that no buffer moves before there are more."""

    @property
    @abstractmethod
    def fixed(self) -> list[Tensor]:
        """Buffers that a captured step reads and writes where they are."""

    def fetch_ahead(self, rows: Tensor, count: Number) -> None:  # noqa: B027 - where rows are on the device anyway
        """See :meth:`pqbench.method.KV.fetch_ahead`. Orders nothing but the current stream; the step's :meth:`fetch`
        must come after it."""

    @abstractmethod
    def fetch(
        self, indices: Tensor | None, count: Number | None = None, anew: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Bring rows ``[B, H, n]``, or all of them, to the device; of the n the first ``count``, None for all. Heads
        that are not set in ``anew`` ``[B, H]`` ask for what :meth:`fetch_ahead` was given.

        Returns:
            keys and values ``[B, H, R, D]`` on the device, and which rows of these are the ones asked for, in the order
            asked for: ``[B, H, n]``, None for all R, or for as many as are held where :attr:`number` is set and R is
            the room there is. Valid until the next call.
        """

    @abstractmethod
    def keep(self, indices: Tensor) -> Store:
        """A store of rows ``[B, H, n]`` alone, in that order, on the device: all that an evicting method holds."""

    @abstractmethod
    def arrange(self, indices: Tensor) -> Store:
        """The same rows in the order of ``indices`` ``[B, H, length]``, each once, on the same tier; only before the
        first append. New tokens follow behind. Rows that are asked for together can so lie side by side."""

    def after_prefill(self, rows: Tensor | None, evicts: bool) -> Store:
        """What a method goes on with when it has built its index and answered ``rows``: those alone if it evicts, else
        all in that order; see :meth:`pqbench.method.LayerState.finish_prefill`."""
        if rows is None:
            return self
        if not evicts and rows.shape[2] != self.length:
            raise RuntimeError(f"a method answered {rows.shape[2]} of {self.length} rows: return all, or set evicts")
        return self.keep(rows) if evicts else self.arrange(rows)

    def open(self) -> None:  # noqa: B027 - a store without transfers has counted nothing
        """The index is built: what it has moved so far is no traffic of decoding."""

    def separate(self) -> None:  # noqa: B027 - where only the prompt is shared and nobody writes there
        """Stop sharing memory that another store of the same prompt may write to, so that both go on side by side."""

    def settle(self) -> None:  # noqa: B027 - a store without transfers has nothing to wait for
        """Wait for every transfer under way."""

    @abstractmethod
    def drop(self, indices: Tensor) -> None:
        """Remove rows ``[B, H, e]``; see :func:`pqbench.kernels.buffers.swap_remove` for the order of what remains."""

    @property
    @abstractmethod
    def device_bytes(self) -> int:
        """KV bytes on the accelerator."""

    @property
    @abstractmethod
    def host_bytes(self) -> int:
        """KV bytes in host memory."""
