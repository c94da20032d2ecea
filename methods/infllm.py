"""InfLLM: retrieve whole blocks by a few representative keys, all at one distance (arXiv 2402.04617)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pqbench.kernels import reference
from pqbench.kernels.buffers import GrowingBuffer, gather_rows
from pqbench.method import KV, Budget, ConfigError, Geometry, LayerState, Method, Selection, Split


@dataclass(frozen=True)
class InfLLM(Method):
    """Middle tokens form blocks; a block is scored by the mean of its representative keys and fetched whole.

    Representatives are the tokens of the block that received most attention probability from the queries that saw them
    inside the local window. Keys are scored and averaged un-rotated, the query at angle ``window - 1``. In the
    attention itself every token outside the local window, sinks included, sits at distance ``window - 1``: positions
    are clipped, so InfLLM with all blocks is not full attention.

    Differs from the released code: prefill is exact and blocks are built after it; probabilities come from a softmax
    over the local window alone; one vector per block and KV head, not per query head (phi = 1/block_size); the last
    block may be partial, and the lowest-ranked block is cut so that the budget is met to the token.

    Attributes:
        budget: sinks are n_init, the window n_local, top_k the tokens of retrieved blocks.
        block_size: tokens per block (paper: 128).
        representatives: keys averaged per block (paper: 4; PQCache's comparison: 1).
        per_head: each KV head ranks blocks by itself; otherwise all heads of a layer share the same blocks (released).
    """

    needs_positions = True

    budget: Budget = field(default_factory=Budget)
    block_size: int = 128
    representatives: int = 4
    per_head: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 1 or not 1 <= self.representatives <= self.block_size:
            raise ConfigError("infllm needs block_size >= 1 and representatives between 1 and block_size, got "
                              f"{self.block_size} and {self.representatives}")  # fmt: skip

    def layer(self, geometry: Geometry) -> LayerState:
        return InfLLMState(self, geometry)


class InfLLMState(LayerState):
    """Representative scores per token ``[B, H, S]`` and one vector per block ``[B, H, blocks, D]``."""

    needs_weights = True

    def __init__(self, method: InfLLM, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        self.scores = GrowingBuffer(torch.zeros(geometry.batch, geometry.kv_heads, 0))
        self.vectors: GrowingBuffer | None = None
        self.covered = 0  # tokens in blocks

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        window = self.method.budget.resolve(self.geometry.prompt, self.geometry.prompt).window
        sums = self.geometry.kernels.column_sums(q, keys, self.geometry.scaling, band=window)  # [B, H, S]
        if len(self.scores):
            sums[:, :, : len(self.scores)] += self.scores.view()
        self.scores = GrowingBuffer(sums)

    def finish_prefill(self, kv: KV) -> None:
        self.vectors = GrowingBuffer.like(kv.keys(), 0)
        self._cover(kv)

    def append(self, kv: KV) -> None:
        self.scores.append(self.scores.view(stop=1) * 0)
        self._cover(kv)

    def attended(self, weights: Tensor | None, kv: KV) -> None:
        if weights is not None:
            window = self.method.budget.resolve(kv.length, self.geometry.prompt).window
            self.scores.view(kv.length - window).add_(weights.sum(2)[..., -window:])

    def select(self, q: Tensor, kv: KV) -> Selection:
        split = self.method.budget.resolve(kv.length, self.geometry.prompt)
        first, stop = split.middle(kv.length)
        top = self._rank(q, kv, split)  # [B, H, blocks taken]
        size = self.method.block_size
        tokens = (first + top[..., None] * size + torch.arange(size, device=q.device)).flatten(2)  # [B, H, n]
        beyond = (tokens >= stop).to(torch.int8)  # the partial block's missing tokens go last and are cut
        tokens = tokens.gather(2, beyond.argsort(dim=2, stable=True))[..., : split.top_k]
        indices = split.around(tokens, kv.length)
        distance = kv.length - split.window  # moves a key so that the current query is window - 1 away
        outside = indices < kv.length - split.window
        return Selection(indices, key_shift=(distance - indices) * outside)

    def _rank(self, q: Tensor, kv: KV, split: Split) -> Tensor:
        """Best blocks first, ``[B, H, n]``: enough of them to fill top_k even if the partial block is among them."""
        if self.vectors is None or self.geometry.inverse_frequencies is None:
            raise RuntimeError("select() before finish_prefill()")
        turn = torch.tensor(split.window - kv.length, device=q.device)
        local = reference.rotate(q, turn, self.geometry.inverse_frequencies)  # query at angle window - 1
        scores = (local.float().sum(2, keepdim=True) @ self.vectors.view().float().transpose(2, 3))[:, :, 0]
        if not self.method.per_head:
            scores = scores.sum(1, keepdim=True).expand_as(scores)
        wanted = min(-(-split.top_k // self.method.block_size) + 1, scores.shape[2])
        return scores.topk(wanted, dim=-1, sorted=True).indices

    def _cover(self, kv: KV) -> None:
        """Put every middle token into a block; the last, partial one is made anew."""
        if self.vectors is None:
            raise RuntimeError("append() before finish_prefill()")
        first, stop = self.method.budget.resolve(kv.length, self.geometry.prompt).middle(kv.length)
        if stop - first <= self.covered:
            return
        whole = self.covered // self.method.block_size
        self.vectors.truncate(whole)
        start = first + whole * self.method.block_size
        full = (stop - start) // self.method.block_size * self.method.block_size
        if full:
            self.vectors.append(self._summaries(kv, start, start + full, self.method.block_size))
        if start + full < stop:
            self.vectors.append(self._summaries(kv, start + full, stop, stop - start - full))
        self.covered = stop - first

    def _summaries(self, kv: KV, start: int, stop: int, size: int) -> Tensor:
        """Mean un-rotated representative of each block of ``size`` tokens in a range, ``[B, H, blocks, D]``."""
        frequencies = self.geometry.inverse_frequencies
        if frequencies is None:
            raise RuntimeError("InfLLM needs rotary frequencies")
        scores = self.scores.view(start, stop)  # [B, H, n]
        blocks = scores.view(*scores.shape[:2], -1, size)
        best = reference.top_k(blocks, self.method.representatives)  # [B, H, blocks, r]
        offset = size * torch.arange(blocks.shape[2], device=best.device)[:, None]
        rows = (best + offset).flatten(2)  # [B, H, blocks * r]
        keys = reference.rotate(gather_rows(kv.keys(start, stop), rows), -(rows + start), frequencies)
        return keys.view(*best.shape, -1).mean(3)

    @property
    def index_bytes(self) -> int:
        return 0 if self.vectors is None else self.vectors.bytes

    @property
    def resident_bytes(self) -> int:
        return self.index_bytes + self.scores.bytes
