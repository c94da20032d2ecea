"""Triton: exact attention of one query per head over selected rows, split over the tokens (flash decoding)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from pqbench.kernels.gpu import launch
from pqbench.kernels.gpu.launch import product, read, row_products, rows_of, share
from pqbench.kernels.number import Number


@triton.jit(do_not_specialize=["key_batch", "key_head", "value_batch", "value_head", "given", "count"])
def attend_part(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    indices: tl.tensor,
    visible: tl.tensor,
    added: tl.tensor,
    logits: tl.tensor,
    part: tl.tensor,
    part_lse: tl.tensor,
    q_strides: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    value_batch: tl.tensor,
    value_head: tl.tensor,
    key_row: tl.tensor,
    value_row: tl.tensor,
    heads: tl.tensor,
    given: tl.tensor,
    count: tl.tensor,
    scaling: tl.tensor,
    unit: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    chunk: tl.constexpr,
    precision: tl.constexpr,
    value_precision: tl.constexpr,
    block_g: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Attention of one KV head over one part of its rows: output ``part`` ``[B*H, parts, G, D]`` and log-sum-exp
    ``part_lse`` ``[B*H, parts, G]``. Rows are gathered by ``indices`` ``[B*H, n]``, and logits are written to
    ``logits`` ``[B*H, G, n]``; these two, ``visible`` and ``added`` may be None. Only the first ``count`` of the
    ``given`` n rows are used."""
    pair, number = tl.program_id(0), tl.program_id(1)
    sequence, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    g, d, lane = tl.arange(0, block_g), tl.arange(0, block_d), tl.arange(0, block_n)
    queries = q + sequence * q_strides[0] + head * q_strides[1] + g * q_strides[2]
    first_key = rows_of(keys, (key_batch, key_head), pair, heads, unit)
    first_value = rows_of(values, (value_batch, value_head), pair, heads, unit)
    top = tl.full([block_g], float("-inf"), tl.float32)
    total = tl.zeros([block_g], tl.float32)
    output = tl.zeros([block_g, block_d], tl.float32)
    first, stop = share(tl.minimum(given, read(count)), block_n)
    for start in range(first, stop, block_n):
        n = start + lane
        seen = n < stop
        rows = n.to(tl.int64)
        if indices is not None:
            rows = tl.load(indices + pair.to(tl.int64) * given + n, mask=seen, other=0).to(tl.int64)
        own = first_key + rows * key_row
        score = row_products(queries, own, g < group, seen, width, chunk, precision) * scaling  # [G, n]
        inside = seen[:, None] & (d < width)[None, :]
        value = tl.load(first_value + rows[:, None] * value_row + d[None, :], mask=inside, other=0.0)
        cell = (pair.to(tl.int64) * group + g)[:, None] * given + n[None, :]
        shown = (g < group)[:, None] & seen[None, :]
        if visible is not None:
            shown = shown & (tl.load(visible + cell, mask=shown, other=0) != 0)
        if added is not None:
            score += tl.load(added + cell, mask=shown, other=0.0)
        score = tl.where(shown, score, float("-inf"))
        if logits is not None:
            tl.store(logits + cell, score, mask=(g < group)[:, None] & seen[None, :])
        above = tl.maximum(top, tl.max(score, 1))
        base = tl.where(above == float("-inf"), 0.0, above)  # avoids inf - inf while no row is visible
        weight, fade = tl.exp(score - base[:, None]), tl.exp(top - base)
        total = total * fade + tl.sum(weight, 1)
        output = output * fade[:, None] + product(weight, value, value_precision)
        top = above
    some = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log(some))
    row = (pair * tl.num_programs(1) + number).to(tl.int64) * group + g
    tl.store(part_lse + row, lse, mask=g < group)
    held = (g < group)[:, None] & (d < width)[None, :]
    tl.store(part + row[:, None] * width + d[None, :], output / some[:, None], mask=held)


@triton.jit(do_not_specialize=["parts"])
def merge_parts(
    part: tl.tensor,
    part_lse: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    parts: tl.tensor,
    group: tl.constexpr,
    width: tl.constexpr,
    most: tl.constexpr,
    block_s: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Merge the parts of one query head into attention over all rows: output ``[B*H, G, D]``, log-sum-exp
    ``[B*H, G]``."""
    pair, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, every = tl.arange(0, block_d), tl.arange(0, most)
    first = pair * parts * group + head  # parts of one query head are ``group`` apart
    whole = tl.load(part_lse + first + every * group, mask=every < parts, other=float("-inf"))
    top = tl.max(whole, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(whole - base), 0)
    sums = tl.zeros([block_d], tl.float32)
    for start in range(0, parts, block_s):
        s = start + tl.arange(0, block_s)
        row = first + s * group
        share = tl.exp(tl.load(part_lse + row, mask=s < parts, other=float("-inf")) - base)
        inside = (s < parts)[:, None] & (d < width)[None, :]
        sums += tl.sum(share[:, None] * tl.load(part + row[:, None] * width + d[None, :], mask=inside, other=0.0), 0)
    some = tl.where(total == 0.0, 1.0, total)
    tl.store(lse + pair * group + head, base + tl.log(total))
    tl.store(output + (pair * group + head) * width + d, sums / some, mask=d < width)


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    indices: Tensor | None = None,
    visible: Tensor | None = None,
    need_weights: bool = False,
    log_weights: Tensor | None = None,
    count: Number | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See :func:`pqbench.kernels.reference.attention`. Rows are gathered inside the kernel and not copied. Logits have
    float32 precision; for half types, probabilities are rounded to 11 bits before the product with the values."""
    q, keys, values = launch.dense_rows(q), launch.dense_rows(keys), launch.dense_rows(values)
    batch, heads, group, width = q.shape
    given = keys.shape[2] if indices is None else indices.shape[2]
    shape = (batch, heads, group, given)
    block_n = 32 if width > 128 or keys.dtype == torch.float32 else 64
    parts = launch.split(given, block_n, batch * heads, q.device)
    part = q.new_empty(batch, heads, parts, group, width, dtype=torch.float32)
    part_lse = q.new_empty(batch, heads, parts, group, dtype=torch.float32)
    weights = q.new_empty(shape, dtype=torch.float32) if need_weights else None
    if weights is not None and count is not None:
        weights.fill_(float("-inf"))  # rows from ``count`` on are not visited
    output, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    unit, outer = launch.outer(keys, values)
    precision = launch.precision_for(q, keys)
    with launch.on(q):
        attend_part[(batch * heads, parts)](
            q,
            keys,
            values,
            None if indices is None else indices.contiguous(),
            None if visible is None else visible.expand(shape).contiguous().view(torch.uint8),
            None if log_weights is None else log_weights.float().expand(shape).contiguous(),
            weights,
            part,
            part_lse,
            q.stride()[:3],
            *outer[0],
            *outer[1],
            keys.stride(2),
            values.stride(2),
            heads,
            given,
            given if count is None else count,
            float(scaling),
            unit=unit,
            group=group,
            width=width,
            chunk=launch.chunk_for(width, precision),
            precision=precision,
            value_precision="tf32x3" if values.dtype == torch.float32 else "tf32",
            block_g=launch.power(group, 16),
            block_n=block_n,
            block_d=launch.power(width, 16),
            **launch.options(),
        )
        _merge(part, part_lse, output, lse)
    if weights is not None:
        weights.sub_(lse[..., None]).exp_()
    return output, lse, weights


def _merge(part: Tensor, part_lse: Tensor, output: Tensor, lse: Tensor) -> None:
    """Merge outputs ``[B, H, parts, G, D]`` and log-sum-exps ``[B, H, parts, G]`` of all parts into ``output`` and
    ``lse``."""
    batch, heads, parts, group, width = part.shape
    merge_parts[(batch * heads, group)](
        part,
        part_lse,
        output,
        lse,
        parts,
        group=group,
        width=width,
        most=launch.MOST_SPLITS,
        block_s=16,
        block_d=launch.power(width, 16),
        **launch.options(),
    )


def dense_attention(q: Tensor, keys: Tensor, values: Tensor, scaling: float, count: Number | None = None) -> Tensor:
    """See :func:`pqbench.kernels.reference.dense_attention`.

    The query heads of a KV head are passed to SDPA as query positions, so that KV heads are not repeated. For half
    types, SDPA uses flash attention, which splits the work over the tokens. It has no such kernel for float32, where
    one program per head would leave most of the GPU idle; the kernel of this module is used instead. It is also used if
    ``count`` is on the device, because SDPA takes lengths from shapes.
    """
    if keys.dtype == torch.float32 or isinstance(count, Tensor):
        return attention(q, keys, values, scaling, count=count)[0]
    if count is not None:
        keys, values = keys[:, :, :count], values[:, :, :count]
    return functional.scaled_dot_product_attention(q, keys, values, scale=scaling)
