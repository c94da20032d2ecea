"""The tail: what the tokens that a step does not select add to its output, and with which weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from methods.pqcache.plus_index import PlusIndex, ready
from methods.pqcache.queries import SeenQueries
from methods.pqcache.tail import quantised_mean, tail_share
from pqbench.method import KV, Geometry, Residual

if TYPE_CHECKING:
    from methods.pqcache.plus import PQCachePlus

_TILE = 1 << 24  # elements of the largest temporary of calibration


class Tail:
    """Computes the residual of a step.

    Attributes:
        log_factor: ``[B, H]``, log of the ratio of true to estimated weight of the tail; zero without calibration.
    """

    def __init__(self, method: PQCachePlus, geometry: Geometry, index: PlusIndex, queries: SeenQueries) -> None:
        self._method, self._geometry, self._index, self._queries = method, geometry, index, queries
        self.log_factor = torch.zeros(geometry.batch, geometry.kv_heads, device=geometry.device)

    def residual(self, q: Tensor, log_weight: Tensor, weights: Tensor | None, codes: Tensor | None) -> Residual:
        """The residual for queries ``[B, H, G, D]``, from the ``log_weight`` ``[B, H, G]`` of the tail and, if every
        token was scored, the ``weights`` ``[B, H, G, M]`` of its tokens."""
        return Residual(self._value(q, weights, codes), log_weight + self.log_factor[:, :, None])

    def _value(self, q: Tensor, weights: Tensor | None, codes: Tensor | None) -> Tensor:
        """Mean value ``[B, H, G, D]`` of the tail: weighted by ``weights`` ``[B, H, G, M]`` if values have codes,
        otherwise the mean over the middle."""
        if self._method.tail == "pq":
            value_codes = ready(codes)[..., self._method.m :]
            return quantised_mean(ready(weights), value_codes, ready(self._index.value_codebook))
        return (ready(self._index.value_sum) / len(self._index.known)).expand(q.shape)

    def calibrate(self, kv: KV) -> None:
        """Fit the factor to the last queries, if the method calibrates. Every new codebook needs a new factor."""
        recent = self._queries.recent
        if self._method.calibrates and recent is not None:
            split = self._method.budget.resolve(kv.length, self._geometry.prompt)
            self.log_factor = self._fitted(kv, split.middle(kv.length)[0], recent, split.top_k)

    def _fitted(self, kv: KV, first: int, recent: Tensor, top_k: int) -> Tensor:
        """Log ``[B, H]`` of the ratio of true to estimated tail weight over the last queries ``[B, H, G, n, D]``."""
        batch, heads, group, count, _ = recent.shape
        last, index = self._queries.last, self._index
        # If the prompt was too short for codebooks, some middle tokens are younger than the queries; they are masked.
        keys, codes = kv.keys(0, max(last + 1, first + len(index.known))), index.known.view().to(kv.device)
        true = guessed = torch.zeros(batch, heads, device=kv.device)
        rows = max(1, _TILE // (batch * heads * group * (last + 1)))
        for start in range(0, count, rows):
            q = recent[:, :, :, start : start + rows]
            estimated = index.logits(q.flatten(2, 3), codes).view(*q.shape[:4], -1)
            position = last - count + start + q.shape[3]  # position of the block's last query
            part = tail_share(q, keys, estimated, first, position, top_k, self._geometry.scaling)
            true, guessed = true + part[0], guessed + part[1]
        return torch.where((true > 0) & (guessed > 0), true.log() - guessed.log(), torch.zeros_like(true))
