"""Writing, finding and fetching rows of tokens, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pqbench.kernels.number import Number


class Found(NamedTuple):
    """The rows of tokens in a table.

    Attributes:
        slots: ``[B, H, n]``, the row of each token; -1 if it is missing.
        missing: ``[M]``, places of the missing tokens among the B * H * n, ascending.
        counts: ``[owners, blocks]``, how many tokens of each block were asked for, without those that are sinks or in
            the ring; None without a block cache.
    """

    slots: Tensor
    missing: Tensor
    counts: Tensor | None

    @property
    def asked(self) -> int:
        """Number of tokens that are neither sinks nor in the ring."""
        return len(self.missing) if self.counts is None else int(self.counts.sum())


def append_rows(
    keys: Tensor,
    values: Tensor,
    key_rows: Tensor,
    value_rows: Tensor,
    at: Number,
    local: Tensor | None = None,
    sinks: int = 0,
) -> None:
    """Write keys and values ``[B, H, n, D]`` of the tokens from ``at`` on into ``key_rows`` and ``value_rows``
    ``[B, H, S, D]``, whose last axis is dense. Token t is written to row t.

    With ``local``, the S rows are a ring, n is at most S, and token t is written to row t % S. The ring begins at row
    ``sinks`` of each head. ``local`` ``[P]`` holds the row of each token, the same for all heads, and is updated: token
    t is in row ``sinks`` + t % S, and token t - S is in no row (-1), unless it is one of the first ``sinks`` tokens.
    """
    first, count, size = int(at), keys.shape[2], key_rows.shape[2]
    if local is None:
        key_rows[:, :, first : first + count], value_rows[:, :, first : first + count] = keys, values
        return
    for i in range(count):
        token, row = first + i, (first + i) % size
        key_rows[:, :, row], value_rows[:, :, row] = keys[:, :, i], values[:, :, i]
        if token - size >= sinks:
            local[token - size] = -1
        local[token] = sinks + row


def find_rows(
    indices: Tensor, local: Tensor, resident: int, where: Tensor | None = None, block: int = 1, first: int = 0
) -> Found:
    """Find tokens ``indices`` ``[B, H, n]`` in a table in which every head has ``resident`` rows, head after head.

    Args:
        indices: the tokens.
        local: ``[P]``, the row of each token, the same for all heads; -1 for none.
        resident: rows per head.
        where: ``[owners, blocks]``, the slot of each cached block, or -1; None without a block cache. All owners have
            equally many heads.
        block: tokens of a block.
        first: row of a head at which the first slot begins.

    Raises:
        IndexError: a token is not below P.
    """
    batch, heads, _ = indices.shape
    rows = local.take(indices)
    head = torch.arange(batch * heads, device=indices.device).view(batch, heads, 1)
    away = rows < 0
    if where is None:
        missing = away.view(-1).nonzero().view(-1)
        return Found(torch.where(away, -1, rows + head * resident), missing, None)
    owners, blocks = where.shape
    entries = indices // block + head // (batch * heads // owners) * blocks
    slots = where.take(entries)
    cached = torch.where(slots < 0, -1, first + slots * block + indices % block)
    rows = torch.where(away, cached, rows)
    missing = (rows < 0).view(-1).nonzero().view(-1)
    counts = torch.bincount(entries[away], minlength=owners * blocks).view(owners, blocks)
    return Found(torch.where(rows < 0, -1, rows + head * resident), missing, counts)


class HostTokens(NamedTuple):
    """Rows of tokens ``start`` to ``stop`` in host memory; if it is page-locked, kernels on a GPU read it directly.

    Attributes:
        start, stop: first and one-past-last token.
        rows: ``[B, H, S, 2, D]``, dense; rows of the tokens from ``start`` on.
        middle: first token that is in ``more``.
        more: ``[B, H, E, 2, D]``, dense; rows of the tokens from ``middle`` on.
    """

    start: int
    stop: int
    rows: Tensor
    middle: int
    more: Tensor


class Blocks(NamedTuple):
    """Cached blocks of ``size`` tokens in a table; see :func:`find_rows` for ``where`` and ``first``. The number of
    tokens of each block that a step asks for is added to ``counts`` ``[owners, blocks]``."""

    where: Tensor
    size: int
    first: int
    counts: Tensor


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
    """Rows ``[B, H, n]`` of tokens ``indices`` ``[B, H, n]`` in a table ``[R, 2, D]``, after copying the missing ones
    from the host. Each of the B * H * n places has its own row, from row ``staging`` on, for a missing token.

    Tokens are found as by :func:`find_rows`. Only tokens of ``tokens`` are copied and counted: the number of rows
    copied and the number of rows that are not in ``local`` are added to ``tally`` ``[2]``. Only the first ``count`` of
    the n tokens are needed (None for all); the others are not read.

    Raises:
        IndexError: a token is outside of ``local``. The GPU backend copies nothing for it instead.
    """
    batch, heads, number = indices.shape
    counted = torch.arange(number, device=indices.device) < (number if count is None else int(count))
    wanted = indices.masked_fill(~counted, 0)
    place = staging + torch.arange(batch * heads * number, device=indices.device).view(batch, heads, number)
    where = (blocks.where, blocks.size, blocks.first) if blocks is not None else ()
    slots = find_rows(wanted, local, resident, *where).slots
    here = counted & (local.take(wanted) < 0) & (wanted >= tokens.start) & (wanted < tokens.stop)
    missing = here & (slots < 0)
    for rows, start, stop in (tokens.rows, tokens.start, tokens.middle), (tokens.more, tokens.middle, tokens.stop):
        sequence, head, at = (missing & (wanted >= start) & (wanted < stop)).nonzero().unbind(1)
        table[place[sequence, head, at]] = rows[sequence, head, wanted[sequence, head, at] - start].to(table.device)
    tally[0] += missing.sum()
    tally[1] += here.sum()
    if blocks is not None:
        owners, every = blocks.where.shape
        owner = torch.arange(batch * heads, device=indices.device).view(batch, heads, 1) // (batch * heads // owners)
        entries = (wanted // blocks.size + owner * every)[here]
        blocks.counts.add_(torch.bincount(entries, minlength=owners * every).view(owners, every))
    return torch.where(counted & (slots >= 0), slots, place)


def vacate_rows(indices: Tensor, slots: Tensor, table: Tensor, resident: int, staging: int, blocks: Blocks) -> None:
    """Save rows of blocks that have left the cache, before these are overwritten. ``slots`` ``[B, H, n]`` are the rows
    of tokens ``indices`` ``[B, H, n]`` from :func:`fetch_rows`. A row in a block that is not in the cache any more is
    copied to its place from row ``staging`` on, and ``slots`` is updated."""
    batch, heads, number = indices.shape
    owners, every = blocks.where.shape
    pair = torch.arange(batch * heads, device=indices.device).view(batch, heads, 1)
    place = staging + torch.arange(batch * heads * number, device=indices.device).view(batch, heads, number)
    row = slots - pair * resident - blocks.first  # row within the cached blocks
    cached = (slots < staging) & (row >= 0)
    entries = torch.where(cached, indices // blocks.size + pair // (batch * heads // owners) * every, 0)
    left = cached & (blocks.where.take(entries) != row // blocks.size)
    table[place[left]] = table[slots[left]]
    slots[left] = place[left]


def copy_blocks(moves: Tensor, tokens: HostTokens, table: Tensor, resident: int, blocks: Blocks) -> None:
    """Copy blocks from the host into a table ``[R, 2, D]``, for every head of the owner. ``moves`` int64
    ``[owners, A, 2]`` holds blocks and the slots that they are copied to; -1 for none. Only those of their tokens are
    copied that are in ``tokens``."""
    pairs = tokens.rows.shape[0] * tokens.rows.shape[1]
    shared, size = pairs // len(moves), blocks.size
    for owner, made in enumerate(moves.tolist()):
        heads = torch.arange(owner * shared, (owner + 1) * shared)
        for first, slot in ((block * size, slot) for block, slot in made if block >= 0):
            for token in range(max(first, tokens.start), min(first + size, tokens.stop)):
                late = token >= tokens.middle
                rows = (tokens.more if late else tokens.rows).flatten(0, 1)
                row = rows[heads, token - (tokens.middle if late else tokens.start)]
                place = heads * resident + blocks.first + slot * size + token - first
                table[place.to(table.device)] = row.to(table.device)


def copy(source: Tensor, target: Tensor) -> None:
    """Copy between tensors of equal shape and any strides, on the device or in page-locked host memory."""
    target.copy_(source, non_blocking=True)
