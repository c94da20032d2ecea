"""Triton: search by cells. Cells are scored by table look-up of their digits, as tokens are in
:mod:`pqbench.kernels.gpu.scoring`. Cells are then ranked and tokens selected by torch's sorting and gathering, which do
not make the host wait for the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqbench.kernels.gpu import launch
from pqbench.kernels.gpu.launch import share
from pqbench.kernels.gpu.scoring import fold, sum_over_group
from pqbench.kernels.gpu.tables import scored_tables
from pqbench.kernels.reference.cells import cell_counts, shares, taken

_CELLS = 128  # cells of a tile


@triton.jit
def score_cells(
    tables: tl.tensor,
    counts: tl.tensor,
    scores: tl.tensor,
    part_lse: tl.tensor,
    cells: tl.constexpr,
    clusters: tl.constexpr,
    parts: tl.constexpr,
    group: tl.constexpr,
    lanes: tl.constexpr,
    block_n: tl.constexpr,
) -> None:
    """Logits ``scores`` ``[B*H, C, L]`` of one part of the cells, and the log-sum-exp ``part_lse`` ``[B*H, pieces, L]``
    of its tokens, -inf if there are none. ``counts`` ``[B*H, C]`` are the numbers of tokens of cells."""
    pair, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g, lane = tl.arange(0, lanes), tl.arange(0, block_n)
    first_table = tables + pair * parts * clusters * lanes
    top, total = tl.full([lanes], float("-inf"), tl.float32), tl.zeros([lanes], tl.float32)
    first, stop = share(cells, block_n)
    for start in range(first, stop, block_n):
        n = start + lane
        seen = (n < stop)[:, None] & (g < group)[None, :]
        score = tl.zeros([block_n, lanes], tl.float32)
        digits = n
        for i in tl.static_range(parts):  # the last sub-space is the lowest digit
            entry = ((parts - 1 - i) * clusters + digits % clusters)[:, None] * lanes + g[None, :]
            score += tl.load(first_table + entry, mask=seen, other=0.0)
            digits = digits // clusters
        tl.store(scores + (pair * cells + n)[:, None] * lanes + g[None, :], score, mask=seen)
        held = tl.load(counts + pair * cells + n, mask=n < stop, other=0)
        weighed = score + tl.log(tl.maximum(held, 1).to(tl.float32))[:, None]
        top, total = fold(top, total, tl.where((held > 0)[:, None], weighed, float("-inf")))
    row = (pair * tl.num_programs(1) + number) * lanes + g
    tl.store(part_lse + row, tl.where(top == float("-inf"), 0.0, top) + tl.log(total))


def best_of_cells(
    q: Tensor, codebook: Tensor, starts: Tensor, tokens: Tensor, pending: Tensor, wanted: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """See :func:`pqbench.kernels.reference.cells.best_of_cells`."""
    counts = cell_counts(starts, pending)
    scores, probabilities = cell_probabilities(q, codebook, counts, scaling)
    take = shares(probabilities.masked_fill(counts == 0, -1.0), counts, wanted)
    rest = (counts - take).float().log()[..., None]  # -inf where all tokens are selected
    found = max(0, min(wanted, tokens.shape[2] + pending.shape[2]))
    return taken(take, starts, tokens, pending, found), (scores[..., : q.shape[2]] + rest).logsumexp(2)


def cell_probabilities(q: Tensor, codebook: Tensor, counts: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Logits ``[B, H, C, L]`` of all cells, where L is the size of the query group padded to a power of two, and the
    attention that each of their tokens would receive, summed over the query group, ``[B, H, C]``. Empty cells get what
    a token there would receive."""
    q, codebook, counts = launch.dense_rows(q), codebook.contiguous(), counts.contiguous()
    batch, heads, group, _ = q.shape
    parts, clusters = codebook.shape[2:4]
    lanes, cells = launch.power(group), counts.shape[2]
    tables = scored_tables(q, codebook, scaling)
    pieces = launch.split(cells, _CELLS, batch * heads, q.device)
    scores = q.new_empty(batch, heads, cells, lanes, dtype=torch.float32)
    part_lse = q.new_empty(batch, heads, pieces, lanes, dtype=torch.float32)
    with launch.on(q):
        score_cells[(batch * heads, pieces)](
            tables,
            counts,
            scores,
            part_lse,
            cells=cells,
            clusters=clusters,
            parts=parts,
            group=group,
            lanes=lanes,
            block_n=_CELLS,
            **launch.options(),
        )
    return scores, sum_over_group(q, scores, part_lse)
