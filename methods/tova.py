"""TOVA: drop the token that the last query attends to least (arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pqbench.method import KV, Budget, Geometry, LayerState, Method


@dataclass(frozen=True)
class TOVA(Method):
    """Token omission via attention: after each step the token with the lowest attention of that step's query is gone.

    Attention is the probability averaged over all query heads of the layer, so that a layer's heads hold the same
    tokens. No memory of earlier steps: the last query alone decides. The prompt is reduced at once, at the end of its
    dense prefill, by the attention of its last query.

    Differs from the paper: no token is special there, neither the first nor the newest; here sinks and window are kept
    as for every method, so that budgets compare (``budget.sink=0 budget.window=1`` for the paper: then even the newest
    token may go). Dense prefill, as in the other comparisons.

    Attributes:
        budget: sinks and window always; top_k by the last query's attention.
        per_head: each KV head drops by the attention of its own query group.
    """

    evicts = True

    budget: Budget = field(default_factory=Budget)
    per_head: bool = False

    def layer(self, geometry: Geometry) -> LayerState:
        return TOVAState(self, geometry)


class TOVAState(LayerState):
    """Holds the attention of the last prompt query, ``[B, H, S]``, from the end of prefill to the first eviction."""

    needs_weights = True

    def __init__(self, method: TOVA, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        self.last: Tensor | None = None

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        if keys.shape[2] == self.geometry.prompt:
            self.last = self.geometry.column_sums(q[:, :, :, -1:], keys)

    def finish_prefill(self, kv: KV) -> Tensor:
        if self.last is None:
            raise RuntimeError("finish_prefill() before observe() saw the end of the prompt")
        split = self.method.budget.between_steps(kv.seen, self.geometry.prompt)
        first, stop = split.middle(kv.length)
        rows = split.around(first + self._top(self.last[:, :, first:stop], split.top_k), kv.length)
        self.last = None
        return rows

    def attended(self, weights: Tensor | None, kv: KV) -> Tensor | None:
        split = self.method.budget.between_steps(kv.seen, self.geometry.prompt)
        surplus = kv.length - split.total
        if surplus <= 0 or weights is None:
            return None
        positions = kv.positions
        kept = split.always(positions, kv.seen)
        return self._top(-weights.sum(2).masked_fill(kept, float("inf")), surplus)

    def _top(self, scores: Tensor, count: int) -> Tensor:
        """Indices ``[B, H, count]`` of the largest scores ``[B, H, n]``, the same for all heads unless ``per_head``.
        Heads that never parted hold their rows in the same order."""
        if self.method.per_head:
            return self.geometry.kernels.top_k(scores, count)
        top = self.geometry.kernels.top_k(scores.mean(1, keepdim=True), count)  # [B, 1, count]
        return top.expand(-1, scores.shape[1], -1)
