"""PyramidKV: votes as in SnapKV, and budgets that shrink from layer to layer (arXiv 2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from pqbench.kernels.voting import Votes, oldest_generated
from pqbench.method import KV, Budget, ConfigError, Geometry, LayerState, Method, Split


@dataclass(frozen=True)
class PyramidKV(Method):
    """The last ``observation`` prompt queries vote per KV head for middle tokens; lower layers keep more of them.

    Votes: attention probability over all keys a query may see, summed over queries and query group, pooled along the
    middle. Every layer holds sinks and window; their top_k is the mean of a line that falls from the first
    full-attention layer to the last (:func:`layer_budget`).

    Differs from the paper: as :class:`methods.snapkv.SnapKV` does; the line is rounded so that the mean over layers is
    top_k exactly, where the released code keeps up to half a token per layer more; it is laid once, at the end of
    prefill, and a budget that grows while decoding grows by the same number of tokens in every layer.

    Attributes:
        budget: sinks and window in every layer; top_k is the mean over layers.
        observation: prompt queries that vote (released: 8 to 32).
        kernel: width of the pooling, odd; 1 for none.
        pooling: ``max`` ignores what lies beyond the middle's edges; ``avg`` counts it as zeros, as released.
        beta: steepness; the last layer keeps ``top_k // beta`` (released: 20). 1 gives every layer the same.
        evict_generated: the layer's budget holds in every step: the tokens voted for stay, and of all that came after
            them the oldest outside the window is dropped. False keeps all generated tokens, as published.
    """

    evicts = True

    budget: Budget = field(default_factory=Budget)
    observation: int = 32
    kernel: int = 7
    pooling: str = "max"
    beta: int = 20
    evict_generated: bool = True

    def __post_init__(self) -> None:
        if self.observation < 1:
            raise ConfigError(f"pyramidkv.observation is {self.observation}: at least 1 query must vote")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"pyramidkv.kernel is {self.kernel}: it must be odd, 1 for no pooling")
        if self.pooling not in ("avg", "max"):
            raise ConfigError(f"pyramidkv.pooling is {self.pooling!r}: use avg or max")
        if self.beta < 1:
            raise ConfigError(f"pyramidkv.beta is {self.beta}: it must be at least 1")

    def layer(self, geometry: Geometry) -> LayerState:
        return PyramidKVState(self, geometry)

    @property
    def beyond_budget(self) -> str | None:
        return None if self.evict_generated else "keeps every generated token"

    def limit(self, context: int, geometry: Geometry) -> int | None:
        """The layer's own share: the first layers hold more than the mean of all layers, and the last ones less."""
        if self.beyond_budget:
            return None
        split = self.budget.resolve(context, geometry.prompt)
        return split.sink + split.window + max(0, split.top_k + self.extra(geometry))

    def extra(self, geometry: Geometry) -> int:
        """Tokens that a layer holds beyond the mean of all layers; negative in the last layers."""
        prompt = geometry.prompt
        split = self.budget.resolve(prompt + 1, prompt)
        middle = prompt - split.sink - (split.window - 1)
        return layer_budget(split.top_k, middle, prompt, self.beta, geometry.layers, geometry.rank) - split.top_k


def layer_budget(mean: int, middle: int, context: int, beta: int, layers: int, rank: int) -> int:
    """Middle tokens that layer ``rank`` of ``layers`` keeps of ``middle``, when the layers' mean is ``mean``.

    From 2 * mean - mean // beta in the first layer down to mean // beta in the last. A first layer that would keep more
    than there is keeps all, and the last one what this leaves. Contexts shorter than 2 * mean get ``mean`` everywhere.
    Lower half rounded up, upper half its mirror image, so that the sum is exactly ``layers * mean``.
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
    """The votes until the prefill ends; afterwards how this layer's budget differs, and what was up for the vote."""

    def __init__(self, method: PyramidKV, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        self.votes = Votes(method.observation, geometry.prompt)
        self.voted = 0  # tokens before this position were sinks or up for the vote
        self.extra = 0  # tokens this layer keeps beyond the mean; negative in upper layers

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
        """What to hold until the next step, whose own token will complete the layer's budget."""
        split = self.method.budget.between_steps(kv.seen, self.geometry.prompt)
        return replace(split, top_k=max(0, split.top_k + self.extra))
