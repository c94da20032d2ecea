"""MagicPIG: sample tokens by locality-sensitive hashing, and weight each by its probability (arXiv 2410.16179)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from pqbench.kernels.buffers import GrowingBuffer
from pqbench.kernels.sampling import step_seed
from pqbench.method import KV, Budget, ConfigError, Geometry, LayerState, Method, Selection

_CENTRED = 16  # keys; the mean of fewer is not used
_TILE = 1 << 24  # elements of the largest temporary


@dataclass(frozen=True)
class MagicPIG(Method):
    """A query head samples a middle token if at least two of ``tables`` hashes of query and key agree. A hash holds the
    signs of ``bits`` random projections (SimHash) of the query, or of the key minus the mean key. A sampled token is
    weighted by 1 / p, where p is the probability that it is sampled (:func:`collision_chance`). Numerator and
    denominator of attention are therefore unbiased.

    The number of sampled tokens is random. The budget limits it per KV head: if the union over the query group is
    larger than top_k, a uniform sample of top_k tokens is kept, with larger weights. If it is smaller, fewer tokens are
    attended to. Keys of sampled tokens are read twice, for p and for attention; both reads are counted. The index takes
    2 bytes per token and table.

    Differs from the paper: no layer is left dense; top_k limits the sample; the mean key is that of the prompt's middle
    tokens, and zero if there are fewer than 16 of them.

    Attributes:
        budget: sinks and window are always attended to, and at most top_k sampled tokens.
        bits: K, projections per hash, 1 to 15 (paper: 8 to 11).
        tables: L, hashes per key (paper: 75 to 300).
        seed: seed of the projections, which also depend on layer and head.
    """

    budget: Budget = field(default_factory=Budget)
    bits: int = 10
    tables: int = 150
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 15 or self.tables < 2:
            raise ConfigError(
                f"magicpig needs bits from 1 to 15 and at least 2 tables, got {self.bits} and {self.tables}"
            )

    def layer(self, geometry: Geometry) -> LayerState:
        return MagicPIGState(self, geometry)


class MagicPIGState(LayerState):
    """Hashes int16 ``[B, H, middle, L]``, and the mean key ``[B, H, 1, D]`` that is subtracted from keys."""

    def __init__(self, method: MagicPIG, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        generator = torch.Generator().manual_seed(step_seed(method.seed, geometry.layer, 0))
        shape = (geometry.kv_heads, geometry.head_dim, method.tables * method.bits)
        self.projections = torch.randn(shape, generator=generator).to(geometry.device)
        self.mean = torch.zeros(geometry.batch, geometry.kv_heads, 1, geometry.head_dim, device=geometry.device)
        self.hashes: GrowingBuffer | None = None

    def finish_prefill(self, kv: KV) -> None:
        first, stop = self.method.budget.resolve(kv.length, self.geometry.prompt).middle(kv.length)
        keys = kv.keys(first, stop)
        if stop - first >= _CENTRED:
            self.mean = keys.float().mean(2, keepdim=True)
        self.hashes = GrowingBuffer(self._hashed(keys.float() - self.mean))

    def append(self, kv: KV) -> None:
        if self.hashes is None:
            raise RuntimeError("append() before finish_prefill()")
        first, stop = self.method.budget.resolve(kv.length, self.geometry.prompt).middle(kv.length)
        start = first + len(self.hashes)
        if stop > start:
            self.hashes.append(self._hashed(kv.keys(start, stop).float() - self.mean))

    def select(self, q: Tensor, kv: KV) -> Selection:
        split = self.method.budget.resolve(kv.length, self.geometry.prompt)
        collides = self.collides(q)  # [B, H, G, M]
        middle = collides.shape[3]
        if split.top_k >= middle:
            return Selection()  # the budget holds every token: nothing to sample
        union = collides.any(2)  # [B, H, M]
        backend, seed = self.geometry.kernels, step_seed(self.method.seed, self.geometry.layer, kv.length)
        lots = backend.noise(self.geometry.kv_heads, middle, seed, q.device) * 2.0**-33  # from -1/4 to 1/4
        sampled = union.sum(-1)  # [B, H]
        size = min(split.top_k, int(sampled.max()))  # heads with fewer get padding that no head sees
        top = backend.top_k(lots + union, size)
        seen = collides.gather(3, top[:, :, None].expand(-1, -1, q.shape[2], -1))
        kept = (sampled.float() / max(split.top_k, 1)).clamp(min=1)  # [B, H]: tokens that a kept one stands for
        weights = kept.log()[:, :, None, None] - self._log_chance(q, kv, split.sink + top)
        around = (split.sink, split.window)
        return Selection(
            split.around(split.sink + top, kv.length),
            functional.pad(seen, around, value=True),
            log_weights=functional.pad(weights, around),
        )

    def collides(self, q: Tensor) -> Tensor:
        """Which middle tokens each query of ``q`` ``[B, H, G, D]`` samples: bool ``[B, H, G, M]``."""
        if self.hashes is None:
            raise RuntimeError("collides() before finish_prefill()")
        hashes, own = self.hashes.view(), self._hashed(q.float())  # [B, H, M, L], [B, H, G, L]
        batch, heads, middle, tables = hashes.shape
        found = torch.empty(batch, heads, q.shape[2], middle, dtype=torch.bool, device=q.device)
        step = max(1, _TILE // (batch * heads * tables))
        for start in range(0, middle, step):
            part = hashes[:, :, start : start + step]
            for head in range(q.shape[2]):
                agreeing = (part == own[:, :, head, None]).sum(-1)
                found[:, :, head, start : start + step] = agreeing >= 2
        return found

    def _log_chance(self, q: Tensor, kv: KV, rows: Tensor) -> Tensor:
        """Log of the probability that queries ``[B, H, G, D]`` sample rows ``[B, H, n]``: ``[B, H, G, n]``."""
        keys = kv.keys_at(rows)
        directions = functional.normalize(keys.float() - self.mean, dim=-1)
        cosine = functional.normalize(q.float(), dim=-1) @ directions.transpose(2, 3)
        return collision_chance(cosine, self.method.bits, self.method.tables).log().float()

    def _hashed(self, x: Tensor) -> Tensor:
        """Hashes int16 ``[B, H, n, L]`` of vectors ``[B, H, n, D]``: bit j of a hash is the sign of projection j."""
        method, (batch, heads, count, _) = self.method, x.shape
        powers = 2.0 ** torch.arange(method.bits, device=x.device)
        hashes = torch.empty(batch, heads, count, method.tables, dtype=torch.int16, device=x.device)
        step = max(1, _TILE // (batch * heads * method.tables * method.bits))
        for start in range(0, count, step):
            signs = (x[:, :, start : start + step] @ self.projections > 0).unflatten(3, (method.tables, method.bits))
            hashes[:, :, start : start + step] = (signs.float() @ powers).to(torch.int16)
        return hashes

    @property
    def index_bytes(self) -> int:
        return 0 if self.hashes is None else self.hashes.bytes

    @property
    def resident_bytes(self) -> int:
        held = 0 if self.hashes is None else self.hashes.bytes
        return held + self.projections.nbytes + self.mean.nbytes


def collision_chance(cosine: Tensor, bits: int, tables: int) -> Tensor:
    """Probability, float64, that two vectors whose angle has this ``cosine`` agree in at least two of ``tables`` hashes
    of ``bits`` signs each. A sign agrees with probability u = 1 - angle / pi, a hash with u^bits (MagicPIG, arXiv
    2410.16179)."""
    hit = (1 - cosine.double().clamp(-1, 1).arccos() / math.pi) ** bits
    miss = torch.log1p(-hit)  # -inf where the directions are equal
    none, one = (tables * miss).exp(), tables * hit * ((tables - 1) * miss).exp()
    return (1 - none - one).clamp(min=torch.finfo(torch.float64).tiny)
