"""The mathematics of the tail: what unselected tokens would add to the output, estimated from codes.

Shapes: B sequences, H KV heads, G query heads per KV head, M middle tokens, k selected middle tokens, D head dimension.
Sinks and window are never in the tail. Logits are scaled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels import reference

KINDS = ("none", "mean", "pq", "sampled")


def without(logits: Tensor, selected: Tensor, seen: Tensor | None = None) -> Tensor:
    """Logits ``[B, H, G, M]`` with -inf for the ``selected`` tokens ``[B, H, k]``, so that no token counts twice. With
    ``seen`` bool ``[B, H, k]``, only selected tokens that are seen get -inf."""
    chosen = selected[:, :, None].expand(*logits.shape[:3], -1)
    if seen is None:
        return logits.scatter(3, chosen, float("-inf"))
    return logits.scatter(3, chosen, logits.gather(3, chosen).masked_fill(seen[:, :, None], float("-inf")))


def smallest_set(shares: Tensor, top: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The fewest of the tokens ``top`` ``[B, H, k]`` whose ``shares`` ``[B, H, M]`` add up to ``wanted`` ``[B, H]``.

    Returns:
        tokens ``[B, H, n]``, largest share first, and which of them a head needs, bool ``[B, H, n]``; n is the number
        that the head with the largest set needs.
    """
    ranked, order = shares.gather(-1, top).sort(dim=-1, descending=True, stable=True)
    needed = ranked.cumsum(-1) - ranked < wanted[..., None]
    size = int(needed.sum(-1).max())
    return top.gather(-1, order[..., :size]), needed[..., :size]


def log_mass(logits: Tensor) -> Tensor:
    """Log-sum-exp ``[...]`` of logits ``[..., M]``; -inf if M is 0."""
    return logits.logsumexp(-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], float("-inf"))


def tail_weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax ``[B, H, G, M]`` of the logits that :func:`without` returns, and their log-sum-exp ``[B, H, G]``. For an
    empty tail these are 0 and -inf."""
    log_weight = log_mass(logits)
    finite = log_weight.masked_fill(log_weight == float("-inf"), 0.0)
    return (logits - finite[..., None]).exp(), log_weight


def quantised_mean(weights: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    """Weighted sum ``[B, H, G, D]`` of quantised values with codes ``[B, H, M, m]``.

    The weights ``[B, H, G, M]`` are first added up per value code and then multiplied by the codebook
    ``[B, H, m, K, D/m]``. This takes K * D multiplications per query head instead of M * D.
    """
    batch, heads, group, _ = weights.shape
    _, _, parts, clusters, _ = codebook.shape
    sums = weights.new_zeros(batch, heads, parts, group, clusters)
    index = codes.permute(0, 1, 3, 2).long()[:, :, :, None, :]  # [B, H, m, 1, M]
    shape = (-1, -1, parts, group, -1)
    sums.scatter_add_(4, index.expand(shape), weights[:, :, None].expand(shape))
    return torch.einsum("bhmgk,bhmkw->bhgmw", sums, codebook).flatten(3)


def tail_share(
    q: Tensor, keys: Tensor, estimated: Tensor, first: int, last: int, top_k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """True and estimated weight of the tail, each ``[B, H]``: shares of a query's whole attention, summed over queries
    and query group.

    Quantisation averages keys, and the exponential of an average is less than the average exponential (Jensen's
    inequality). Estimates from codes are therefore too small; the ratio of the two sums corrects them.

    Each query selects by its own estimates among the middle tokens that it may see, as in a decode step. The other ones
    are its tail.

    Args:
        q: queries ``[B, H, G, n, D]`` of n consecutive positions.
        keys: ``[B, H, S, D]``, the whole context; a query sees keys up to its own position.
        estimated: approximate logits ``[B, H, G, n, M]`` of the middle tokens ``first`` to ``first + M``.
        first: position of the first middle token.
        last: position of the last query.
        top_k: tokens that a step selects.
        scaling: factor on q.k before the softmax.
    """
    batch, heads, group, count, middle = estimated.shape
    exact = (q.float().flatten(2, 3) @ keys.float().transpose(2, 3) * scaling).view(batch, heads, group, count, -1)
    position = torch.arange(last - count + 1, last + 1, device=q.device)[:, None]
    exact = exact.masked_fill(torch.arange(keys.shape[2], device=q.device) > position, float("-inf"))
    future = first + torch.arange(middle, device=q.device) > position  # [n, M]
    estimated = estimated.masked_fill(future, float("-inf"))
    probabilities = estimated.softmax(-1).nan_to_num(0.0).sum(2)  # [B, H, n, M]; 0 if a query sees none
    chosen = reference.top_k(probabilities, top_k)[:, :, None].expand(-1, -1, group, -1, -1)
    tail = exact[..., first : first + middle].scatter(4, chosen, float("-inf"))
    normaliser = exact.logsumexp(-1, keepdim=True)
    true, guessed = ((x - normaliser).exp().sum((2, 3, 4)) for x in (tail, estimated.scatter(4, chosen, float("-inf"))))
    return true, guessed
