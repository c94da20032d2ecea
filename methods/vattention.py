"""vAttention: another method's selection plus a weighted uniform sample of the other tokens (arXiv 2510.05688)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pqbench.kernels.sampling import draw_rest, sample_log_weights, sample_sizes, step_seed
from pqbench.method import KV, Budget, Check, ConfigError, Geometry, LayerState, Method, Selection, Split


@dataclass(frozen=True)
class VAttention(Method):
    """Runs any method that selects without evicting, and gives a share of its top_k to a uniform sample of the other
    tokens. In numerator and denominator of attention, a sampled token is weighted by the number of tokens that it
    represents.

    With ``epsilon``, the sample of each KV head is as large as an error bound asks, but not larger than the share. The
    bound needs the standard deviation, which is estimated from ``base_sample`` tokens
    (:func:`pqbench.kernels.sampling.sample_sizes`). For that, keys of the exact part and of these tokens are read a
    second time and counted as index. The bound assumes a normal distribution, which is a good model if the base leaves
    out no token of large weight; with random tokens as base, errors beyond epsilon were twice as frequent as delta.

    Differs from the paper: the sample is part of the budget; the bound is for the denominator only; a query group
    shares one sample, large enough for each of its heads; a residual of the base method is not used.

    Attributes:
        base: the method that selects; the budget here replaces its own.
        budget: sinks, window and top_k, of which ``share`` goes to the sample.
        share: share of top_k for the sample, in [0, 1].
        epsilon: tolerated relative error of the denominator; None for a sample of fixed size.
        delta: probability of a larger error, in (0, 1).
        base_sample: tokens from which the standard deviation is estimated.
        seed: seed of the sample, which otherwise depends only on layer, head and length.
    """

    base: Method
    budget: Budget = field(default_factory=Budget)
    share: float = 0.5
    epsilon: float | None = None
    delta: float = 0.1
    base_sample: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"vattention.share is {self.share}: it must lie in [0, 1]")
        if not 0 < self.delta < 1 or (self.epsilon is not None and self.epsilon <= 0) or self.base_sample < 2:
            raise ConfigError(
                "vattention needs epsilon > 0 or null, delta in (0, 1) and base_sample >= 2, got "
                f"{self.epsilon}, {self.delta} and {self.base_sample}"
            )
        name = type(self.base).__name__
        if self.base.budget is None:
            raise ConfigError(f"vattention.base is {name}, which attends to all tokens: nothing is left to sample")
        if self.base.evicts or self.base.needs_positions or self.base.own_prefill:
            raise ConfigError(
                f"vattention.base is {name}, which drops or renumbers tokens: use one that only selects, "
                "such as methods.pqcache.PQCache or methods.sparq.SparQ"
            )

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """Whether the base needs times of this hardware."""
        return self.base.needs_calibration

    def layer(self, geometry: Geometry) -> LayerState:
        return VAttentionState(self, geometry)

    def attends_all(self, context: int, prompt: int | None = None) -> bool:
        return self.selecting.attends_all(context, prompt)

    @property
    def selecting(self) -> Method:
        """The base method with the budget that remains after the sample."""
        return self.base.with_budget(_Remaining(whole=self.budget, share=self.share))


@dataclass(frozen=True)
class _Remaining(Budget):
    """A budget whose top_k is reduced by a share."""

    whole: Budget = field(default_factory=Budget)
    share: float = 0.0

    def resolve(self, context: int, prompt: int) -> Split:
        split = self.whole.resolve(context, prompt)
        return replace(split, top_k=split.top_k - int(split.top_k * self.share))


class VAttentionState(LayerState):
    """The state of the base method; each step adds a sample to its selection."""

    def __init__(self, method: VAttention, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        self.base = method.selecting.layer(geometry)
        if self.base.needs_weights:
            raise ConfigError(
                f"vattention.base is {type(method.base).__name__}, which learns from what it attends to: "
                "a sample would be mixed in; use a base that only selects"
            )

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        self.base.observe(q, keys, values)

    def finish_prefill(self, kv: KV) -> Tensor | None:
        return self.base.finish_prefill(kv)

    def append(self, kv: KV) -> None:
        self.base.append(kv)

    def prefetch(self, kv: KV) -> None:
        self.base.prefetch(kv)

    def select(self, q: Tensor, kv: KV) -> Selection:
        # Every query head attends to all rows of the selection, also to those that were chosen for other heads.
        chosen = self.base.select(q, kv).indices
        if chosen is None:
            return Selection()
        split = self.method.budget.resolve(kv.length, self.geometry.prompt)
        seed = step_seed(self.method.seed, self.geometry.layer, kv.length)
        sample = draw_rest(chosen, kv.length, int(split.top_k * self.method.share), seed)
        exact, drawn = chosen.shape[2], sample.shape[2]
        if drawn == 0:
            return Selection(chosen)
        rest, sizes, shown = kv.length - exact, None, None
        if self.method.epsilon is None or drawn <= self.method.base_sample or drawn == rest:
            sample = sample.sort(-1).values  # rows in order are read faster
        else:
            sizes = self._sizes(q, kv, chosen, sample, self.method.epsilon)
            sample, shown = self._first(sample, sizes, exact, q.shape[2])
        weights = sample_log_weights(sample, rest, exact, sizes=sizes)
        return Selection(torch.cat([chosen, sample], dim=2), shown, log_weights=weights)

    def _sizes(self, q: Tensor, kv: KV, chosen: Tensor, sample: Tensor, epsilon: float) -> Tensor:
        """How many tokens of the sample ``[B, H, n]`` each KV head needs: ``[B, H]``."""
        base, rest = sample[..., : self.method.base_sample], kv.length - chosen.shape[2]
        keys = kv.keys_at(torch.cat([chosen, base], dim=2))
        logits = q.float() @ keys.float().transpose(2, 3) * self.geometry.scaling  # [B, H, G, exact + base]
        exact, seen = logits.split([chosen.shape[2], base.shape[2]], dim=3)
        sizes = sample_sizes(exact.logsumexp(3), seen, rest, epsilon, self.method.delta)
        return sizes.clamp(base.shape[2], sample.shape[2])

    def _first(self, sample: Tensor, sizes: Tensor, exact: int, group: int) -> tuple[Tensor, Tensor]:
        """The sample, cut to the largest of ``sizes`` ``[B, H]``, and which rows a head sees, ``[B, H, G, n]``, with
        the ``exact`` rows first."""
        sample = sample[..., : int(sizes.max())]
        within = torch.arange(sample.shape[2], device=sample.device) < sizes[..., None]
        shown = torch.nn.functional.pad(within, (exact, 0), value=True)
        return sample, shown[:, :, None].expand(-1, -1, group, -1)

    def attended(self, weights: Tensor | None, kv: KV) -> Tensor | None:
        return self.base.attended(weights, kv)

    @property
    def checks(self) -> list[Check]:
        return self.base.checks

    @property
    def facts(self) -> dict[str, float]:
        return self.base.facts

    @property
    def index_bytes(self) -> int:
        return self.base.index_bytes

    @property
    def resident_bytes(self) -> int:
        return self.base.resident_bytes
