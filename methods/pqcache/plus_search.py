"""The search of :class:`methods.pqcache.plus.PQCachePlus`: which middle tokens a step selects, and the weight of the
others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from methods.pqcache.cells import InvertedLists
from methods.pqcache.plus_index import PlusIndex, ready
from methods.pqcache.tail import log_mass, smallest_set, tail_weights, without
from pqbench.kernels import reference
from pqbench.method import KV, Geometry, Split

if TYPE_CHECKING:
    from methods.pqcache.plus import PQCachePlus


@dataclass(frozen=True)
class Best:
    """The result of a search.

    Attributes:
        top: selected middle tokens ``[B, H, k]``.
        seen: bool ``[B, H, k]``, which of them the KV head attends to; None for all.
        log_weight: ``[B, H, G]``, log-sum-exp of the estimated logits of the other middle tokens; None if not needed.
        weights: ``[B, H, G, M]``, softmax over the other middle tokens; None if not every token was scored.
        codes: all codes on the device; None if they were not read.
    """

    top: Tensor
    seen: Tensor | None = None
    log_weight: Tensor | None = None
    weights: Tensor | None = None
    codes: Tensor | None = None


class Search:
    """Finds the best middle tokens by a scan of all codes, or in the lists of the cells."""

    def __init__(self, method: PQCachePlus, geometry: Geometry, index: PlusIndex) -> None:
        self._method, self._geometry, self._index = method, geometry, index
        self._taken = 0  # tokens that the last step read from the lists

    @property
    def bytes_taken(self) -> int:
        """Bytes of the token numbers that the last step read from the lists."""
        return self._geometry.batch * self._geometry.kv_heads * self._taken * 4

    def best(self, q: Tensor, kv: KV, split: Split) -> Best:
        """The best middle tokens for q ``[B, H, G, D]``."""
        index, method = self._index, self._method
        codes = index.arrived(kv) if index.reads_codes else None
        if index.lists is None and not method.wants_logits:
            return Best(self._by_codes(q, ready(codes), split.top_k), codes=codes)
        logits = index.logits(q, codes) if codes is not None and method.wants_logits else None
        if index.lists is None:
            return self._by_logits(q, kv, split, ready(logits), codes)
        top, log_weight = self._by_cells(q, index.lists, split.top_k)
        if logits is None or not method.estimates_tail:
            return Best(top, log_weight=log_weight, codes=codes)
        weights, log_weight = tail_weights(without(logits, top))
        return Best(top, None, log_weight, weights, codes)

    def _by_logits(self, q: Tensor, kv: KV, split: Split, logits: Tensor, codes: Tensor | None) -> Best:
        """The best tokens by estimated logits ``[B, H, G, M]`` of all middle tokens."""
        method, seen = self._method, None
        if method.top_p is not None:
            top, seen = self._enough(q, kv, logits, split, method.top_p)
        else:
            top = self._geometry.kernels.top_k(reference.group_probabilities(logits), split.top_k)
        if not method.estimates_tail:
            return Best(top, seen, codes=codes)
        weights, log_weight = tail_weights(without(logits, top, seen))
        return Best(top, seen, log_weight, weights, codes)

    def _by_codes(self, q: Tensor, codes: Tensor, wanted: int) -> Tensor:
        """The best tokens ``[B, H, k]`` by codes only."""
        index, backend = self._index, self._geometry.kernels
        mapped, book = index.map.queries(q), ready(index.codebook)
        scores = backend.pq_probabilities(mapped, book, index.key_codes(codes), self._geometry.scaling)
        return backend.top_k(scores, wanted)

    def _by_cells(self, q: Tensor, lists: InvertedLists, wanted: int) -> tuple[Tensor, Tensor]:
        """The same tokens ``[B, H, k]``, found in inverted lists, and the log-weight ``[B, H, G]`` of the others."""
        self._taken = wanted
        index, scaling = self._index, self._geometry.scaling
        top, rest = self._geometry.kernels.best_of_cells(
            index.map.queries(q), ready(index.codebook), lists.starts, lists.tokens, lists.pending, wanted, scaling
        )
        return top, rest + index.map.constant(q) * scaling

    def _enough(self, q: Tensor, kv: KV, logits: Tensor, split: Split, share: float) -> tuple[Tensor, Tensor]:
        """The fewest middle tokens that hold, with sinks and window, a ``share`` of the query group's mean attention as
        estimated from ``logits`` ``[B, H, G, M]``, but at most top_k. Returns as
        :func:`methods.pqcache.tail.smallest_set`."""
        first, stop = split.middle(kv.length)
        outside = torch.cat([kv.keys(0, first), kv.keys(stop)], dim=2).float()
        held = (q.float() @ outside.transpose(2, 3) * self._geometry.scaling).logsumexp(-1)  # [B, H, G]
        whole = torch.logaddexp(held, log_mass(logits))
        shares = (logits - whole[..., None]).exp().mean(2)
        top = self._geometry.kernels.top_k(shares, split.top_k)
        return smallest_set(shares, top, share - (held - whole).exp().mean(2))
