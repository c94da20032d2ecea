"""Fused attention of one query per head: gather, logits, softmax and weighted sum in one pass, over rows at any stride.

Tokens are divided into blocks whose size depends only on the number of tokens. Threads compute the blocks, and blocks
are merged in order, so results do not depend on the number of threads. While a tile of a block is computed, the rows
two tiles ahead are prefetched, because the hardware cannot predict where selected rows are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from pqbench.kernels.cpu.lanes import bits_of, exp2, largest, splat, swap_halves
from pqbench.kernels.cpu.tiles import (
    TILE,
    add_values,
    addresses,
    arrange_queries,
    hide,
    pair_logits,
    prefetch_token,
    shrink,
    softmax_step,
    weigh,
)
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
    number_bytes,
    read_f32,
    read_f32x8,
    read_i64,
    subtract,
    write_f32,
    write_f32x8,
    write_u16,
)

_LOWEST = np.float32(-1e30)  # initial maximum; finite, so that a tile without visible tokens gives no NaN
_AHEAD = 2 * TILE  # rows are prefetched this many tokens ahead
_LN_2 = np.float32(0.6931471805599453)


@njit(**INLINE)
def _block_size(count: int) -> int:
    return 256 if count <= 16384 else 2048


@njit(**OPTIONS)
def _attend_block(
    kind: Any,
    q: int,
    heads: int,
    dims: int,
    place: Any,
    indices: int,
    rows: int,
    first: int,
    stop: int,
    visible: int,
    added: int,
    logits_out: int,
    count: int,
    record: int,
) -> bool:
    """Attention over tokens ``first`` to ``stop`` for one KV head. Maximum, sum and weighted values of each head group
    (four query heads) are written to ``record``.

    ``place`` is (keys, bytes per key row, values or 0, bytes per value row). ``added`` and ``logits_out`` are
    ``[heads, count]``, or 0. Returns whether all rows exist.
    """
    blocks, groups, row_bytes = dims // 16, (heads + 3) // 4, dims * number_bytes(kind)
    scratch = np.empty(4 * TILE + 4, np.int64)  # row addresses, logits, factors
    current = address_of(scratch)
    logits = current + 16 * TILE
    factors = logits + 16 * TILE
    size = 16 * dims + 64  # bytes of the record of a head group
    for at in range(record, record + groups * size, 32):
        write_f32x8(at, splat(np.float32(0)))
    for group in range(groups):
        write_f32x8(record + group * size, splat(_LOWEST))
    valid = True
    for start in range(first, stop, TILE):
        valid &= addresses(indices, start, stop, rows, place, current)
        for group in range(groups):
            state = record + group * size
            for i in range(0, TILE, 2):
                if group == 0:
                    prefetch_token(indices, min(start + i + _AHEAD, stop - 1), place, row_bytes)
                    prefetch_token(indices, min(start + i + 1 + _AHEAD, stop - 1), place, row_bytes)
                pair_logits(
                    kind,
                    q + group * dims * 16,
                    read_i64(current + i * 8),
                    read_i64(current + i * 8 + 8),
                    blocks,
                    logits + i * 16,
                )
            own = min(4, heads - group * 4)
            if added != 0:
                weigh(logits, start, stop, added + group * 16 * count, count, own)
            if start + TILE > stop or visible != 0:
                seen = 0 if visible == 0 else visible + group * 4 * count
                hide(logits, start, stop, seen, count, own)
            if logits_out != 0:
                for i in range(min(TILE, stop - start)):
                    for head in range(own):
                        at = logits_out + ((group * 4 + head) * count + start + i) * 4
                        write_f32(at, read_f32(logits + (i * 4 + head) * 4))
            if softmax_step(logits, state, factors):
                shrink(state + 64, factors, blocks)
            if place[2] != 0:
                add_values(kind, current + TILE * 8, logits, state + 64, blocks)
    hold(scratch)
    return valid


@njit(**INLINE)
def _merge(half: bool, records: int, step: int, parts: int, heads: int, dims: int, output: int, lse: int) -> None:
    """Merge the records of one head group, ``step`` bytes apart, into log-sum-exp and ``output`` ``[heads, D]`` (0 for
    none)."""
    top, mass = splat(_LOWEST), splat(np.float32(0))
    for part in range(parts):
        top = larger(read_f32x8(records + part * step), top)
    for part in range(parts):
        at = records + part * step
        factor = exp2(subtract(read_f32x8(at), top))
        mass = fma(read_f32x8(at + 32), factor, mass)
        write_f32x8(at, factor)
    mass = add(mass, swap_halves(mass))
    result = np.empty(8, np.float32)
    write_f32x8(address_of(result), mass)
    tops = np.empty(8, np.float32)
    write_f32x8(address_of(tops), top)
    for head in range(heads):
        write_f32(lse + head * 4, (tops[head] + np.log2(result[head])) * _LN_2)
    for vector in range(dims // 8 if output != 0 else 0):
        for head in range(heads):
            combined = splat(np.float32(0))
            for part in range(parts):
                at = records + part * step
                combined = fma(read_f32x8(at + 64 + vector * 128 + head * 32), splat(read_f32(at + head * 4)), combined)
            combined = multiply(combined, splat(np.float32(1) / result[head]))
            if half:
                write_f32x8(address_of(tops), combined)
                at = output + (head * dims + vector // 2 * 16 + vector % 2) * 4  # even or odd numbers
                for i in range(8):
                    write_f32(at + i * 8, tops[i])
            else:
                write_f32x8(output + (head * dims + vector * 8) * 4, combined)
    hold(result)
    hold(tops)


@njit(**INLINE)
def _normalise(weights: int, count: int, lse: int) -> None:
    """Turn logits ``[count]`` in units of ln 2 into probabilities, in place."""
    base = splat(read_f32(lse) / _LN_2)
    whole = count // 8 * 8
    for at in range(weights, weights + whole * 4, 32):
        write_f32x8(at, exp2(subtract(read_f32x8(at), base)))
    for at in range(weights + whole * 4, weights + count * 4, 4):
        write_f32(at, largest(exp2(subtract(splat(read_f32(at)), base))))


@njit(**OPTIONS)
def _part(
    half: bool,
    q: int,
    heads: int,
    dims: int,
    place: Any,
    indices: int,
    rows: int,
    first: int,
    stop: int,
    visible: int,
    added: int,
    logits: int,
    count: int,
    record: int,
) -> bool:
    """:func:`_attend_block` for bfloat16 (``half``) or float32 rows."""
    if half:
        return _attend_block(
            BFLOAT16, q, heads, dims, place, indices, rows, first, stop, visible, added, logits, count, record
        )
    return _attend_block(
        FLOAT32, q, heads, dims, place, indices, rows, first, stop, visible, added, logits, count, record
    )


@njit(**OPTIONS)
def _arrange(
    half: bool, half_q: bool, q: int, problems: int, heads: int, dims: int, scaling: float, target: int
) -> None:
    """Write the queries of all KV heads in the layout of head groups. Queries are bfloat16 if ``half_q``, rows if
    ``half``."""
    for problem in range(problems):
        source = q + problem * heads * dims * (2 if half_q else 4)
        place = target + problem * ((heads + 3) // 4 * 4) * dims * 4
        if half:
            arrange_queries(BFLOAT16, half_q, source, heads, dims, scaling, place)
        else:
            arrange_queries(FLOAT32, half_q, source, heads, dims, scaling, place)


@njit(**INLINE)
def _write_bfloat16(numbers: int, count: int, target: int) -> None:
    """Round float32 numbers to the nearest bfloat16, ties to even."""
    for i in range(count):
        number = read_f32(numbers + i * 4)
        bits = bits_of(number)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        write_u16(target + i * 2, np.uint16(rounded if number == number else 0x7FC0))


@njit(**OPTIONS)
def _finish(
    half: bool,
    records: int,
    step: int,
    parts: int,
    heads: int,
    count: int,
    dims: int,
    output: int,
    lse: int,
    weights: int,
) -> None:
    """Merge the records of one head group, and turn its logits ``[heads, count]`` at ``weights`` into probabilities
    unless ``weights`` is 0."""
    _merge(half, records, step, parts, heads, dims, output, lse)
    for head in range(heads if weights != 0 else 0):
        _normalise(weights + head * count * 4, count, lse + head * 4)


@njit(**OPTIONS)
def _all_set(flags: Any) -> bool:
    """Whether all of some bytes are 1."""
    every = True
    for flag in flags:
        every &= flag == 1
    return every


@njit(parallel=True, **OPTIONS)
def attend(
    half: bool,
    half_q: bool,
    q: int,
    keys: int,
    key_batch: int,
    key_head: int,
    key_row: int,
    values: int,
    value_batch: int,
    value_head: int,
    value_row: int,
    indices: int,
    visible: int,
    added: int,
    weights: int,
    output: int,
    lse: int,
    batch: int,
    heads: int,
    group: int,
    rows: int,
    count: int,
    dims: int,
    scaling: float,
) -> bool:
    """Attention of q ``[B, H, G, D]`` over ``count`` rows per head. All tensors are given by addresses and strides in
    bytes.

    Rows are bfloat16 if ``half``, otherwise float32; so are q and the output, depending on ``half_q``. Addresses of
    absent tensors are 0: ``indices`` int64 ``[B, H, n]``, ``visible`` bool ``[B, H, G, n]``, ``added`` and ``weights``
    float32 ``[B, H, G, n]``, and ``values`` with ``output`` ``[B, H, G, D]``. Returns whether all rows exist.
    """
    problems, groups, size = batch * heads, (group + 3) // 4, _block_size(count)
    parts = (count + size - 1) // size
    step = groups * (16 * dims + 64)
    queries = np.empty(problems * groups * 4 * dims, np.float32)
    records = np.empty(problems * parts * step // 4, np.float32)
    valid = np.empty(problems * parts, np.uint8)
    answers = np.empty(problems * group * dims if half_q else 0, np.float32)
    answer = address_of(answers) if half_q and output != 0 else output
    _arrange(half, half_q, q, problems, group, dims, scaling, address_of(queries))
    for unit in prange(problems * parts):
        problem, part = unit // parts, unit % parts
        sequence, head = problem // heads, problem % heads
        value = 0 if values == 0 else values + sequence * value_batch + head * value_head
        place = (keys + sequence * key_batch + head * key_head, key_row, value, value_row)
        valid[unit] = _part(
            half,
            address_of(queries) + problem * groups * dims * 16,
            group,
            dims,
            place,
            0 if indices == 0 else indices + problem * count * 8,
            rows,
            part * size,
            min(count, part * size + size),
            0 if visible == 0 else visible + problem * group * count,
            0 if added == 0 else added + problem * group * count * 4,
            0 if weights == 0 else weights + problem * group * count * 4,
            count,
            address_of(records) + unit * step,
        )
    for job in prange(problems * groups):
        problem, part = job // groups, job % groups
        row = problem * group + part * 4
        _finish(
            half,
            address_of(records) + problem * parts * step + part * (16 * dims + 64),
            step,
            parts,
            min(4, group - part * 4),
            count,
            dims,
            0 if output == 0 else answer + row * dims * 4,
            lse + row * 4,
            0 if weights == 0 else weights + row * count * 4,
        )
        if half_q and output != 0:
            _write_bfloat16(answer + row * dims * 4, min(4, group - part * 4) * dims, output + row * dims * 2)
    hold(answers)
    return _all_set(valid)
