"""PQCache: product-quantised keys find the tokens, full-precision keys and values attend (arXiv 2407.12820)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pqbench.kernels.buffers import GrowingBuffer
from pqbench.method import KV, Budget, ConfigError, Geometry, LayerState, Method, PaperBudget, Selection


@dataclass(frozen=True)
class PQCache(Method):
    """Per KV head and sub-space, K-Means on the middle keys after rotary embedding gives codebooks and codes.

    A step scores every middle token by table look-up, takes the softmax over the middle per query head, sums it over
    the query group, and attends exactly to the top-k per KV head together with sinks and window. A token that leaves
    the window gets the nearest centroid of the frozen codebooks.

    Differs from the paper: the number of iterations is fixed here (the paper adapts it to the prefill time); contexts
    whose middle holds at most ``2**b`` tokens are attended whole, and get their codebooks once the middle is larger.

    Attributes:
        budget: sinks, window and top_k per KV head.
        m: sub-spaces; must divide the head dimension.
        b: bits per code, 1 to 8; codes are stored one byte each. The paper uses m=2 b=6 on LongBench and, where single
            tokens must be found, m=4 b=8 on InfiniteBench, the default here.
        iterations: Lloyd iterations.
        seed: of the initial centroids, a draw of middle keys shared by all heads.
    """

    budget: Budget = field(default_factory=Budget)
    m: int = 4
    b: int = 8
    iterations: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.b <= 8:
            raise ConfigError(f"pqcache.b is {self.b}: codes have 1 to 8 bits")
        if self.m < 1 or self.iterations < 0:
            raise ConfigError(f"pqcache needs m >= 1 and iterations >= 0, got {self.m} and {self.iterations}")

    @classmethod
    def paper_longbench(cls, ratio: float = 0.1) -> PQCache:
        """The paper's LongBench setting: 12 bits per key and the paper's half/half split."""
        return cls(PaperBudget(ratio=ratio), m=2, b=6)

    @classmethod
    def paper_infinitebench(cls, ratio: float = 0.1) -> PQCache:
        """The paper's InfiniteBench setting: 32 bits per key and the paper's half/half split."""
        return cls(PaperBudget(ratio=ratio), m=4, b=8)

    def layer(self, geometry: Geometry) -> LayerState:
        if geometry.head_dim % self.m:
            raise ConfigError(f"pqcache.m is {self.m}: it must divide the head dimension {geometry.head_dim}")
        return PQCacheState(self, geometry)

    def attends_all(self, context: int) -> bool:
        first, stop = self.budget.resolve(context, context).middle(context)
        return stop - first <= 2**self.b


class PQCacheState(LayerState):
    """Codebook ``[B, H, m, 2**b, D/m]`` and codes uint8 ``[B, H, middle, m]``; None until there are keys enough."""

    def __init__(self, method: PQCache, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        self.codebook: Tensor | None = None
        self.codes: GrowingBuffer | None = None

    def finish_prefill(self, kv: KV) -> None:
        self._cover(kv)

    def append(self, kv: KV) -> None:
        self._cover(kv)

    def select(self, q: Tensor, kv: KV) -> Selection:
        if self.codebook is None or self.codes is None:
            return Selection()
        split = self.method.budget.resolve(kv.length, self.geometry.prompt)
        body = self.geometry.kernels
        scores = body.pq_probabilities(q, self.codebook, self.codes.view(), self.geometry.scaling)  # [B, H, middle]
        top = body.top_k(scores, split.top_k)
        return Selection(split.around(split.sink + top, kv.length))

    def _cover(self, kv: KV) -> None:
        """Give every middle token a code."""
        first, stop = self.method.budget.resolve(kv.length, self.geometry.prompt).middle(kv.length)
        if self.codebook is None or self.codes is None:
            if stop - first > 2**self.method.b:
                self._train(kv.keys(first, stop))
        elif stop - first > len(self.codes):
            self.codes.append(self.geometry.kernels.encode(kv.keys(first + len(self.codes), stop), self.codebook))

    def _train(self, keys: Tensor) -> None:
        """Cluster the keys ``[B, H, S, D]``; raises ConfigError when they are not finite."""
        if not bool(keys.isfinite().all()):
            raise ConfigError(f"layer {self.geometry.layer} has keys that are NaN or infinite: try model.dtype=float32")
        self.codebook, codes = self.geometry.kernels.train_codebook(
            keys, self.method.m, 2**self.method.b, self.method.iterations, self.method.seed
        )
        self.codes = GrowingBuffer(codes)

    @property
    def index_bytes(self) -> int:
        return 0 if self.codes is None else self.codes.bytes

    @property
    def resident_bytes(self) -> int:
        return self.index_bytes + (0 if self.codebook is None else self.codebook.nbytes)
