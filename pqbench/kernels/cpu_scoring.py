"""Product-quantised scores without an exponential per token.

exp(score) is a product over sub-spaces, so tables of exponentials ``[m][K][4 heads]`` are made first; the weight of a
token is then the product of m table entries, four query heads per load. Entries are relative to the largest of their sub-space
and the first table carries 2**80, which leaves the range of float32 below the best token. Where the best token lies too
far below the product of the largest entries for that, scores are added up and exponentials taken token by token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from pqbench.kernels.cpu_lanes import exp2, splat4, sums_of_quads
from pqbench.kernels.cpu_vector import (
    INLINE,
    OPTIONS,
    add,
    address_of,
    fma,
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

_HEADROOM = np.float32(80)  # a sum of 2**40 tokens still fits
_PART = 8192  # tokens that one thread takes at once
_RUN = 1024  # tokens added up in one register: short, for accuracy


@njit(**OPTIONS)
def _make_tables(
    q: int, heads: int, dims: int, codebook: int, clusters: int, width: int, first: int, target: int, scores: int
) -> None:
    """Tables ``[K][4]`` of one sub-space at ``target`` and their logarithms at ``scores``; centroids ``[K, width]``
    meet dimensions from ``first`` of q ``[heads, D]``, of which four at most."""
    turned = np.empty(width * 4, np.float32)  # [width][4]
    for w in range(width):
        for head in range(4):
            turned[w * 4 + head] = read_f32(q + (head * dims + first + w) * 4) if head < heads else np.float32(0)
    base = address_of(turned)
    top = splat4(np.float32(-np.inf))
    for c in range(0, clusters, 4):  # four chains of additions hide each other's latency; the last centroids may repeat
        c1, c2, c3 = min(c + 1, clusters - 1), min(c + 2, clusters - 1), min(c + 3, clusters - 1)
        s0 = s1 = s2 = s3 = splat4(np.float32(0))
        for w in range(width):
            number, at = read_f32x4(base + w * 16), codebook + w * 4
            s0 = fma(splat4(read_f32(at + c * width * 4)), number, s0)
            s1 = fma(splat4(read_f32(at + c1 * width * 4)), number, s1)
            s2 = fma(splat4(read_f32(at + c2 * width * 4)), number, s2)
            s3 = fma(splat4(read_f32(at + c3 * width * 4)), number, s3)
        write_f32x4(scores + c * 16, s0)
        write_f32x4(scores + c1 * 16, s1)
        write_f32x4(scores + c2 * 16, s2)
        write_f32x4(scores + c3 * 16, s3)
        top = larger(larger(s0, s1), larger(larger(s2, s3), top))
    offset = splat4(_HEADROOM if first == 0 else np.float32(0))
    for at in range(0, clusters * 16, 16):
        write_f32x4(target + at, exp2(add(subtract(read_f32x4(scores + at), top), offset)))
    hold(turned)


@njit(**INLINE)
def _weight(tables: int, step: int, codes: int, parts: int) -> Any:
    """Product of the table entries of one token: four heads; tables are ``step`` bytes apart."""
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
    """Sum of the weights of ``count`` tokens, codes ``row`` bytes apart: ``[4]`` at ``target``."""
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
def _spread(tables: int, step: int, codes: int, row: int, count: int, parts: int, more: bool, target: int) -> None:
    """Sum over heads of the weights of each token: ``[count]`` at ``target``, or added there (``more``)."""
    rest = np.empty(4, np.float32)
    for token in range(0, count, 4):
        last = count - 1 - token
        at = codes + token * row
        result = sums_of_quads(
            _weight(tables, step, at, parts),
            _weight(tables, step, at + min(1, last) * row, parts),
            _weight(tables, step, at + min(2, last) * row, parts),
            _weight(tables, step, at + min(3, last) * row, parts),
        )
        place = target + token * 4
        if last >= 3:
            write_f32x4(place, add(read_f32x4(place), result) if more else result)
        else:
            write_f32x4(address_of(rest), result)
            for i in range(last + 1):
                write_f32(place + i * 4, (read_f32(place + i * 4) if more else np.float32(0)) + rest[i])
    hold(rest)


@njit(**OPTIONS)
def _mass_of(tables: int, step: int, codes: int, row: int, count: int, parts: int, target: int) -> None:
    """:func:`_mass`, with the loop over sub-spaces unrolled where their number is usual."""
    if parts == 2:
        _mass(tables, step, codes, row, count, 2, target)
    elif parts == 4:
        _mass(tables, step, codes, row, count, 4, target)
    else:
        _mass(tables, step, codes, row, count, parts, target)


@njit(**OPTIONS)
def _spread_of(tables: int, step: int, codes: int, row: int, count: int, parts: int, more: bool, target: int) -> None:
    if parts == 2:
        _spread(tables, step, codes, row, count, 2, more, target)
    elif parts == 4:
        _spread(tables, step, codes, row, count, 4, more, target)
    else:
        _spread(tables, step, codes, row, count, parts, more, target)


@njit(**OPTIONS)
def _exact(
    scores: int, step: int, codes: int, row: int, count: int, parts: int, heads: int, more: bool, target: int
) -> None:
    """The same by softmax of added scores, for up to four heads; adds to ``target`` if ``more``."""
    top = splat4(np.float32(-np.inf))
    for token in range(count):
        top = larger(_score(scores, step, codes + token * row, parts), top)
    mass = splat4(np.float32(0))
    for start in range(0, count, _RUN):
        run = splat4(np.float32(0))
        for token in range(start, min(count, start + _RUN)):
            run = add(run, exp2(subtract(_score(scores, step, codes + token * row, parts), top)))
        mass = add(mass, run)
    numbers = np.empty(4, np.float32)
    write_f32x4(address_of(numbers), mass)
    for head in range(4):
        numbers[head] = np.float32(1) / numbers[head] if head < heads else np.float32(0)
    share = read_f32x4(address_of(numbers))
    for token in range(count):
        weight = multiply(exp2(subtract(_score(scores, step, codes + token * row, parts), top)), share)
        write_f32x4(address_of(numbers), weight)
        number = (numbers[0] + numbers[1]) + (numbers[2] + numbers[3])
        write_f32(target + token * 4, number + read_f32(target + token * 4) if more else number)
    hold(numbers)


@njit(**OPTIONS)
def _settle(masses: int, apart: int, parts: int, heads: int, count: int, table: int, clusters: int) -> bool:
    """Divide the first table by the sum of the masses ``[4]``, ``apart`` bytes apart; False if that lost precision."""
    mass = splat4(np.float32(0))
    for part in range(parts):
        mass = add(mass, read_f32x4(masses + part * apart))
    write_f32x4(masses, mass)
    safe = True
    for head in range(4):
        number = read_f32(masses + head * 4)
        safe &= head >= heads or number >= np.float32(count)  # then the best of all tokens has weight 1 at least
        write_f32(masses + head * 4, np.float32(1) / number if head < heads and safe else np.float32(0))
    share = read_f32x4(masses)
    for at in range(table, table + clusters * 16, 16):
        write_f32x4(at, multiply(read_f32x4(at), share))
    return safe


@njit(parallel=True, **OPTIONS)
def probabilities(
    q: int, codebook: int, codes: int, code_batch: int, code_head: int, code_row: int, output: int, batch: int,
    heads: int, group: int, count: int, dims: int, parts: int, clusters: int,
) -> None:  # fmt: skip
    """Group-summed softmax of q ``[B, H, G, D]`` (scaled, in units of ln 2), codebook ``[B, H, m, K, D/m]`` and codes
    ``[B, H, S, m]`` at byte strides: float32 ``[B, H, S]``."""
    problems, groups, width = batch * heads, (group + 3) // 4, dims // parts
    blocks = (count + _PART - 1) // _PART
    step = clusters * 16  # bytes of a table
    tables = np.empty(problems * groups * parts * clusters * 8, np.float32)  # [problem][group][2: exp, log][m][K][4]
    masses = np.empty(problems * blocks * groups * 4, np.float32)
    base, sums = address_of(tables), address_of(masses)
    for job in prange(problems * groups * parts):
        owner, j = job // parts, job % parts  # owner: problem and head group
        problem, part = owner // groups, owner % groups
        target = base + owner * 2 * parts * step + j * step
        _make_tables(
            q + (problem * group + part * 4) * dims * 4, group - part * 4, dims,
            codebook + (problem * parts + j) * clusters * width * 4, clusters, width, j * width, target,
            target + parts * step,
        )  # fmt: skip
    for unit in prange(problems * blocks):
        problem, start = unit // blocks, unit % blocks * _PART
        at = codes + problem // heads * code_batch + problem % heads * code_head + start * code_row
        for part in range(groups):
            table = base + (problem * groups + part) * 2 * parts * step
            _mass_of(table, step, at, code_row, min(_PART, count - start), parts, sums + (unit * groups + part) * 16)
    safe = np.empty(problems, np.uint8)
    for problem in range(problems):
        safe[problem] = 1
        for part in range(groups):
            table = base + (problem * groups + part) * 2 * parts * step
            start = sums + (problem * blocks * groups + part) * 16
            if not _settle(start, groups * 16, blocks, group - part * 4, count, table, clusters):
                safe[problem] = 0
    for unit in prange(problems * blocks):
        problem, start = unit // blocks, unit % blocks * _PART
        at = codes + problem // heads * code_batch + problem % heads * code_head + start * code_row
        if safe[problem] == 1:
            for part in range(groups):
                table = base + (problem * groups + part) * 2 * parts * step
                target, size = output + (problem * count + start) * 4, min(_PART, count - start)
                _spread_of(table, step, at, code_row, size, parts, part > 0, target)
        elif start == 0:
            for part in range(groups):
                table = base + ((problem * groups + part) * 2 + 1) * parts * step
                own = group - part * 4
                _exact(table, step, at, code_row, count, parts, own, part > 0, output + problem * count * 4)
    hold(tables)
    hold(masses)
