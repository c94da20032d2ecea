"""PyramidKV: keep tokens by votes as SnapKV does, with fewer tokens in higher layers (arXiv 2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from pqbench.kernels.voting import Votes, oldest_generated, refused
from pqbench.method import KV, Budget, ConfigError, Geometry, LayerState, Method, Split


@dataclass(frozen=True)
class PyramidKV(Method):
    """The last ``observation`` prompt queries vote per KV head for middle tokens; lower layers keep more of them.

    The votes are attention probabilities over all keys that a query may see, summed over these queries and the query
    group, and pooled along the middle. Every layer keeps sinks and window. The number of middle tokens that a layer
    keeps falls linearly from the first full-attention layer to the last, and its mean is top_k (:func:`layer_budget`).

    Differs from the paper: as :class:`methods.snapkv.SnapKV` does; numbers of tokens are rounded so that their mean
    over layers is exactly top_k, where the released code keeps up to half a token per layer more; they are computed
    once, at the end of prefill, and a budget that grows while decoding grows by as many tokens in every layer.

    Attributes:
        budget: sinks and window of every layer; top_k is the mean over layers.
        observation: prompt queries that vote (released: 8 to 32).
        kernel: width of the pooling, odd; 1 for no pooling.
        pooling: ``max``, or ``avg`` with zeros beyond the edges of the middle, as released.
        beta: steepness; the last layer keeps ``top_k // beta`` (released: 20). With 1 all layers keep the same number.
        evict_generated: meet the layer's budget in every step: tokens chosen by the vote stay, and the oldest generated
            token outside the window is dropped. False keeps all generated tokens, as published.
    """

    evicts = True

    budget: Budget = field(default_factory=Budget)
    observation: int = 32
    kernel: int = 7
    pooling: str = "max"
    beta: int = 20
    evict_generated: bool = True

    def __post_init__(self) -> None:
        reason = refused(self.observation, self.kernel, self.pooling)
        if reason:
            raise ConfigError(f"pyramidkv.{reason}")
        if self.beta < 1:
            raise ConfigError(f"pyramidkv.beta is {self.beta}: it must be at least 1")

    def layer(self, geometry: Geometry) -> LayerState:
        return PyramidKVState(self, geometry)

    @property
    def beyond_budget(self) -> str | None:
        return None if self.evict_generated else "keeps every generated token"

    def limit(self, context: int, geometry: Geometry) -> int | None:
        """See :meth:`pqbench.method.Method.limit`. The first layers hold more than the mean, the last ones less."""
        if self.beyond_budget:
            return None
        split = self.budget.resolve(context, geometry.prompt)
        return split.sink + split.window + max(0, split.top_k + self.extra(geometry))

    def extra(self, geometry: Geometry) -> int:
        """Tokens that this layer holds beyond the mean over layers; negative in the last layers."""
        prompt = geometry.prompt
        split = self.budget.resolve(prompt + 1, prompt)
        middle = prompt - split.sink - (split.window - 1)
        return layer_budget(split.top_k, middle, prompt, self.beta, geometry.layers, geometry.rank) - split.top_k


def layer_budget(mean: int, middle: int, context: int, beta: int, layers: int, rank: int) -> int:
    """How many of ``middle`` tokens layer ``rank`` of ``layers`` keeps, when the mean over layers is ``mean``.

    The number falls from 2 * mean - mean // beta in the first layer to mean // beta in the last. If the first layer
    would keep more than ``middle`` tokens, it keeps all of them, and the last layer keeps the rest of the two layers'
    sum. Contexts shorter than 2 * mean get ``mean`` in every layer. Numbers of the lower half are rounded up, and the
    upper half mirrors them, so that the sum is exactly ``layers * mean``.
    """
    mirror = layers - 1 - rank
    if context < 2 * mean or rank == mirror:
        return mean
    top = min(2 * mean - mean // beta, middle)
    fall = 2 * (top - mean)  # from the first layer to the last
    if rank < mirror:
        return top - rank * fall // (layers - 1)
    return 2 * mean - (top - mirror * fall // (layers - 1))


class PyramidKVState(LayerState):
    """Holds the votes during the prefill; afterwards, which tokens could be voted for and this layer's extra tokens."""

    def __init__(self, method: PyramidKV, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        self.votes = Votes(method.observation, geometry.prompt)
        self.voted = 0  # tokens before this position were sinks or could be voted for
        self.extra = 0  # tokens that this layer keeps beyond the mean; negative in upper layers

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        self.votes.observe(q, keys, self.geometry.column_sums)

    def finish_prefill(self, kv: KV) -> Tensor:
        split = self._next(kv)
        first, self.voted = split.middle(kv.length)
        self.extra = self.method.extra(self.geometry)
        count = split.top_k + self.extra
        votes = self.votes.take(first, self.voted, self.method.kernel, self.method.pooling)
        return split.around(first + self.geometry.kernels.top_k(votes, count), kv.length)

    def attended(self, weights: Tensor | None, kv: KV) -> Tensor | None:
        split = self._next(kv)
        surplus = kv.length - split.total
        if surplus <= 0 or not self.method.evict_generated:
            return None
        positions = kv.positions
        return oldest_generated(positions, kv.seen, self.voted, split.always(positions, kv.seen), surplus)

    def _next(self, kv: KV) -> Split:
        """What to hold until the next step, whose own token then completes the layer's budget."""
        split = self.method.budget.between_steps(kv.seen, self.geometry.prompt)
        return replace(split, top_k=max(0, split.top_k + self.extra))
