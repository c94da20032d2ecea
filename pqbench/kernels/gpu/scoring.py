"""Triton: the attention every token would receive, from PQ codes or from the keys themselves.

Two launches. The first writes the logits of a part of the tokens to scratch ``[B*H, S, L]`` (L query heads of the
group, padded to a power of two) with their log-sum-exp; the second sums probabilities over the group. Products of
tables of exponentials would save the logits, but underflow where no token reaches the maximum of every sub-space.

Look-up tables of codes (:mod:`pqbench.kernels.gpu.tables`) are made by every program for itself. That saves a launch,
and a codebook is small enough to be read from the cache of the GPU once per multiprocessor.
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

_LOGITS = 8192  # of a tile of tokens by look-up
UNIT = 4096  # tokens; the second launch and those behind it split a row by these


@triton.jit
def fold(top: tl.tensor, total: tl.tensor, score: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Running maximum and sum of exponentials ``[L]`` after more logits ``[n, L]``, -inf where there is no token."""
    above = tl.maximum(top, tl.max(score, 0))
    base = tl.where(above == float("-inf"), 0.0, above)  # nothing above -inf yet: avoid inf - inf
    total = total * tl.exp(top - base) + tl.sum(tl.exp(score - base[None, :]), 0)
    return above, total


@triton.jit
def merged(
    part_lse: tl.tensor, parts: tl.tensor, group: tl.constexpr, lanes: tl.constexpr, most: tl.constexpr
) -> tl.tensor:
    """Log-sum-exp ``[L]`` of a row from those of its parts ``[parts, L]``."""
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
    """Logits ``scores`` ``[B*H, S, L]`` of one part of the tokens by table look-up of uint8 codes ``[B, H, S, m]``,
    with their log-sum-exp ``[B*H, pieces, L]``. Of the ``given`` S tokens the first ``count`` count, and none where
    ``only`` ``[B*H]`` is 0. ``tables`` are scratch ``[B*H, pieces, m, K, L]``; ``counters`` ``[B*H]`` are set to 0."""
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
        tl.debug_barrier()  # threads look up what others of their program have written
    top, total = tl.full([lanes], float("-inf"), tl.float32), tl.zeros([lanes], tl.float32)
    for start in range(first, stop, block_n):
        n = start + lane
        seen = n < stop
        score = tl.zeros([block_n, lanes], tl.float32)
        for part in tl.static_range(parts):
            code = tl.load(first_code + n.to(tl.int64) * code_row + part, mask=seen, other=0).to(tl.int32)
            entry = (part * clusters + code)[:, None] * lanes + g[None, :]  # one vector per token: the group is inner
            score += tl.load(own + entry, mask=seen[:, None], other=0.0)
        tl.store(scores + (pair * given + n)[:, None] * lanes + g[None, :], score, mask=seen[:, None])
        top, total = fold(top, total, tl.where(seen[:, None], score, float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(part_lse + here * lanes + g, base + tl.log(total))


@triton.jit
def awake(count: tl.tensor, only: tl.tensor, pair: tl.tensor) -> tl.tensor:
    """``count``, or 0 where the pair is not set in ``only``, which may be None."""
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
    """The same from keys ``[B, H, S, D]``."""
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
    """One of 256 bins, in the order of the keys (:func:`ordered`) of probabilities that are summed over a group.

    What is wanted are mostly scores around the mean, which is G / ``count``. Bins from 2**12 times the mean down to
    2**-12 times are an eighth of a power of two wide; those below, two powers. Above are few scores, by Markov's
    inequality less than count / 2**12, and they share the last bin."""
    bits = (key >> 20).to(tl.int32) & 2047  # probabilities have no sign: exponent and three bits of the fraction
    mean = (127 + 12) * 8 + 127 * 8 - (count.to(tl.float32).to(tl.int32, bitcast=True) >> 20)
    for power in tl.static_range(8):  # the logarithm of the padded group
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
    """Probabilities summed over the group, ``sums`` ``[B*H, S]``, from logits ``[B*H, S, L]`` and the log-sum-exps of
    their ``parts``; and how many of them fall into each bin, ``[B*H, pieces, 256]``, where that is wanted. ``given``,
    ``count`` and ``only`` as in :func:`score_codes`."""
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
    """Logits ``[B, H, S, L]`` of the first ``count`` codes ``[B, H, S, m]`` of heads that ``only`` ``[B, H]`` sets, or
    all; their log-sum-exps by part ``[B, H, pieces, L]``; and a zero for every head ``[B, H]``."""
    q, codes, codebook = launch.dense_rows(q), launch.dense_rows(codes), codebook.contiguous()
    batch, heads, group, _ = q.shape
    parts, clusters, width = codebook.shape[2:]
    lanes, given, block_w = launch.power(group), codes.shape[2], launch.power(width)
    pieces = max(1, min(launch.MOST_SPLITS, launch.processors(q.device) // (batch * heads)))  # one on a multiprocessor
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
    """Sum probabilities over the group: ``[B, H, S]``; and fill ``histograms`` ``[B, H, pieces, 256]`` if they are
    given, of as many pieces as :func:`pieces_for` says."""
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
    """Pieces of a row behind the first launch: a power of two, whatever the number of tokens."""
    wanted = min(launch.MOST_SPLITS, max(1, 2 * launch.processors(device) // rows))
    return 1 << (wanted.bit_length() - 1)
