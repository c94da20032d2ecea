"""All KV on the accelerator."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.backend import Number, kernels
from pqbench.kernels.buffers import GrowingBuffer, gather_rows, swap_remove
from pqbench.store.base import Store


class DeviceStore(Store):
    """Rows in two growing buffers.

    Stores of one prompt share its rows without a copy and append into the same slack. ``lease`` names the one that may
    write, the youngest: an older store raises instead of reading another's tokens.
    """

    def __init__(
        self, keys: GrowingBuffer, values: GrowingBuffer, lease: list[DeviceStore] | None = None, backend: str = "auto"
    ) -> None:
        """``backend`` names the kernels that write rows."""
        self._keys, self._values = keys, values
        self._kernels = kernels(keys.whole.device, backend)
        self._seen = len(keys)
        self._positions: GrowingBuffer | None = None  # rows are their own positions until some are dropped
        self._lease = lease if lease is not None else []
        self._lease[:] = [self]

    @property
    def length(self) -> int:
        return len(self._keys)

    @property
    def seen(self) -> int:
        return self._seen

    @property
    def positions(self) -> Tensor:
        if self._positions is not None:
            return self._positions.view()
        batch, heads = self._keys.view().shape[:2]
        return torch.arange(self.length, device=self._keys.view().device).expand(batch, heads, -1)

    def keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._keys.view(start, stop)

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._values.view(start, stop)

    @property
    def device(self) -> torch.device:
        return self._keys.view().device

    def prepare(self, count: int) -> None:
        if self._lease[0] is not self:
            raise RuntimeError("this store is stale: a younger store of the same prompt writes into the shared slack")
        self._keys.make_room(count)
        self._values.make_room(count)

    def write(self, keys: Tensor, values: Tensor) -> None:
        at = self.length if self.number is None else self.number
        self._kernels.append_rows(keys, values, self._keys.whole, self._values.whole, at)

    def written(self, count: int) -> None:
        if self._positions is not None:
            ages = torch.arange(self._seen, self._seen + count, device=self.device)
            self._positions.append(ages.expand(*self._keys.whole.shape[:2], -1))
        self._keys.advance(count)
        self._values.advance(count)
        self._seen += count

    def reserve(self, rows: int) -> None:
        for buffer in (self._keys, self._values, self._positions):
            if buffer is not None:
                buffer.reserve(rows)

    @property
    def fixed(self) -> list[Tensor]:
        return [self._keys.whole, self._values.whole]

    def fetch(
        self, indices: Tensor | None, count: Number | None = None, anew: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.number is not None:  # shapes that do not change
            return self._keys.whole, self._values.whole, indices
        return self.keys(), self.values(), indices

    def separate(self) -> None:
        if self._positions is None:  # rows that were kept have own memory
            self._keys, self._values, self._lease = GrowingBuffer(self.keys()), GrowingBuffer(self.values()), [self]

    def keep(self, indices: Tensor) -> DeviceStore:
        self._positions = GrowingBuffer(self.positions.gather(2, indices))
        self._keys = GrowingBuffer(gather_rows(self.keys(), indices))
        self._values = GrowingBuffer(gather_rows(self.values(), indices))
        self._lease = [self]  # own memory now
        return self

    def arrange(self, indices: Tensor) -> DeviceStore:
        """See :meth:`Store.arrange`; the rows get memory of their own."""
        return self.keep(indices)

    def drop(self, indices: Tensor) -> None:
        if self._positions is None:
            raise RuntimeError("drop() before keep(): a prompt's rows are shared and cannot be removed in place")
        for buffer in (self._keys, self._values, self._positions):
            swap_remove(buffer, indices)

    @property
    def device_bytes(self) -> int:
        return self._keys.bytes + self._values.bytes

    @property
    def host_bytes(self) -> int:
        return 0
