"""A host store whose device also holds the blocks that selections ask for most (PQCache, arXiv 2407.12820)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pqbench.kernels.reference_rows import Found
from pqbench.method import Split
from pqbench.store.block_cache import Admission, BlockCache, CacheOptions
from pqbench.store.host import HostStore
from pqbench.store.host_rows import HostPrompt
from pqbench.store.link import Copy, Direction, Transfer
from pqbench.store.scratch import Scratch


class CachedHostStore(HostStore):
    """Blocks let in by one step are copied in the background, after the rows that the step itself misses, and waited
    for at the start of the next step. So which rows are hits does not depend on the speed of a link."""

    def __init__(
        self, prompt: HostPrompt, split: Callable[[int], Split | None], cache: CacheOptions, margin: int = 64,
        overlap: bool = True, scratch: Scratch | None = None, body: str = "auto",
    ) -> None:  # fmt: skip
        """See :class:`HostStore`."""
        self._cache = BlockCache(cache, prompt.rows.shape[0], prompt.rows.shape[1], prompt.device)
        super().__init__(prompt, split, margin, overlap, scratch, self._cache.rows, body)
        self._entering: list[Transfer] = []

    @property
    def cache_bytes(self) -> int:
        """Bytes of the pool that cached blocks may take."""
        return self._cache.rows * self._row_bytes

    def _find(self, indices: Tensor) -> Found:
        pool, table = self._pool, self._cache.table(self._length)
        size = self._cache.options.block
        return self._kernels.find_rows(indices, pool.local[: self._length], pool.resident, table, size, pool.blocks)

    def _bring(self, indices: Tensor, found: Found) -> None:
        cache, pool, slots, missing = self._cache, self._pool, found.slots, found.missing
        if found.counts is None:
            raise RuntimeError("nothing was counted")
        admitted = cache.step(found.counts, self._flushed)
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
        asked = found.asked
        self.cache_lookups += asked
        self.cache_hits += asked - len(missing)

    def _admit(self, admitted: Sequence[Admission]) -> None:
        """Start to copy blocks in; all their tokens have been sent to the host."""
        if not admitted:
            return
        rows, size = self._pool.rows.flatten(0, 1), self._cache.options.block
        copies = []
        self._land(max(block.start for block in admitted) + size)
        for block in admitted:
            for piece in self._host.pieces(block.start, block.start + size):
                source = piece.rows.flatten(0, 1)[block.first : block.stop]
                first = self._pool.blocks + block.row + piece.start - block.start
                copies.append(Copy(source, rows[block.first : block.stop, first : first + source.shape[1]]))
        self.bytes_admitted += sum(copy.nbytes for copy in copies)
        self._entering = [self._move(copies, Direction.TO_DEVICE, "blocks")]

    def _arrive(self) -> None:
        for transfer in self._entering:
            transfer.wait()
        self._entering = []
