"""Which blocks of a context a cache holds, in plain torch; other backends are tested against this."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pqbench.kernels.number import Number


class Residency(NamedTuple):
    """What a cache of C slots per owner holds, int64 all.

    Attributes:
        where: which slot each block is in, ``[owners, blocks]``, -1 where in none.
        held: which block each slot holds, ``[owners, C]``, -1 for none.
        uses: in how many steps it was promoted since it entered, ``[owners, C]``.
        since: when it was promoted last, ``[owners, C]``; larger is later.
        clock: ``[owners]``, numbers promotions.
    """

    where: Tensor
    held: Tensor
    uses: Tensor
    since: Tensor
    clock: Tensor

    @classmethod
    def empty(cls, owners: int, slots: int, device: torch.device) -> Residency:
        """A cache that holds nothing, of a context without blocks."""
        number = torch.zeros(owners, slots, dtype=torch.int64, device=device)
        nothing, none = torch.full_like(number, -1), number.new_empty(owners, 0)
        return cls(none, nothing, number, number.clone(), number.new_zeros(owners))


def admit_blocks(
    counts: Tensor, complete: Number, admit: int, frequent: bool, residency: Residency, tally: Tensor
) -> Tensor:
    """Let in the blocks most asked for: one step of a cache.

    Wanted are the ``admit`` blocks of largest ``counts`` ``[owners, blocks]`` among the first ``complete``, ties to the
    earlier, without those nobody asked for; at most as many as there are slots. They are promoted, the most wanted
    last. Those absent enter, the most wanted first, each into the slot of the resident that is not wanted and has the
    fewest promotions (with ``frequent``; otherwise that is not looked at), among equals the one promoted longest ago;
    when as many have left as must, into the free slots, the first one first. ``residency`` is brought up to date,
    ``counts`` are set to zero, and to ``tally`` ``[1]`` is added how many entered.

    Returns:
        int64 ``[owners, min(admit, C), 2]``: which block entered which slot, by rank of the block; -1 where none did.
    """
    owners, capacity = residency.held.shape
    most = min(admit, capacity)
    moves = torch.full((owners, most, 2), -1, dtype=torch.int64, device=counts.device)
    for owner in range(owners):
        asked = counts[owner, : int(complete)].tolist()
        wanted = sorted((b for b, count in enumerate(asked) if count > 0), key=lambda b: (-asked[b], b))[:most]
        entered = _step(wanted, most, frequent, *(part[owner] for part in residency))
        for rank, slot in entered.items():
            moves[owner, rank, 0], moves[owner, rank, 1] = wanted[rank], slot
        tally[0] += len(entered)
    counts.zero_()
    return moves


def _step(
    wanted: list[int],
    most: int,
    frequent: bool,
    where: Tensor,
    held: Tensor,
    uses: Tensor,
    since: Tensor,
    clock: Tensor,
) -> dict[int, int]:
    """One owner's step; returns the slot that each rank entered."""
    present = {int(block): slot for slot, block in enumerate(held) if block >= 0}
    absent = [rank for rank, block in enumerate(wanted) if block not in present]
    free = [slot for slot in range(len(held)) if held[slot] < 0]
    leaving = sorted(
        (slot for block, slot in present.items() if block not in wanted),
        key=lambda slot: (int(uses[slot]) if frequent else 0, int(since[slot])),
    )[: max(0, len(absent) - len(free))]
    entered = dict(zip(absent, leaving + free, strict=False))
    for rank, slot in entered.items():
        if held[slot] >= 0:
            where[held[slot]] = -1
        held[slot], where[wanted[rank]], uses[slot] = wanted[rank], slot, 0
    for rank, block in enumerate(wanted):
        slot = where[block]
        uses[slot] += 1
        since[slot] = clock + most - rank
    clock += most
    return entered
