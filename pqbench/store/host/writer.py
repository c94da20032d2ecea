"""Writes new tokens of a host store to the ring on the device, and sends them to the host in batches."""

from __future__ import annotations

from torch import Tensor

from pqbench.store.base import Writer
from pqbench.store.host.finder import Finder
from pqbench.store.host.holdings import Holdings
from pqbench.store.host.layout import Layout


class HostWriter(Writer):
    """The writer of a host store. A slot of the ring is overwritten only after its token was copied to the host."""

    def __init__(self, holdings: Holdings, layout: Layout, finder: Finder) -> None:
        super().__init__(holdings.extent)
        self._holdings, self._layout, self._finder = holdings, layout, finder

    def append(self, keys: Tensor, values: Tensor) -> None:
        """See :meth:`Writer.append`. Tokens are added one by one, so that there may be more than fit into the ring."""
        for step in range(keys.shape[2]):
            super().append(keys[:, :, step : step + 1], values[:, :, step : step + 1])

    def prepare(self, count: int) -> None:
        """See :meth:`Writer.prepare`; ``count`` is at most half of the margin."""
        held, length = self._holdings, self.extent.length + count
        self._layout.fit(length)
        held.outbox.land(length - held.pool.ring)  # tokens whose slots will be overwritten
        held.pool.cover(length)
        self._finder.prepare()

    def write(self, keys: Tensor, values: Tensor) -> None:
        pool, extent = self._holdings.pool, self.extent
        at = extent.length if extent.number is None else extent.number
        ring = pool.rows[:, :, pool.sinks : pool.sinks + pool.ring]
        append_rows = self._holdings.kernels.append_rows
        append_rows(keys, values, ring[..., 0, :], ring[..., 1, :], at, pool.local, pool.sinks)

    def written(self, count: int) -> None:
        held, extent = self._holdings, self.extent
        extent.length += count
        extent.seen += count
        held.pool.low = max(held.pool.low, extent.length - held.pool.ring)
        if extent.length - held.outbox.sent >= self._layout.margin // 2:
            held.outbox.send(extent.length)

    def reserve(self, rows: int) -> None:
        """See :meth:`Writer.reserve`. The regions on the device are made for the largest window from the start."""
        held = self._holdings
        held.reserved = max(held.reserved, rows)
        held.host.reserve(rows)
        held.pool.cover(rows)

    @property
    def fixed(self) -> list[Tensor]:
        held = self._holdings
        return [held.pool.table, held.pool.local, *held.by_kernels.fixed]
