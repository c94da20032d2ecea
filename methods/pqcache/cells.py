"""Search by cells: when it is faster than a scan of all codes, and the lists of tokens that it needs. The result is
defined in :mod:`pqbench.kernels.reference.cells`."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.backend import Kernels
from pqbench.kernels.buffers import GrowingBuffer

SEARCHES = ("auto", "scan", "cells")
MOST_BITS = 16  # most bits of a cell number
# Tokens per cell from which a search by cells is faster. Measured on one layer of 8 KV heads with 2x6 bits: cells take
# 0.3 ms at any length; a scan takes as long at 4 tokens per cell, and more beyond.
_WORTH = 4
_PENDING = 512  # appended tokens before a merge: each step reads all of them, and a merge copies all tokens


def searches_cells(search: str, bits: int, tokens: int, scans_anyway: bool) -> bool:
    """Whether to search by cells. ``auto`` does so from 4 tokens per cell on, unless every token is scored anyway."""
    if search != "auto":
        return search == "cells"
    return bits <= MOST_BITS and not scans_anyway and tokens >= _WORTH * 2**bits


def cell_numbers(codes: Tensor, bits: int) -> Tensor:
    """Cell of each token, int32 ``[B, H, S]``: the number whose digits of ``bits`` bits are its codes
    ``[B, H, S, m]``."""
    cells = codes[..., 0].int()
    for part in codes.unbind(-1)[1:]:
        cells = (cells << bits) + part
    return cells


class InvertedLists:
    """Tokens ``[B, H, S]`` by cell, oldest first. Appended tokens are first kept apart (pending), as the youngest of
    their cells, and are merged into the lists when there are many.

    Attributes:
        tokens, starts: the lists, see :mod:`pqbench.kernels.reference.cells`.
    """

    def __init__(self, cells: Tensor, bits: int, kernels: Kernels) -> None:
        """Make the lists from the cells int32 ``[B, H, S]`` of all tokens; cell numbers have ``bits`` bits."""
        none = cells.new_zeros(*cells.shape[:2], 2**bits + 1)
        self.starts, self.tokens = kernels.merge_lists(none, cells[:, :, :0], cells)
        self._pending = GrowingBuffer.like(cells, _PENDING)

    def __len__(self) -> int:
        return self.tokens.shape[2] + len(self._pending)

    @property
    def pending(self) -> Tensor:
        """Cells ``[B, H, P]`` of the tokens that are not in the lists yet."""
        return self._pending.view()

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return self.step_bytes + self.tokens.nbytes

    @property
    def step_bytes(self) -> int:
        """Bytes that every step reads besides the tokens it selects: where lists begin, and the pending cells."""
        return self.starts.nbytes + self.pending.nbytes

    def renumber(self) -> Tensor:
        """Give each token its place in the lists as its new number. Returns the old numbers in the new order, int64
        ``[B, H, N]``. No token may be pending."""
        before = self.tokens.long()
        numbers = torch.arange(self.tokens.shape[2], dtype=self.tokens.dtype, device=self.tokens.device)
        self.tokens = numbers.expand(self.tokens.shape).contiguous()
        return before

    def append(self, cells: Tensor, kernels: Kernels) -> None:
        """Add the next tokens, given by their cells int32 ``[B, H, n]``."""
        self._pending.append(cells)
        if len(self._pending) >= _PENDING:
            self.starts, self.tokens = kernels.merge_lists(self.starts, self.tokens, self.pending)
            self._pending.truncate(0)
