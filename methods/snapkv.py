"""SnapKV: keep the tokens that the last queries of the prompt attend to most (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pqbench.kernels.voting import Votes, oldest_generated, refused
from pqbench.method import KV, Budget, ConfigError, Geometry, LayerState, Method


@dataclass(frozen=True)
class SnapKV(Method):
    """Each KV head selects once, at the end of prefill, by the attention of the last ``observation`` prompt queries.

    The vote for a token is its attention probability, summed over these queries and the query group; the softmax runs
    over all keys that a query may see. Votes of middle tokens are pooled along the sequence, so that neighbours of a
    token with many votes are kept with it. Sinks, window and the top_k tokens with the most votes are kept.

    Differs from the paper: tokens are kept per KV head, not per query head with repeated keys; sinks are kept, as for
    every method here (``budget.sink=0`` for the paper); votes are pooled over the middle only, so that sinks do not
    raise the votes of their neighbours; the window is that of the budget, not the ``observation`` last tokens (set
    ``budget.window`` to ``observation`` for the paper), so that a token whose query votes can itself receive votes from
    later queries; generated tokens are evicted (see ``evict_generated``).

    Attributes:
        budget: sinks and window are always kept; top_k tokens by votes.
        observation: w, prompt queries that vote (released LongBench runs: 32).
        kernel: width of the pooling, odd; 1 for no pooling (released: 5 with avg, LongBench 7 with max).
        pooling: ``max``, or ``avg`` with zeros beyond the edges of the middle, as released.
        evict_generated: meet the budget in every step: tokens chosen by the vote stay, and the oldest generated token
            outside the window is dropped. False keeps all generated tokens, as published; the cache then grows by one
            token in every step, beyond the budget.
    """

    evicts = True

    budget: Budget = field(default_factory=Budget)
    observation: int = 32
    kernel: int = 7
    pooling: str = "max"
    evict_generated: bool = True

    def __post_init__(self) -> None:
        reason = refused(self.observation, self.kernel, self.pooling)
        if reason:
            raise ConfigError(f"snapkv.{reason}")

    def layer(self, geometry: Geometry) -> LayerState:
        return SnapKVState(self, geometry)

    @property
    def beyond_budget(self) -> str | None:
        return None if self.evict_generated else "keeps every generated token"


class SnapKVState(LayerState):
    """Holds the votes during the prefill, and afterwards the position up to which tokens could be voted for."""

    def __init__(self, method: SnapKV, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        self.votes = Votes(method.observation, geometry.prompt)
        self.voted = 0  # tokens before this position were sinks or could be voted for

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        self.votes.observe(q, keys, self.geometry.column_sums)

    def finish_prefill(self, kv: KV) -> Tensor:
        split = self.method.budget.between_steps(kv.seen, self.geometry.prompt)
        first, self.voted = split.middle(kv.length)
        votes = self.votes.take(first, self.voted, self.method.kernel, self.method.pooling)
        return split.around(first + self.geometry.kernels.top_k(votes, split.top_k), kv.length)

    def attended(self, weights: Tensor | None, kv: KV) -> Tensor | None:
        split = self.method.budget.between_steps(kv.seen, self.geometry.prompt)
        surplus = kv.length - split.total
        if surplus <= 0 or not self.method.evict_generated:
            return None
        positions = kv.positions
        return oldest_generated(positions, kv.seen, self.voted, split.always(positions, kv.seen), surplus)
