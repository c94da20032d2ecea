"""Search by cells, compiled. One thread per KV head scores the cells, finds the boundary and selects the tokens.

Selected tokens are marked in a bitmap with one bit per token, which also sorts them.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from pqbench.kernels.cpu.lanes import bits_of, copy_bytes, exp2, largest, splat, total, trailing_zeros
from pqbench.kernels.cpu.vector import (
    OPTIONS,
    add,
    address_of,
    fma,
    hold,
    larger,
    multiply,
    read_f32,
    read_f32x8,
    read_i32,
    subtract,
    write_f32,
    write_f32x8,
    write_i32,
    write_i64,
)

_LN_2 = np.float32(0.6931471805599453)
_DIGITS = ((21, 11), (10, 11), (0, 10))  # shift and width of the bits of a float in three histograms


@njit(**OPTIONS)
def _product(left: int, right: int, width: int) -> float:
    """Inner product of two rows of floats."""
    lanes, whole = splat(np.float32(0)), width // 8 * 8
    for at in range(0, whole * 4, 32):
        lanes = fma(read_f32x8(left + at), read_f32x8(right + at), lanes)
    result = total(lanes)
    for at in range(whole * 4, width * 4, 4):
        result += read_f32(left + at) * read_f32(right + at)
    return result


@njit(**OPTIONS)
def _score(q: int, codebook: int, parts: int, clusters: int, width: int, scores: np.ndarray, spare: np.ndarray) -> None:
    """Scores ``[K**m]`` of one query ``[D]`` in a codebook ``[m, K, D/m]``."""
    size = 1
    scores[0] = 0
    for part in range(parts):
        spare[:size] = scores[:size]
        for k in range(clusters):
            row = codebook + (part * clusters + k) * width * 4
            scores[k] = _product(q + part * width * 4, row, width)  # the first row of scores first holds the table
        table = scores[:clusters].copy()
        for i in range(size):
            for k in range(clusters):
                scores[i * clusters + k] = spare[i] + table[k]
        size *= clusters


@njit(**OPTIONS)
def _weigh(scores: int, counts: int, cells: int) -> tuple[float, float]:
    """Turn scores ``[C]`` in units of ln 2, in place, into exponentials relative to the best cell that holds tokens,
    and into 0 for empty cells. Returns the score of that cell and the sum of exponentials over all tokens. C is a
    multiple of 8."""
    top, none = splat(np.float32(-np.inf)), np.float32(-np.inf)
    for at in range(0, cells * 4, 4):
        if read_f32(counts + at) == 0:
            write_f32(scores + at, none)
    for at in range(0, cells * 4, 32):
        top = larger(read_f32x8(scores + at), top)
    best = largest(top)
    top, mass = splat(best), splat(np.float32(0))
    for at in range(0, cells * 4, 32):
        power = exp2(subtract(read_f32x8(scores + at), top))
        write_f32x8(scores + at, power)
        mass = fma(power, read_f32x8(counts + at), mass)
    return best, total(mass)


@njit(**OPTIONS)
def _boundary(chances: np.ndarray, counts: np.ndarray, wanted: int) -> tuple[np.uint32, int]:
    """The bits of the probability of the last cell that is needed for the ``wanted`` best tokens, and how many tokens
    to select from the cells of exactly this probability."""
    prefix, left = np.uint32(0), wanted
    for shift, width in _DIGITS:
        histogram = np.zeros(1 << width, np.int64)
        for c in range(len(chances)):
            bits = bits_of(chances[c])
            if np.int64(bits) >> (shift + width) == np.int64(prefix):
                histogram[(np.int64(bits) >> shift) & ((1 << width) - 1)] += np.int64(counts[c])
        digit = (1 << width) - 1
        while histogram[digit] < left:
            left -= histogram[digit]
            digit -= 1
        prefix = np.uint32((np.int64(prefix) << width) + digit)
    return prefix, left


@njit(**OPTIONS)
def _take(chances: np.ndarray, counts: np.ndarray, wanted: int, take: np.ndarray) -> None:
    """Number of tokens to select from each cell, see :func:`pqbench.kernels.reference.cells.shares`."""
    bound, left = _boundary(chances, counts, wanted)
    for c in range(len(take)):
        bits, held = bits_of(chances[c]), np.int64(counts[c])
        take[c] = held if bits > bound else 0
        if bits == bound and held > 0:
            take[c] = min(held, left)
            left -= take[c]


@njit(**OPTIONS)
def _mark(
    take: np.ndarray, starts: int, tokens: int, built: int, pending: int, waiting: int, marks: np.ndarray
) -> None:
    """Set the bit of every selected token. ``take``, the number per cell, is changed."""
    for c in range(len(take)):
        if take[c] > 0:
            first = np.int64(read_i32(starts + c * 4))
            count = min(take[c], np.int64(read_i32(starts + (c + 1) * 4)) - first)
            for at in range(first, first + count):
                token = read_i32(tokens + at * 4)
                marks[token >> 5] |= np.int32(1) << (token & np.int32(31))
            take[c] -= count
    for i in range(waiting):
        cell, token = read_i32(pending + i * 4), np.int32(built + i)
        if take[cell] > 0:
            take[cell] -= 1
            marks[token >> 5] |= np.int32(1) << (token & np.int32(31))


@njit(**OPTIONS)
def _write(marks: np.ndarray, target: int) -> None:
    """Write the marked tokens, in ascending order, as int64."""
    for word in range(len(marks)):
        mask = marks[word]
        while mask != 0:
            write_i64(target, np.int64(word * 32 + trailing_zeros(mask)))
            mask = np.int32(mask & (mask - np.int32(1)))  # in int64, a sign bit would never become 0
            target += 8


@njit(**OPTIONS)
def _search(
    q: int,
    group: int,
    codebook: int,
    parts: int,
    clusters: int,
    width: int,
    starts: int,
    tokens: int,
    built: int,
    pending: int,
    waiting: int,
    wanted: int,
    target: int,
    log_weight: int,
) -> None:
    """Search for one KV head; arguments as for :func:`search`."""
    cells = clusters**parts
    padded = (cells + 7) // 8 * 8
    weights = np.full(group * padded, -np.inf, np.float32)  # [G, C]
    counts, chances, spare = np.zeros(padded, np.float32), np.zeros(padded, np.float32), np.empty(cells, np.float32)
    for c in range(cells):
        counts[c] = read_i32(starts + (c + 1) * 4) - read_i32(starts + c * 4)
    for i in range(waiting):
        counts[read_i32(pending + i * 4)] += 1
    held, summed = address_of(counts), address_of(chances)
    best = np.empty(group, np.float32)
    for g in range(group):
        own = weights[g * padded : (g + 1) * padded]
        _score(q + g * parts * width * 4, codebook, parts, clusters, width, own, spare)
        best[g], mass = _weigh(address_of(own), held, padded)
        share = splat(np.float32(1) / np.float32(mass))
        for at in range(0, padded * 4, 32):
            write_f32x8(summed + at, add(read_f32x8(summed + at), multiply(read_f32x8(address_of(own) + at), share)))
    take = np.empty(cells, np.int64)
    _take(chances, counts, wanted, take)
    for g in range(group):
        rest = np.float32(0)
        for c in range(cells):
            rest += (counts[c] - np.float32(take[c])) * weights[g * padded + c]
        write_f32(log_weight + g * 4, (best[g] + np.log2(rest)) * _LN_2 if rest > 0 else np.float32(-np.inf))
    marks = np.zeros((built + waiting + 31) // 32, np.int32)
    _mark(take, starts, tokens, built, pending, waiting, marks)
    _write(marks, target)
    hold(weights)
    hold(counts)
    hold(chances)


@njit(parallel=True, **OPTIONS)
def search(
    q: int,
    codebook: int,
    starts: int,
    tokens: int,
    pending: int,
    target: int,
    log_weight: int,
    problems: int,
    group: int,
    parts: int,
    clusters: int,
    width: int,
    built: int,
    waiting: int,
    wanted: int,
) -> None:
    """Search for every KV head of q ``[B * H, G, D]``, which is scaled and in units of ln 2. Other shapes are those of
    :func:`pqbench.kernels.reference.cells.best_of_cells`."""
    cells, dims = clusters**parts, parts * width
    for problem in prange(problems):
        _search(
            q + problem * group * dims * 4,
            group,
            codebook + problem * parts * clusters * width * 4,
            parts,
            clusters,
            width,
            starts + problem * (cells + 1) * 4,
            tokens + problem * built * 4,
            built,
            pending + problem * waiting * 4,
            waiting,
            wanted,
            target + problem * wanted * 8,
            log_weight + problem * group * 4,
        )


@njit(parallel=True, **OPTIONS)
def merge(
    starts: int,
    tokens: int,
    pending: int,
    begins: int,
    merged: int,
    problems: int,
    cells: int,
    built: int,
    waiting: int,
) -> None:
    """Write the lists with the pending tokens at their ends: tokens to ``merged`` ``[B * H, N + P]``, and where lists
    begin to ``begins`` ``[B * H, C + 1]``. The cost is linear in the number of tokens."""
    for problem in prange(problems):
        old, new = starts + problem * (cells + 1) * 4, begins + problem * (cells + 1) * 4
        own, target = pending + problem * waiting * 4, merged + problem * (built + waiting) * 4
        ends = np.zeros(cells + 1, np.int64)  # first how far each list moves, then its current end
        for i in range(waiting):
            ends[read_i32(own + i * 4) + 1] += 1
        for c in range(cells):
            ends[c + 1] += ends[c]
        for c in range(cells + 1):
            write_i32(new + c * 4, np.int32(read_i32(old + c * 4) + ends[c]))
        for c in range(cells):
            start, stop = np.int64(read_i32(old + c * 4)), np.int64(read_i32(old + c * 4 + 4))
            copy_bytes(target + (start + ends[c]) * 4, tokens + (problem * built + start) * 4, (stop - start) * 4)
            ends[c] += stop
        for i in range(waiting):
            cell = read_i32(own + i * 4)
            write_i32(target + ends[cell] * 4, np.int32(built + i))
            ends[cell] += 1
