"""Lloyd's algorithm on many small problems. One thread computes a problem, so that results do not depend on the number
of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from pqbench.kernels.cpu.lanes import copy_bytes
from pqbench.kernels.cpu.nearest import assign, make_table, reassign, sum_clusters, table_size
from pqbench.kernels.cpu.products import fetch
from pqbench.kernels.cpu.vector import BFLOAT16, FLOAT32, OPTIONS, address_of, hold, read_f32, read_i64, write_f32

_PART = 2048  # keys that one thread encodes at once


@njit(**OPTIONS)
def _move(centroids: int, clusters: int, width: int, sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Set the centroids of nonempty clusters to their means. Returns the clusters whose centroids moved."""
    moved, n = np.empty(clusters, np.int64), 0
    for c in range(clusters):
        moves = False
        if sizes[c] > 0:
            for w in range(width):
                at, mean = centroids + (c * width + w) * 4, sums[c * width + w] / np.float32(sizes[c])
                moves |= read_f32(at) != mean
                write_f32(at, mean)
        if moves:
            moved[n] = c
            n += 1
    return moved[:n]


@njit(**OPTIONS)
def _lloyd(
    kind: Any,
    points: int,
    step: int,
    count: int,
    width: int,
    centroids: int,
    clusters: int,
    iterations: int,
    codes: int,
    code_step: int,
    tolerance: float,
) -> None:
    """At most ``iterations`` steps from the given centroids, which are changed in place. Writes the codes of the
    nearest final centroids."""
    table, few = np.empty(table_size(clusters, width), np.float32), np.empty(table_size(clusters, width), np.float32)
    sums, sizes = np.empty(clusters * width, np.float32), np.empty(clusters, np.int64)
    chosen, best = np.empty(clusters * width, np.float32), np.empty(count if iterations > 0 else 0, np.float32)
    make_table(centroids, clusters, width, address_of(table))
    assign(kind, points, step, count, width, address_of(table), clusters, codes, code_step, best)
    for _ in range(iterations):
        sum_clusters(kind, points, step, count, width, codes, code_step, sums, sizes)
        moved = _move(centroids, clusters, width, sums, sizes)
        make_table(centroids, clusters, width, address_of(table))
        if len(moved) > clusters // 2:
            changed = assign(kind, points, step, count, width, address_of(table), clusters, codes, code_step, best)
        else:
            for i, c in enumerate(moved):
                copy_bytes(address_of(chosen) + i * width * 4, centroids + c * width * 4, width * 4)
            make_table(address_of(chosen), len(moved), width, address_of(few))
            changed = reassign(
                kind,
                points,
                step,
                count,
                width,
                address_of(table),
                clusters,
                address_of(few),
                moved,
                codes,
                code_step,
                best,
            )
        if changed <= np.int64(tolerance * count):
            break
    hold(table)
    hold(few)
    hold(chosen)


@njit(**OPTIONS)
def _train(
    kind: Any,
    points: int,
    step: int,
    count: int,
    width: int,
    order: int,
    centroids: int,
    clusters: int,
    iterations: int,
    sample: int,
    codes: int,
    code_step: int,
    tolerance: float,
) -> None:
    """K-Means of one problem; arguments as for :func:`train`."""
    sampled = 0 < sample < count
    drawn = max(sample, clusters) if sampled else clusters
    rows, marks, one = np.empty(drawn * width, np.float32), np.empty(drawn, np.uint8), drawn // drawn
    base = address_of(rows)
    for i in range(drawn):
        fetch(kind, points + read_i64(order + i * 8) * step, step, 1, width, base + i * width * 4)
    copy_bytes(centroids, base, clusters * width * 4)
    if sampled:
        _lloyd(
            FLOAT32, base, width * 4, drawn, width, centroids, clusters, iterations, address_of(marks), one, tolerance
        )
    rounds = min(iterations, 1) if sampled else iterations
    _lloyd(kind, points, step, count, width, centroids, clusters, rounds, codes, code_step, tolerance)
    hold(rows)
    hold(marks)


@njit(parallel=True, **OPTIONS)
def train(
    half: bool,
    keys: int,
    key_batch: int,
    key_head: int,
    key_row: int,
    order: int,
    codebook: int,
    codes: int,
    batch: int,
    heads: int,
    count: int,
    dims: int,
    parts: int,
    clusters: int,
    iterations: int,
    sample: int,
    tolerance: float,
) -> None:
    """K-Means of every sub-space of keys, which are bfloat16 (``half``) or float32 with strides in bytes. ``order``
    int64 ``[S]`` is the order in which rows are drawn.

    Writes codebook ``[B, H, m, K, D/m]`` and codes ``[B, H, S, m]``. If 0 < ``sample`` < S, the iterations run on that
    many rows, and one more on all rows.
    """
    width, size = dims // parts, 2 if half else 4
    for problem in prange(batch * heads * parts):
        owner, part = problem // parts, problem % parts
        points = keys + owner // heads * key_batch + owner % heads * key_head + part * width * size
        place, target = codebook + problem * clusters * width * 4, codes + owner * count * parts + part
        if half:
            _train(
                BFLOAT16,
                points,
                key_row,
                count,
                width,
                order,
                place,
                clusters,
                iterations,
                sample,
                target,
                parts,
                tolerance,
            )
        else:
            _train(
                FLOAT32,
                points,
                key_row,
                count,
                width,
                order,
                place,
                clusters,
                iterations,
                sample,
                target,
                parts,
                tolerance,
            )


@njit(**OPTIONS)
def _encode(
    half: bool, points: int, step: int, count: int, width: int, table: int, clusters: int, codes: int, code_step: int
) -> None:
    """Write the codes of ``count`` points, which are bfloat16 (``half``) or float32."""
    unasked = np.empty(0, np.float32)
    if half:
        assign(BFLOAT16, points, step, count, width, table, clusters, codes, code_step, unasked)
    else:
        assign(FLOAT32, points, step, count, width, table, clusters, codes, code_step, unasked)


@njit(parallel=True, **OPTIONS)
def encode_keys(
    half: bool,
    keys: int,
    key_batch: int,
    key_head: int,
    key_row: int,
    codebook: int,
    codes: int,
    batch: int,
    heads: int,
    count: int,
    dims: int,
    parts: int,
    clusters: int,
) -> None:
    """Write the codes ``[B, H, S, m]`` of keys (strides in bytes) in a codebook ``[B, H, m, K, D/m]``."""
    width, problems, chunks = dims // parts, batch * heads * parts, (count + _PART - 1) // _PART
    size, number = table_size(clusters, width) * 4, 2 if half else 4
    tables = np.empty(problems * size // 4, np.float32)
    for problem in prange(problems):
        make_table(codebook + problem * clusters * width * 4, clusters, width, address_of(tables) + problem * size)
    for unit in prange(problems * chunks):
        problem, first = unit // chunks, unit % chunks * _PART
        owner, part = problem // parts, problem % parts
        points = keys + owner // heads * key_batch + owner % heads * key_head + part * width * number + first * key_row
        _encode(
            half,
            points,
            key_row,
            min(_PART, count - first),
            width,
            address_of(tables) + problem * size,
            clusters,
            codes + (owner * count + first) * parts + part,
            parts,
        )
