"""Where selected tokens lie on the device, in plain torch; other bodies are tested against this."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pqbench.kernels.backend import Number


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
    keys: Tensor, values: Tensor, key_rows: Tensor, value_rows: Tensor, at: Number, local: Tensor | None = None,
    sinks: int = 0,
) -> None:  # fmt: skip
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
) -> Found:  # fmt: skip
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
