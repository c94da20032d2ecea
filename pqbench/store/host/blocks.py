"""Which blocks of the middle stay on the device: the cache of PQCache (arXiv 2407.12820), least frequently or least
recently used blocks leaving first.

Differs from the released code: only blocks whose tokens are all on the host are admitted, the blocks of one step never
evict each other, and every store starts with an empty cache. The blocks that enter and leave are chosen on the
device that holds the counts, by :func:`pqbench.kernels.reference.blocks.admit_blocks`.
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
    """``tokens`` per KV head are kept in blocks of ``block``; in a step the ``admit`` most wanted blocks are let in.
    With ``per_head`` each KV head has blocks of its own; otherwise the heads of a sequence share them."""

    tokens: int
    block: int = 128
    policy: str = "lfu"
    admit: int = 32
    per_head: bool = False


class Admission(NamedTuple):
    """A block to be copied to the device: for heads ``first`` to ``stop`` (counted over all sequences), tokens from
    ``start`` on, to cache rows from ``row`` on."""

    first: int
    stop: int
    start: int
    row: int


class BlockCache:
    """Where the cached tokens of one layer lie, in rows of a cache of :attr:`rows` rows per head.

    An owner has blocks of its own: it is a sequence, or with ``per_head`` one KV head of a sequence.
    """

    def __init__(self, options: CacheOptions, batch: int, heads: int, device: torch.device, kernels: Kernels) -> None:
        self.options = options
        self.slots = options.tokens // options.block  # per owner
        self._shared = 1 if options.per_head else heads  # heads of an owner
        self._kernels = kernels
        self._residency = Residency.empty(batch * heads // self._shared, self.slots, device)

    @property
    def rows(self) -> int:
        """Rows per head."""
        return self.slots * self.options.block

    @property
    def fixed(self) -> list[Tensor]:
        """Buffers that a captured step reads and writes where they are."""
        return [part for part in self._residency if isinstance(part, Tensor)]

    def table(self, length: int) -> Tensor:
        """Which slot each block of a context of ``length`` tokens is in, ``[owners, blocks]``, -1 where in none."""
        where, size = self._residency.where, self.options.block
        blocks = where.shape[1]
        if blocks * size < length:
            grown = length // size + 1 + blocks // 2
            self._residency = self._residency._replace(where=functional.pad(where, (0, grown - blocks), value=-1))
        return self._residency.where

    def step(self, counts: Tensor, complete: Number, tally: Tensor) -> Tensor:
        """Account for how many tokens of each block one step asked for, ``[owners, blocks]``, and let blocks in. Only
        the first ``complete`` blocks qualify; ties go to the earlier block. ``counts`` are zero afterwards, ``tally``
        ``[1]`` counts the blocks let in.

        Returns:
            int64 ``[owners, A, 2]``: which block entered which slot, -1 for none.
        """
        options = self.options
        return self._kernels.admit_blocks(
            counts, complete, options.admit, options.policy == "lfu", self._residency, tally
        )

    def admissions(self, moves: Tensor) -> list[Admission]:
        """The blocks that must be copied after a step."""
        size, heads = self.options.block, self._shared
        return [
            Admission(owner * heads, (owner + 1) * heads, block * size, slot * size)
            for owner, made in enumerate(moves.tolist())
            for block, slot in made
            if block >= 0
        ]
