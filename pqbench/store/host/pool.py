"""The part of a host store on the device: a single buffer, so that one kernel can attend to any selection."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pqbench.store.link.base import poison


class Pool:
    """Each head has the regions [sinks | ring of the newest tokens | cached blocks]; one staging area follows them all.

    All rows are one flat table ``[R, 2, D]``, so that heads may have different numbers of rows in the staging area. Row
    r of head h (counted over all sequences) is row ``h * resident + r`` of the table. ``local`` holds the row of each
    position, the same for all heads; -1 if the position is neither a sink nor in the ring.
    """

    def __init__(self, like: Tensor, device: torch.device, length: int, cached: int, poisoned: bool) -> None:
        """An empty pool at context length ``length``, for rows like ``like`` ``[B, H, *, 2, D]``. From the first
        :meth:`resize` on it has ``cached`` rows of cached blocks per head. If ``poisoned``, new memory is NaN."""
        self._batch, self._heads, self._width = like.shape[0], like.shape[1], like.shape[4]
        self._dtype, self._device, self._poisoned = like.dtype, device, poisoned
        self.sinks = self.ring = 0  # rows per head
        self.low = length  # lowest position in the ring
        self.cached, self.staged = cached, 0  # rows of blocks per head, rows of the staging area
        self.table = self._allocate(0, 0, 0)
        self.local = torch.full((0,), -1, dtype=torch.int64, device=self._device)

    @property
    def resident(self) -> int:
        """Rows per head without the staging area; 0 before the first :meth:`resize`."""
        return self.sinks + self.ring + self.cached if self.ring else 0

    @property
    def rows(self) -> Tensor:
        """Sinks, ring and blocks as ``[B, H, resident, 2, D]``."""
        count = self._batch * self._heads * self.resident
        return self.table[:count].view(self._batch, self._heads, self.resident, 2, self._width)

    @property
    def blocks(self) -> int:
        """First row of the cached blocks in each head."""
        return self.sinks + self.ring

    @property
    def staging(self) -> int:
        """First row of the staging area in the table."""
        return self._batch * self._heads * self.resident

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the table, ``[B, H, rows, D]``: every head sees all rows."""
        shape = (self._batch, self._heads, -1, -1)
        return self.table[:, 0].expand(shape), self.table[:, 1].expand(shape)

    def ring_pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """Tokens ``start`` to ``stop`` of the ring, as at most two ``(start, stop, rows [B, H, n, 2, D])``."""
        while start < stop:
            slot = start % self.ring
            count = min(stop - start, self.ring - slot)
            yield start, start + count, self.rows[:, :, self.sinks + slot : self.sinks + slot + count]
            start += count

    def resize(self, ring: int, head: Tensor, tail: Tensor, length: int) -> None:
        """Set new sizes of the regions. ``head`` ``[B, H, sinks, 2, D]`` are the sinks. ``tail`` ``[B, H, n, 2, D]``
        are the last n of ``length`` tokens, for a ring of ``ring`` rows. No transfer on the pool may be running."""
        blocks = self.rows[:, :, self.blocks :]
        self.table = self._allocate(head.shape[2], ring, self.staged)
        self.sinks, self.ring, self.low = head.shape[2], ring, length - tail.shape[2]
        tokens = torch.arange(self.low, length, device=self._device)
        self.rows[:, :, : self.sinks] = head
        self.rows[:, :, self.sinks + tokens % ring] = tail
        self.rows[:, :, self.blocks : self.blocks + blocks.shape[2]] = blocks
        self.cover(length)
        self.local.fill_(-1)
        self.local[tokens] = self.sinks + tokens % ring
        self.local[: self.sinks] = torch.arange(self.sinks, device=self._device)

    def stage(self, count: int) -> Tensor:
        """The first ``count`` rows of the staging area, ``[count, 2, D]``. No transfer into the pool may be running,
        because the table may be replaced by a larger one."""
        if count > self.staged:
            self.staged = max(count, self.staged + self.staged // 2)
            table = self._allocate(self.sinks, self.ring, self.staged)
            table[: self.staging] = self.table[: self.staging]
            self.table = table
        return self.table[self.staging : self.staging + count]

    def _allocate(self, sinks: int, ring: int, staged: int) -> Tensor:
        """A new table with regions of these sizes."""
        resident = sinks + ring + self.cached if ring else 0
        shape = (self._batch * self._heads * resident + staged, 2, self._width)
        table = torch.empty(shape, dtype=self._dtype, device=self._device)
        return poison(table) if self._poisoned else table

    def cover(self, length: int) -> None:
        """Make :attr:`local` large enough for ``length`` positions."""
        held = len(self.local)
        if length > held:
            grown = self.local.new_full((length + max(256, length // 2),), -1)
            grown[:held] = self.local
            self.local = grown
