"""Triton: the attention that each token would receive, from codes or from the keys themselves.

There are two launches. In the first, each program writes the logits of a part of the tokens to a scratch tensor
``[B*H, S, L]``, where L is the size of the query group padded to a power of two, and their log-sum-exp. The second
sums probabilities over the query group. Products of tables of exponentials would need no logits, but they underflow if
no token is near the maximum of every sub-space.

Every program computes its own look-up tables of codes (:mod:`pqbench.kernels.gpu.tables`). This saves a launch, and a
codebook is small enough to be read from the cache of the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqbench.kernels.gpu import launch
from pqbench.kernels.gpu.launch import read, row_products, rows_of, share
from pqbench.kernels.gpu.tables import fill_tables
from pqbench.kernels.gpu.top_k import ordered
from pqbench.kernels.number import Number

_LOGITS = 8192  # logits of a tile of tokens
UNIT = 4096  # tokens; the second launch and the following ones split a row into units of this size


@triton.jit
def fold(top: tl.tensor, total: tl.tensor, score: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Running maximum and sum of exponentials ``[L]``, updated with logits ``[n, L]``, which are -inf for missing
    tokens."""
    above = tl.maximum(top, tl.max(score, 0))
    base = tl.where(above == float("-inf"), 0.0, above)  # avoids inf - inf before the first token
    total = total * tl.exp(top - base) + tl.sum(tl.exp(score - base[None, :]), 0)
    return above, total


@triton.jit
def merged(
    part_lse: tl.tensor, parts: tl.tensor, group: tl.constexpr, lanes: tl.constexpr, most: tl.constexpr
) -> tl.tensor:
    """Log-sum-exp ``[L]`` of a row, from the log-sum-exps ``[parts, L]`` of its parts."""
    g, part = tl.arange(0, lanes), tl.arange(0, most)
    held = (part < parts)[:, None] & (g < group)[None, :]
    lse = tl.load(part_lse + part[:, None] * lanes + g[None, :], mask=held, other=float("-inf"))
    top = tl.max(lse, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    return base + tl.log(tl.sum(tl.exp(lse - base[None, :]), 0))


@triton.jit(do_not_specialize=["code_batch", "code_head", "given", "count"])
def score_codes(
    q: tl.tensor,
    codebook: tl.tensor,
    codes: tl.tensor,
    only: tl.tensor,
    tables: tl.tensor,
    scores: tl.tensor,
    part_lse: tl.tensor,
    counters: tl.tensor,
    q_strides: tl.tensor,
    code_batch: tl.tensor,
    code_head: tl.tensor,
    code_row: tl.tensor,
    heads: tl.tensor,
    given: tl.tensor,
    count: tl.tensor,
    scaling: tl.tensor,
    clusters: tl.constexpr,
    parts: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    lanes: tl.constexpr,
    block_k: tl.constexpr,
    block_w: tl.constexpr,
    block_n: tl.constexpr,
) -> None:
    """Logits ``scores`` ``[B*H, S, L]`` of one part of the tokens, by table look-up of codes uint8 ``[B, H, S, m]``,
    and their log-sum-exp ``part_lse`` ``[B*H, pieces, L]``. Only the first ``count`` of the ``given`` S tokens are
    scored, and none of a head whose ``only`` ``[B*H]`` is 0. ``tables`` ``[B*H, pieces, m, K, L]`` is scratch memory;
    ``counters`` ``[B*H]`` are set to 0."""
    pair, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, lane = tl.arange(0, lanes), tl.arange(0, block_n)
    here = pair * tl.num_programs(1) + number
    if number == 0:
        tl.store(counters + pair, 0)
    first, stop = share(awake(read(count), only, pair), block_n)
    first_code = rows_of(codes, (code_batch, code_head), pair, heads, 1)
    own = tables + here * parts * clusters * lanes
    if first < stop:
        query = rows_of(q, q_strides, pair, heads, 1)
        book = codebook + pair * parts * clusters * width
        fill_tables(query, book, own, q_strides[2], scaling, clusters, parts, group, width, lanes, block_k, block_w)
        tl.debug_barrier()  # threads read what other threads of their program have written
    top, total = tl.full([lanes], float("-inf"), tl.float32), tl.zeros([lanes], tl.float32)
    for start in range(first, stop, block_n):
        n = start + lane
        seen = n < stop
        score = tl.zeros([block_n, lanes], tl.float32)
        for part in tl.static_range(parts):
            code = tl.load(first_code + n.to(tl.int64) * code_row + part, mask=seen, other=0).to(tl.int32)
            entry = (part * clusters + code)[:, None] * lanes + g[None, :]  # one vector per token
            score += tl.load(own + entry, mask=seen[:, None], other=0.0)
        tl.store(scores + (pair * given + n)[:, None] * lanes + g[None, :], score, mask=seen[:, None])
        top, total = fold(top, total, tl.where(seen[:, None], score, float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(part_lse + here * lanes + g, base + tl.log(total))


@triton.jit
def awake(count: tl.tensor, only: tl.tensor, pair: tl.tensor) -> tl.tensor:
    """``count``, or 0 if ``only`` is given and is 0 for this pair of sequence and head."""
    if only is not None:
        count = tl.where(tl.load(only + pair) != 0, count, 0)
    return count


@triton.jit(do_not_specialize=["key_batch", "key_head", "count"])
def score_keys(
    q: tl.tensor,
    keys: tl.tensor,
    scores: tl.tensor,
    part_lse: tl.tensor,
    q_strides: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    key_row: tl.tensor,
    heads: tl.tensor,
    count: tl.tensor,
    scaling: tl.tensor,
    unit: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    lanes: tl.constexpr,
    chunk: tl.constexpr,
    precision: tl.constexpr,
    block_g: tl.constexpr,
    block_n: tl.constexpr,
) -> None:
    """Logits ``scores`` ``[B*H, S, L]`` of one part of the tokens from keys ``[B, H, S, D]``, and their log-sum-exp
    ``part_lse`` ``[B*H, pieces, L]``."""
    pair, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, lane = tl.arange(0, block_g), tl.arange(0, block_n)
    queries = rows_of(q, q_strides, pair, heads, 1) + g * q_strides[2]
    first_key = rows_of(keys, (key_batch, key_head), pair, heads, unit)
    top, total = tl.full([block_g], float("-inf"), tl.float32), tl.zeros([block_g], tl.float32)
    first, stop = share(count, block_n)
    for start in range(first, stop, block_n):
        n = start + lane
        rows = first_key + n.to(tl.int64) * key_row
        score = row_products(rows, queries, n < stop, g < group, width, chunk, precision) * scaling  # [n, G]
        seen = (n < stop)[:, None] & (g < lanes)[None, :]
        tl.store(scores + (pair * count + n)[:, None] * lanes + g[None, :], score, mask=seen)
        top, total = fold(top, total, tl.where((n < stop)[:, None], score, float("-inf")))
    row = (pair * tl.num_programs(1) + number) * lanes + g
    tl.store(part_lse + row, tl.where(top == float("-inf"), 0.0, top) + tl.log(total), mask=g < lanes)


@triton.jit
def bin_of(key: tl.tensor, count: tl.tensor, lanes: tl.constexpr) -> tl.tensor:
    """The bin, 0 to 255, of a probability that was summed over a query group, given by its key (:func:`ordered`). Bins
    have the order of the probabilities.

    The threshold of a selection is mostly near the mean, which is G / ``count``. Bins between 2**-12 and 2**12 times
    the mean are therefore narrow: there are eight per power of two. Below, a bin covers two powers of two. Above, all
    probabilities share the last bin; by Markov's inequality these are fewer than count / 2**12."""
    bits = (key >> 20).to(tl.int32) & 2047  # exponent and three bits of the fraction; the sign is 0
    mean = (127 + 12) * 8 + 127 * 8 - (count.to(tl.float32).to(tl.int32, bitcast=True) >> 20)
    for power in tl.static_range(8):  # adds the logarithm of the padded group
        if (1 << power) < lanes:
            mean += 8
    below = tl.maximum(mean - bits, 0)
    return tl.where(below < 192, 255 - below, 63 - tl.minimum((below - 192) >> 4, 63))


@triton.jit(do_not_specialize=["given", "count", "parts"])
def sum_group(
    scores: tl.tensor,
    part_lse: tl.tensor,
    only: tl.tensor,
    sums: tl.tensor,
    histograms: tl.tensor,
    given: tl.tensor,
    count: tl.tensor,
    parts: tl.tensor,
    group: tl.constexpr,
    lanes: tl.constexpr,
    most: tl.constexpr,
    unit: tl.constexpr,
    block_n: tl.constexpr,
) -> None:
    """Probabilities summed over the query group, ``sums`` ``[B*H, S]``, from logits ``[B*H, S, L]`` and the
    log-sum-exps of their ``parts``. Unless ``histograms`` ``[B*H, pieces, 256]`` is None, the numbers of sums in each
    bin are written there. ``given``, ``count`` and ``only`` as in :func:`score_codes`."""
    pair, g = tl.program_id(0).to(tl.int64), tl.arange(0, lanes)
    whole = merged(part_lse + pair * parts * lanes, parts, group, lanes, most)  # [L]
    count = read(count)
    first, stop = share(awake(count, only, pair), unit)
    histogram = tl.zeros([256], tl.int32)
    for start in range(first, stop, block_n):
        n = start + tl.arange(0, block_n)
        cell = (pair * given + n)[:, None] * lanes + g[None, :]
        score = tl.load(scores + cell, mask=(n < stop)[:, None], other=0.0)
        weight = tl.where((g < group)[None, :], tl.exp(score - whole[None, :]), 0.0)
        total = tl.sum(weight, 1)
        tl.store(sums + pair * given + n, total, mask=n < stop)
        if histograms is not None:
            histogram += tl.histogram(bin_of(ordered(total), count, lanes), 256, mask=n < stop)
    if histograms is not None:
        here = pair * tl.num_programs(1) + tl.program_id(1)
        tl.store(histograms + here * 256 + tl.arange(0, 256), histogram)


def pq_probabilities(q: Tensor, codebook: Tensor, codes: Tensor, scaling: float) -> Tensor:
    """See :func:`pqbench.kernels.reference.pq_probabilities`."""
    scores, part_lse = scan(q, codebook, codes, scaling, codes.shape[2])[:2]
    return sum_over_group(q, scores, part_lse)


def scan(
    q: Tensor, codebook: Tensor, codes: Tensor, scaling: float, count: Number, only: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Score the first ``count`` of the codes ``[B, H, S, m]``, for the heads that are set in ``only`` ``[B, H]`` or for
    all.

    Returns:
        logits ``[B, H, S, L]``, the log-sum-exps of their parts ``[B, H, pieces, L]``, and int32 zeros ``[B, H]``.
    """
    q, codes, codebook = launch.dense_rows(q), launch.dense_rows(codes), codebook.contiguous()
    batch, heads, group, _ = q.shape
    parts, clusters, width = codebook.shape[2:]
    lanes, given, block_w = launch.power(group), codes.shape[2], launch.power(width)
    pieces = max(1, min(launch.MOST_SPLITS, launch.processors(q.device) // (batch * heads)))  # one per multiprocessor
    scores = q.new_empty(batch, heads, given, lanes, dtype=torch.float32)
    part_lse = q.new_empty(batch, heads, pieces, lanes, dtype=torch.float32)
    tables = q.new_empty(batch, heads, pieces, parts * clusters * lanes, dtype=torch.float32)
    counters = q.new_empty(batch, heads, dtype=torch.int32)
    with launch.on(q):
        score_codes[(batch * heads, pieces)](
            q,
            codebook,
            codes,
            only,
            tables,
            scores,
            part_lse,
            counters,
            q.stride()[:3],
            *codes.stride()[:3],
            heads,
            given,
            count,
            float(scaling),
            clusters=clusters,
            parts=parts,
            group=group,
            width=width,
            lanes=lanes,
            block_k=min(launch.power(clusters), max(1, _LOGITS // block_w)),
            block_w=block_w,
            block_n=max(64, _LOGITS // (lanes if max(parts, lanes) <= 4 else 2 * lanes)),
            **launch.options(16),
        )
    return scores, part_lse, counters


def exact_probabilities(q: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """See :func:`pqbench.kernels.reference.exact_probabilities`."""
    q, keys = launch.dense_rows(q), launch.dense_rows(keys)
    batch, heads, group, width = q.shape
    count, lanes, block_n = keys.shape[2], launch.power(group), 64
    pieces = launch.split(count, block_n, batch * heads, q.device)
    scores = q.new_empty(batch, heads, count, lanes, dtype=torch.float32)
    part_lse = q.new_empty(batch, heads, pieces, lanes, dtype=torch.float32)
    precision, (unit, outer) = launch.precision_for(q, keys), launch.outer(keys)
    with launch.on(q):
        score_keys[(batch * heads, pieces)](
            q,
            keys,
            scores,
            part_lse,
            q.stride()[:3],
            *outer[0],
            keys.stride(2),
            heads,
            count,
            float(scaling),
            unit=unit,
            group=group,
            width=width,
            lanes=lanes,
            chunk=launch.chunk_for(width, precision),
            precision=precision,
            block_g=launch.power(group, 16),
            block_n=block_n,
            **launch.options(),
        )
    return sum_over_group(q, scores, part_lse)


def sum_over_group(
    q: Tensor,
    scores: Tensor,
    part_lse: Tensor,
    count: Number | None = None,
    only: Tensor | None = None,
    histograms: Tensor | None = None,
) -> Tensor:
    """Probabilities summed over the query group, ``[B, H, S]``. If ``histograms`` ``[B, H, pieces, 256]`` are given,
    with as many pieces as :func:`pieces_for` returns, they are filled as in :func:`sum_group`."""
    batch, heads, given, lanes = scores.shape
    sums = q.new_empty(batch, heads, given, dtype=torch.float32)
    with launch.on(q):
        sum_group[(batch * heads, pieces_for(batch * heads, q.device))](
            scores,
            part_lse,
            only,
            sums,
            histograms,
            given,
            given if count is None else count,
            part_lse.shape[2],
            group=q.shape[2],
            lanes=lanes,
            most=launch.MOST_SPLITS,
            unit=UNIT,
            block_n=max(64, _LOGITS // (2 * lanes)),
            **launch.options(8),
        )
    return sums


def pieces_for(rows: int, device: torch.device) -> int:
    """Number of pieces of a row in the launches after the first one: a power of two that does not depend on the number
    of tokens."""
    wanted = min(launch.MOST_SPLITS, max(1, 2 * launch.processors(device) // rows))
    return 1 << (wanted.bit_length() - 1)
