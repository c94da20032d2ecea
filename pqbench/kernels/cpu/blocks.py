"""The policy of the block cache: which blocks enter and leave."""

from __future__ import annotations

import numpy as np
from numba import njit

from pqbench.kernels.cpu.vector import OPTIONS, read_i64, write_i64

_LAST = np.int64(1) << 62


@njit(**OPTIONS)
def _next_wanted(counts: int, blocks: int, count: int, block: int) -> tuple[np.int64, np.int64]:
    """Count and number of the next wanted block after the one with this ``count`` and number ``block``: blocks are
    ordered by falling count, then by number. The number is -1 if there is none."""
    best, found = np.int64(0), np.int64(-1)
    for i in range(blocks):
        asked = read_i64(counts + i * 8)
        if asked > best and (asked < count or (asked == count and i > block)):
            best, found = asked, np.int64(i)
    return best, found


@njit(**OPTIONS)
def _vacant(held: int, uses: int, since: int, before: int, capacity: int, frequent: bool, leaves: bool) -> np.int64:
    """The slot that the next block enters: with ``leaves``, that of the block that leaves next (among those not
    promoted since ``before``), otherwise a free one."""
    chosen, fewest, oldest = np.int64(-1), _LAST, _LAST
    for slot in range(capacity):
        if not leaves:
            if read_i64(held + slot * 8) < 0:
                return np.int64(slot)
            continue
        when = read_i64(since + slot * 8)
        if read_i64(held + slot * 8) < 0 or when > before:
            continue
        number = read_i64(uses + slot * 8) if frequent else np.int64(0)
        if number < fewest or (number == fewest and when < oldest):
            chosen, fewest, oldest = np.int64(slot), number, when
    return chosen


@njit(**OPTIONS)
def choose(
    counts: int,
    stride: int,
    complete: int,
    most: int,
    frequent: bool,
    where: int,
    held: int,
    uses: int,
    since: int,
    clock: int,
    moves: int,
    owners: int,
    capacity: int,
) -> int:
    """See :func:`pqbench.kernels.reference.blocks.admit_blocks`. Arrays are addresses of int64 numbers; ``counts`` and
    ``where`` have ``stride`` blocks per owner, and ``moves`` are -1 before. Returns how many blocks entered."""
    entered = 0
    for owner in range(owners):
        asked, slots, mine = counts + owner * stride * 8, where + owner * stride * 8, owner * capacity * 8
        now, made = read_i64(clock + owner * 8), moves + owner * most * 16
        ranks, absent, count, block = 0, 0, _LAST, np.int64(-1)
        while ranks < most:  # promotions come first, so that no wanted block can leave
            count, block = _next_wanted(asked, complete, count, block)
            if block < 0:
                break
            slot = read_i64(slots + block * 8)
            if slot >= 0:
                write_i64(uses + mine + slot * 8, read_i64(uses + mine + slot * 8) + 1)
                write_i64(since + mine + slot * 8, now + most - ranks)
            else:
                write_i64(made + ranks * 16, block)
                absent += 1
            ranks += 1
        free = 0
        for slot in range(capacity):
            free += read_i64(held + mine + slot * 8) < 0
        leave = absent - free
        for rank in range(ranks):
            block = read_i64(made + rank * 16)
            if block < 0:
                continue
            slot = _vacant(held + mine, uses + mine, since + mine, now, capacity, frequent, leave > 0)
            gone = read_i64(held + mine + slot * 8)
            if gone >= 0:
                write_i64(slots + gone * 8, -1)
            leave -= 1
            write_i64(held + mine + slot * 8, block)
            write_i64(slots + block * 8, slot)
            write_i64(uses + mine + slot * 8, 1)
            write_i64(since + mine + slot * 8, now + most - rank)
            write_i64(made + rank * 16 + 8, slot)
            entered += 1
        write_i64(clock + owner * 8, now + most)
    return entered
