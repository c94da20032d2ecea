"""When a search by cells pays, and the lists that it needs. :mod:`pqbench.kernels.reference.cells` defines its
result."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.backend import Kernels
from pqbench.kernels.buffers import GrowingBuffer

SEARCHES = ("auto", "scan", "cells")
MOST_BITS = 16  # of a cell's number
# Tokens per cell from which cells pay. Measured on one layer of 8 KV heads, 2x6 bits: by cells 0.3 ms at any length, by
# scan as much at 4 tokens per cell, and growing.
_WORTH = 4
_PENDING = 512  # appended tokens that wait beside the lists: a step looks at each, a merge copies all tokens


def searches_cells(search: str, bits: int, tokens: int, scans_anyway: bool) -> bool:
    """Whether to search by cells. ``auto`` does so from 4 tokens per cell, unless a tail reads every token anyway."""
    if search != "auto":
        return search == "cells"
    return bits <= MOST_BITS and not scans_anyway and tokens >= _WORTH * 2**bits


def cell_numbers(codes: Tensor, bits: int) -> Tensor:
    """Cell of each token, int32 ``[B, H, S]``: its codes ``[B, H, S, m]`` as digits of ``bits`` bits."""
    cells = codes[..., 0].int()
    for part in codes.unbind(-1)[1:]:
        cells = (cells << bits) + part
    return cells


class InvertedLists:
    """Tokens ``[B, H, S]`` by cell, oldest first. Appended tokens wait beside the lists and count as the youngest of
    their cells; from time to time they are merged in.

    Attributes:
        tokens, starts: the lists, see :mod:`pqbench.kernels.reference.cells`.
    """

    def __init__(self, cells: Tensor, bits: int, kernels: Kernels) -> None:
        """Cells int32 ``[B, H, S]`` of all tokens, numbers of ``bits`` bits."""
        none = cells.new_zeros(*cells.shape[:2], 2**bits + 1)
        self.starts, self.tokens = kernels.merge_lists(none, cells[:, :, :0], cells)
        self._pending = GrowingBuffer.like(cells, _PENDING)

    def __len__(self) -> int:
        return self.tokens.shape[2] + len(self._pending)

    @property
    def pending(self) -> Tensor:
        """Cells ``[B, H, P]`` of the tokens that are in no list yet."""
        return self._pending.view()

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return self.step_bytes + self.tokens.nbytes

    @property
    def step_bytes(self) -> int:
        """Bytes that every step reads, beside the tokens it takes: where lists begin, and the waiting tokens."""
        return self.starts.nbytes + self.pending.nbytes

    def renumber(self) -> Tensor:
        """Number the listed tokens by their places in the lists from now on. Returns which token each number was, int64
        ``[B, H, N]``; no token may be pending."""
        before = self.tokens.long()
        numbers = torch.arange(self.tokens.shape[2], dtype=self.tokens.dtype, device=self.tokens.device)
        self.tokens = numbers.expand(self.tokens.shape).contiguous()
        return before

    def append(self, cells: Tensor, kernels: Kernels) -> None:
        """The next tokens' cells, int32 ``[B, H, n]``."""
        self._pending.append(cells)
        if len(self._pending) >= _PENDING:
            self.starts, self.tokens = kernels.merge_lists(self.starts, self.tokens, self.pending)
            self._pending.truncate(0)
