"""MagicPIG: tokens sampled by locality-sensitive hashing and weighted by their chance (arXiv 2410.16179)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from pqbench.kernels.buffers import GrowingBuffer
from pqbench.kernels.sampling import step_seed
from pqbench.method import KV, Budget, ConfigError, Geometry, LayerState, Method, Selection

_CENTRED = 16  # fewer keys have no mean worth the name
_TILE = 1 << 24  # elements of the largest temporary


@dataclass(frozen=True)
class MagicPIG(Method):
    """A middle token is sampled by a query head when at least two of ``tables`` hashes agree, each the signs of
    ``bits`` random projections (SimHash) of the query and of the key less the mean key. What is sampled counts
    1 / p-fold, p its chance to be, so that numerator and denominator of attention are unbiased
    (:func:`collision_chance`).

    How many tokens are sampled is up to chance. The budget caps it per KV head: of a larger union over the query group
    a uniform sample of top_k is kept and weighted by what it stands for. Where fewer are sampled, fewer are attended.
    Keys that are sampled are read twice, for p and for attention; both are counted. The index takes 2 bytes a table.

    Differs from the paper: no layer is left dense; top_k caps the sample; the mean is that of the prompt's middle keys,
    and zero where these are fewer than 16.

    Attributes:
        budget: sinks and window always; at most top_k sampled tokens.
        bits: K, projections per hash, 1 to 15 (paper: 8 to 11).
        tables: L, hashes per key (paper: 75 to 300).
        seed: of the projections, which also depend on layer and head.
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
    """Hashes int16 ``[B, H, middle, L]`` and the mean key ``[B, H, 1, D]`` they are taken about."""

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
        size = min(split.top_k, int(sampled.max()))  # heads with fewer get padding nobody sees
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
        """Whether a query ``[B, H, G, D]`` samples a middle token: bool ``[B, H, G, M]``."""
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
        """Log of the chance that a query ``[B, H, G, D]`` samples rows ``[B, H, n]``: ``[B, H, G, n]``."""
        keys = kv.keys_at(rows)
        directions = functional.normalize(keys.float() - self.mean, dim=-1)
        cosine = functional.normalize(q.float(), dim=-1) @ directions.transpose(2, 3)
        return collision_chance(cosine, self.method.bits, self.method.tables).log().float()

    def _hashed(self, x: Tensor) -> Tensor:
        """Hashes int16 ``[B, H, n, L]`` of vectors ``[B, H, n, D]``: bit j of a hash is the sign of a projection."""
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
    """Chance that two vectors at an angle of this ``cosine`` agree in at least two of ``tables`` hashes of ``bits``
    signs, float64: a sign agrees with chance u = 1 - angle / pi, a hash with u^bits (MagicPIG, arXiv 2410.16179)."""
    hit = (1 - cosine.double().clamp(-1, 1).arccos() / math.pi) ** bits
    miss = torch.log1p(-hit)  # -inf where the directions are equal
    none, one = (tables * miss).exp(), tables * hit * ((tables - 1) * miss).exp()
    return (1 - none - one).clamp(min=torch.finfo(torch.float64).tiny)
