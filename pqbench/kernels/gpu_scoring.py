"""Triton: the attention every token would receive, from PQ codes or from the keys themselves.

Two passes. The first writes the logits of a part of the tokens to scratch ``[B*H, S, L]`` (L query heads of the group,
padded to a power of two) with their log-sum-exp; the second sums probabilities over the group. Products of tables of
exponentials would save the logits, but underflow where no token reaches the maximum of every sub-space.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqbench.kernels import gpu_launch as launch
from pqbench.kernels.gpu_launch import row_products

_TOKENS = 128  # of a tile


@triton.jit
def look_up_tables(
    q: tl.tensor, codebook: tl.tensor, tables: tl.tensor, q_strides: tl.tensor, heads: tl.tensor, clusters: tl.tensor,
    scaling: tl.tensor, parts: tl.constexpr, group: tl.constexpr, width: tl.constexpr, lanes: tl.constexpr,
    block_k: tl.constexpr, block_w: tl.constexpr,
) -> None:  # fmt: skip
    """Scaled products of every centroid with its part of every query head: ``tables`` ``[B*H, m, K, L]``, from a
    codebook ``[B*H, m, K, D/m]``. One program per sub-space and block of centroids."""
    problem = tl.program_id(0)
    pair, part = problem // parts, problem % parts
    sequence, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    k, w = tl.program_id(1) * block_k + tl.arange(0, block_k), tl.arange(0, block_w)
    row = problem.to(tl.int64) * clusters + k
    inside = (k < clusters)[:, None] & (w < width)[None, :]
    centroid = tl.load(codebook + row[:, None] * width + w[None, :], mask=inside, other=0.0)
    first = q + sequence * q_strides[0] + head * q_strides[1] + part * width
    for g in range(group):
        query = tl.load(first + g * q_strides[2] + w, mask=w < width, other=0.0).to(tl.float32)
        tl.store(tables + row * lanes + g, tl.sum(centroid * query[None, :], 1) * scaling, mask=k < clusters)


@triton.jit
def fold(top: tl.tensor, total: tl.tensor, score: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Running maximum and sum of exponentials ``[L]`` after more logits ``[n, L]``, -inf where there is no token."""
    above = tl.maximum(top, tl.max(score, 0))
    total = total * tl.exp(top - above) + tl.sum(tl.exp(score - above[None, :]), 0)
    return above, total


@triton.jit(do_not_specialize=["count", "size"])
def score_codes(
    tables: tl.tensor, codes: tl.tensor, scores: tl.tensor, part_lse: tl.tensor, code_strides: tl.tensor,
    heads: tl.tensor, count: tl.tensor, size: tl.tensor, clusters: tl.tensor, parts: tl.constexpr, group: tl.constexpr,
    lanes: tl.constexpr, block_n: tl.constexpr,
) -> None:  # fmt: skip
    """Logits of one part of the tokens by table look-up of uint8 codes ``[B, H, S, m]``, with their log-sum-exp
    ``[B*H, parts, L]``."""
    pair, number = tl.program_id(0), tl.program_id(1)
    sequence, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    g, lane = tl.arange(0, lanes), tl.arange(0, block_n)
    first_code = codes + sequence * code_strides[0] + head * code_strides[1]
    first_table = tables + pair.to(tl.int64) * parts * clusters * lanes
    top, total = tl.full([lanes], float("-inf"), tl.float32), tl.zeros([lanes], tl.float32)
    stop = tl.minimum(count, (number + 1) * size)
    for start in range(number * size, stop, block_n):
        n = start + lane
        seen = (n < stop)[:, None] & (g < group)[None, :]
        score = tl.zeros([block_n, lanes], tl.float32)
        for part in tl.static_range(parts):
            code = tl.load(first_code + n.to(tl.int64) * code_strides[2] + part, mask=n < stop, other=0).to(tl.int32)
            entry = (part * clusters + code)[:, None] * lanes + g[None, :]  # one vector per token: the group is inner
            score += tl.load(first_table + entry, mask=seen, other=0.0)
        tl.store(scores + (pair.to(tl.int64) * count + n)[:, None] * lanes + g[None, :], score, mask=seen)
        top, total = fold(top, total, tl.where((n < stop)[:, None], score, float("-inf")))
    tl.store(part_lse + (pair * tl.num_programs(1) + number) * lanes + g, top + tl.log(total))


@triton.jit(do_not_specialize=["count", "size"])
def score_keys(
    q: tl.tensor, keys: tl.tensor, scores: tl.tensor, part_lse: tl.tensor, q_strides: tl.tensor, key_strides: tl.tensor,
    heads: tl.tensor, count: tl.tensor, size: tl.tensor, scaling: tl.tensor, group: tl.constexpr, width: tl.constexpr,
    lanes: tl.constexpr, chunk: tl.constexpr, precision: tl.constexpr, block_g: tl.constexpr, block_n: tl.constexpr,
) -> None:  # fmt: skip
    """The same from keys ``[B, H, S, D]``."""
    pair, number = tl.program_id(0), tl.program_id(1)
    sequence, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    g, lane = tl.arange(0, block_g), tl.arange(0, block_n)
    queries = q + sequence * q_strides[0] + head * q_strides[1] + g * q_strides[2]
    first_key = keys + sequence * key_strides[0] + head * key_strides[1]
    top, total = tl.full([block_g], float("-inf"), tl.float32), tl.zeros([block_g], tl.float32)
    stop = tl.minimum(count, (number + 1) * size)
    for start in range(number * size, stop, block_n):
        n = start + lane
        rows = first_key + n.to(tl.int64) * key_strides[2]
        score = row_products(rows, queries, n < stop, g < group, width, chunk, precision) * scaling  # [n, G]
        seen = (n < stop)[:, None] & (g < group)[None, :]
        tl.store(scores + (pair.to(tl.int64) * count + n)[:, None] * lanes + g[None, :], score, mask=seen)
        top, total = fold(top, total, tl.where((n < stop)[:, None], score, float("-inf")))
    row = (pair * tl.num_programs(1) + number) * lanes + g
    tl.store(part_lse + row, top + tl.log(total), mask=g < group)


@triton.jit(do_not_specialize=["count", "parts"])
def sum_group(
    scores: tl.tensor, part_lse: tl.tensor, sums: tl.tensor, count: tl.tensor, parts: tl.tensor, group: tl.constexpr,
    lanes: tl.constexpr, most: tl.constexpr, block_n: tl.constexpr,
) -> None:  # fmt: skip
    """Probabilities summed over the group, ``sums`` ``[B*H, S]``, from logits ``[B*H, S, L]``."""
    pair, g, s = tl.program_id(0), tl.arange(0, lanes), tl.arange(0, most)
    held = (s < parts)[:, None] & (g < group)[None, :]
    lse = tl.load(part_lse + (pair * parts + s)[:, None] * lanes + g[None, :], mask=held, other=float("-inf"))
    top = tl.where(g < group, tl.max(lse, 0), 0.0)
    whole = top + tl.log(tl.sum(tl.exp(lse - top[None, :]), 0))  # [L]
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    seen = (n < count)[:, None] & (g < group)[None, :]
    cell = (pair.to(tl.int64) * count + n)[:, None] * lanes + g[None, :]
    score = tl.load(scores + cell, mask=seen, other=float("-inf"))
    weight = tl.where(seen, tl.exp(score - whole[None, :]), 0.0)
    tl.store(sums + pair.to(tl.int64) * count + n, tl.sum(weight, 1), mask=n < count)


def pq_probabilities(q: Tensor, codebook: Tensor, codes: Tensor, scaling: float) -> Tensor:
    """See :func:`pqbench.kernels.reference.pq_probabilities`."""
    q, codes, codebook = launch.dense_rows(q), launch.dense_rows(codes), codebook.contiguous()
    batch, heads, group, _ = q.shape
    parts, clusters = codebook.shape[2:4]
    lanes, count = launch.power(group), codes.shape[2]
    scores, part_lse, pieces, size = scratch(q, count, lanes)
    tables = scored_tables(q, codebook, scaling)
    with launch.on(q):
        score_codes[(batch * heads, pieces)](
            tables, codes, scores, part_lse, codes.stride()[:3], heads, count, size, clusters, parts=parts, group=group,
            lanes=lanes, block_n=_TOKENS, **launch.options(),
        )  # fmt: skip
    return sum_over_group(q, scores, part_lse, pieces)


def exact_probabilities(q: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """See :func:`pqbench.kernels.reference.exact_probabilities`."""
    q, keys = launch.dense_rows(q), launch.dense_rows(keys)
    batch, heads, group, width = q.shape
    count, lanes = keys.shape[2], launch.power(group)
    scores, part_lse, pieces, size = scratch(q, count, lanes)
    precision = launch.precision_for(q, keys)
    with launch.on(q):
        score_keys[(batch * heads, pieces)](
            q, keys, scores, part_lse, q.stride()[:3], keys.stride()[:3], heads, count, size, float(scaling),
            group=group, width=width, lanes=lanes, chunk=launch.chunk_for(width, precision), precision=precision,
            block_g=launch.power(group, 16), block_n=64, **launch.options(),
        )  # fmt: skip
    return sum_over_group(q, scores, part_lse, pieces)


def scored_tables(q: Tensor, codebook: Tensor, scaling: float) -> Tensor:
    """Scaled products ``[B, H, m, K, L]`` of q ``[B, H, G, D]`` with a contiguous codebook ``[B, H, m, K, D/m]``."""
    batch, heads, group, _ = q.shape
    parts, clusters, width = codebook.shape[2:]
    lanes, block_k = launch.power(group), min(64, launch.power(clusters, 16))
    tables = q.new_empty(batch, heads, parts, clusters, lanes, dtype=torch.float32)
    with launch.on(q):
        look_up_tables[(batch * heads * parts, launch.blocks(clusters, block_k))](
            q, codebook, tables, q.stride()[:3], heads, clusters, float(scaling), parts=parts, group=group, width=width,
            lanes=lanes, block_k=block_k, block_w=launch.power(width), **launch.options(),
        )  # fmt: skip
    return tables


def scratch(q: Tensor, count: int, lanes: int) -> tuple[Tensor, Tensor, int, int]:
    """Room for logits and for log-sum-exps, the number of parts, and tokens of each."""
    batch, heads = q.shape[:2]
    pieces, size = launch.split(count, _TOKENS, batch * heads, q.device)
    scores = q.new_empty(batch, heads, count, lanes, dtype=torch.float32)
    return scores, q.new_empty(batch, heads, pieces, lanes, dtype=torch.float32), pieces, size


def sum_over_group(q: Tensor, scores: Tensor, part_lse: Tensor, pieces: int) -> Tensor:
    """Sum probabilities over the group: ``[B, H, S]``."""
    batch, heads, count, lanes = scores.shape
    sums = q.new_empty(batch, heads, count, dtype=torch.float32)
    block_n = max(32, 4 * _TOKENS // lanes)
    with launch.on(q):
        sum_group[(batch * heads, launch.blocks(count, block_n))](
            scores, part_lse, sums, count, pieces, group=q.shape[2], lanes=lanes, most=launch.MOST_SPLITS,
            block_n=block_n, **launch.options(),
        )  # fmt: skip
    return sums
