"""The nearest centroid of many points: the one with the largest score x . c - |c|^2 / 2.

Points are slices of strided key rows, read without a copy of all keys, in tiles that fit the level 1 cache. When only
few centroids move, only those codes are computed that can have changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pqbench.kernels.cpu.lanes import count_from, index_of_largest, largest, splat, where_greater
from pqbench.kernels.cpu.products import COLUMNS, ROWS, fetch, pack, padded, products
from pqbench.kernels.cpu.tiles import prefetch_row
from pqbench.kernels.cpu.vector import (
    FLOAT32,
    INLINE,
    OPTIONS,
    add,
    address_of,
    fma,
    hold,
    larger,
    multiply,
    number_bytes,
    read_f32,
    read_f32x8,
    read_u8,
    write_f32,
    write_f32x8,
    write_u8,
)

_TILE = 8 * ROWS  # points of a tile


@njit(**INLINE)
def table_size(clusters: int, width: int) -> int:
    """Size of a packed codebook with its biases, in float32 numbers."""
    return padded(clusters) * (width + 1)


@njit(**OPTIONS)
def make_table(centroids: int, clusters: int, width: int, table: int) -> None:
    """Pack centroids ``[K, width]``, followed by their biases -|c|^2 / 2; the bias of a padding column is -inf."""
    pack(FLOAT32, centroids, width * 4, clusters, width, table)
    columns = padded(clusters)
    biases = table + columns * width * 4
    for c in range(0, columns, 8):
        norms = splat(np.float32(0))
        start = table + (c // COLUMNS * width * COLUMNS + c % COLUMNS) * 4
        for at in range(start, start + width * COLUMNS * 4, COLUMNS * 4):
            norms = fma(read_f32x8(at), read_f32x8(at), norms)
        write_f32x8(biases + c * 4, multiply(norms, splat(np.float32(-0.5))))
    for c in range(clusters, columns):
        write_f32(biases + c * 4, np.float32(-np.inf))


@njit(**INLINE)
def _improve(score: Any, other: Any, best: Any, index: Any, columns: Any) -> Any:
    """The best scores and their centroids, updated with sixteen more scores."""
    left, right = columns
    index = where_greater(score, best, left, index)
    best = larger(score, best)
    index = where_greater(other, best, right, index)
    return larger(other, best), index


@njit(**OPTIONS)
def _nearest(points: int, width: int, table: int, clusters: int, found: np.ndarray, scores: np.ndarray) -> None:
    """The nearest centroids of six points ``[6, width]``, int64 ``[6]``, and their scores, float32 ``[6]``."""
    columns = padded(clusters)
    biases = table + columns * width * 4
    b0 = b1 = b2 = b3 = b4 = b5 = splat(np.float32(-np.inf))
    i0 = i1 = i2 = i3 = i4 = i5 = count_from(np.int32(0))
    for block in range(0, columns, COLUMNS):
        p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11 = products(
            points, width, table + block * width * 4, biases + block * 4
        )
        names = count_from(np.int32(block)), count_from(np.int32(block + 8))
        b0, i0 = _improve(p0, p1, b0, i0, names)
        b1, i1 = _improve(p2, p3, b1, i1, names)
        b2, i2 = _improve(p4, p5, b2, i2, names)
        b3, i3 = _improve(p6, p7, b3, i3, names)
        b4, i4 = _improve(p8, p9, b4, i4, names)
        b5, i5 = _improve(p10, p11, b5, i5, names)
    found[0], found[1], found[2] = index_of_largest(b0, i0), index_of_largest(b1, i1), index_of_largest(b2, i2)
    found[3], found[4], found[5] = index_of_largest(b3, i3), index_of_largest(b4, i4), index_of_largest(b5, i5)
    scores[0], scores[1], scores[2] = largest(b0), largest(b1), largest(b2)
    scores[3], scores[4], scores[5] = largest(b3), largest(b4), largest(b5)


@njit(**INLINE)
def _add_points(points: int, count: int, width: int, codes: int, code_step: int, sums: int, sizes: np.ndarray) -> None:
    """Add points ``[count, width]`` to the sums ``[K, width]`` of their clusters."""
    whole = width // 8 * 8
    for i in range(count):
        code = np.int64(read_u8(codes + i * code_step))
        sizes[code] += 1
        source, target = points + i * width * 4, sums + code * width * 4
        for w in range(0, whole * 4, 32):
            write_f32x8(target + w, add(read_f32x8(target + w), read_f32x8(source + w)))
        for w in range(whole * 4, width * 4, 4):
            write_f32(target + w, read_f32(target + w) + read_f32(source + w))


@njit(**OPTIONS)
def assign(
    kind: Any,
    points: int,
    step: int,
    count: int,
    width: int,
    table: int,
    clusters: int,
    codes: int,
    code_step: int,
    best: np.ndarray,
) -> int:
    """Write the codes of points, which are ``step`` bytes apart, and their scores unless ``best`` is empty. Returns how
    many codes changed."""
    tile, found, scores = np.zeros(_TILE * width, np.float32), np.empty(ROWS, np.int64), np.empty(ROWS, np.float32)
    base, changed = address_of(tile), 0
    for start in range(0, count, _TILE):
        size = min(_TILE, count - start)
        fetch(kind, points + start * step, step, size, width, base)
        for i in range(0, size, ROWS):
            for ahead in range(start + _TILE + i, min(start + _TILE + i + ROWS, count)):
                prefetch_row(points + ahead * step, width * number_bytes(kind))
            _nearest(base + i * width * 4, width, table, clusters, found, scores)
            for row in range(min(ROWS, size - i)):
                at = codes + (start + i + row) * code_step
                changed += read_u8(at) != np.uint8(found[row])
                write_u8(at, np.uint8(found[row]))
                if len(best):
                    best[start + i + row] = scores[row]
    hold(tile)
    return changed


@njit(**OPTIONS)
def sum_clusters(
    kind: Any,
    points: int,
    step: int,
    count: int,
    width: int,
    codes: int,
    code_step: int,
    sums: np.ndarray,
    sizes: np.ndarray,
) -> None:
    """Write the sums ``[K * width]`` and sizes ``[K]`` of the clusters."""
    tile = np.empty(_TILE * width, np.float32)
    base, target = address_of(tile), address_of(sums)
    sums[:] = 0
    sizes[:] = 0
    for start in range(0, count, _TILE):
        size = min(_TILE, count - start)
        fetch(kind, points + start * step, step, size, width, base)
        _add_points(base, size, width, codes + start * code_step, code_step, target, sizes)
    hold(tile)
    hold(sums)


@njit(**OPTIONS)
def _settle_queue(
    kind: Any,
    points: int,
    step: int,
    width: int,
    queue: np.ndarray,
    count: int,
    table: int,
    clusters: int,
    names: np.ndarray,
    codes: int,
    code_step: int,
    best: np.ndarray,
) -> int:
    """Assign each of the queued points to the best of the centroids in ``table``, whose numbers are ``names`` ``[K]``,
    if its score is better than the point's current score; of equal scores, the lower number is taken. Returns how many
    codes changed."""
    tile, found, scores = np.zeros(ROWS * width, np.float32), np.empty(ROWS, np.int64), np.empty(ROWS, np.float32)
    base, changed = address_of(tile), 0
    for row in range(count):
        fetch(kind, points + queue[row] * step, step, 1, width, base + row * width * 4)
    _nearest(base, width, table, clusters, found, scores)
    for row in range(count):
        i, name, score = queue[row], names[found[row]], scores[row]
        at = codes + i * code_step
        old = np.int64(read_u8(at))
        if score > best[i] or (score == best[i] and name < old):
            best[i] = score
            changed += name != old
            write_u8(at, np.uint8(name))
    hold(tile)
    return changed


@njit(**OPTIONS)
def reassign(
    kind: Any,
    points: int,
    step: int,
    count: int,
    width: int,
    table: int,
    clusters: int,
    few: int,
    moved: np.ndarray,
    codes: int,
    code_step: int,
    best: np.ndarray,
) -> int:
    """The same result as :func:`assign`, bit by bit, if only the centroids ``moved`` int64 ``[M]``, ascending, have
    moved. Returns how many codes changed.

    A point whose own centroid did not move can only change to a centroid that moved. The table ``few`` contains only
    these. ``best`` holds the scores of the previous step.
    """
    shifted = np.zeros(clusters, np.bool_)
    shifted[moved] = True
    every, around, alone = np.arange(clusters), np.empty(ROWS, np.int64), np.empty(ROWS, np.int64)
    n_all = n_few = changed = 0
    for i in range(count):
        if shifted[read_u8(codes + i * code_step)]:
            best[i] = -np.inf  # the centroid of this score has moved
            around[n_all] = i
            n_all += 1
        else:
            alone[n_few] = i
            n_few += 1
        if n_all == ROWS or (i == count - 1 and n_all):
            changed += _settle_queue(
                kind, points, step, width, around, n_all, table, clusters, every, codes, code_step, best
            )
            n_all = 0
        if n_few == ROWS or (i == count - 1 and n_few):
            changed += _settle_queue(
                kind, points, step, width, alone, n_few, few, len(moved), moved, codes, code_step, best
            )
            n_few = 0
    return changed
