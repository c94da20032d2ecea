"""PQCache: product-quantised keys find the tokens, full-precision keys and values attend (arXiv 2407.12820)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from methods.pqcache.host_codes import HostCodes
from methods.pqcache.previous import PreviousQuery
from pqbench.kernels.backend import kernels
from pqbench.kernels.buffers import GrowingBuffer
from pqbench.method import (
    KV,
    Arrival,
    Budget,
    Check,
    ConfigError,
    Geometry,
    LayerState,
    Method,
    Number,
    PaperBudget,
    Plan,
    Selection,
)

AHEAD = 16  # tokens encoded at once


@dataclass(frozen=True)
class PQCache(Method):
    """Per KV head and sub-space, K-Means on the middle keys after rotary embedding gives codebooks and codes.

    A step scores every middle token by table look-up, takes the softmax over the middle per query head, sums it over
    the query group, and attends exactly to the top-k per KV head together with sinks and window. A token that leaves
    the window gets the nearest centroid of the frozen codebooks.

    Differs from the paper: contexts whose middle holds at most ``2**b`` tokens are attended whole, and get their
    codebooks once the middle is larger; K-Means runs on a sample of the middle, then once on all of it; the number of
    iterations is fixed by default, so that quality does not depend on the machine (null: the paper's adaptive rule).

    Attributes:
        budget: sinks, window and top_k per KV head.
        m: sub-spaces; must divide the head dimension.
        b: bits per code, 1 to 8; codes are stored one byte each. The paper uses m=2 b=6 on LongBench and, where single
            tokens must be found, m=4 b=8 on InfiniteBench, the default here.
        iterations: Lloyd iterations; None for as many as a layer's prefill hides (:func:`adaptive_iterations`).
        seed: of the initial centroids, a draw of middle keys shared by all heads.
        sample: keys per centroid that the iterations run on, None for all.
        tolerance: K-Means stops early once at most this share of the keys changes cluster.
        codes_on: ``device`` keeps codes beside the accelerator; ``host`` brings those of the prompt over for every
            step, asked for while the layer before computes, as in the paper.
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
        """The paper's LongBench setting: 12 bits per key and the paper's half/half split."""
        return cls(PaperBudget(ratio=ratio), m=2, b=6, iterations=None, tolerance=0.0)

    @classmethod
    def paper_infinitebench(cls, ratio: float = 0.1) -> PQCache:
        """The paper's InfiniteBench setting: 32 bits per key and the paper's half/half split."""
        return cls(PaperBudget(ratio=ratio), m=4, b=8, iterations=None, tolerance=0.0)

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        """Only the adaptive rule asks for times of this hardware."""
        return self.iterations is None

    def layer(self, geometry: Geometry) -> LayerState:
        if geometry.head_dim % self.m:
            raise ConfigError(f"pqcache.m is {self.m}: it must divide the head dimension {geometry.head_dim}")
        return PQCacheState(self, geometry)

    def why_not_captured(self, offloads: bool) -> str | None:
        return None if self.codes_on == "device" else "brings more codes over in every step: set codes_on=device"

    def why_not_ahead(self) -> str | None:
        return None if self.codes_on == "device" else "has no codes on the device ahead of a step: set codes_on=device"

    def attends_all(self, context: int) -> bool:
        first, stop = self.budget.resolve(context, context).middle(context)
        return stop - first <= self.clusters

    @property
    def clusters(self) -> int:
        """Centroids per sub-space: as many middle tokens need no codebook."""
        return 2**self.b


def adaptive_iterations(idle: float, fit: tuple[float, float], points: int) -> int:
    """The paper's rule: as many iterations as fit into ``idle`` seconds when clustering ``points`` keys takes
    a + b * points * iterations; 3 to 300 as in the released code."""
    a, b = fit
    return max(3, min(300, int((idle - a) / max(b * points, 1e-12))))


class PQCacheState(LayerState):
    """Codebook ``[B, H, m, 2**b, D/m]`` and codes uint8 ``[B, H, n, m]``, of the middle and of a few
    tokens behind it; None until there are keys enough."""

    def __init__(self, method: PQCache, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        self.codebook: Tensor | None = None
        self.codes: GrowingBuffer | HostCodes | None = None
        self.arriving: Arrival | None = None
        self.middle = 0  # tokens whose codes count; some that are still in the window have theirs already
        self.iterations = 0
        self.finite: Tensor | None = None  # bool [], whether the keys of the codebook were; the device may not know yet
        self.previous = None if geometry.correction is None else PreviousQuery(geometry.correction)
        self.room = 0  # of a captured step's selection
        problems = geometry.batch * geometry.kv_heads * method.m
        known = geometry.calibration if method.needs_calibration else None
        self.fit = None if known is None else known.clustering(problems, geometry.head_dim // method.m, 2**method.b)

    def finish_prefill(self, kv: KV) -> Tensor | None:
        self._cover(kv)
        return None

    def append(self, kv: KV) -> None:
        self._cover(kv)

    def prefetch(self, kv: KV) -> None:
        if self.codes is not None and self.method.codes_on == "host":
            self.arriving = self._on_host(self.codes).ask(kv)
        if self.codes is not None and self.previous is not None and self.previous.query is not None:
            self._choose_ahead(kv, self.previous)

    def reserve(self, kv: KV, rows: int) -> bool:
        if self.codes is None or (self.previous is not None and self.previous.query is None):
            return False
        self._on_device.reserve(rows)
        self.room = max(self._numbers(length)[4] for length in (kv.length + 1, rows))
        if self.previous is not None:
            batch, heads = self._on_device.whole.shape[:2]
            self.previous.chosen = torch.zeros(batch, heads, self.room, dtype=torch.int64, device=kv.device)
        return True

    def plan(self, kv: KV, length: int) -> Plan:
        self._reach(kv, length)
        numbers = self._numbers(length)
        attended = numbers[4]
        if attended > self.room:
            raise RuntimeError(f"a step attends to {attended} tokens, but was captured for at most {self.room}")
        if self.previous is not None:
            self.previous.steps += 1
        return Plan(numbers, attended)

    @property
    def fixed(self) -> list[Tensor]:
        held = [] if self.codes is None or self.codebook is None else [self.codebook, self._on_device.whole]
        return held + ([] if self.previous is None else self.previous.fixed)

    def select(self, q: Tensor, kv: KV) -> Selection:
        if self.codebook is None or self.codes is None:
            return Selection()
        previous, only = self.previous, None
        chosen = None if previous is None else previous.arrived()
        if previous is not None and chosen is not None:
            only = previous.turned(q)
        numbers = self.numbers or self._numbers(kv.length)
        indices = self._choose(q, self.codebook, self._codes(kv), numbers, only, chosen)
        if previous is not None:
            previous.follow(q)
            if self.numbers is None and only is not None:
                previous.chosen, previous.steps = None, previous.steps + 1
        return Selection(indices, count=None if self.numbers is None else numbers[4], anew=only)

    def _best_by_scan(self, q: Tensor, codebook: Tensor, codes: Tensor, kv: KV) -> Selection:
        """Sinks, window, and the middle tokens that ``codes`` ``[B, H, middle, m]`` put first for q
        ``[B, H, G, D]``."""
        return Selection(self._choose(q, codebook, codes, self._numbers(kv.length)))

    def _choose_ahead(self, kv: KV, previous: PreviousQuery) -> None:
        """Select for the coming step with the query of the one before."""
        if self.numbers is None:
            self._reach(kv, kv.length + 1)
        numbers, codes, codebook = self.numbers or self._numbers(kv.length + 1), self._codes(kv), self.codebook
        if codebook is None:
            raise RuntimeError("no codebook before finish_prefill()")

        def choose(query: Tensor, chosen: Tensor | None) -> Tensor:
            rows = self._choose(query, codebook, codes, numbers, None, chosen)
            kv.fetch_ahead(rows, numbers[-1])
            return rows

        previous.choose_ahead(choose)

    def _choose(
        self,
        q: Tensor,
        codebook: Tensor,
        codes: Tensor,
        numbers: Sequence[Number],
        only: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """Sinks, the best of the middle for q, and the window, by the :meth:`_numbers` of a step: ``[B, H, room]``, the
        heads that are not among ``only`` as they are in ``chosen``."""
        sink, top_k, length, middle, attended, _ = numbers
        room = attended if isinstance(attended, int) else self.room
        return self.geometry.kernels.pq_select(
            q, codebook, codes, self.geometry.scaling, sink, top_k, length, middle, room, only, chosen
        )

    def _numbers(self, length: int) -> tuple[int, int, int, int, int, int]:
        """Sinks, top_k, length, middle, tokens attended to, and those among them that are no window, all of a step with
        ``length`` tokens."""
        split = self.method.budget.resolve(length, self.geometry.prompt)
        middle = length - split.sink - split.window
        found = split.sink + min(split.top_k, middle)
        return split.sink, split.top_k, length, middle, found + split.window, found

    def _cover(self, kv: KV) -> None:
        """Give every middle token a code."""
        self._reach(kv, kv.length)

    def _reach(self, kv: KV, length: int) -> None:
        """Give every token a code that is in the middle when there are ``length``."""
        first, stop = self.method.budget.resolve(length, self.geometry.prompt).middle(length)
        if self.codebook is None or self.codes is None:
            if stop - first > self.method.clusters:
                self._train(kv, first, stop)
        elif stop - first > len(self.codes):
            self._join(kv, first + len(self.codes), stop)
        self.middle = stop - first

    def _join(self, kv: KV, start: int, stop: int) -> None:
        """Rows ``start`` to ``stop`` have left the window and get their codes. So do the next ones to leave it, since
        to encode one token and to encode sixteen takes as long."""
        self._known.append(self._encode(kv, start, min(kv.length, max(stop, start + AHEAD))))

    def _codes(self, kv: KV) -> Tensor:
        """Codes ``[B, H, n, m]`` on the device, those of the middle first: what was asked for a layer ago, and what has
        joined since."""
        if self.numbers is not None:
            return self._on_device.whole  # of which a number counts
        if self.method.codes_on == "device":
            return self._known.view()
        codes = self._on_host(self._known)
        arrived = (self.arriving or codes.ask(kv)).wait()
        self.arriving = None
        return codes.all(arrived)

    @property
    def _known(self) -> GrowingBuffer | HostCodes:
        """The codes, which there must be."""
        if self.codes is None:
            raise RuntimeError("no codes before finish_prefill()")
        return self.codes

    def _on_host(self, codes: GrowingBuffer | HostCodes) -> HostCodes:
        """The codes, moved to the host by the first step: until then they are still being worked on."""
        moved = self.codes = HostCodes(codes.view()) if isinstance(codes, GrowingBuffer) else codes
        return moved

    @property
    def _on_device(self) -> GrowingBuffer:
        """The codes, which must lie on the device."""
        codes = self._known
        if not isinstance(codes, GrowingBuffer):
            raise RuntimeError("codes that have moved to the host have no place on the device")
        return codes

    def _encode(self, kv: KV, start: int, stop: int) -> Tensor:
        """What the index says of rows ``start`` to ``stop``: codes ``[B, H, n, m]``."""
        if self.codebook is None:
            raise RuntimeError("no codebook before finish_prefill()")
        return self.geometry.kernels.encode(kv.keys(start, stop), self.codebook)

    def _train(self, kv: KV, start: int, stop: int) -> None:
        """Make the codebook from rows ``start`` to ``stop``, and their codes."""
        self.middle = stop - start
        codebook, codes = self._clustered(kv.stored_keys(start, stop))
        self.codebook = codebook.to(kv.device)
        self.codes, self.arriving = GrowingBuffer(codes.to(kv.device)), None  # others may be on their way

    def _clustered(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Codebook and codes of keys ``[B, H, S, D]``, made on their device by the backend for it. Keys that are not
        finite raise ConfigError at once on the CPU; on a GPU, which is not waited for here, see :attr:`checks`."""
        # NaN is both the smallest and the largest. A mask of isfinite() would be as large as the keys.
        extremes = torch.stack(keys.aminmax())
        self.finite = extremes.isfinite().all()
        if keys.device.type == "cpu" and not bool(self.finite):
            raise ConfigError(self.checks[0].message)
        method, clusters = self.method, 2**self.method.b
        self.iterations = self._iterations(keys.shape[2])
        sample = None if method.sample is None else method.sample * clusters
        backend = kernels(keys.device, self.geometry.backend)
        return backend.train_codebook(keys, method.m, clusters, self.iterations, method.seed, sample, method.tolerance)

    def _iterations(self, points: int) -> int:
        calibration = self.geometry.calibration
        if self.method.iterations is not None:
            return self.method.iterations
        if calibration is None or self.fit is None:
            return 10  # nobody measured this hardware
        return adaptive_iterations(calibration.idle_seconds(self.geometry.prompt), self.fit, points)

    @property
    def checks(self) -> list[Check]:
        if self.finite is None:
            return []
        layer = self.geometry.layer
        return [Check(self.finite, f"layer {layer} has keys that are NaN or infinite: try model.dtype=float32")]

    @property
    def facts(self) -> dict[str, float]:
        known: dict[str, float] = {"iterations": self.iterations}
        if self.previous is not None:
            known["corrected_heads"] = self.previous.share(self.geometry.batch * self.geometry.kv_heads)
        return known

    @property
    def index_bytes(self) -> int:
        return 0 if self.codes is None else self.codes.bytes // len(self.codes) * self.middle

    @property
    def resident_bytes(self) -> int:
        return (0 if self.codes is None else self.codes.bytes) + (0 if self.codebook is None else self.codebook.nbytes)
