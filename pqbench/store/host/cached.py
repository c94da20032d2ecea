"""Finds rows when there is a block cache, which holds the blocks that selections use most (arXiv 2407.12820)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pqbench.kernels.number import Number
from pqbench.kernels.reference.rows import Found
from pqbench.store.host.blocks import Admission, BlockCache
from pqbench.store.host.finder import Finder
from pqbench.store.host.holdings import Holdings
from pqbench.store.link.base import Copy, Direction, Transfer


class CachedFinder(Finder):
    """A finder with a block cache. Blocks that enter in a step are copied in the background, after the rows that this
    step needs. The next step waits for them when it starts, so that hits do not depend on the speed of the link."""

    def __init__(self, holdings: Holdings, cache: BlockCache) -> None:
        super().__init__(holdings)
        self._blocks = cache
        self._entering: list[Transfer] = []
        self._asked = self._hits = self._admitted = 0
        device = holdings.device
        self._entered = torch.zeros(1, dtype=torch.int64, device=device)  # never read; bytes are counted instead
        self._complete = torch.zeros(1, dtype=torch.int32, device=device)  # blocks on the host, for a captured graph

    @property
    def bytes_admitted(self) -> int:
        """Bytes of the blocks that entered the block cache."""
        return self._admitted + self.admitted_directly

    @property
    def admitted_directly(self) -> int:
        """The part of :attr:`bytes_admitted` that kernels copied and that no transfer of the link counted."""
        owners, held = len(self._blocks.table(0)), self._holdings
        return held.counted[2] * self._blocks.options.block * (held.row_bytes // owners)

    @property
    def cache_lookups(self) -> int:
        """See :attr:`pqbench.store.base.Usage.cache_lookups`."""
        return self._asked + self._holdings.counted[1]

    @property
    def cache_hits(self) -> int:
        """See :attr:`pqbench.store.base.Usage.cache_hits`."""
        copied, asked, _ = self._holdings.counted
        return self._hits + asked - copied

    def arrive(self) -> None:
        for transfer in self._entering:
            transfer.wait()
        self._entering = []

    def prepare(self) -> None:
        super().prepare()
        if self._holdings.extent.number is not None:
            outbox = self._holdings.outbox
            outbox.land(outbox.sent)
            self._complete.fill_(outbox.sent // self._blocks.options.block)

    def _slots(self, indices: Tensor, count: Number | None) -> Tensor:
        slots, held, direct = super()._slots(indices, count), self._holdings, self._holdings.direct
        if direct is not None:
            held.outbox.land(held.outbox.sent)
            captured = held.extent.number is not None
            complete = self._complete if captured else held.outbox.sent // self._blocks.options.block
            self._entering = direct.exchange(indices, slots, held.most, complete, held.overlap and not captured)
        return slots

    def _find(self, indices: Tensor) -> Found:
        held, pool = self._holdings, self._holdings.pool
        length, size = held.extent.length, self._blocks.options.block
        table = self._blocks.table(length)
        return held.kernels.find_rows(indices, pool.local[:length], pool.resident, table, size, pool.blocks)

    def _bring(self, indices: Tensor, found: Found) -> None:
        cache, pool, slots, missing = self._blocks, self._holdings.pool, found.slots, found.missing
        if found.counts is None:
            raise RuntimeError("nothing was counted")
        asked, sent = found.asked, self._holdings.outbox.sent
        admitted = cache.admissions(cache.step(found.counts, sent // cache.options.block, self._entered))
        leaving = missing[:0]
        if admitted:  # a row that this step needs is saved before a new block overwrites it
            gone = (self._find(indices).slots != slots) & (slots >= 0)
            leaving = gone.view(-1).nonzero().view(-1)
        place = pool.stage(len(missing) + len(leaving))
        if len(missing):
            slots.put_(missing, self._request(indices, missing, place[: len(missing)]))
        if len(leaving):
            place[len(missing) :] = pool.table.index_select(0, slots.take(leaving))
            first = pool.staging + len(missing)
            slots.put_(leaving, torch.arange(first, first + len(leaving), device=slots.device))
        self._admit(admitted)
        self._asked += asked
        self._hits += asked - len(missing)

    def _admit(self, admitted: Sequence[Admission]) -> None:
        """Start to copy blocks into the cache. All their tokens have been sent to the host before."""
        if not admitted:
            return
        held, pool = self._holdings, self._holdings.pool
        rows, size = pool.rows.flatten(0, 1), self._blocks.options.block
        copies = []
        held.outbox.land(max(block.start for block in admitted) + size)
        for block in admitted:
            for piece in held.host.pieces(block.start, block.start + size):
                source = piece.rows.flatten(0, 1)[block.first : block.stop]
                first = pool.blocks + block.row + piece.start - block.start
                copies.append(Copy(source, rows[block.first : block.stop, first : first + source.shape[1]]))
        self._admitted += sum(copy.nbytes for copy in copies)
        self._entering = [held.traffic.move(copies, Direction.TO_DEVICE, "blocks")]
