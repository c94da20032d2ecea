"""The store of the device tier: all keys and values are on the accelerator."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pqbench.kernels.backend import Kernels, kernels
from pqbench.kernels.buffers import GrowingBuffer, gather_rows, swap_remove
from pqbench.kernels.number import Number
from pqbench.store.base import Extent, Store, Usage, Writer


@dataclass
class DeviceRows:
    """The buffers of a device store, which its parts share.

    Attributes:
        keys, values: ``[B, H, S, D]``.
        positions: ``[B, H, S]`` after rows were kept or arranged; None as long as a row's number is its position.
        lease: a list that all stores of one prompt share. Its only element is the youngest store, which may write into
            the shared memory.
    """

    keys: GrowingBuffer
    values: GrowingBuffer
    positions: GrowingBuffer | None = None
    lease: list[DeviceRows] = field(default_factory=list)

    def own(self, keys: GrowingBuffer, values: GrowingBuffer, positions: GrowingBuffer | None = None) -> None:
        """Use these buffers, which are shared with no other store, from now on."""
        self.keys, self.values, self.positions, self.lease = keys, values, positions, [self]


class DeviceWriter(Writer):
    """Writes after the rows held, into free space that several stores of one prompt may share."""

    def __init__(self, extent: Extent, rows: DeviceRows, backend: Kernels) -> None:
        super().__init__(extent)
        self._rows, self._kernels = rows, backend

    def prepare(self, count: int) -> None:
        rows = self._rows
        if rows.lease[0] is not rows:
            raise RuntimeError("this store is stale: a younger store of the same prompt writes into the shared slack")
        rows.keys.make_room(count)
        rows.values.make_room(count)

    def write(self, keys: Tensor, values: Tensor) -> None:
        at = self.extent.length if self.extent.number is None else self.extent.number
        self._kernels.append_rows(keys, values, self._rows.keys.whole, self._rows.values.whole, at)

    def written(self, count: int) -> None:
        rows, seen = self._rows, self.extent.seen
        if rows.positions is not None:
            ages = torch.arange(seen, seen + count, device=rows.keys.whole.device)
            rows.positions.append(ages.expand(*rows.keys.whole.shape[:2], -1))
        rows.keys.advance(count)
        rows.values.advance(count)
        self.extent.length += count
        self.extent.seen += count

    def reserve(self, rows: int) -> None:
        for buffer in (self._rows.keys, self._rows.values, self._rows.positions):
            if buffer is not None:
                buffer.reserve(rows)

    @property
    def fixed(self) -> list[Tensor]:
        return [self._rows.keys.whole, self._rows.values.whole]


class DeviceUsage(Usage):
    """Bytes of the rows on the device; nothing is moved."""

    def __init__(self, rows: DeviceRows) -> None:
        super().__init__()
        self._rows = rows

    @property
    def device_bytes(self) -> int:
        return self._rows.keys.bytes + self._rows.values.bytes


class DeviceStore(Store):
    """Rows in two growing buffers.

    Stores of one prompt share its rows without a copy and append into the same free space. Only the youngest store may
    write there, which ``lease`` names: an older store raises an error instead of reading the tokens of another.
    """

    def __init__(
        self,
        keys: GrowingBuffer,
        values: GrowingBuffer,
        lease: list[DeviceRows] | None = None,
        backend: str = "auto",
        positions: GrowingBuffer | None = None,
        seen: int | None = None,
    ) -> None:
        """
        Args:
            keys, values: the rows ``[B, H, S, D]``.
            lease: the list that all stores of one prompt share; None for a store that shares no memory.
            backend: name of the backend that writes rows.
            positions: positions ``[B, H, S]`` of the rows; None if a row's number is its position.
            seen: tokens appended so far; None for as many as there are rows.
        """
        device, extent = keys.whole.device, Extent(len(keys), len(keys) if seen is None else seen)
        self._rows = rows = DeviceRows(keys, values, positions, lease if lease is not None else [])
        rows.lease[:] = [rows]
        writer = DeviceWriter(extent, rows, kernels(device, backend))
        super().__init__(extent, device, DeviceUsage(rows), writer)

    @property
    def positions(self) -> Tensor:
        rows = self._rows
        if rows.positions is not None:
            return rows.positions.view()
        batch, heads = rows.keys.whole.shape[:2]
        return torch.arange(self.length, device=self.device).expand(batch, heads, -1)

    def keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._read(self._rows.keys.view(start, stop))

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._rows.values.view(start, stop)

    def keys_at(self, rows: Tensor) -> Tensor:
        keys = self._rows.keys
        return self._read(gather_rows(keys.view() if self.extent.number is None else keys.whole, rows))

    def fetch(
        self, indices: Tensor | None, count: Number | None = None, anew: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = self._rows
        if self.extent.number is not None:  # a captured step needs shapes that do not change
            return rows.keys.whole, rows.values.whole, indices
        return rows.keys.view(), rows.values.view(), indices

    def separate(self) -> None:
        rows = self._rows
        if rows.positions is None:  # kept rows share no memory
            rows.own(GrowingBuffer(rows.keys.view()), GrowingBuffer(rows.values.view()))

    def keep(self, indices: Tensor) -> DeviceStore:
        rows = self._rows
        keys, values = (GrowingBuffer(gather_rows(buffer.view(), indices)) for buffer in (rows.keys, rows.values))
        rows.own(keys, values, GrowingBuffer(self.positions.gather(2, indices)))
        self.extent.length = indices.shape[2]
        return self

    def arrange(self, indices: Tensor) -> DeviceStore:
        """See :meth:`Store.arrange`; the rows are copied."""
        return self.keep(indices)

    def drop(self, indices: Tensor) -> None:
        rows = self._rows
        if rows.positions is None:
            raise RuntimeError("drop() before keep(): a prompt's rows are shared and cannot be removed in place")
        for buffer in (rows.keys, rows.values, rows.positions):
            swap_remove(buffer, indices)
        self.extent.length -= indices.shape[2]
