"""Lloyd's algorithm on many small problems: one thread per problem, so that results do not depend on their number.

The nearest centroid maximises x . c - |c|^2 / 2. Points are read where they lie, as slices of strided key rows, in
tiles that fit the first cache; a tile is assigned and added to the sums of its clusters while it is there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from pqbench.kernels.cpu_lanes import copy_bytes, count_from, index_of_largest, splat, where_greater
from pqbench.kernels.cpu_products import COLUMNS, ROWS, fetch, pack, padded, products
from pqbench.kernels.cpu_tiles import prefetch_row
from pqbench.kernels.cpu_vector import (
    BFLOAT16,
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
    read_i64,
    read_u8,
    write_f32,
    write_f32x8,
    write_u8,
)

_TILE = 8 * ROWS  # points fetched at once
_PART = 2048  # keys that one thread encodes at once


@njit(**INLINE)
def _table_size(clusters: int, width: int) -> int:
    """Numbers of a packed codebook and its biases."""
    return padded(clusters) * (width + 1)


@njit(**OPTIONS)
def _make_table(centroids: int, clusters: int, width: int, table: int) -> None:
    """Pack centroids ``[K, width]``; biases -|c|^2 / 2 follow, -inf for columns that are none."""
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
    """Best scores so far and their centroids, after sixteen more."""
    left, right = columns
    index = where_greater(score, best, left, index)
    best = larger(score, best)
    index = where_greater(other, best, right, index)
    return larger(other, best), index


@njit(**OPTIONS)
def _nearest(points: int, width: int, table: int, clusters: int, codes: int, code_step: int, count: int) -> int:
    """Codes of the first ``count`` of six points ``[6, width]``; returns how many changed."""
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
    found = (
        index_of_largest(b0, i0), index_of_largest(b1, i1), index_of_largest(b2, i2), index_of_largest(b3, i3),
        index_of_largest(b4, i4), index_of_largest(b5, i5),
    )  # fmt: skip
    changed = 0
    for i in range(count):
        at, code = codes + i * code_step, np.uint8(found[i])
        changed += read_u8(at) != code
        write_u8(at, code)
    return changed


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
def _assign(
    kind: Any, points: int, step: int, count: int, width: int, table: int, clusters: int, codes: int, code_step: int,
    sums: int, sizes: np.ndarray,
) -> int:  # fmt: skip
    """Codes of points ``step`` bytes apart, and unless ``sums`` is 0 the sums and sizes of the clusters.

    Returns how many codes changed.
    """
    tile = np.zeros(_TILE * width, np.float32)
    base, changed = address_of(tile), 0
    if sums != 0:
        sizes[:] = 0
        for at in range(sums, sums + clusters * width * 4, 4):
            write_f32(at, np.float32(0))
    for start in range(0, count, _TILE):
        size = min(_TILE, count - start)
        fetch(kind, points + start * step, step, size, width, base)
        for i in range(0, size, ROWS):
            for ahead in range(start + _TILE + i, min(start + _TILE + i + ROWS, count)):
                prefetch_row(points + ahead * step, width * number_bytes(kind))
            at = codes + (start + i) * code_step
            changed += _nearest(base + i * width * 4, width, table, clusters, at, code_step, min(ROWS, size - i))
        if sums != 0:
            _add_points(base, size, width, codes + start * code_step, code_step, sums, sizes)
    hold(tile)
    return changed


@njit(**OPTIONS)
def _lloyd(
    kind: Any, points: int, step: int, count: int, width: int, centroids: int, clusters: int, iterations: int,
    codes: int, code_step: int,
) -> None:  # fmt: skip
    """At most ``iterations`` steps from the given centroids, which change in place; codes end as the nearest."""
    table = np.empty(_table_size(clusters, width), np.float32)
    sums, sizes = np.empty(clusters * width, np.float32), np.empty(clusters, np.int64)
    for iteration in range(iterations + 1):
        _make_table(centroids, clusters, width, address_of(table))
        wanted = address_of(sums) if iteration < iterations else np.int64(0)
        changed = _assign(
            kind, points, step, count, width, address_of(table), clusters, codes, code_step, wanted, sizes
        )
        if iteration == iterations or (iteration > 0 and changed == 0):
            break
        for c in range(clusters):
            if sizes[c] > 0:
                for w in range(width):
                    write_f32(centroids + (c * width + w) * 4, sums[c * width + w] / np.float32(sizes[c]))
    hold(table)
    hold(sums)


@njit(**OPTIONS)
def _train(
    kind: Any, points: int, step: int, count: int, width: int, order: int, centroids: int, clusters: int,
    iterations: int, sample: int, codes: int, code_step: int,
) -> None:  # fmt: skip
    """K-Means of one problem."""
    sampled = 0 < sample < count
    drawn = max(sample, clusters) if sampled else clusters
    rows, marks, one = np.empty(drawn * width, np.float32), np.empty(drawn, np.uint8), drawn // drawn
    base = address_of(rows)
    for i in range(drawn):
        fetch(kind, points + read_i64(order + i * 8) * step, step, 1, width, base + i * width * 4)
    copy_bytes(centroids, base, clusters * width * 4)
    if sampled:
        _lloyd(FLOAT32, base, width * 4, drawn, width, centroids, clusters, iterations, address_of(marks), one)
    rounds = min(iterations, 1) if sampled else iterations
    _lloyd(kind, points, step, count, width, centroids, clusters, rounds, codes, code_step)
    hold(rows)
    hold(marks)


@njit(parallel=True, **OPTIONS)
def train(
    half: bool, keys: int, key_batch: int, key_head: int, key_row: int, order: int, codebook: int, codes: int,
    batch: int, heads: int, count: int, dims: int, parts: int, clusters: int, iterations: int, sample: int,
) -> None:  # fmt: skip
    """K-Means of every sub-space of keys at byte strides, bfloat16 (``half``) or float32; rows are drawn in ``order``
    int64 ``[S]``.

    Fills codebook ``[B, H, m, K, D/m]`` and codes ``[B, H, S, m]``. With 0 < ``sample`` < S the iterations run on that
    many rows, and one more on all.
    """
    width, size = dims // parts, 2 if half else 4
    for problem in prange(batch * heads * parts):
        owner, part = problem // parts, problem % parts
        points = keys + owner // heads * key_batch + owner % heads * key_head + part * width * size
        place, target = codebook + problem * clusters * width * 4, codes + owner * count * parts + part
        if half:
            _train(BFLOAT16, points, key_row, count, width, order, place, clusters, iterations, sample, target, parts)
        else:
            _train(FLOAT32, points, key_row, count, width, order, place, clusters, iterations, sample, target, parts)


@njit(**OPTIONS)
def _encode(half: bool, points: int, step: int, count: int, width: int, table: int, clusters: int, codes: int,
            code_step: int) -> None:  # fmt: skip
    """Codes of ``count`` points."""
    sums, none = np.int64(0), np.empty(0, np.int64)
    if half:
        _assign(BFLOAT16, points, step, count, width, table, clusters, codes, code_step, sums, none)
    else:
        _assign(FLOAT32, points, step, count, width, table, clusters, codes, code_step, sums, none)


@njit(parallel=True, **OPTIONS)
def encode_keys(
    half: bool, keys: int, key_batch: int, key_head: int, key_row: int, codebook: int, codes: int, batch: int,
    heads: int, count: int, dims: int, parts: int, clusters: int,
) -> None:  # fmt: skip
    """Codes ``[B, H, S, m]`` of keys at byte strides in a codebook ``[B, H, m, K, D/m]``."""
    width, problems, chunks = dims // parts, batch * heads * parts, (count + _PART - 1) // _PART
    size, number = _table_size(clusters, width) * 4, 2 if half else 4
    tables = np.empty(problems * size // 4, np.float32)
    for problem in prange(problems):
        _make_table(codebook + problem * clusters * width * 4, clusters, width, address_of(tables) + problem * size)
    for unit in prange(problems * chunks):
        problem, first = unit // chunks, unit % chunks * _PART
        owner, part = problem // parts, problem % parts
        points = keys + owner // heads * key_batch + owner % heads * key_head + part * width * number + first * key_row
        _encode(
            half, points, key_row, min(_PART, count - first), width, address_of(tables) + problem * size, clusters,
            codes + (owner * count + first) * parts + part, parts,
        )  # fmt: skip
