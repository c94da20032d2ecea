"""Where selected tokens lie on the device, in plain torch; other backends are tested against this."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pqbench.kernels.number import Number


class Found(NamedTuple):
    """Where tokens lie in a table of rows.

    Attributes:
        slots: row of each, ``[B, H, n]``, -1 where a token is missing.
        missing: which are missing, places ``[M]`` among the B * H * n, ascending.
        counts: how many tokens of each block were asked for that lie outside the regions that are always there,
            ``[owners, blocks]``; None without blocks.
    """

    slots: Tensor
    missing: Tensor
    counts: Tensor | None

    @property
    def asked(self) -> int:
        """How many tokens lie outside those regions, all blocks together."""
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
    """Write keys and values ``[B, H, n, D]`` of tokens from ``at`` on into ``key_rows`` and ``value_rows``
    ``[B, H, S, D]``, whose last axis is dense: token t goes to row t.

    With ``local`` the S rows are a ring, and token t goes to row t % S of it; n is at most S. The ring begins at row
    ``sinks`` of each head, and ``local`` ``[P]``, which says in which row of every head a token lies, is brought up to
    date: token t lies in row ``sinks`` + t % S, and token t - S, unless it is one of the ``sinks`` first, in none (-1).
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

    ``local`` ``[P]`` says in which row of every head a token lies, or -1. Tokens come in blocks of ``block``; some of
    these are in slots, from row ``first`` of a head on. ``where`` ``[owners, blocks]`` says in which, or -1; an owner
    is as many heads as there are for each.

    Raises:
        IndexError: a token beyond the P.
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
    """Rows of tokens ``start`` to ``stop`` in host memory, which kernels on a GPU read where it is page-locked.

    Attributes:
        rows: ``[B, H, S, 2, D]``, dense; its first row is that of token ``start``.
        more: ``[B, H, E, 2, D]``, dense; rows of the tokens from ``middle`` on, which ``rows`` does not hold.
    """

    start: int
    stop: int
    rows: Tensor
    middle: int
    more: Tensor


class Blocks(NamedTuple):
    """Blocks of ``size`` tokens that a table holds; see :func:`find_rows` for ``where`` and ``first``. To ``counts``
    ``[owners, blocks]`` is added how many tokens of each block were asked for."""

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
    """Where tokens ``indices`` ``[B, H, n]`` are in a table ``[R, 2, D]``, ``[B, H, n]``, after those it does not hold
    have been copied there: each place among the B * H * n has a row of its own, from row ``staging`` on, used or not.

    Tokens are found as by :func:`find_rows`. Only those among the ``tokens`` given are copied and counted: to ``tally``
    ``[2]`` are added the rows copied, and the rows that ``local`` does not hold. Of the n only the first ``count``
    matter (None: all); the others have a place and are not read.

    Raises:
        IndexError: a token beyond those that ``local`` knows; on a GPU nothing is copied for it.
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
    """After blocks have come and gone: rows that ``slots`` ``[B, H, n]`` of tokens ``indices`` say are in a block which
    is not there any more are copied to their places from row ``staging`` on, see :func:`fetch_rows`, and ``slots`` are
    brought up to date. For tables whose blocks are about to be overwritten."""
    batch, heads, number = indices.shape
    owners, every = blocks.where.shape
    pair = torch.arange(batch * heads, device=indices.device).view(batch, heads, 1)
    place = staging + torch.arange(batch * heads * number, device=indices.device).view(batch, heads, number)
    row = slots - pair * resident - blocks.first  # in the blocks
    cached = (slots < staging) & (row >= 0)
    entries = torch.where(cached, indices // blocks.size + pair // (batch * heads // owners) * every, 0)
    left = cached & (blocks.where.take(entries) != row // blocks.size)
    table[place[left]] = table[slots[left]]
    slots[left] = place[left]


def copy_blocks(moves: Tensor, tokens: HostTokens, table: Tensor, resident: int, blocks: Blocks) -> None:
    """Copy blocks ``moves`` int64 ``[owners, A, 2]``, each a block and the slot it goes to, or -1 for none, into a
    table ``[R, 2, D]``: those of their tokens that are among the ``tokens`` given, for every head of the owner."""
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
    """Copy between tensors of one shape, whatever their strides, on the device or in page-locked host memory."""
    target.copy_(source, non_blocking=True)
