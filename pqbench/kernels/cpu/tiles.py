"""The steps of attention on a tile of tokens: logits, one online softmax step, and the weighted sum of value rows.

A head group is four query heads of one KV head, which share each read of a row; missing heads are zeros. Layouts in
float32: queries and sums of a head group are ``[D/16][2][4 heads][8]``, logits of a tile are ``[TILE][4 heads]``.
Logits are in units of ln 2, so that exponentials are powers of two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pqbench.kernels.cpu.lanes import exp2, greater_mask, prefetch, splat, sums_of_four, swap_halves
from pqbench.kernels.cpu.vector import (
    BFLOAT16,
    INLINE,
    add,
    fma,
    lane,
    larger,
    load,
    multiply,
    number_bytes,
    read_f32,
    read_f32x8,
    read_i64,
    read_number,
    read_u8,
    subtract,
    write_f32,
    write_f32x4,
    write_f32x8,
    write_i64,
)

TILE = 16
LOG2_E = np.float32(1.4426950408889634)
_LINE = 64  # bytes of a cache line


@njit(**INLINE)
def arrange_queries(kind: Any, half: bool, q: int, heads: int, dims: int, scaling: float, target: int) -> None:
    """Write the queries ``[heads, D]`` of one KV head (bfloat16 if ``half``, otherwise float32), times the scaling in
    units of ln 2, in the layout of head groups for rows of storage ``kind``."""
    factor = np.float32(scaling) * LOG2_E
    for head in range((heads + 3) // 4 * 4):
        for dimension in range(dims):
            place = lane(kind, dimension)
            at = head // 4 * 4 * dims + (place // 8 * 4 + head % 4) * 8 + place % 8
            number, source = np.float32(0), head * dims + dimension
            if head < heads:
                number = read_number(BFLOAT16, q + source * 2) if half else read_f32(q + source * 4)
            write_f32(target + at * 4, number * factor)


@njit(**INLINE)
def pair_logits(kind: Any, q: int, first: int, second: int, blocks: int, target: int) -> None:
    """Write the logits ``[2][4]`` of two tokens, whose keys are at ``first`` and ``second``, for four heads to
    ``target``."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(np.float32(0))
    step = 16 * number_bytes(kind)
    for _ in range(blocks):
        x, y = load(kind, first, 0), load(kind, second, 0)
        q0, q1, q2, q3 = read_f32x8(q), read_f32x8(q + 32), read_f32x8(q + 64), read_f32x8(q + 96)
        a0, a1, a2, a3 = fma(q0, x, a0), fma(q1, x, a1), fma(q2, x, a2), fma(q3, x, a3)
        b0, b1, b2, b3 = fma(q0, y, b0), fma(q1, y, b1), fma(q2, y, b2), fma(q3, y, b3)
        x, y = load(kind, first, 1), load(kind, second, 1)
        q0, q1, q2, q3 = read_f32x8(q + 128), read_f32x8(q + 160), read_f32x8(q + 192), read_f32x8(q + 224)
        a0, a1, a2, a3 = fma(q0, x, a0), fma(q1, x, a1), fma(q2, x, a2), fma(q3, x, a3)
        b0, b1, b2, b3 = fma(q0, y, b0), fma(q1, y, b1), fma(q2, y, b2), fma(q3, y, b3)
        first += step
        second += step
        q += 256
    write_f32x4(target, sums_of_four(a0, a1, a2, a3))
    write_f32x4(target + 16, sums_of_four(b0, b1, b2, b3))


@njit(**INLINE)
def softmax_step(logits: int, state: int, factors: int) -> bool:
    """Replace the logits of a tile by weights relative to the maximum so far. ``state`` holds this maximum and the sum
    of weights, both as ``[2 copies][4]``, and is updated. The factors for all earlier sums are written to ``factors``;
    returns whether any of them is not 1."""
    before = read_f32x8(state)
    top = before
    for i in range(TILE // 2):
        top = larger(read_f32x8(logits + i * 32), top)
    top = larger(swap_halves(top), top)
    shrink = exp2(subtract(before, top))
    mass = multiply(read_f32x8(state + 32), shrink)
    for i in range(TILE // 2):
        weight = exp2(subtract(read_f32x8(logits + i * 32), top))
        write_f32x8(logits + i * 32, weight)
        mass = add(mass, weight)
    write_f32x8(state, top)
    write_f32x8(state + 32, mass)
    write_f32x8(factors, shrink)
    return greater_mask(top, before) != 0


@njit(**INLINE)
def shrink(sums: int, factors: int, blocks: int) -> None:
    """Multiply the sums of four heads by their factors."""
    f0, f1 = splat(read_f32(factors)), splat(read_f32(factors + 4))
    f2, f3 = splat(read_f32(factors + 8)), splat(read_f32(factors + 12))
    for at in range(sums, sums + blocks * 256, 128):
        write_f32x8(at, multiply(read_f32x8(at), f0))
        write_f32x8(at + 32, multiply(read_f32x8(at + 32), f1))
        write_f32x8(at + 64, multiply(read_f32x8(at + 64), f2))
        write_f32x8(at + 96, multiply(read_f32x8(at + 96), f3))


@njit(**INLINE)
def add_values(kind: Any, rows: int, weights: int, sums: int, blocks: int) -> None:
    """Add the value rows, whose addresses are at ``rows``, times their weights to the sums."""
    offset = 0
    for _ in range(blocks):
        a0, a1, a2, a3 = read_f32x8(sums), read_f32x8(sums + 32), read_f32x8(sums + 64), read_f32x8(sums + 96)
        b0, b1, b2, b3 = read_f32x8(sums + 128), read_f32x8(sums + 160), read_f32x8(sums + 192), read_f32x8(sums + 224)
        for i in range(TILE):
            row = read_i64(rows + i * 8) + offset
            x, y = load(kind, row, 0), load(kind, row, 1)
            at = weights + i * 16
            w0, w1 = splat(read_f32(at)), splat(read_f32(at + 4))
            w2, w3 = splat(read_f32(at + 8)), splat(read_f32(at + 12))
            a0, a1, a2, a3 = fma(w0, x, a0), fma(w1, x, a1), fma(w2, x, a2), fma(w3, x, a3)
            b0, b1, b2, b3 = fma(w0, y, b0), fma(w1, y, b1), fma(w2, y, b2), fma(w3, y, b3)
        write_f32x8(sums, a0)
        write_f32x8(sums + 32, a1)
        write_f32x8(sums + 64, a2)
        write_f32x8(sums + 96, a3)
        write_f32x8(sums + 128, b0)
        write_f32x8(sums + 160, b1)
        write_f32x8(sums + 192, b2)
        write_f32x8(sums + 224, b3)
        sums += 256
        offset += 16 * number_bytes(kind)


@njit(**INLINE)
def addresses(indices: int, first: int, stop: int, rows: int, place: Any, target: int) -> bool:
    """Write the addresses of the key and value rows of a tile that begins with token ``first``; after token
    ``stop - 1`` it is repeated. Returns False if a row does not exist."""
    keys, key_step, values, value_step = place
    valid = True
    for i in range(TILE):
        token = min(first + i, stop - 1)
        row = token if indices == 0 else read_i64(indices + token * 8)
        valid &= 0 <= row < rows
        row = min(max(row, 0), rows - 1)
        write_i64(target + i * 8, keys + row * key_step)
        write_i64(target + (TILE + i) * 8, values + row * value_step)
    return valid


@njit(**INLINE)
def prefetch_row(address: int, size: int) -> None:
    """Prefetch a row of ``size`` bytes."""
    for offset in range(0, size, _LINE):
        prefetch(address + offset)


@njit(**INLINE)
def prefetch_token(indices: int, token: int, place: Any, size: int) -> None:
    """Prefetch the key and value row of a token; ``place`` as in :func:`addresses`."""
    keys, key_step, values, value_step = place
    row = token if indices == 0 else read_i64(indices + token * 8)
    prefetch_row(keys + row * key_step, size)
    if values != 0:
        prefetch_row(values + row * value_step, size)


@njit(**INLINE)
def hide(logits: int, first: int, stop: int, visible: int, count: int, heads: int) -> None:
    """Set logits to -inf for tokens from ``stop`` on, and where ``visible`` ``[heads, count]`` (an address, or 0) is
    false."""
    for i in range(TILE):
        for head in range(4):
            token = first + i
            hidden = token >= stop
            if visible != 0 and not hidden and head < heads:
                hidden = read_u8(visible + head * count + token) == 0
            if hidden:
                write_f32(logits + (i * 4 + head) * 4, np.float32(-np.inf))


@njit(**INLINE)
def weigh(logits: int, first: int, stop: int, added: int, count: int, heads: int) -> None:
    """Add the natural logarithms ``added`` ``[heads, count]`` to the logits of a tile that begins with token
    ``first``."""
    for i in range(min(TILE, stop - first)):
        for head in range(heads):
            at = logits + (i * 4 + head) * 4
            write_f32(at, read_f32(at) + read_f32(added + (head * count + first + i) * 4) * LOG2_E)
