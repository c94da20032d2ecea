"""Triton: one kernel writes new rows into buffers, another one fetches selected rows from page-locked host memory.

The GPU reads page-locked memory directly: the launcher asks the driver for its address on the device. A program copies
some rows with loads of 16 bytes per thread, so that many requests are on the link at once. Offsets have 64 bits. Host
memory that a kernel reads may be freed only after the kernel is done, see :mod:`pqbench.store.link.held`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqbench.kernels.gpu.launch import blocks as tiles
from pqbench.kernels.gpu.launch import dense_rows, on, options, outer, power, read, rows_of
from pqbench.kernels.gpu.rows import tile
from pqbench.kernels.number import Number
from pqbench.kernels.reference.rows import Blocks, HostTokens


@triton.jit(
    do_not_specialize=[
        "at",
        "ring",
        "sinks",
        "key_batch",
        "key_head",
        "value_batch",
        "value_head",
        "key_row_batch",
        "key_row_head",
        "value_row_batch",
        "value_row_head",
    ]
)
def write_rows(
    keys: tl.tensor,
    values: tl.tensor,
    key_rows: tl.tensor,
    value_rows: tl.tensor,
    local: tl.tensor,
    at: tl.tensor,
    key_batch: tl.tensor,
    key_head: tl.tensor,
    value_batch: tl.tensor,
    value_head: tl.tensor,
    key_row_batch: tl.tensor,
    key_row_head: tl.tensor,
    value_row_batch: tl.tensor,
    value_row_head: tl.tensor,
    heads: tl.tensor,
    ring: tl.tensor,
    sinks: tl.tensor,
    unit: tl.constexpr,
    row_unit: tl.constexpr,
    key_step: tl.constexpr,
    value_step: tl.constexpr,
    key_row_step: tl.constexpr,
    value_row_step: tl.constexpr,
    width: tl.constexpr,
    block_w: tl.constexpr,
    wraps: tl.constexpr,
) -> None:
    """Write new row i of one head to row ``at`` + i of ``key_rows`` and ``value_rows``, or with ``wraps`` to its row of
    the ring."""
    i, pair = tl.program_id(0), tl.program_id(1)
    token = (read(at) + i).to(tl.int64)
    row = token
    if wraps:
        row = token % ring
        if pair == 0:
            tl.store(local + token, sinks.to(tl.int64) + row)
            tl.store(local + token - ring, -1, mask=token - ring >= sinks)
    w = tl.arange(0, block_w)
    inside = w < width
    key = tl.load(rows_of(keys, (key_batch, key_head), pair, heads, unit) + i * key_step + w, mask=inside)
    value = tl.load(rows_of(values, (value_batch, value_head), pair, heads, unit) + i * value_step + w, mask=inside)
    key_goal = rows_of(key_rows, (key_row_batch, key_row_head), pair, heads, row_unit)
    value_goal = rows_of(value_rows, (value_row_batch, value_row_head), pair, heads, row_unit)
    tl.store(key_goal + row * key_row_step + w, key, mask=inside)
    tl.store(value_goal + row * value_row_step + w, value, mask=inside)


def append_rows(
    keys: Tensor,
    values: Tensor,
    key_rows: Tensor,
    value_rows: Tensor,
    at: Number,
    local: Tensor | None = None,
    sinks: int = 0,
) -> None:
    """See :func:`pqbench.kernels.reference.rows.append_rows`."""
    batch, heads, count, width = keys.shape
    keys, values = dense_rows(keys.to(key_rows.dtype)), dense_rows(values.to(value_rows.dtype))
    (unit, new), (row_unit, old) = outer(keys, values), outer(key_rows, value_rows)
    with on(key_rows):
        write_rows[(count, batch * heads)](
            keys,
            values,
            key_rows,
            value_rows,
            key_rows if local is None else local,
            at,
            *new[0],
            *new[1],
            *old[0],
            *old[1],
            heads,
            key_rows.shape[2],
            sinks,
            unit=unit,
            row_unit=row_unit,
            key_step=keys.stride(2),
            value_step=values.stride(2),
            key_row_step=key_rows.stride(2),
            value_row_step=value_rows.stride(2),
            width=width,
            block_w=power(width),
            wraps=local is not None,
            **options(1),
        )


@triton.jit
def copy_tile(
    rows: tl.tensor,
    row: tl.tensor,
    table: tl.tensor,
    place: tl.tensor,
    seen: tl.tensor,
    width: tl.constexpr,
    block_w: tl.constexpr,
) -> tl.tensor:
    """Copy rows ``row`` ``[N]`` of dense ``rows`` to rows ``place`` ``[N]`` of a dense table where ``seen`` ``[N]``.
    Returns how many were copied, int64."""
    for start in tl.static_range(0, width, block_w):
        w = start + tl.arange(0, block_w)
        inside = seen[:, None] & (w < width)[None, :]
        moved = tl.load(rows + row[:, None] * width + w[None, :], mask=inside)
        tl.store(table + place[:, None] * width + w[None, :], moved, mask=inside)
    return tl.sum(seen.to(tl.int64), 0)


@triton.jit(
    do_not_specialize=[
        "count",
        "number",
        "positions",
        "resident",
        "staging",
        "start",
        "middle",
        "stop",
        "held",
        "held_more",
        "shared",
        "every",
        "size",
        "first",
    ]
)
def find_and_copy(
    indices: tl.tensor,
    local: tl.tensor,
    table: tl.tensor,
    slots: tl.tensor,
    rows: tl.tensor,
    more: tl.tensor,
    tally: tl.tensor,
    where: tl.tensor,
    counts: tl.tensor,
    count: tl.tensor,
    number: tl.tensor,
    positions: tl.tensor,
    resident: tl.tensor,
    staging: tl.tensor,
    start: tl.tensor,
    middle: tl.tensor,
    stop: tl.tensor,
    held: tl.tensor,
    held_more: tl.tensor,
    shared: tl.tensor,
    every: tl.tensor,
    size: tl.tensor,
    first: tl.tensor,
    cached: tl.constexpr,
    width: tl.constexpr,
    block_n: tl.constexpr,
    block_w: tl.constexpr,
) -> None:
    """Fetch some tokens of one head; see :func:`pqbench.kernels.reference.rows.fetch_rows`."""
    pair = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    matters = n < tl.minimum(read(count), number)
    token = tl.load(indices + pair * number + n, mask=matters, other=-1).to(tl.int64)
    known = matters & (token >= 0) & (token < positions)
    row = tl.load(local + token, mask=known, other=-1)
    here = known & (row < 0) & (token >= start) & (token < stop)
    if cached:
        entry = pair // shared * every + token // size
        inside = known & (row < 0) & (token // size < every)
        slot = tl.load(where + entry, mask=inside, other=-1)
        row = tl.where(slot >= 0, first + slot * size + token % size, row)
        tl.atomic_add(counts + entry, 1, mask=here & inside)
    missing = here & (row < 0)
    place = staging.to(tl.int64) + pair * number + n
    tl.store(slots + pair * number + n, tl.where(row >= 0, pair * resident + row, place), mask=n < number)
    early, late = missing & (token < middle), missing & (token >= middle)
    copied = copy_tile(rows, pair * held + token - start, table, place, early, width, block_w)
    copied += copy_tile(more, pair * held_more + token - middle, table, place, late, width, block_w)
    asked = tl.sum(here.to(tl.int64), 0)
    tl.atomic_add(tally, copied, mask=copied > 0)
    tl.atomic_add(tally + 1, asked, mask=asked > 0)


def fetch_rows(
    indices: Tensor,
    local: Tensor,
    table: Tensor,
    resident: int,
    staging: int,
    tokens: HostTokens,
    tally: Tensor,
    blocks: Blocks | None = None,
    count: Number | None = None,
) -> Tensor:
    """See :func:`pqbench.kernels.reference.rows.fetch_rows`; tokens that do not exist are not copied."""
    batch, heads, number = indices.shape
    slots = torch.empty(batch, heads, number, dtype=torch.int64, device=indices.device)
    sizes, known = tile(table.shape[1] * table.shape[2], table.dtype), blocks is not None
    where, counts = (blocks.where, blocks.counts) if blocks is not None else (slots, slots)
    owners, every = blocks.where.shape if blocks is not None else (1, 0)
    with on(table):
        find_and_copy[(tiles(number, sizes["block_n"]), batch * heads)](
            indices.contiguous(),
            local,
            table,
            slots,
            tokens.rows,
            tokens.more,
            tally,
            where,
            counts,
            number if count is None else count,
            number,
            len(local),
            resident,
            staging,
            tokens.start,
            tokens.middle,
            tokens.stop,
            tokens.rows.shape[2],
            tokens.more.shape[2],
            batch * heads // owners,
            every,
            blocks.size if blocks is not None else 1,
            blocks.first if blocks is not None else 0,
            cached=known,
            **sizes,
            **options(),
        )
    return slots
