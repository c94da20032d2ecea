"""Search by cells. Tokens with equal codes are in one cell and have the same score, so a step computes one score per
cell instead of one per token.

With m sub-spaces of K centroids there are C = K**m cells, each with a list of its tokens (an inverted multi-index,
Babenko and Lempitsky, CVPR 2012). ``tokens`` int32 ``[B, H, N]`` holds all lists one after another, each with its
oldest token first; ``starts`` int32 ``[B, H, C + 1]`` holds where each list begins. ``pending`` int32 ``[B, H, P]`` are
the cells of P younger tokens, N to N + P - 1, which are not in the lists yet.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_of_cells(
    q: Tensor, codebook: Tensor, starts: Tensor, tokens: Tensor, pending: Tensor, wanted: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """The ``wanted`` tokens with the largest approximate probability, summed over the query group, and the log-weight
    of the others.

    The result equals that of a scan over all codes except for ties: of equal cells the lower one is taken, and in a
    cell the older token.

    Args:
        q: ``[B, H, G, D]``.
        codebook: ``[B, H, m, K, D/m]``.
        starts, tokens, pending: the lists and the pending cells, see the module.
        wanted: number of tokens; at most all N + P are returned.
        scaling: factor on q.k before the softmax.

    Returns:
        tokens int64 ``[B, H, k]``, ascending, and the log-sum-exp of the scores of the others, float32 ``[B, H, G]``.
    """
    scores = cell_scores(q, codebook) * scaling  # [B, H, G, C]
    counts = cell_counts(starts, pending)
    take = shares(cell_probabilities(scores, counts), counts, wanted)
    count = max(0, min(wanted, tokens.shape[2] + pending.shape[2]))
    return taken(take, starts, tokens, pending, count), cell_log_weight(scores, counts - take)


def cell_counts(starts: Tensor, pending: Tensor) -> Tensor:
    """Number of tokens of each cell, pending ones included: int64 ``[B, H, C]``."""
    waiting = pending.long()
    return starts.diff(dim=2).long().scatter_add(2, waiting, torch.ones_like(waiting))


def cell_scores(q: Tensor, codebook: Tensor) -> Tensor:
    """Score of every cell, ``[B, H, G, K**m]``: the product of q ``[B, H, G, D]`` with the centroids of the cell in a
    codebook ``[B, H, m, K, D/m]``."""
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
    """Approximate attention ``[B, H, C]`` that each token of a cell receives: softmax over tokens per query head,
    summed over the query group, from logits of cells ``[B, H, G, C]`` and ``counts`` ``[B, H, C]``. Empty cells get
    -1."""
    normaliser = cell_log_weight(scores, counts)
    summed = (scores - normaliser[..., None]).exp().sum(2)
    return summed.masked_fill(counts == 0, -1.0)


def shares(probabilities: Tensor, counts: Tensor, wanted: int) -> Tensor:
    """Number of tokens to select from each cell, ``[B, H, C]``: best cells first, until ``wanted`` tokens are
    selected."""
    order = probabilities.argsort(dim=-1, descending=True, stable=True)
    ranked = counts.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    given = (wanted - before).clamp(min=0).minimum(ranked)
    return torch.zeros_like(counts).scatter_(-1, order, given)


def taken(take: Tensor, starts: Tensor, tokens: Tensor, pending: Tensor, count: int) -> Tensor:
    """The oldest ``take`` ``[B, H, C]`` tokens of each cell, in ascending order, ``[B, H, count]``. ``take`` adds up to
    ``count`` for every head. No shape depends on the values of a tensor, so the host never waits for a GPU."""
    places = torch.arange(count, device=take.device).expand(*take.shape[:2], -1).contiguous()
    ends = take.cumsum(-1)
    cell = torch.searchsorted(ends, places, right=True).clamp(max=take.shape[2] - 1)  # cell of the token at each place
    within = places - (ends - take).gather(2, cell)
    old = starts.diff(dim=2).long().gather(2, cell)  # tokens of the cell that are in the lists
    waiting, order = pending.sort(dim=2, stable=True)
    younger = tokens.shape[2] + torch.searchsorted(waiting, cell.int()) + within - old
    source = torch.cat([tokens.long(), tokens.shape[2] + order], dim=2)
    index = torch.where(within < old, starts.long().gather(2, cell) + within, younger)
    return source.gather(2, index).sort(dim=2).values


def merge_lists(starts: Tensor, tokens: Tensor, pending: Tensor) -> tuple[Tensor, Tensor]:
    """``starts`` ``[B, H, C + 1]`` and ``tokens`` ``[B, H, N + P]`` after the pending tokens were added to the ends of
    their lists."""
    counts = cell_counts(starts, pending)
    places = torch.arange(tokens.shape[2], dtype=torch.int32, device=tokens.device).expand(tokens.shape).contiguous()
    listed = torch.searchsorted(starts[..., 1:].contiguous(), places, right=True)  # cell of each place
    cells = torch.empty_like(tokens).scatter_(2, tokens.long(), listed.int())  # cell of each token
    order = torch.cat([cells, pending], dim=2).argsort(dim=2, stable=True)
    return torch.nn.functional.pad(counts.cumsum(2), (1, 0)).int(), order.int()
