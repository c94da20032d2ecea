"""Learned attention sinks: one logit per query head that takes part in the softmax and adds no value.

A sink has the same effect as further tokens whose mean value is zero. It is therefore merged like any residual, and the
probabilities of the tokens are multiplied by the share that it leaves. These functions run on every device, with any
backend.
Shapes as in :mod:`pqbench.kernels.reference`; sinks are float32 ``[H, G]``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(output: Tensor, lse: Tensor, weights: Tensor | None, sinks: Tensor) -> tuple[Tensor, Tensor | None]:
    """Output ``[B, H, G, D]`` and probabilities ``[B, H, G, n]`` with sinks, from those without sinks. ``lse``
    ``[B, H, G]`` is the log-sum-exp of the tokens."""
    share = left_by_sinks(lse, sinks)[..., None]
    return (output.float() * share).to(output.dtype), None if weights is None else weights * share


def left_by_sinks(lse: Tensor, sinks: Tensor) -> Tensor:
    """The share of the softmax, ``[B, H, G]``, that remains for tokens with log-sum-exp ``lse`` ``[B, H, G]``."""
    return torch.sigmoid(lse - sinks)


def probabilities(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of logits ``[B, H, G, ..., S]`` over the last axis, with the sinks unless they are None."""
    if sinks is None:
        return logits.softmax(-1)
    shape = (*sinks.shape, *[1] * (logits.ndim - 4))
    whole = torch.logaddexp(logits.logsumexp(-1), sinks.view(shape))
    return (logits - whole[..., None]).exp()


def exact_probabilities(q: Tensor, keys: Tensor, scaling: float, sinks: Tensor) -> Tensor:
    """:func:`pqbench.kernels.reference.exact_probabilities` with sinks: float32 ``[B, H, S]``."""
    logits = q.float() @ keys.float().transpose(2, 3) * scaling  # [B, H, G, S]
    return probabilities(logits, sinks).sum(2)


def column_sums(
    q: Tensor, keys: Tensor, scaling: float, sinks: Tensor, band: int | None = None, rows: int = 128
) -> Tensor:
    """:func:`pqbench.kernels.reference.column_sums` with sinks: float32 ``[B, H, S]`` for q ``[B, H, G, n, D]`` of the
    last n of the keys ``[B, H, S, D]``."""
    count, total = q.shape[3], keys.shape[2]
    sums = torch.zeros(*keys.shape[:3], device=q.device)
    for start in range(0, count, rows):
        block = q[:, :, :, start : start + rows].float() * scaling  # [B, H, G, c, D]
        end = total - count + start + block.shape[3]
        query = torch.arange(end - block.shape[3], end, device=q.device)[:, None]
        key = torch.arange(end, device=q.device)
        hidden = (key > query) if band is None else (key > query) | (key <= query - band)
        logits = block @ keys[:, :, None, :end].float().transpose(3, 4)  # [B, H, G, c, e]
        weights = probabilities(logits.masked_fill(hidden, float("-inf")), sinks)
        sums[:, :, :end] += weights.sum((2, 3))
    return sums
