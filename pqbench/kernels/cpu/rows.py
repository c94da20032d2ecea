"""Finding and copying selected rows."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from pqbench.kernels.cpu.lanes import copy_bytes
from pqbench.kernels.cpu.tiles import prefetch_row
from pqbench.kernels.cpu.vector import OPTIONS, read_i64, write_i64

_PART = 256  # rows that one thread copies at once
_AHEAD = 8  # rows are prefetched this many rows ahead


@njit(parallel=True, **OPTIONS)
def copy_rows(
    source: int,
    source_batch: int,
    source_head: int,
    source_row: int,
    indices: int,
    target: int,
    target_batch: int,
    target_head: int,
    target_row: int,
    batch: int,
    heads: int,
    rows: int,
    count: int,
    size: int,
) -> bool:
    """Copy rows ``indices`` int64 ``[B, H, n]`` of ``size`` bytes each; strides are in bytes.

    Returns whether all rows exist; rows that do not exist are not copied.
    """
    parts = (count + _PART - 1) // _PART
    valid = np.ones(batch * heads * parts, np.uint8)
    for unit in prange(batch * heads * parts):
        problem, first = unit // parts, unit % parts * _PART
        sequence, head = problem // heads, problem % heads
        start = source + sequence * source_batch + head * source_head
        place = target + sequence * target_batch + head * target_head
        chosen = indices + problem * count * 8
        for i in range(first, min(count, first + _PART)):
            if i + _AHEAD < count:
                prefetch_row(start + read_i64(chosen + (i + _AHEAD) * 8) * source_row, size)
            row = read_i64(chosen + i * 8)
            if 0 <= row < rows:
                copy_bytes(place + i * target_row, start + row * source_row, size)
            else:
                valid[unit] = 0
    every = True
    for unit in range(batch * heads * parts):
        every &= valid[unit] == 1
    return every


@njit(**OPTIONS)
def find(
    indices: int,
    heads: int,
    count: int,
    local: int,
    positions: int,
    resident: int,
    where: int,
    shared: int,
    blocks: int,
    block: int,
    first: int,
    slots: int,
    missing: int,
    counts: int,
) -> tuple[bool, int]:
    """See :func:`pqbench.kernels.reference.rows.find_rows`. Arrays are addresses of int64 numbers; ``where`` and
    ``counts`` are 0 without a block cache. ``heads`` is the number of heads of all sequences, ``shared`` the number of
    heads per owner.

    Returns whether all tokens exist, and how many are missing on the device.
    """
    valid, absent = True, 0
    for head in range(heads):
        table = where + head // shared * blocks * 8
        counted = counts + head // shared * blocks * 8
        for i in range(head * count, head * count + count):
            position = read_i64(indices + i * 8)
            if not 0 <= position < positions:
                valid = False
                continue
            row = read_i64(local + position * 8)
            if row < 0 and where != 0:
                number = np.int64(np.uint32(position) // np.uint32(block))  # division of 32 bits is faster
                if number >= blocks:
                    valid = False
                    continue
                write_i64(counted + number * 8, read_i64(counted + number * 8) + 1)
                slot = read_i64(table + number * 8)
                if slot >= 0:
                    row = first + slot * block + position - number * block
            if row < 0:
                write_i64(missing + absent * 8, i)
                absent += 1
            write_i64(slots + i * 8, row + head * resident if row >= 0 else -1)
    return valid, absent
