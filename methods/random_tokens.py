"""Random tokens: the lower bound that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection


@dataclass(frozen=True)
class RandomTokens(Method):
    """Attends to sinks, window and random middle tokens, drawn without replacement in every step for every KV head.

    The draw depends only on ``seed``, layer, KV head and step: two runs select the same tokens, and so do all sequences
    of a batch.

    Attributes:
        budget: sinks and window are always attended to; top_k random tokens of the middle.
        seed: seed of the draws.
    """

    budget: Budget = field(default_factory=Budget)
    seed: int = 0

    def layer(self, geometry: Geometry) -> LayerState:
        return RandomTokensState(self, geometry)


class RandomTokensState(LayerState):
    """Holds nothing between steps; the number of tokens seen identifies the step."""

    def __init__(self, method: RandomTokens, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method

    def select(self, q: torch.Tensor, kv: KV) -> Selection:
        split = self.method.budget.resolve(kv.length, self.geometry.prompt)
        first, stop = split.middle(kv.length)
        seed = (self.method.seed * 4099 + self.geometry.layer) * (1 << 24) + kv.seen  # differs in every layer and step
        backend = self.geometry.kernels
        lots = backend.noise(q.shape[1], stop - first, seed % (1 << 63), q.device)  # [H, middle]
        top = first + backend.top_k(lots.float()[None], split.top_k)
        return Selection(split.around(top.expand(q.shape[0], -1, -1), kv.length))
