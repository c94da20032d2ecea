"""The largest scores of a row, found by histograms of their bits: two passes over the scores for any number wanted."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from pqbench.kernels.cpu.lanes import bits_of, float_of, not_less_mask, splat, trailing_zeros
from pqbench.kernels.cpu.vector import INLINE, OPTIONS, read_f32, read_f32x8, write_i64

_COARSE, _FINE = 20, 10  # numbers of bits below those of the first and of the second histogram


@njit(**INLINE)
def _key(score: float) -> int:
    """An unsigned integer with the same order as the scores; -0 equals 0, and NaN equals infinity."""
    bits = bits_of(np.float32(score) + np.float32(0)) if score == score else np.uint32(0x7F800000)
    return bits ^ (np.uint32(0xFFFFFFFF) if bits >> np.uint32(31) else np.uint32(0x80000000))  # type: ignore[return-value]


@njit(**INLINE)
def _lowest_score(key: int) -> float:
    """The score with this key."""
    bits = key ^ (np.uint32(0x80000000) if key >> np.uint32(31) else np.uint32(0xFFFFFFFF))  # type: ignore[operator]
    return float_of(np.uint32(bits))


@njit(**INLINE)
def _boundary(histogram: np.ndarray, wanted: int) -> tuple[int, int]:
    """The bin that contains the ``wanted``-th largest entry, and the number of entries in higher bins."""
    above, at = 0, histogram.shape[0] - 1
    while above + histogram[at] < wanted:
        above += histogram[at]
        at -= 1
    return at, above


@njit(**INLINE)
def _collect(scores: int, count: int, lowest: float, found: np.ndarray) -> None:
    """Write the indices of all scores that are not below ``lowest``, in ascending order, to ``found``, which has
    exactly their size."""
    bound, size = splat(np.float32(lowest)), 0
    whole = count // 8 * 8
    for i in range(0, whole, 8):
        mask = not_less_mask(read_f32x8(scores + i * 4), bound)
        while mask != 0:
            found[size] = i + trailing_zeros(mask)
            size += 1
            mask &= mask - np.int32(1)
    for i in range(whole, count):
        if not read_f32(scores + i * 4) < lowest:
            found[size] = i
            size += 1


@njit(**OPTIONS)
def _top_of_row(scores: int, count: int, wanted: int, target: int) -> None:
    """Write the indices of the ``wanted`` largest of ``count`` scores in ascending order; of equal scores, the lower
    index is taken."""
    histogram = np.zeros((4, 1 << (32 - _COARSE)), np.int32)  # four, as adding twice to one bin is slow
    whole = count // 4 * 4
    for i in range(0, whole, 4):
        for j in range(4):
            histogram[j, _key(read_f32(scores + (i + j) * 4)) >> np.uint32(_COARSE)] += 1
    for i in range(whole, count):
        histogram[0, _key(read_f32(scores + i * 4)) >> np.uint32(_COARSE)] += 1
    first = histogram[0]
    for i in range(first.shape[0]):
        first[i] += histogram[1, i] + histogram[2, i] + histogram[3, i]
    prefix, above = _boundary(first, wanted)
    found = np.empty(above + first[prefix], np.int32)
    _collect(scores, count, _lowest_score(np.uint32(prefix << _COARSE)), found)
    threshold, ties = np.uint32(0), found.shape[0]
    if found.shape[0] > wanted:
        keys = np.empty(found.shape[0], np.uint32)
        for i in range(found.shape[0]):
            keys[i] = _key(read_f32(scores + np.int64(found[i]) * 4))
        for shift, bits in ((_FINE, _COARSE - _FINE), (0, _FINE)):
            fine = np.zeros(1 << bits, np.int32)
            for key in keys:
                if key >> np.uint32(shift + bits) == prefix:
                    fine[(key >> np.uint32(shift)) & np.uint32((1 << bits) - 1)] += 1
            level, more = _boundary(fine, wanted - above)
            prefix, above = (prefix << bits) + level, above + more
        threshold, ties = np.uint32(prefix), wanted - above
        size = 0
        for i in range(found.shape[0]):
            if keys[i] > threshold or (keys[i] == threshold and ties > 0):
                ties -= keys[i] == threshold
                write_i64(target + size * 8, np.int64(found[i]))
                size += 1
    else:
        for i in range(wanted):
            write_i64(target + i * 8, np.int64(found[i]))


@njit(parallel=True, **OPTIONS)
def top_of_rows(scores: int, rows: int, count: int, wanted: int, target: int) -> None:
    """:func:`_top_of_row` for each row of scores float32 ``[rows, count]``: writes int64 ``[rows, wanted]``, where
    0 < wanted < count."""
    for row in prange(rows):
        _top_of_row(scores + row * count * 4, count, wanted, target + row * wanted * 8)
