"""TOVA: in each step, drop the token that the last query attends to least (arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pqbench.method import KV, Budget, Geometry, LayerState, Method


@dataclass(frozen=True)
class TOVA(Method):
    """Token omission via attention: each step drops the token that receives the least attention from its query.

    Attention is the probability averaged over all query heads of the layer, so that all heads of a layer hold the same
    tokens. Only the last query counts, not those of earlier steps. The prompt is reduced once, at the end of its dense
    prefill, by the attention of its last query.

    Differs from the paper: there any token may be dropped, also the first and the newest; here sinks and window are
    kept as for every method, so that budgets are comparable (``budget.sink=0 budget.window=1`` for the paper: then even
    the newest token may be dropped); the prefill is dense, as for the other methods.

    Attributes:
        budget: sinks and window are always kept; top_k tokens by the last query's attention.
        per_head: each KV head drops tokens by the attention of its own query group.
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
        All heads then hold the same tokens in the same rows."""
        if self.method.per_head:
            return self.geometry.kernels.top_k(scores, count)
        top = self.geometry.kernels.top_k(scores.mean(1, keepdim=True), count)  # [B, 1, count]
        return top.expand(-1, scores.shape[1], -1)
