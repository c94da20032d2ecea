"""Fetches selected rows by kernels that read host memory directly."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pqbench.kernels.backend import Kernels
from pqbench.kernels.number import Number
from pqbench.kernels.reference.rows import Blocks
from pqbench.store.host.blocks import BlockCache
from pqbench.store.host.pool import Pool
from pqbench.store.host.rows import HostRows
from pqbench.store.link.base import Direction, Transfer


class DirectRows:
    """One kernel finds rows, copies those that the device does not hold, and counts them. The host never waits for it,
    and no shape depends on its result, because every place of a selection has a row in the staging area.

    With a block cache, three more kernels choose the blocks that enter, save rows of the blocks that leave, and copy
    the new blocks. The last one runs beside the work that follows on the device.
    """

    def __init__(self, host: HostRows, pool: Pool, kernels: Kernels, cache: BlockCache | None = None) -> None:
        self._host, self._pool, self._kernels, self._cache = host, pool, kernels, cache
        self._tally = torch.zeros(3, dtype=torch.int64, device=host.device)  # rows copied, rows asked for, new blocks
        self._counts = torch.empty(0, 0, dtype=torch.int32, device=host.device)  # [owners, blocks], zero between steps
        self._used = False

    def counted(self) -> tuple[int, int, int]:
        """Rows copied, rows asked for that are neither sinks nor in the ring, and blocks entered so far. Waits for the
        device."""
        copied, asked, entered = self._tally.tolist() if self._used else (0, 0, 0)
        return copied, asked, entered

    @property
    def fixed(self) -> list[Tensor]:
        """Buffers that a captured step uses and that therefore must not move."""
        host = [rows for tokens in self._host.tokens() for rows in (tokens.rows, tokens.more)]
        return [*host, self._tally, self._counts, *(() if self._cache is None else self._cache.fixed)]

    def forget(self) -> None:
        """Set all counts to zero."""
        self._tally.zero_()
        self._used = False

    def fetch(self, indices: Tensor, length: int, count: Number | None) -> Tensor:
        """Fetch tokens ``indices`` ``[B, H, n]`` of a context of ``length`` tokens, of which the first ``count`` are
        needed (None for all). Returns their rows in the pool's table, ``[B, H, n]``."""
        pool, slots, self._used = self._pool, indices, True
        pool.stage(indices.numel())
        self._host.link.reads()
        blocks = None if self._cache is None else self._blocks(self._cache, length)
        for tokens in self._host.tokens():
            slots = self._kernels.fetch_rows(
                indices, pool.local, pool.table, pool.resident, pool.staging, tokens, self._tally, blocks, count
            )
        return slots

    def exchange(self, indices: Tensor, slots: Tensor, length: int, complete: Number, aside: bool) -> list[Transfer]:
        """After :meth:`fetch`: bring the blocks that were asked for most into the cache. Rows of this selection in
        blocks that leave are saved first.

        Args:
            indices: the selection ``[B, H, n]``.
            slots: what :meth:`fetch` returned for it; rows that were saved are updated.
            length: tokens of the context.
            complete: only the first ``complete`` blocks may enter, because all their tokens are on the host.
            aside: copy blocks beside the work that follows.

        Returns:
            the transfers to wait for before the next step.
        """
        if self._cache is None:
            raise RuntimeError("there is no cache")
        pool, blocks = self._pool, self._blocks(self._cache, length)
        moves = self._cache.step(blocks.counts, complete, self._tally[2:])
        self._kernels.vacate_rows(indices, slots, pool.table, pool.resident, pool.staging, blocks)
        work = partial(self._enter, moves, blocks)
        if aside:
            return [self._host.link.launch(work, Direction.TO_DEVICE, "blocks", [moves, pool.table])]
        work()
        return []

    def _enter(self, moves: Tensor, blocks: Blocks) -> None:
        self._host.link.reads()
        for tokens in self._host.tokens():
            self._kernels.copy_blocks(moves, tokens, self._pool.table, self._pool.resident, blocks)

    def _blocks(self, cache: BlockCache, length: int) -> Blocks:
        where = cache.table(length)
        if self._counts.shape != where.shape:
            self._counts = self._counts.new_zeros(where.shape)
        return Blocks(where, cache.options.block, self._pool.blocks, self._counts)
