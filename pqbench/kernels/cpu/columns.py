"""Attention that each key received: the causal softmax of six query rows at a time, summed over the rows."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from pqbench.kernels.cpu.lanes import exp2, largest, splat, total
from pqbench.kernels.cpu.products import COLUMNS, ROWS, pack, padded, products
from pqbench.kernels.cpu.vector import (
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
    read_f32,
    read_f32x8,
    subtract,
    write_f32,
    write_f32x8,
)

_LOG2_E = np.float32(1.4426950408889634)
_CHUNKS = 8  # the queries of a head are summed in this many parts


@njit(**INLINE)
def _logits(rows: int, dims: int, columns: int, zeros: int, first: int, stop: int, line: int, target: int) -> None:
    """Products of six rows with the columns ``first`` to ``stop``; each row of results has ``line`` bytes."""
    for block in range(first, stop, COLUMNS):
        p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11 = products(rows, dims, columns + block * dims * 4, zeros)
        at = target + block * 4
        write_f32x8(at, p0)
        write_f32x8(at + 32, p1)
        write_f32x8(at + line, p2)
        write_f32x8(at + line + 32, p3)
        write_f32x8(at + 2 * line, p4)
        write_f32x8(at + 2 * line + 32, p5)
        write_f32x8(at + 3 * line, p6)
        write_f32x8(at + 3 * line + 32, p7)
        write_f32x8(at + 4 * line, p8)
        write_f32x8(at + 4 * line + 32, p9)
        write_f32x8(at + 5 * line, p10)
        write_f32x8(at + 5 * line + 32, p11)


@njit(**INLINE)
def _softmax(line: int, first: int, stop: int, seen: int, end: int) -> float:
    """Replace numbers ``first`` to ``stop`` (multiples of 16) of a line by exponentials; those before ``seen`` or from
    ``end`` on become zero. Returns one over their sum."""
    for i in range(first, seen):
        write_f32(line + i * 4, np.float32(-np.inf))
    for i in range(end, stop):
        write_f32(line + i * 4, np.float32(-np.inf))
    top = splat(np.float32(-np.inf))
    for at in range(line + first * 4, line + stop * 4, 32):
        top = larger(read_f32x8(at), top)
    top = splat(largest(top))
    left = right = splat(np.float32(0))
    for at in range(line + first * 4, line + stop * 4, 64):
        x, y = exp2(subtract(read_f32x8(at), top)), exp2(subtract(read_f32x8(at + 32), top))
        left, right = add(left, x), add(right, y)
        write_f32x8(at, x)
        write_f32x8(at + 32, y)
    return np.float32(1) / total(add(left, right))  # type: ignore[return-value]


@njit(**OPTIONS)
def _add_rows(
    q: int,
    count: int,
    begin: int,
    end: int,
    dims: int,
    columns: int,
    total_keys: int,
    band: int,
    factor: float,
    sums: int,
) -> None:
    """Add the attention of queries ``begin`` to ``end`` of one head to ``sums``. ``q`` float32 ``[count, D]`` are all
    its queries."""
    line = padded(total_keys) * 4
    scratch = np.empty((ROWS + 1) * (padded(total_keys) + dims) + 16, np.float32)
    logits = address_of(scratch)
    rows, zeros, shares = logits + ROWS * line, logits + ROWS * line + ROWS * dims * 4, np.zeros(ROWS, np.float32)
    write_f32x8(zeros, splat(np.float32(0)))
    write_f32x8(zeros + 32, splat(np.float32(0)))
    for start in range(begin, end, ROWS):
        own = min(ROWS, end - start)
        for i in range(ROWS):  # missing rows repeat the last query
            source = q + (start + min(i, own - 1)) * dims * 4
            for at in range(0, dims * 4, 4):
                write_f32(rows + i * dims * 4 + at, read_f32(source + at) * np.float32(factor))
        position = total_keys - count + start
        first = max(0, position - band + 1) // COLUMNS * COLUMNS
        stop = padded(position + own)
        _logits(rows, dims, columns, zeros, first, stop, line, logits)
        for i in range(ROWS):
            at = position + min(i, own - 1)
            share = _softmax(logits + i * line, first, stop, max(0, at - band + 1), at + 1)
            shares[i] = share if i < own else np.float32(0)
        s0, s1, s2 = splat(shares[0]), splat(shares[1]), splat(shares[2])
        s3, s4, s5 = splat(shares[3]), splat(shares[4]), splat(shares[5])
        for i in range(first * 4, stop * 4, 32):
            at = logits + i
            result = add(read_f32x8(sums + i), multiply(read_f32x8(at), s0))
            result = fma(read_f32x8(at + line), s1, result)
            result = fma(read_f32x8(at + 2 * line), s2, result)
            result = fma(read_f32x8(at + 3 * line), s3, result)
            result = fma(read_f32x8(at + 4 * line), s4, result)
            result = fma(read_f32x8(at + 5 * line), s5, result)
            write_f32x8(sums + i, result)
    hold(scratch)


@njit(**OPTIONS)
def _pack(half: bool, source: int, step: int, count: int, dims: int, target: int) -> None:
    """Pack keys as one block of columns."""
    if half:
        pack(BFLOAT16, source, step, count, dims, target)
    else:
        pack(FLOAT32, source, step, count, dims, target)


@njit(parallel=True, **OPTIONS)
def sum_columns(
    half: bool,
    q: int,
    keys: int,
    key_batch: int,
    key_head: int,
    key_row: int,
    output: int,
    batch: int,
    heads: int,
    group: int,
    count: int,
    total_keys: int,
    dims: int,
    band: int,
    scaling: float,
) -> None:
    """Causal softmax of q float32 ``[B, H, G, n, D]`` of the last n of the keys ``[B, H, S, D]`` (strides in bytes),
    summed over queries and query group: ``[B, H, S]``. A query sees the last ``band`` keys up to its own."""
    problems, width = batch * heads, padded(total_keys)
    size = ((count + _CHUNKS - 1) // _CHUNKS + ROWS - 1) // ROWS * ROWS
    columns = np.empty(problems * width * dims, np.float32)
    partial = np.zeros(problems * _CHUNKS * width, np.float32)
    for unit in prange(problems * (width // COLUMNS)):
        problem, row = unit // (width // COLUMNS), unit % (width // COLUMNS) * COLUMNS
        source = keys + problem // heads * key_batch + problem % heads * key_head + row * key_row
        target = address_of(columns) + (problem * width + row) * dims * 4
        _pack(half, source, key_row, min(COLUMNS, total_keys - row), dims, target)
    for unit in prange(problems * _CHUNKS):
        problem, turn = unit // _CHUNKS, unit % _CHUNKS
        chunk = turn // 2 if turn % 2 == 0 else _CHUNKS - 1 - turn // 2  # alternates long and short rows, for balance
        begin, end = min(count, chunk * size), min(count, chunk * size + size)
        for member in range(group):
            _add_rows(
                q + (problem * group + member) * count * dims * 4,
                count,
                begin,
                end,
                dims,
                address_of(columns) + problem * width * dims * 4,
                total_keys,
                band,
                scaling * _LOG2_E,
                address_of(partial) + (problem * _CHUNKS + chunk) * width * 4,
            )
    for problem in prange(problems):
        for i in range(total_keys):
            number = np.float32(0)
            for chunk in range(_CHUNKS):
                number += partial[(problem * _CHUNKS + chunk) * width + i]
            write_f32(output + (problem * total_keys + i) * 4, number)
    hold(columns)
