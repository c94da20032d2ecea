"""Inner products of six rows with sixteen columns at a time. The sums fill twelve registers, the most that fit in AVX2.

Columns are packed as ``[blocks of 16][D][16]``, so that they are read in the order of memory. Rows are read one number
at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pqbench.kernels.cpu.lanes import splat
from pqbench.kernels.cpu.vector import (
    INLINE,
    fma,
    load_in_order,
    number_bytes,
    read_f32,
    read_f32x8,
    read_number,
    write_f32,
    write_f32x8,
)

ROWS, COLUMNS = 6, 16


@njit(**INLINE)
def padded(count: int) -> int:
    """``count`` rounded up to whole blocks of columns."""
    return (count + COLUMNS - 1) // COLUMNS * COLUMNS


@njit(**INLINE)
def fetch(kind: Any, source: int, step: int, count: int, width: int, target: int) -> None:
    """Copy rows of ``width`` numbers, which are ``step`` bytes apart, as float32 ``[count, width]`` to ``target``."""
    whole = width // 8 * 8
    for _ in range(count):
        for w in range(0, whole, 8):
            write_f32x8(target + w * 4, load_in_order(kind, source + w * number_bytes(kind)))
        for w in range(whole, width):
            write_f32(target + w * 4, read_number(kind, source + w * number_bytes(kind)))
        source += step
        target += width * 4


@njit(**INLINE)
def pack(kind: Any, source: int, step: int, count: int, width: int, target: int) -> None:
    """Pack rows ``[count, width]``, which are ``step`` bytes apart, as columns. Padding columns of the last block are
    zero."""
    for row in range(padded(count)):
        at = target + (row // COLUMNS * width * COLUMNS + row % COLUMNS) * 4
        if row < count:
            for w in range(width):
                write_f32(at + w * COLUMNS * 4, read_number(kind, source + row * step + w * number_bytes(kind)))
        else:
            for w in range(width):
                write_f32(at + w * COLUMNS * 4, np.float32(0))


@njit(**INLINE)
def products(rows: int, width: int, columns: int, bias: int) -> Any:
    """Six rows ``[6, width]`` times one block of columns, plus ``bias`` ``[16]``, in twelve registers, two per row."""
    p0 = p2 = p4 = p6 = p8 = p10 = read_f32x8(bias)
    p1 = p3 = p5 = p7 = p9 = p11 = read_f32x8(bias + 32)
    step = width * 4
    last = rows + 5 * step
    second, third, fourth, fifth = rows + step, rows + 2 * step, rows + 3 * step, rows + 4 * step
    for w in range(0, width * 4, 4):
        left, right = read_f32x8(columns), read_f32x8(columns + 32)
        columns += 64
        x = splat(read_f32(rows + w))
        p0, p1 = fma(x, left, p0), fma(x, right, p1)
        x = splat(read_f32(second + w))
        p2, p3 = fma(x, left, p2), fma(x, right, p3)
        x = splat(read_f32(third + w))
        p4, p5 = fma(x, left, p4), fma(x, right, p5)
        x = splat(read_f32(fourth + w))
        p6, p7 = fma(x, left, p6), fma(x, right, p7)
        x = splat(read_f32(fifth + w))
        p8, p9 = fma(x, left, p8), fma(x, right, p9)
        x = splat(read_f32(last + w))
        p10, p11 = fma(x, left, p10), fma(x, right, p11)
    return p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11
