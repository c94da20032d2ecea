"""H2O: keep the tokens that have received the most attention so far (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pqbench.kernels.buffers import GrowingBuffer, swap_remove
from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection


@dataclass(frozen=True)
class H2O(Method):
    """Each KV head keeps sinks, a recent window, and the tokens with the largest accumulated attention probability.

    After a dense prefill the score of a token is its column sum of the causal softmax, over all prompt queries and the
    query group, in float32. Each decode step adds its own attention probabilities. It then evicts the tokens with the
    lowest scores outside sinks and window until the budget is met; evicted tokens never come back.

    Differs from the paper: the official code supports multi-head attention only, here scores are summed over the query
    group; sinks are kept, as in PQCache's comparison (set ``budget.sink=0`` for the paper); nothing is evicted during
    the prefill.

    Attributes:
        budget: sinks, window ("recent") and top_k ("heavy"); in the paper, the latter two have equal size.
    """

    evicts = True

    budget: Budget = field(default_factory=Budget)

    def layer(self, geometry: Geometry) -> LayerState:
        return H2OState(self, geometry)


class H2OState(LayerState):
    """Accumulated scores, float32 ``[B, H, rows]``, one for each row of the store."""

    needs_weights = True

    def __init__(self, method: H2O, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        empty = torch.zeros(geometry.batch, geometry.kv_heads, 0)
        self.scores = GrowingBuffer(empty)

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        sums = self.geometry.column_sums(q, keys)  # [B, H, S]
        if len(self.scores):
            sums[:, :, : len(self.scores)] += self.scores.view()
        self.scores = GrowingBuffer(sums)

    def finish_prefill(self, kv: KV) -> Tensor:
        split = self.method.budget.between_steps(kv.seen, self.geometry.prompt)
        first, stop = split.middle(kv.length)
        heavy = first + self.geometry.kernels.top_k(self.scores.view(first, stop), split.top_k)
        rows = split.around(heavy, kv.length)
        self.scores = GrowingBuffer(self.scores.view().gather(2, rows))
        return rows

    def append(self, kv: KV) -> None:
        self.scores.append(self.scores.view()[:, :, :1] * 0)

    def select(self, q: Tensor, kv: KV) -> Selection:
        return Selection()

    def attended(self, weights: Tensor | None, kv: KV) -> Tensor | None:
        if weights is not None:
            self.scores.view().add_(weights.sum(2))
        split = self.method.budget.between_steps(kv.seen, self.geometry.prompt)
        surplus = kv.length - split.total
        if surplus <= 0:
            return None
        positions = kv.positions
        kept = split.always(positions, kv.seen)
        lightest = self.scores.view().masked_fill(kept, float("inf")).topk(surplus, dim=-1, largest=False).indices
        swap_remove(self.scores, lightest)
        return lightest

    @property
    def index_bytes(self) -> int:
        return self.scores.bytes

    @property
    def resident_bytes(self) -> int:
        return self.scores.bytes
