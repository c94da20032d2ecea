"""Product-quantised probabilities without computing an exponential per token.

exp(score) is a product over sub-spaces. Tables of exponentials ``[m][K][4 heads]`` are therefore computed first; the
weight of a token is then the product of m table entries, which are loaded for four query heads at once. Entries are
relative to the largest entry of their sub-space, times 2**(100/m), and zero below 2**-126. This gives the full
precision of float32 if the weight of the best token is within a factor 2**(100/m) of the product of the largest
entries. Otherwise scores are added and an exponential is computed for each token.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from pqbench.kernels.cpu.lanes import exp2, splat4
from pqbench.kernels.cpu.vector import (
    OPTIONS,
    add,
    address_of,
    fma,
    hold,
    larger,
    read_f32,
    read_f32x4,
    subtract,
    write_f32x4,
)
from pqbench.kernels.cpu.weights import exact, into_shares, mass_of, spread_of

_HEADROOM = 100  # exponent of the factor 2**100 of all tables together; a sum over 2**26 tokens still fits
_PART = 8192  # tokens that one thread processes at once


@njit(**OPTIONS)
def _make_tables(
    q: int,
    heads: int,
    dims: int,
    codebook: int,
    clusters: int,
    width: int,
    first: int,
    target: int,
    scores: int,
    headroom: float,
) -> None:
    """Write the table ``[K][4]`` of one sub-space to ``target`` and its logarithms to ``scores``. Centroids
    ``[K, width]`` are multiplied by the dimensions from ``first`` on of q ``[heads, D]``; at most four heads are
    used."""
    turned = np.empty(width * 4, np.float32)  # [width][4]
    for w in range(width):
        for head in range(4):
            turned[w * 4 + head] = read_f32(q + (head * dims + first + w) * 4) if head < heads else np.float32(0)
    base = address_of(turned)
    top = splat4(np.float32(-np.inf))
    for c in range(0, clusters, 4):  # four independent sums hide latency; the last may repeat
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
    offset = splat4(np.float32(headroom))
    for at in range(0, clusters * 16, 16):
        write_f32x4(target + at, exp2(add(subtract(read_f32x4(scores + at), top), offset)))
    hold(turned)


@njit(**OPTIONS)
def _settle(masses: int, apart: int, parts: int, heads: int, least: float) -> bool:
    """Add up the sums of weights ``[4]`` of all parts, which are ``apart`` bytes apart, and replace the first by one
    over the total. Returns False if a total is below ``least``."""
    mass = splat4(np.float32(0))
    for part in range(parts):
        mass = add(mass, read_f32x4(masses + part * apart))
    write_f32x4(masses, mass)
    safe = True
    for head in range(min(4, heads)):
        safe &= read_f32(masses + head * 4) >= np.float32(least)
    into_shares(masses, heads)
    return safe


@njit(parallel=True, **OPTIONS)
def probabilities(
    q: int,
    codebook: int,
    codes: int,
    code_batch: int,
    code_head: int,
    code_row: int,
    output: int,
    batch: int,
    heads: int,
    group: int,
    count: int,
    dims: int,
    parts: int,
    clusters: int,
) -> None:
    """Softmax per query head, summed over the query group, float32 ``[B, H, S]``: for q ``[B, H, G, D]``, which is
    scaled and in units of ln 2, codebook ``[B, H, m, K, D/m]`` and codes ``[B, H, S, m]`` with strides in bytes."""
    problems, groups, width = batch * heads, (group + 3) // 4, dims // parts
    blocks = (count + _PART - 1) // _PART
    step, headroom = clusters * 16, _HEADROOM // parts  # bytes of a table, and the exponent of its factor
    tables = np.empty(problems * groups * parts * clusters * 8, np.float32)  # [problem][group][2: exp, log][m][K][4]
    masses = np.empty(problems * blocks * groups * 4, np.float32)
    base, sums = address_of(tables), address_of(masses)
    least = count * np.float32(2) ** (headroom * (parts - 1))  # the best token is then off by one factor at most
    for job in prange(problems * groups * parts):
        owner, j = job // parts, job % parts  # owner: problem and head group
        problem, part = owner // groups, owner % groups
        target = base + owner * 2 * parts * step + j * step
        _make_tables(
            q + (problem * group + part * 4) * dims * 4,
            group - part * 4,
            dims,
            codebook + (problem * parts + j) * clusters * width * 4,
            clusters,
            width,
            j * width,
            target,
            target + parts * step,
            headroom,
        )
    for unit in prange(problems * blocks):
        problem, start = unit // blocks, unit % blocks * _PART
        at = codes + problem // heads * code_batch + problem % heads * code_head + start * code_row
        for part in range(groups):
            table = base + (problem * groups + part) * 2 * parts * step
            mass_of(table, step, at, code_row, min(_PART, count - start), parts, sums + (unit * groups + part) * 16)
    safe = np.ones(problems, np.uint8)
    for problem in range(problems):
        for part in range(groups):
            start = sums + (problem * blocks * groups + part) * 16
            if not _settle(start, groups * 16, blocks, group - part * 4, least):
                safe[problem] = 0
    for unit in prange(problems * blocks):
        problem, start = unit // blocks, unit % blocks * _PART
        at = codes + problem // heads * code_batch + problem % heads * code_head + start * code_row
        if safe[problem] == 1:
            for part in range(groups):
                table = base + (problem * groups + part) * 2 * parts * step
                target, size = output + (problem * count + start) * 4, min(_PART, count - start)
                shares = sums + (problem * blocks * groups + part) * 16
                spread_of(table, step, at, code_row, size, parts, shares, part > 0, target)
        elif start == 0:
            for part in range(groups):
                table = base + ((problem * groups + part) * 2 + 1) * parts * step
                exact(table, step, at, code_row, count, parts, group - part * 4, part > 0, output + problem * count * 4)
    hold(tables)
    hold(masses)
