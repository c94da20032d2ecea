"""Triton: the attention that each key received from a block of prompt queries (column sums).

The first pass computes the log-sum-exp of every query row. In the second, each program has one block of keys and loops
over the queries that see it. There are no atomic additions, so results do not depend on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqbench.kernels.gpu import launch
from pqbench.kernels.gpu.launch import blocks, chunk_for, dense_rows, on, options, precision_for, row_products, rows_of


@triton.jit
def sees(query: tl.tensor, key: tl.tensor, total: tl.tensor, band: tl.tensor) -> tl.tensor:
    """Whether a query at position ``query`` attends to position ``key``: to the last ``band`` positions up to its
    own."""
    return (key <= query) & (key > query - band) & (query < total)


@triton.jit(do_not_specialize=["q_batch", "q_head", "q_group", "key_batch", "key_head", "count", "total", "band"])
def row_lse(
    q: tl.tensor,
    keys: tl.tensor,
    lse: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_group: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    q_row: tl.tensor,
    key_row: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    count: tl.tensor,
    total: tl.tensor,
    band: tl.tensor,
    scaling: tl.tensor,
    q_unit: tl.constexpr,
    key_unit: tl.constexpr,
    width: tl.constexpr,
    chunk: tl.constexpr,
    precision: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """Log-sum-exp ``[B*H*G, n]`` of the logits of one block of the last n queries."""
    lane = tl.program_id(1)
    i = tl.program_id(0) * block_q + tl.arange(0, block_q)
    position = total - count + i
    first_q = rows_of(q, (q_batch, q_head), lane // group, heads, q_unit)
    first_q += (lane % group).to(tl.int64) * q_unit * q_group
    queries = first_q + i.to(tl.int64) * q_row
    first_key = rows_of(keys, (key_batch, key_head), lane // group, heads, key_unit)
    top, mass = tl.full([block_q], float("-inf"), tl.float32), tl.zeros([block_q], tl.float32)
    earliest = total - count + tl.program_id(0) * block_q
    begin = tl.maximum(0, earliest - band + 1) // block_k * block_k
    for start in range(begin, tl.minimum(total, earliest + block_q), block_k):
        j = start + tl.arange(0, block_k)
        rows = first_key + j.to(tl.int64) * key_row
        score = row_products(queries, rows, i < count, j < total, width, chunk, precision) * scaling
        score = tl.where(sees(position[:, None], j[None, :], total, band), score, float("-inf"))
        above = tl.maximum(top, tl.max(score, 1))
        base = tl.where(above == float("-inf"), 0.0, above)  # avoids inf - inf for a row that sees none of these keys
        mass = mass * tl.exp(top - base) + tl.sum(tl.exp(score - base[:, None]), 1)
        top = above
    tl.store(lse + lane.to(tl.int64) * count + i, top + tl.log(mass), mask=i < count)


@triton.jit(do_not_specialize=["q_batch", "q_head", "q_group", "key_batch", "key_head", "count", "total", "band"])
def sum_columns(
    q: tl.tensor,
    keys: tl.tensor,
    lse: tl.tensor,
    sums: tl.tensor,
    q_batch: tl.tensor,
    q_head: tl.tensor,
    q_group: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    q_row: tl.tensor,
    key_row: tl.tensor,
    heads: tl.tensor,
    group: tl.tensor,
    count: tl.tensor,
    total: tl.tensor,
    band: tl.tensor,
    scaling: tl.tensor,
    q_unit: tl.constexpr,
    key_unit: tl.constexpr,
    width: tl.constexpr,
    chunk: tl.constexpr,
    precision: tl.constexpr,
    block_q: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """Sums ``[B*H, S]`` of the probabilities of a block of keys over queries and query group."""
    pair = tl.program_id(1)
    first = tl.program_id(0) * block_k
    j = first + tl.arange(0, block_k)
    rows = rows_of(keys, (key_batch, key_head), pair, heads, key_unit) + j.to(tl.int64) * key_row
    begin = tl.maximum(0, first - (total - count)) // block_q * block_q  # from the query of the block's first key
    end = tl.minimum(count, first + block_k - 1 - (total - count) + band)  # to the last query that sees the last key
    received = tl.zeros([block_k], tl.float32)
    first_q = rows_of(q, (q_batch, q_head), pair, heads, q_unit)
    for g in range(group):
        for start in range(begin, end, block_q):
            i = start + tl.arange(0, block_q)
            queries = first_q + i.to(tl.int64) * q_row
            whole = tl.load(lse + (pair.to(tl.int64) * group + g) * count + i, mask=i < count, other=0.0)
            score = row_products(queries, rows, i < count, j < total, width, chunk, precision) * scaling
            seen = sees((total - count + i)[:, None], j[None, :], total, band)
            received += tl.sum(tl.where(seen, tl.exp(score - whole[:, None]), 0.0), 0)
        first_q += tl.full([], q_unit, tl.int64) * q_group
    tl.store(sums + pair.to(tl.int64) * total + j, received, mask=j < total)


def column_sums(q: Tensor, keys: Tensor, scaling: float, band: int | None = None, rows: int = 128) -> Tensor:
    """See :func:`pqbench.kernels.reference.column_sums`; ``rows`` is ignored."""
    del rows
    q, keys = dense_rows(q), dense_rows(keys)
    batch, heads, group, count, width = q.shape
    total = keys.shape[2]
    lse = q.new_empty(batch, heads, group, count, dtype=torch.float32)
    sums = q.new_empty(batch, heads, total, dtype=torch.float32)
    precision = precision_for(q, keys)
    block_q, block_k = (32 if precision == "tf32x3" else 64), 64
    (q_unit, q_outer), (key_unit, key_outer) = launch.outer(q, axes=3), launch.outer(keys)
    strides = (*q_outer[0], *key_outer[0], q.stride(3), keys.stride(2))
    sizes = (heads, group, count, total, total if band is None else min(band, total), float(scaling))
    shape = {
        "q_unit": q_unit,
        "key_unit": key_unit,
        "width": width,
        "chunk": chunk_for(width, precision),
        "precision": precision,
        "block_q": block_q,
        "block_k": block_k,
        **options(),
    }
    with on(q):
        row_lse[(blocks(count, block_q), batch * heads * group)](q, keys, lse, *strides, *sizes, **shape)
        sum_columns[(blocks(total, block_k), batch * heads)](q, keys, lse, sums, *strides, *sizes, **shape)
    return sums
