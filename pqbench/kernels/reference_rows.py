"""Where selected tokens lie on the device, in plain torch; other bodies are tested against this."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
