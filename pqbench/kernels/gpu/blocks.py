"""Triton: the block cache. One program per owner decides which blocks enter and leave. One kernel saves rows that are
about to be overwritten, another one copies all new blocks from page-locked host memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqbench.kernels.gpu.fetch import copy_tile
from pqbench.kernels.gpu.launch import blocks as tiles
from pqbench.kernels.gpu.launch import on, options, power, read
from pqbench.kernels.gpu.rows import tile
from pqbench.kernels.number import Number
from pqbench.kernels.reference.blocks import Residency
from pqbench.kernels.reference.rows import Blocks, HostTokens


@triton.jit(do_not_specialize=["every", "complete", "most", "capacity"])
def choose_blocks(
    counts: tl.tensor,
    where: tl.tensor,
    held: tl.tensor,
    uses: tl.tensor,
    since: tl.tensor,
    clock: tl.tensor,
    moves: tl.tensor,
    tally: tl.tensor,
    every: tl.tensor,
    complete: tl.tensor,
    most: tl.tensor,
    capacity: tl.tensor,
    frequent: tl.constexpr,
    block_b: tl.constexpr,
    block_c: tl.constexpr,
    block_a: tl.constexpr,
) -> None:
    """The step of one owner; see :func:`pqbench.kernels.reference.blocks.admit_blocks`. The state of the slots is in
    registers; one entry is read by a sum in which all other entries are zero."""
    owner = tl.program_id(0).to(tl.int64)
    b, c, a = tl.arange(0, block_b), tl.arange(0, block_c), tl.arange(0, block_a)
    eligible = b < tl.minimum(read(complete), every)
    asked = tl.load(counts + owner * every + b, mask=b < every, other=0).to(tl.int64)
    tl.store(counts + owner * every + b, 0, mask=b < every)
    wish = tl.where(eligible & (asked > 0), asked * block_b + (block_b - 1 - b), -1)  # ties: the earlier block
    exists = c < capacity
    block = tl.load(held + owner * capacity + c, mask=exists, other=-1)
    used = tl.load(uses + owner * capacity + c, mask=exists, other=0)
    when = tl.load(since + owner * capacity + c, mask=exists, other=0)
    now = tl.load(clock + owner)
    wanted = tl.full([block_a], -1, tl.int64)  # blocks that will enter, by rank
    absent = tl.sum(c * 0, 0)
    for rank in range(most):  # promotions come first, so that no wanted block can leave
        best = tl.max(wish, 0)
        number = block_b - 1 - best % block_b
        wish = tl.where(wish == best, -1, wish)
        mine = exists & (block == number) & (best >= 0)
        present = tl.sum(mine.to(tl.int32), 0)
        used = tl.where(mine, used + 1, used)
        when = tl.where(mine, now + most - rank, when)
        enters = (best >= 0) & (present == 0)
        wanted = tl.where((a == rank) & enters, number, wanted)
        absent += enters.to(tl.int32)
    leave = absent - tl.sum((exists & (block < 0)).to(tl.int32), 0)
    for rank in range(most):
        number = tl.sum(tl.where(a == rank, wanted + 1, 0), 0) - 1
        rest = exists & (block >= 0) & (when <= now)
        if frequent:
            rest = rest & (used == tl.min(tl.where(rest, used, 1 << 62), 0))
        oldest = tl.min(tl.where(rest, when, 1 << 62), 0)
        going = tl.min(tl.where(rest & (when == oldest), c, block_c), 0)
        free = tl.min(tl.where(exists & (block < 0), c, block_c), 0)
        slot = tl.where(leave > 0, going, free)
        enters = number >= 0
        gone = tl.sum(tl.where(c == slot, block + 1, 0), 0) - 1
        tl.store(where + owner * every + gone, -1, mask=enters & (gone >= 0))
        tl.store(where + owner * every + number, slot.to(tl.int64), mask=enters)
        tl.store(moves + (owner * most + rank) * 2, number)
        tl.store(moves + (owner * most + rank) * 2 + 1, tl.where(enters, slot.to(tl.int64), -1))
        taken = (c == slot) & enters
        block = tl.where(taken, number, block)
        used = tl.where(taken, 1, used)
        when = tl.where(taken, now + most - rank, when)
        leave -= enters.to(tl.int32)
    tl.store(held + owner * capacity + c, block, mask=exists)
    tl.store(uses + owner * capacity + c, used, mask=exists)
    tl.store(since + owner * capacity + c, when, mask=exists)
    tl.store(clock + owner, now + most)
    tl.atomic_add(tally, absent.to(tl.int64))


def admit_blocks(
    counts: Tensor, complete: Number, admit: int, frequent: bool, residency: Residency, tally: Tensor
) -> Tensor:
    """See :func:`pqbench.kernels.reference.blocks.admit_blocks`."""
    (owners, every), capacity = counts.shape, residency.held.shape[1]
    most = min(admit, capacity)
    moves = torch.empty(owners, most, 2, dtype=torch.int64, device=counts.device)
    warps = 8 if max(every, capacity) > 2048 else 4
    with on(counts):
        choose_blocks[(owners,)](
            counts,
            *residency,
            moves,
            tally,
            every,
            complete,
            most,
            capacity,
            frequent=frequent,
            block_b=power(every),
            block_c=power(capacity),
            block_a=power(most),
            **options(warps),
        )
    return moves


@triton.jit(do_not_specialize=["number", "resident", "staging", "shared", "every", "size", "first"])
def save_rows(
    indices: tl.tensor,
    slots: tl.tensor,
    table: tl.tensor,
    where: tl.tensor,
    number: tl.tensor,
    resident: tl.tensor,
    staging: tl.tensor,
    shared: tl.tensor,
    every: tl.tensor,
    size: tl.tensor,
    first: tl.tensor,
    width: tl.constexpr,
    block_n: tl.constexpr,
    block_w: tl.constexpr,
) -> None:
    """Save some tokens of one head; see :func:`pqbench.kernels.reference.rows.vacate_rows`."""
    pair = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    slot = tl.load(slots + pair * number + n, mask=n < number, other=-1)
    row = slot - pair * resident - first
    cached = (n < number) & (slot < staging) & (row >= 0)
    token = tl.load(indices + pair * number + n, mask=cached, other=0).to(tl.int64)
    now = tl.load(where + pair // shared * every + token // size, mask=cached, other=-1)
    left = cached & (now != row // size)
    place = staging.to(tl.int64) + pair * number + n
    copy_tile(table, slot, table, place, left, width, block_w)
    tl.store(slots + pair * number + n, place, mask=left)


def vacate_rows(indices: Tensor, slots: Tensor, table: Tensor, resident: int, staging: int, blocks: Blocks) -> None:
    """See :func:`pqbench.kernels.reference.rows.vacate_rows`."""
    batch, heads, number = indices.shape
    owners, every = blocks.where.shape
    sizes = tile(table.shape[1] * table.shape[2], table.dtype)
    with on(table):
        save_rows[(tiles(number, sizes["block_n"]), batch * heads)](
            indices.contiguous(),
            slots,
            table,
            blocks.where,
            number,
            resident,
            staging,
            batch * heads // owners,
            every,
            blocks.size,
            blocks.first,
            **sizes,
            **options(),
        )


@triton.jit(do_not_specialize=["most", "resident", "start", "middle", "stop", "held", "held_more", "size", "first"])
def copy_moved(
    moves: tl.tensor,
    rows: tl.tensor,
    more: tl.tensor,
    table: tl.tensor,
    most: tl.tensor,
    shared: tl.tensor,
    resident: tl.tensor,
    start: tl.tensor,
    middle: tl.tensor,
    stop: tl.tensor,
    held: tl.tensor,
    held_more: tl.tensor,
    size: tl.tensor,
    first: tl.tensor,
    width: tl.constexpr,
    block_n: tl.constexpr,
    block_w: tl.constexpr,
) -> None:
    """Copy some rows of one block for one head; see :func:`pqbench.kernels.reference.rows.copy_blocks`."""
    pair, move = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    entry = moves + ((pair // shared) * most + move) * 2 + n * 0
    block, slot = tl.load(entry), tl.load(entry + 1)
    token = block * size + n
    seen = (block >= 0) & (n < size) & (token >= start) & (token < stop)
    place = pair * resident + first + slot * size + n
    copy_tile(rows, pair * held + token - start, table, place, seen & (token < middle), width, block_w)
    copy_tile(more, pair * held_more + token - middle, table, place, seen & (token >= middle), width, block_w)


def copy_blocks(moves: Tensor, tokens: HostTokens, table: Tensor, resident: int, blocks: Blocks) -> None:
    """See :func:`pqbench.kernels.reference.rows.copy_blocks`."""
    owners, most = moves.shape[:2]
    pairs = tokens.rows.shape[0] * tokens.rows.shape[1]
    sizes = tile(table.shape[1] * table.shape[2], table.dtype)
    with on(table):
        copy_moved[(tiles(blocks.size, sizes["block_n"]), pairs, most)](
            moves,
            tokens.rows,
            tokens.more,
            table,
            most,
            pairs // owners,
            resident,
            tokens.start,
            tokens.middle,
            tokens.stop,
            tokens.rows.shape[2],
            tokens.more.shape[2],
            blocks.size,
            blocks.first,
            **sizes,
            **options(),
        )
