"""Oracle: selects by exact attention scores. An upper bound for other methods, too slow for real use."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pqbench.kernels.sinks import probabilities
from pqbench.kernels.unions import union_of
from pqbench.method import KV, Budget, ConfigError, Geometry, LayerState, Method, Selection

_RULES = ("kv_head", "query_head", "top_p")


@dataclass(frozen=True)
class Oracle(Method):
    """Selects the middle tokens with the largest exact attention probability.

    Attributes:
        budget: sinks and window are always attended to; ``rule`` selects ``top_k`` middle tokens.
        rule: ``kv_head`` takes the top_k of the probabilities summed over the query group (as the oracle of the PQCache
            code: the softmax runs over all cached tokens, then only middle tokens compete). ``query_head`` takes the
            top_k of each query head; a KV head reads their union. ``top_p`` takes for each KV head the smallest set
            that, with sinks and window, holds a share ``top_p`` of the group's mean probability; its size is not fixed.
        top_p: share of the probability for the rule ``top_p``, in (0, 1].

    Its index is the whole key cache, whose reads the store counts (phi = 1).
    """

    budget: Budget = field(default_factory=Budget)
    rule: str = "kv_head"
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.rule not in _RULES:
            raise ConfigError(f"oracle.rule is {self.rule!r}: use one of {', '.join(_RULES)}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"oracle.top_p is {self.top_p}: it must lie in (0, 1]")

    def layer(self, geometry: Geometry) -> LayerState:
        return OracleState(self, geometry)

    @property
    def beyond_budget(self) -> str | None:
        if self.rule == "query_head":
            return "reads the union of what its query heads choose"
        return "takes as many tokens as hold top_p of the probability" if self.rule == "top_p" else None


class OracleState(LayerState):
    """Holds nothing between steps."""

    def __init__(self, method: Oracle, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method

    def select(self, q: Tensor, kv: KV) -> Selection:
        keys = kv.keys()  # the store counts this read
        split = self.method.budget.resolve(kv.length, self.geometry.prompt)
        first, stop = split.middle(kv.length)
        backend = self.geometry.kernels
        if self.method.rule == "kv_head":
            received = self.geometry.exact_probabilities(q, keys)[..., first:stop]  # [B, H, M]
            return Selection(split.around(first + backend.top_k(received, split.top_k), kv.length))
        logits = q.float() @ keys.float().transpose(2, 3) * self.geometry.scaling  # [B, H, G, S]
        received = probabilities(logits, self.geometry.sinks)
        middle = received[..., first:stop]
        if self.method.rule == "query_head":
            chosen = _member(self.geometry.kernels.top_k(middle, split.top_k), middle)  # [B, H, G, M]
            return _ragged(chosen, split.around, first, kv.length)
        outside = received[..., :first].sum(-1) + received[..., stop:].sum(-1)  # [B, H, G]
        if self.geometry.sinks is not None:
            outside = outside + (1 - received.sum(-1))  # the share of the learned sinks
        chosen = _smallest_set(middle.mean(2), self.method.top_p - outside.mean(2))  # [B, H, M]
        return _ragged(chosen[:, :, None].expand_as(middle), split.around, first, kv.length)


def _member(indices: Tensor, like: Tensor) -> Tensor:
    """Bool mask shaped ``like`` that is True at ``indices`` along the last axis."""
    return torch.zeros_like(like, dtype=torch.bool).scatter_(-1, indices, True)


def _smallest_set(weights: Tensor, wanted: Tensor) -> Tensor:
    """Mask ``[..., M]`` of the fewest ``weights`` ``[..., M]`` whose sum reaches ``wanted`` ``[...]``; empty if
    ``wanted`` <= 0."""
    order = weights.argsort(dim=-1, descending=True)
    before = weights.gather(-1, order).cumsum(-1) - weights.gather(-1, order)
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, before < wanted[..., None])


def _ragged(chosen: Tensor, around: object, first: int, length: int) -> Selection:
    """A selection of the sets ``[B, H, G, M]`` of query heads: their union per KV head, padded to the largest."""
    top, visible_top = union_of(chosen)
    indices = around(first + top, length)  # type: ignore[operator]
    sink, window = first, indices.shape[2] - first - top.shape[2]
    return Selection(indices, torch.nn.functional.pad(visible_top, (sink, window), value=True))
