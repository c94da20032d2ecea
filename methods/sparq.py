"""SparQ: score keys on the largest query components, and use the mean value for other tokens (arXiv 2312.04985)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pqbench.kernels.buffers import GrowingBuffer
from pqbench.method import KV, Budget, ConfigError, Geometry, LayerState, Method, Residual, Selection


@dataclass(frozen=True)
class SparQ(Method):
    """Selects top_k tokens by approximate logits, computed from the ``rank`` largest components of sum_g |q_g|.

    Keys are stored twice, the second time dimension-major, so that a step reads ``rank`` rows of S elements. The
    softmax of the approximate logits has the temperature tau = sqrt(D |q_I|_1 / |q|_1) in each query head, where I are
    the components read. With alpha the approximate probability of the selected tokens, the output is alpha times the
    exact attention to them plus 1 - alpha times the mean of all values ("reallocation").

    Differs from the paper: sinks are always kept, as for every method here (``budget.sink=0`` for the paper).

    Attributes:
        budget: the window is the paper's local window, top_k its k.
        rank: r, components read (paper: 16 to 64 of 128; PQCache's comparison at 1/128: 1).
        reallocate: add the mean of all values as above (PQCache's comparison does not).
    """

    budget: Budget = field(default_factory=Budget)
    rank: int = 16
    reallocate: bool = True

    def layer(self, geometry: Geometry) -> LayerState:
        if not 1 <= self.rank <= geometry.head_dim:
            raise ConfigError(
                f"sparq.rank is {self.rank}: it must lie between 1 and the head dimension {geometry.head_dim}"
            )
        return SparQState(self, geometry)


class SparQState(LayerState):
    """Dimension-major keys ``[B, H * D, S]``, and the sum of all values."""

    def __init__(self, method: SparQ, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        self.columns: GrowingBuffer | None = None
        self.value_sum: Tensor | None = None  # [B, H, D] float32

    def finish_prefill(self, kv: KV) -> None:
        self.columns = GrowingBuffer(_dimension_major(kv.keys()))
        self.value_sum = kv.values().float().sum(2)

    def append(self, kv: KV) -> None:
        if self.columns is None or self.value_sum is None:
            raise RuntimeError("append() before finish_prefill()")
        self.columns.append(_dimension_major(kv.keys(kv.length - 1)))
        self.value_sum = self.value_sum + kv.values(kv.length - 1)[:, :, 0].float()

    def select(self, q: Tensor, kv: KV) -> Selection:
        split = self.method.budget.resolve(kv.length, self.geometry.prompt)
        logits = self.scores(q)  # [B, H, G, S]
        first, stop = split.middle(kv.length)
        top = first + self.geometry.kernels.top_k(logits[..., first:stop].sum(2), split.top_k)
        indices = split.around(top, kv.length)
        if not self.method.reallocate or self.value_sum is None:
            return Selection(indices)
        chosen = indices[:, :, None].expand(-1, -1, q.shape[2], -1)
        share = (logits.gather(3, chosen).logsumexp(-1) - logits.logsumexp(-1)).exp()  # alpha, [B, H, G]
        mean = (self.value_sum / kv.length)[:, :, None].expand_as(q)
        rest = (1 - share).clamp(min=0)
        return Selection(indices, residual=Residual(mean, rest.log() - share.log(), relative=True))

    def scores(self, q: Tensor) -> Tensor:
        """Approximate logits ``[B, H, G, S]`` of q ``[B, H, G, D]``, divided by the temperature."""
        if self.columns is None:
            raise RuntimeError("scores() before finish_prefill()")
        size = q.float().abs()
        picked = self.geometry.kernels.top_k(size.sum(2), self.method.rank)  # [B, H, r]
        part = q.float().gather(3, picked[:, :, None].expand(-1, -1, q.shape[2], -1))  # [B, H, G, r]
        batch, heads, rank = picked.shape
        offset = self.geometry.head_dim * torch.arange(heads, device=q.device)[:, None]
        rows = (picked + offset).view(batch, heads * rank)
        sequence = torch.arange(batch, device=q.device)[:, None]
        read = self.columns.view()[sequence, rows].view(batch, heads, rank, -1).float()  # [B, H, r, S]
        tau = (self.geometry.head_dim * part.abs().sum(-1) / size.sum(-1).clamp(min=1e-12)).sqrt()  # [B, H, G]
        correction = self.geometry.scaling * math.sqrt(self.geometry.head_dim)  # 1 where scaling is 1 / sqrt(D)
        return part @ read * correction / tau[..., None].clamp(min=1e-12)

    @property
    def index_bytes(self) -> int:
        if self.columns is None:
            return 0
        return self.columns.bytes * self.method.rank // self.geometry.head_dim

    @property
    def resident_bytes(self) -> int:
        return 0 if self.columns is None else self.columns.bytes


def _dimension_major(keys: Tensor) -> Tensor:
    """Keys ``[B, H, n, D]`` as ``[B, H * D, n]``, one contiguous row per component."""
    batch, heads, count, dimension = keys.shape
    return keys.transpose(2, 3).reshape(batch, heads * dimension, count)
