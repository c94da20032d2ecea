"""StreamingLLM: attention sinks and a sliding window, with positions inside the cache (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Keeps the first ``sink`` tokens and the most recent ones up to the budget; all others are dropped for good.

    A token's position is its index in the cache, as in the paper: after tokens are dropped, the sinks directly precede
    the window. Keys are stored after rotary embedding, and the sinks' keys are rotated further by the number of dropped
    tokens. The result is the same as rotating every key by its index in the cache.

    Differs from the paper in one thing: the prefill is dense, as in published comparisons.

    Attributes:
        budget: its total is the number of tokens kept; its sink and window fields are not used.
        sink: number of sink tokens (paper: 4).
    """

    evicts = True
    needs_positions = True

    budget: Budget = field(default_factory=Budget)
    sink: int = 4

    def layer(self, geometry: Geometry) -> LayerState:
        return StreamingState(self, geometry)


class StreamingState(LayerState):
    """Holds nothing; the store knows how many tokens were dropped."""

    def __init__(self, method: StreamingLLM, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method

    def finish_prefill(self, kv: KV) -> Tensor:
        size = self._size(kv)
        sink = min(self.method.sink, size)
        first = kv.length - (size - sink)
        rows = torch.cat([torch.arange(sink, device=kv.device), torch.arange(first, kv.length, device=kv.device)])
        return rows.expand(self.geometry.batch, self.geometry.kv_heads, -1)

    def select(self, q: Tensor, kv: KV) -> Selection:
        dropped = kv.seen - kv.length
        if dropped == 0:
            return Selection()
        return Selection(key_shift=(kv.positions < self.method.sink) * dropped)  # window tokens keep their distance

    def attended(self, weights: Tensor | None, kv: KV) -> Tensor | None:
        surplus = kv.length - self._size(kv)
        if surplus <= 0:
            return None
        positions = kv.positions
        ages = positions.masked_fill(positions < self.method.sink, kv.seen)  # sinks never leave
        return ages.topk(surplus, dim=-1, largest=False).indices

    def _size(self, kv: KV) -> int:
        """Rows to hold until the next step, whose own token then completes the budget."""
        return self.method.budget.between_steps(kv.seen, self.geometry.prompt).total
