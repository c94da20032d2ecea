"""Which blocks of the middle stay on the device: the cache of PQCache (arXiv 2407.12820), least frequently or least
recently used blocks leaving first.

Differs from the released code: only blocks whose tokens are all on the host are admitted, the blocks of one step never
evict each other, and every store starts with an empty cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Move(NamedTuple):
    """A block that enters a slot, from which ``evicted`` (None: nothing) leaves."""

    block: int
    slot: int
    evicted: int | None


class Policy(ABC):
    """Residency of blocks in ``capacity`` slots, one call per step."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.slots: dict[int, int] = {}  # resident block -> slot, in the order of promotion, oldest first

    def step(self, blocks: Sequence[int]) -> list[Move]:
        """Promote the blocks most asked for, in that order, and let the absent ones in.

        At most ``capacity`` of them count. The most wanted is promoted last, so it leaves last among equals.
        """
        wanted = list(blocks[: self.capacity])
        for block in wanted:
            self.promote(block)
        absent = [block for block in wanted if block not in self.slots]
        leaving = self._leaving(set(wanted), len(absent) - (self.capacity - len(self.slots)))
        moves = [self._enter(block, leaving) for block in absent]
        for block in reversed(wanted):
            self.slots[block] = self.slots.pop(block)
        return moves

    def _leaving(self, wanted: set[int], count: int) -> list[int]:
        """The ``count`` residents to evict, first to leave last in the list."""
        ranked = sorted((block for block in self.slots if block not in wanted), key=self.rank)  # stable: oldest first
        return ranked[: max(0, count)][::-1]

    def _enter(self, block: int, leaving: list[int]) -> Move:
        if not leaving:
            free = set(range(self.capacity)).difference(self.slots.values())
            self.slots[block] = min(free)
            return Move(block, self.slots[block], None)
        evicted = leaving.pop()
        self.forget(evicted)
        self.slots[block] = self.slots.pop(evicted)
        return Move(block, self.slots[block], evicted)

    def promote(self, block: int) -> None:  # noqa: B027 - recency is the order of slots, nothing more to note
        """A block is among the most wanted of this step."""

    def forget(self, block: int) -> None:  # noqa: B027
        """A block leaves."""

    @abstractmethod
    def rank(self, block: int) -> int:
        """Residents of lower rank leave first; among equals the one promoted longest ago."""


class LRU(Policy):
    """The block leaves whose last promotion is longest ago."""

    def rank(self, block: int) -> int:
        return 0


class LFU(Policy):
    """The block leaves that was promoted in the fewest steps since it entered; counts do not age."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.counts: dict[int, int] = {}

    def promote(self, block: int) -> None:
        self.counts[block] = self.counts.get(block, 0) + 1

    def forget(self, block: int) -> None:
        del self.counts[block]

    def rank(self, block: int) -> int:
        return self.counts[block]


POLICIES: Mapping[str, type[Policy]] = MappingProxyType({"lfu": LFU, "lru": LRU})


@dataclass(frozen=True)
class CacheOptions:
    """``tokens`` per KV head are kept in blocks of ``block``; in a step the ``admit`` most wanted blocks are let in.
    With ``per_head`` each KV head has blocks of its own, else those of a sequence share them."""

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

    An owner is what has blocks of its own: a sequence, or with ``per_head`` a head of one.
    """

    def __init__(self, options: CacheOptions, batch: int, heads: int, device: torch.device) -> None:
        self.options = options
        self.slots = options.tokens // options.block  # per owner
        self._shared = 1 if options.per_head else heads  # heads of an owner
        owners = batch * heads // self._shared
        self._policies = [POLICIES[options.policy](self.slots) for _ in range(owners)]
        self._where = torch.full((owners, 0), -1, dtype=torch.int64, device=device)  # [owners, blocks]: slot, -1 absent

    @property
    def rows(self) -> int:
        """Rows per head."""
        return self.slots * self.options.block

    def table(self, length: int) -> Tensor:
        """Which slot each block of a context of ``length`` tokens is in, ``[owners, blocks]``, -1 where in none."""
        blocks = self._where.shape[1]
        if blocks * self.options.block < length:
            grown = length // self.options.block + 1 + blocks // 2
            self._where = functional.pad(self._where, (0, grown - blocks), value=-1)
        return self._where

    def step(self, counts: Tensor, on_host: int) -> list[Admission]:
        """Account for how many tokens of each block one step asked for, ``[owners, blocks]``, and let blocks in. Only
        blocks that end within the first ``on_host`` tokens qualify; ties go to the earlier block."""
        ranked = counts[:, : on_host // self.options.block].sort(dim=1, descending=True, stable=True)
        counted = ranked.values[:, : self.options.admit].count_nonzero(1).tolist()
        order = ranked.indices[:, : self.options.admit].tolist()
        moves = [policy.step(order[o][: counted[o]]) for o, policy in enumerate(self._policies)]
        self._note(moves)
        size, heads = self.options.block, self._shared
        return [
            Admission(owner * heads, (owner + 1) * heads, move.block * size, move.slot * size)
            for owner, made in enumerate(moves)
            for move in made
        ]

    def _note(self, moves: Sequence[Sequence[Move]]) -> None:
        """Bring the table up to date."""
        blocks = self._where.shape[1]
        changed: dict[int, int] = {}
        for owner, made in enumerate(moves):
            changed |= {owner * blocks + move.evicted: -1 for move in made if move.evicted is not None}
            changed |= {owner * blocks + move.block: move.slot for move in made}
        if changed:
            device = self._where.device
            self._where.put_(torch.tensor([*changed], device=device), torch.tensor([*changed.values()], device=device))
