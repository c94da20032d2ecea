"""The policy of the block cache: which blocks enter and leave, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pqbench.kernels.number import Number


class Residency(NamedTuple):
    """What a cache of C slots per owner holds; all tensors are int64.

    A block is promoted in each step in which it is among the blocks that were asked for most.

    Attributes:
        where: ``[owners, blocks]``, the slot of each block; -1 for none.
        held: ``[owners, C]``, the block in each slot; -1 for none.
        uses: ``[owners, C]``, how often the block in a slot was promoted since it entered.
        since: ``[owners, C]``, time of its last promotion; larger is later.
        clock: ``[owners]``, the current time, which counts promotions.
    """

    where: Tensor
    held: Tensor
    uses: Tensor
    since: Tensor
    clock: Tensor

    @classmethod
    def empty(cls, owners: int, slots: int, device: torch.device) -> Residency:
        """An empty cache, for a context without blocks."""
        number = torch.zeros(owners, slots, dtype=torch.int64, device=device)
        nothing, none = torch.full_like(number, -1), number.new_empty(owners, 0)
        return cls(none, nothing, number, number.clone(), number.new_zeros(owners))


def admit_blocks(
    counts: Tensor, complete: Number, admit: int, frequent: bool, residency: Residency, tally: Tensor
) -> Tensor:
    """One step of a block cache: the blocks that were asked for most enter.

    1. Among the first ``complete`` blocks, the ``admit`` blocks with the largest positive ``counts``
       ``[owners, blocks]`` are wanted, but at most C; of equal counts, the earlier block comes first.
    2. Wanted blocks are promoted, the most wanted one last.
    3. If the free slots are too few for the wanted blocks that are not in the cache, other blocks leave: those that are
       not wanted and have the fewest promotions (only with ``frequent``), and among these the ones whose last promotion
       is oldest.
    4. Wanted blocks that are not in the cache enter, the most wanted one first: into the slots of the blocks that
       leave, in the order above, and then into the free slots, lowest first.

    ``residency`` is updated, ``counts`` are set to zero, and the number of blocks that entered is added to ``tally``
    ``[1]``.

    Returns:
        int64 ``[owners, min(admit, C), 2]``: block and slot of each block that entered, by its rank among the wanted
        blocks; -1 for a rank whose block did not enter.
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
    """The step of one owner. Returns the slot that the block of each rank entered."""
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
