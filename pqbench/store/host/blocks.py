"""The block cache of PQCache (arXiv 2407.12820): which blocks of the middle are on the device. The least frequently or
least recently used blocks leave first.

Differs from the released code: only blocks whose tokens are all on the host may enter, the blocks of one step never
evict each other, and every store starts with an empty cache. The kernel
:func:`pqbench.kernels.reference.blocks.admit_blocks` decides which blocks enter and leave, on the device that holds
their counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pqbench.kernels.backend import Kernels
from pqbench.kernels.number import Number
from pqbench.kernels.reference.blocks import Residency

POLICIES = ("lfu", "lru")


@dataclass(frozen=True)
class CacheOptions:
    """Options of a block cache.

    Attributes:
        tokens: tokens that the cache holds per KV head.
        block: tokens of a block.
        policy: lfu or lru.
        admit: in each step, at most this many of the blocks with the most requests enter.
        per_head: each KV head has its own blocks; otherwise the KV heads of a sequence share them.
    """

    tokens: int
    block: int = 128
    policy: str = "lfu"
    admit: int = 32
    per_head: bool = False


class Admission(NamedTuple):
    """A block to copy to the device: its tokens from ``start`` on, for heads ``first`` to ``stop`` (counted over all
    sequences), to the cache rows from ``row`` on."""

    first: int
    stop: int
    start: int
    row: int


class BlockCache:
    """Knows which blocks of one layer are in which slots of the cache, which has :attr:`rows` rows per head.

    An owner is what has its own set of cached blocks: a sequence, or with ``per_head`` one KV head of a sequence.
    """

    def __init__(self, options: CacheOptions, batch: int, heads: int, device: torch.device, kernels: Kernels) -> None:
        self.options = options
        self.slots = options.tokens // options.block  # slots per owner
        self._shared = 1 if options.per_head else heads  # heads per owner
        self._kernels = kernels
        self._residency = Residency.empty(batch * heads // self._shared, self.slots, device)

    @property
    def rows(self) -> int:
        """Rows of the cache per head."""
        return self.slots * self.options.block

    @property
    def fixed(self) -> list[Tensor]:
        """Buffers that a captured step uses and that therefore must not move."""
        return [part for part in self._residency if isinstance(part, Tensor)]

    def table(self, length: int) -> Tensor:
        """The slot of each block of a context of ``length`` tokens, ``[owners, blocks]``; -1 for none."""
        where, size = self._residency.where, self.options.block
        blocks = where.shape[1]
        if blocks * size < length:
            grown = length // size + 1 + blocks // 2
            self._residency = self._residency._replace(where=functional.pad(where, (0, grown - blocks), value=-1))
        return self._residency.where

    def step(self, counts: Tensor, complete: Number, tally: Tensor) -> Tensor:
        """Update the cache after a step that asked for ``counts`` ``[owners, blocks]`` tokens of each block. Only the
        first ``complete`` blocks may enter; of equal counts, the earlier block enters. Afterwards ``counts`` are zero,
        and the number of blocks that entered has been added to ``tally`` ``[1]``.

        Returns:
            int64 ``[owners, A, 2]``: each block that entered and its slot; -1 for none.
        """
        options = self.options
        return self._kernels.admit_blocks(
            counts, complete, options.admit, options.policy == "lfu", self._residency, tally
        )

    def admissions(self, moves: Tensor) -> list[Admission]:
        """The blocks to copy after a step, from the result of :meth:`step`."""
        size, heads = self.options.block, self._shared
        return [
            Admission(owner * heads, (owner + 1) * heads, block * size, slot * size)
            for owner, made in enumerate(moves.tolist())
            for block, slot in made
            if block >= 0
        ]
