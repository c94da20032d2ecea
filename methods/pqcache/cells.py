"""Search by cells: tokens of equal codes share one score, so scores, softmax and ranking need a cell each, not a token.

With m sub-spaces of b bits there are C = 2**(m*b) cells, each with a list of its tokens (an inverted multi-index,
Babenko and Lempitsky, CVPR 2012). The cost of a step does not grow with the context. The tokens selected are those of a
scan over all codes, up to ties at the boundary: equal scores go to the lower cell, within a cell to the older token.
Shapes: B sequences, H KV heads, G query heads per KV head, S tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.buffers import GrowingBuffer

SEARCHES = ("auto", "scan", "cells")
MOST_BITS = 16  # of a cell's number
# Tokens per cell from which cells pay: ranking them is a sort in plain torch, scoring tokens is compiled. Measured with
# one CPU thread, 2x6, 8 x 4 heads: 6 to 7 ms by cells at any length; 5.6 ms by scan at 32 tokens per cell, and growing.
_WORTH = 64
_PENDING = 256  # appended tokens kept in a list of their own before the lists are made anew


def searches_cells(search: str, bits: int, tokens: int, scans_anyway: bool) -> bool:
    """Whether to search by cells. ``auto`` does so from 64 tokens per cell, unless a tail reads every token anyway."""
    if search != "auto":
        return search == "cells"
    return bits <= MOST_BITS and not scans_anyway and tokens >= _WORTH * 2**bits


def cell_numbers(codes: Tensor, bits: int) -> Tensor:
    """Cell of each token, int64 ``[B, H, S]``: its codes ``[B, H, S, m]`` as digits of ``bits`` bits."""
    parts = codes.shape[-1]
    shifts = bits * torch.arange(parts - 1, -1, -1, device=codes.device)
    return (codes.long() << shifts).sum(-1)


def cell_scores(q: Tensor, codebook: Tensor) -> Tensor:
    """q . centroid of every cell for q ``[B, H, G, D]`` and a codebook ``[B, H, m, K, D/m]``: ``[B, H, G, K**m]``."""
    batch, heads, group, _ = q.shape
    blocks = q.float().view(batch, heads, group, codebook.shape[2], codebook.shape[4])
    tables = torch.einsum("bhgmw,bhmkw->bhgmk", blocks, codebook)
    scores = tables[:, :, :, 0]
    for table in tables.unbind(3)[1:]:
        scores = (scores[..., None] + table[..., None, :]).flatten(3)
    return scores


def cell_log_weight(scores: Tensor, counts: Tensor) -> Tensor:
    """Log-sum-exp ``[B, H, G]`` of all tokens, from scores of cells ``[B, H, G, C]`` and ``counts`` ``[B, H, C]``."""
    return (scores + counts.float().log()[:, :, None]).logsumexp(-1)


def cell_probabilities(scores: Tensor, counts: Tensor) -> Tensor:
    """Approximate attention that each token of a cell receives: softmax over tokens per query head, summed over the
    group. Logits of cells ``[B, H, G, C]`` with ``counts`` ``[B, H, C]``; -1 for empty cells: ``[B, H, C]``."""
    normaliser = cell_log_weight(scores, counts)
    summed = (scores - normaliser[..., None]).exp().sum(2)
    return summed.masked_fill(counts == 0, -1.0)


def shares(probabilities: Tensor, counts: Tensor, wanted: int) -> Tensor:
    """How many tokens of each cell ``[B, H, C]`` are selected: best cells first, until ``wanted`` are found."""
    order = probabilities.argsort(dim=-1, descending=True, stable=True)
    ranked = counts.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    taken = (wanted - before).clamp(min=0).minimum(ranked)
    return torch.zeros_like(counts).scatter_(-1, order, taken)


def listed(starts: Tensor, tokens: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The first ``shares`` ``[R, C]`` tokens of each list, R rows one after the other.

    List c of row r is ``tokens[r, starts[r, c] : starts[r, c + 1]]``, of which no more than its length is asked for.

    Returns:
        rows and tokens, int64 ``[n]`` each.
    """
    row, cell = shares.nonzero().unbind(1)
    count = shares[row, cell]
    ends = count.cumsum(0)
    within = torch.arange(int(ends[-1]) if len(ends) else 0, device=shares.device)
    within = within - (ends - count).repeat_interleave(count)
    row, begin = row.repeat_interleave(count), starts[row, cell].repeat_interleave(count)
    return row, tokens[row, begin.long() + within].long()


class InvertedLists:
    """Tokens ``[B, H, S]`` by cell, oldest first, with the number in each. Appended tokens wait beside the lists and
    count as the youngest of their cells; from time to time the lists are made anew."""

    def __init__(self, cells: Tensor, bits: int) -> None:
        """Cells int64 ``[B, H, S]`` of all tokens, numbers of ``bits`` bits."""
        self._size = 2**bits
        self._cells = GrowingBuffer(cells.int())  # int64 only where they index
        self._built = 0  # tokens in the lists
        self._tokens, self._starts, self.counts = self._lists()

    def __len__(self) -> int:
        return len(self._cells)

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        return self.bounds_bytes + self._tokens.nbytes + self._cells.bytes + self.counts.nbytes

    @property
    def bounds_bytes(self) -> int:
        """Bytes that say where each list begins: what every step reads, beside the tokens it takes."""
        return self._starts.nbytes

    def append(self, cells: Tensor) -> None:
        """The next tokens' cells, int64 ``[B, H, n]``."""
        self._cells.append(cells.int())
        if len(self) - self._built > _PENDING:
            self._tokens, self._starts, self.counts = self._lists()
        else:
            self.counts = self.counts.scatter_add(2, cells, torch.ones_like(cells))

    def tokens(self, take: Tensor) -> Tensor:
        """The oldest ``take`` ``[B, H, C]`` tokens of each cell, ascending ``[B, H, k]``; k in sum for every head."""
        batch, heads, total = self._cells.view().shape
        take = take.view(batch * heads, self._size)
        starts = self._starts.view(batch * heads, -1)
        old = starts.diff(dim=1).long()  # tokens of each cell that are in the lists
        rows, tokens = listed(starts, self._tokens.view(batch * heads, -1), take.minimum(old))
        late, pending = self._pending(take - take.minimum(old))
        keys = torch.cat([rows * total + tokens, late * total + pending])  # sorted by row, then by token
        return (keys.sort().values % total).view(batch, heads, -1)

    def _pending(self, take: Tensor) -> tuple[Tensor, Tensor]:
        """Waiting tokens among the first ``take`` ``[R, C]`` of their cell: rows and tokens."""
        cells = self._cells.view(self._built).flatten(0, 1).long()  # [R, P]
        same = cells[:, :, None] == cells[:, None, :]
        rank = same.tril(-1).sum(-1)  # older waiting tokens of the same cell
        row, place = (rank < take.gather(1, cells)).nonzero().unbind(1)
        return row, place + self._built

    def _lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens by cell, where each list begins, ``[B, H, C + 1]``, and how long it is, ``[B, H, C]``."""
        cells = self._cells.view()
        none = torch.zeros(*cells.shape[:2], self._size, dtype=torch.int64, device=cells.device)
        counts = none.scatter_add(2, cells.long(), torch.ones_like(cells, dtype=torch.int64))
        self._built = cells.shape[2]
        starts = torch.nn.functional.pad(counts.cumsum(2), (1, 0))
        return cells.argsort(dim=2, stable=True).int(), starts.int(), counts
