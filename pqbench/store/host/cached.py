"""A host store whose device also holds the blocks that selections ask for most (PQCache, arXiv 2407.12820)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pqbench.kernels.backend import Number, kernels
from pqbench.kernels.reference.rows import Found
from pqbench.method import Split
from pqbench.store.host.blocks import Admission, BlockCache, CacheOptions
from pqbench.store.host.rows import HostPrompt
from pqbench.store.host.scratch import Scratch
from pqbench.store.host.store import HostStore
from pqbench.store.link.base import Copy, Direction, Transfer


class CachedHostStore(HostStore):
    """Blocks let in by one step are copied in the background, after the rows that the step itself misses, and waited
    for at the start of the next step. So which rows are hits does not depend on the speed of a link."""

    def __init__(
        self,
        prompt: HostPrompt,
        split: Callable[[int], Split | None],
        options: CacheOptions,
        margin: int = 64,
        overlap: bool = True,
        scratch: Scratch | None = None,
        backend: str = "auto",
        reserve: int = 0,
    ) -> None:
        """See :class:`HostStore`."""
        batch, heads, device = prompt.rows.shape[0], prompt.rows.shape[1], prompt.device
        self._blocks = BlockCache(options, batch, heads, device, kernels(device, backend))
        self._blocks.table(prompt.length + reserve)  # so that it does not grow, nor its kernel change, while decoding
        super().__init__(prompt, split, margin, overlap, scratch, self._blocks, backend, reserve)
        self._entering: list[Transfer] = []
        self._asked = self._hits = self._admitted = 0
        self._entered = torch.zeros(1, dtype=torch.int64, device=device)  # nobody reads it: the bytes say more
        self._complete = torch.zeros(1, dtype=torch.int32, device=device)  # blocks on the host, for a captured graph

    @property
    def cache_bytes(self) -> int:
        """Bytes of the pool that cached blocks may take."""
        return self._blocks.rows * self._row_bytes

    @property
    def bytes_to_device(self) -> int:
        return super().bytes_to_device + self._admitted_directly

    @property
    def bytes_admitted(self) -> int:
        return self._admitted + self._admitted_directly

    @property
    def cache_lookups(self) -> int:
        return self._asked + self._counted[1]

    @property
    def cache_hits(self) -> int:
        return self._hits + self._counted[1] - self._counted[0]

    @property
    def _admitted_directly(self) -> int:
        owners = len(self._blocks.table(0))
        return self._counted[2] * self._blocks.options.block * (self._row_bytes // owners)

    def prepare(self, count: int) -> None:
        super().prepare(count)
        if self.number is not None:
            self._outbox.land(self._outbox.sent)
            self._complete.fill_(self._outbox.sent // self._blocks.options.block)

    def _slots(self, indices: Tensor, count: Number | None) -> Tensor:
        slots = super()._slots(indices, count)
        if self._direct is not None:
            self._outbox.land(self._outbox.sent)
            complete = self._outbox.sent // self._blocks.options.block if self.number is None else self._complete
            aside = self._overlap and self.number is None
            self._entering = self._direct.exchange(indices, slots, self._most, complete, aside)
        return slots

    def _find(self, indices: Tensor) -> Found:
        pool, table = self._pool, self._blocks.table(self._length)
        size = self._blocks.options.block
        return self._kernels.find_rows(indices, pool.local[: self._length], pool.resident, table, size, pool.blocks)

    def _bring(self, indices: Tensor, found: Found) -> None:
        cache, pool, slots, missing = self._blocks, self._pool, found.slots, found.missing
        if found.counts is None:
            raise RuntimeError("nothing was counted")
        asked = found.asked
        admitted = cache.admissions(cache.step(found.counts, self._outbox.sent // cache.options.block, self._entered))
        leaving = missing[:0]
        if admitted:  # a row whose block leaves now, for one that is copied over it, moves out of the way first
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
        """Start to copy blocks in; all their tokens have been sent to the host."""
        if not admitted:
            return
        rows, size = self._pool.rows.flatten(0, 1), self._blocks.options.block
        copies = []
        self._outbox.land(max(block.start for block in admitted) + size)
        for block in admitted:
            for piece in self._host.pieces(block.start, block.start + size):
                source = piece.rows.flatten(0, 1)[block.first : block.stop]
                first = self._pool.blocks + block.row + piece.start - block.start
                copies.append(Copy(source, rows[block.first : block.stop, first : first + source.shape[1]]))
        self._admitted += sum(copy.nbytes for copy in copies)
        self._entering = [self._traffic.move(copies, Direction.TO_DEVICE, "blocks")]

    def _arrive(self) -> None:
        for transfer in self._entering:
            transfer.wait()
        self._entering = []
