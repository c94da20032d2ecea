"""PQCache: product-quantised keys select tokens, which are then attended to exactly (arXiv 2407.12820)."""

from __future__ import annotations

from dataclasses import dataclass, field

from methods.pqcache.state import PQCacheState
from pqbench.method import Budget, ConfigError, Geometry, LayerState, Method, PaperBudget


@dataclass(frozen=True)
class PQCache(Method):
    """K-Means on the middle keys, after rotary embedding, gives a codebook and codes per KV head and sub-space.

    Each decode step scores every middle token by table look-up. It takes the softmax over the middle per query head,
    sums it over the query group, and attends exactly to the top_k tokens per KV head together with sinks and window. A
    token that leaves the window gets the code of its nearest centroid; codebooks do not change while decoding.

    Differs from the paper: if the middle holds at most ``2**b`` tokens, all of the context is attended to, and the
    codebooks are computed once the middle is larger; K-Means runs on a sample of the middle, then once on all of it;
    the number of iterations is fixed by default, so that quality does not depend on the machine (null: the paper's
    adaptive rule).

    Attributes:
        budget: sinks, window and top_k per KV head.
        m: sub-spaces; must divide the head dimension.
        b: bits per code, 1 to 8; each code is stored in one byte. The paper uses m=2 b=6 on LongBench, and m=4 b=8, the
            default here, on InfiniteBench, where single tokens must be found.
        iterations: Lloyd iterations; None for as many as can run behind a layer's prefill
            (:func:`methods.pqcache.clustering.adaptive_iterations`).
        seed: seed of the initial centroids, which are middle keys at the same positions in all heads.
        sample: keys per centroid that the iterations run on; None for all keys.
        tolerance: K-Means stops early once at most this share of the keys changes cluster.
        codes_on: ``device`` keeps codes on the accelerator; ``host`` keeps those of the prompt in host memory and
            brings them over in every step, while the previous layer computes, as in the paper.
    """

    budget: Budget = field(default_factory=Budget)
    m: int = 4
    b: int = 8
    iterations: int | None = 5
    seed: int = 0
    sample: int | None = 128
    tolerance: float = 0.02
    codes_on: str = "device"

    def __post_init__(self) -> None:
        if not 1 <= self.b <= 8:
            raise ConfigError(f"pqcache.b is {self.b}: codes have 1 to 8 bits")
        if self.m < 1 or (self.iterations is not None and self.iterations < 0):
            raise ConfigError(f"pqcache needs m >= 1 and iterations >= 0, got {self.m} and {self.iterations}")
        if self.sample is not None and self.sample < 1:
            raise ConfigError(f"pqcache.sample is {self.sample}: it must be at least 1 key per centroid, or null")
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"pqcache.tolerance is {self.tolerance}: it is a share of the keys, from 0 to below 1")
        if self.codes_on not in ("device", "host"):
            raise ConfigError(f"pqcache.codes_on is {self.codes_on!r}: use device or host")

    @classmethod
    def paper_longbench(cls, ratio: float = 0.1) -> PQCache:
        """The paper's LongBench setting: 12 bits per key, and the budget split equally into window and top_k."""
        return cls(PaperBudget(ratio=ratio), m=2, b=6, iterations=None, tolerance=0.0)

    @classmethod
    def paper_infinitebench(cls, ratio: float = 0.1) -> PQCache:
        """The paper's InfiniteBench setting: 32 bits per key, and the budget split equally into window and top_k."""
        return cls(PaperBudget(ratio=ratio), m=4, b=8, iterations=None, tolerance=0.0)

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """Whether the adaptive rule for the number of iterations is used, which needs times of this hardware."""
        return self.iterations is None

    def layer(self, geometry: Geometry) -> LayerState:
        if geometry.head_dim % self.m:
            raise ConfigError(f"pqcache.m is {self.m}: it must divide the head dimension {geometry.head_dim}")
        return PQCacheState(self, geometry)

    def why_not_captured(self, offloads: bool) -> str | None:
        return None if self.codes_on == "device" else "brings more codes over in every step: set codes_on=device"

    def why_not_ahead(self) -> str | None:
        return None if self.codes_on == "device" else "has no codes on the device ahead of a step: set codes_on=device"

    def attends_all(self, context: int, prompt: int | None = None) -> bool:
        first, stop = self.budget.resolve(context, context if prompt is None else prompt).middle(context)
        return stop - first <= self.clusters

    @property
    def clusters(self) -> int:
        """Centroids per sub-space. A middle of at most as many tokens gets no codebook."""
        return 2**self.b
