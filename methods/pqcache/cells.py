"""When to search by cells, and the lists that it needs. :mod:`pqbench.kernels.reference_cells` says what it finds."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.buffers import GrowingBuffer

SEARCHES = ("auto", "scan", "cells")
MOST_BITS = 16  # of a cell's number
# Tokens per cell from which cells pay. Measured on one layer of 8 KV heads, 2x6 bits: by cells 0.3 ms at any length, by
# scan as much at 4 tokens per cell, and growing.
_WORTH = 4
_PENDING = 256  # appended tokens kept in a list of their own before the lists are made anew


def searches_cells(search: str, bits: int, tokens: int, scans_anyway: bool) -> bool:
    """Whether to search by cells. ``auto`` does so from 4 tokens per cell, unless a tail reads every token anyway."""
    if search != "auto":
        return search == "cells"
    return bits <= MOST_BITS and not scans_anyway and tokens >= _WORTH * 2**bits


def cell_numbers(codes: Tensor, bits: int) -> Tensor:
    """Cell of each token, int64 ``[B, H, S]``: its codes ``[B, H, S, m]`` as digits of ``bits`` bits."""
    parts = codes.shape[-1]
    shifts = bits * torch.arange(parts - 1, -1, -1, device=codes.device)
    return (codes.long() << shifts).sum(-1)


class InvertedLists:
    """Tokens ``[B, H, S]`` by cell, oldest first. Appended tokens wait beside the lists and count as the youngest of
    their cells; from time to time the lists are made anew.

    Attributes:
        tokens, starts: the lists, see :mod:`pqbench.kernels.reference_cells`.
    """

    def __init__(self, cells: Tensor, bits: int) -> None:
        """Cells int64 ``[B, H, S]`` of all tokens, numbers of ``bits`` bits."""
        self._size = 2**bits
        self._cells = GrowingBuffer(cells.int())  # int64 only where they index
        self.tokens, self.starts = self._lists()

    def __len__(self) -> int:
        return len(self._cells)

    @property
    def pending(self) -> Tensor:
        """Cells ``[B, H, P]`` of the tokens that are in no list yet."""
        return self._cells.view(self.tokens.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return self.starts.nbytes + self.tokens.nbytes + self._cells.bytes

    @property
    def step_bytes(self) -> int:
        """Bytes that every step reads, beside the tokens it takes: where lists begin, and the waiting tokens."""
        return self.starts.nbytes + self.pending.nbytes

    def append(self, cells: Tensor) -> None:
        """The next tokens' cells, int64 ``[B, H, n]``."""
        self._cells.append(cells.int())
        if self.pending.shape[2] > _PENDING:
            self.tokens, self.starts = self._lists()

    def _lists(self) -> tuple[Tensor, Tensor]:
        """All tokens by cell ``[B, H, S]``, and where each list begins, ``[B, H, C + 1]``."""
        cells = self._cells.view()
        none = torch.zeros(*cells.shape[:2], self._size, dtype=torch.int64, device=cells.device)
        counts = none.scatter_add(2, cells.long(), torch.ones_like(cells, dtype=torch.int64))
        starts = torch.nn.functional.pad(counts.cumsum(2), (1, 0))
        return cells.argsort(dim=2, stable=True).int(), starts.int()
