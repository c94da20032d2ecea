"""StreamingLLM: attention sinks and a sliding window, with positions counted inside the cache (arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Keeps the first ``sink`` tokens and the most recent ones up to the budget; everything else is dropped for good.

    Rolling positions as in the paper: a token's position is its index in the cache, so once tokens are dropped the
    sinks slide forward beside the window. Keys are cached rotated and the sinks are turned by the number of dropped
    tokens, which equals rotating un-rotated keys by their cache index.

    Differs from the paper in one thing: prefill is dense, as in published comparisons.

    Attributes:
        budget: its total is what is kept; its own sink and window fields do not matter here.
        sink: number of sink tokens (paper: 4).
    """

    evicts = True
    needs_positions = True

    budget: Budget = field(default_factory=Budget)
    sink: int = 4

    def layer(self, geometry: Geometry) -> LayerState:
        return StreamingState(self, geometry)


class StreamingState(LayerState):
    """Needs only to know how many tokens are gone."""

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
        """Rows to hold until the next step, whose own token will complete the budget."""
        return self.method.budget.between_steps(kv.seen, self.geometry.prompt).total
