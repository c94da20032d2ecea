"""Weights of the tokens of one KV head from product-quantised codes, for four query heads at a time.

Tables are ``[m][K][4 heads]``, codes are bytes ``[S, m]``. Loops are compiled for two, for four and for any number of
sub-spaces.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pqbench.kernels.cpu.lanes import exp2, splat4, sums_of_quads
from pqbench.kernels.cpu.vector import (
    INLINE,
    OPTIONS,
    add,
    address_of,
    hold,
    larger,
    multiply,
    read_f32,
    read_f32x4,
    read_u8,
    subtract,
    write_f32,
    write_f32x4,
)

_RUN = 1024  # tokens that are added in one register; few, for accuracy


@njit(**INLINE)
def _weight(tables: int, step: int, codes: int, parts: int) -> Any:
    """Product of the table entries of one token, for four heads; tables are ``step`` bytes apart."""
    weight = read_f32x4(tables + np.int64(read_u8(codes)) * 16)
    for j in range(1, parts):
        weight = multiply(weight, read_f32x4(tables + j * step + np.int64(read_u8(codes + j)) * 16))
    return weight


@njit(**INLINE)
def _score(tables: int, step: int, codes: int, parts: int) -> Any:
    """Sum of the table entries of one token."""
    score = read_f32x4(tables + np.int64(read_u8(codes)) * 16)
    for j in range(1, parts):
        score = add(score, read_f32x4(tables + j * step + np.int64(read_u8(codes + j)) * 16))
    return score


@njit(**INLINE)
def _mass(tables: int, step: int, codes: int, row: int, count: int, parts: int, target: int) -> None:
    """Write the sum ``[4]`` of the weights of ``count`` tokens, whose codes are ``row`` bytes apart, to ``target``."""
    zero = splat4(np.float32(0))
    mass = zero
    for start in range(0, count, _RUN):
        stop = min(count, start + _RUN)
        whole = start + (stop - start) // 4 * 4
        s0 = s1 = s2 = s3 = zero
        for token in range(start, whole, 4):
            at = codes + token * row
            s0 = add(s0, _weight(tables, step, at, parts))
            s1 = add(s1, _weight(tables, step, at + row, parts))
            s2 = add(s2, _weight(tables, step, at + 2 * row, parts))
            s3 = add(s3, _weight(tables, step, at + 3 * row, parts))
        for token in range(whole, stop):
            s0 = add(s0, _weight(tables, step, codes + token * row, parts))
        mass = add(mass, add(add(s0, s1), add(s2, s3)))
    write_f32x4(target, mass)


@njit(**INLINE)
def _put(target: int, left: int, numbers: Any, more: bool) -> None:
    """Store the first ``left`` of four numbers (at most all), or add them to ``target`` with ``more``."""
    if left >= 4:
        write_f32x4(target, add(read_f32x4(target), numbers) if more else numbers)
    else:
        rest = np.empty(4, np.float32)
        write_f32x4(address_of(rest), numbers)
        for i in range(left):
            write_f32(target + i * 4, (read_f32(target + i * 4) if more else np.float32(0)) + rest[i])


@njit(**INLINE)
def _spread(
    tables: int, step: int, codes: int, row: int, count: int, parts: int, shares: int, more: bool, target: int
) -> None:
    """Write the sum over heads of weight times ``shares`` ``[4]`` for each token, ``[count]``, to ``target``, or add it
    there with ``more``."""
    share = read_f32x4(shares)
    for token in range(0, count, 4):
        left = count - token
        at = codes + token * row
        result = sums_of_quads(
            multiply(_weight(tables, step, at, parts), share),
            multiply(_weight(tables, step, at + min(1, left - 1) * row, parts), share),
            multiply(_weight(tables, step, at + min(2, left - 1) * row, parts), share),
            multiply(_weight(tables, step, at + min(3, left - 1) * row, parts), share),
        )
        _put(target + token * 4, left, result, more)


@njit(**OPTIONS)
def mass_of(tables: int, step: int, codes: int, row: int, count: int, parts: int, target: int) -> None:
    """:func:`_mass`, with the loop over sub-spaces unrolled for two and for four of them."""
    if parts == 2:
        _mass(tables, step, codes, row, count, 2, target)
    elif parts == 4:
        _mass(tables, step, codes, row, count, 4, target)
    else:
        _mass(tables, step, codes, row, count, parts, target)


@njit(**OPTIONS)
def spread_of(
    tables: int, step: int, codes: int, row: int, count: int, parts: int, shares: int, more: bool, target: int
) -> None:
    """:func:`_spread`, with the loop over sub-spaces unrolled for two and for four of them."""
    if parts == 2:
        _spread(tables, step, codes, row, count, 2, shares, more, target)
    elif parts == 4:
        _spread(tables, step, codes, row, count, 4, shares, more, target)
    else:
        _spread(tables, step, codes, row, count, parts, shares, more, target)


@njit(**INLINE)
def into_shares(masses: int, heads: int) -> None:
    """Replace the sums of weights ``[4]`` by one over them, and by zero for missing heads."""
    for head in range(4):
        share = np.float32(1) / read_f32(masses + head * 4) if head < heads else np.float32(0)
        write_f32(masses + head * 4, share)


@njit(**OPTIONS)
def exact(
    scores: int, step: int, codes: int, row: int, count: int, parts: int, heads: int, more: bool, target: int
) -> None:
    """The same result as :func:`mass_of` and :func:`spread_of`, but by a softmax of scores that are added up, for up to
    four heads."""
    top = splat4(np.float32(-np.inf))
    for token in range(count):
        top = larger(_score(scores, step, codes + token * row, parts), top)
    mass = splat4(np.float32(0))
    for start in range(0, count, _RUN):
        even = odd = splat4(np.float32(0))
        for token in range(start, min(count, start + _RUN), 2):
            at = codes + token * row
            even = add(even, exp2(subtract(_score(scores, step, at, parts), top)))
            if token + 1 < count:
                odd = add(odd, exp2(subtract(_score(scores, step, at + row, parts), top)))
        mass = add(mass, add(even, odd))
    masses = np.empty(4, np.float32)
    write_f32x4(address_of(masses), mass)
    into_shares(address_of(masses), heads)
    share = read_f32x4(address_of(masses))
    hold(masses)
    for token in range(0, count, 4):
        left, at = count - token, codes + token * row
        result = sums_of_quads(
            multiply(exp2(subtract(_score(scores, step, at, parts), top)), share),
            multiply(exp2(subtract(_score(scores, step, at + min(1, left - 1) * row, parts), top)), share),
            multiply(exp2(subtract(_score(scores, step, at + min(2, left - 1) * row, parts), top)), share),
            multiply(exp2(subtract(_score(scores, step, at + min(3, left - 1) * row, parts), top)), share),
        )
        _put(target + token * 4, left, result, more)
