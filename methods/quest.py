"""Quest: pages ranked by an upper bound on the logits of their keys (arXiv 2406.10774)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from pqbench.kernels.buffers import GrowingBuffer
from pqbench.kernels.unions import union_of
from pqbench.method import KV, Budget, ConfigError, Geometry, LayerState, Method, Selection, Split


@dataclass(frozen=True)
class Quest(Method):
    """Middle tokens form pages; the index holds the smallest and largest value of a page's keys in every dimension.

    For each key k of a page, q.k is at most the sum over dimensions of max(q * smallest, q * largest). Pages with the
    largest bounds are read until the budget is used up. The last page may be partial; it is updated as tokens leave the
    window.

    Differs from the paper: pages are ranked once per KV head, by the bounds summed over the query group, so that a KV
    head reads exactly the budget (see ``per_query_head``); sinks and window are always attended to and are in no page
    (``budget.sink=0 budget.window=1`` comes closest to the paper); the lowest-ranked page that is read is cut so that
    the budget is met exactly; no layer is dense (see ``dense_layers``).

    Attributes:
        budget: sinks and window are always attended to, and top_k tokens of pages.
        page_size: P, tokens per page (paper: 16). The index is two vectors per page, phi = 2 / P.
        group: ``sum`` or ``max``, how the bounds of the query heads that share a KV head are combined.
        per_query_head: each query head takes top_k tokens by its own bound, as in the paper. A KV head reads the union
            of these tokens, which is counted and exceeds the budget.
        dense_layers: number of first full-attention layers that attend to everything, beyond the budget (paper: 2).
    """

    budget: Budget = field(default_factory=Budget)
    page_size: int = 16
    group: str = "sum"
    per_query_head: bool = False
    dense_layers: int = 0

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise ConfigError(f"quest.page_size is {self.page_size}: a page has at least 1 token")
        if self.group not in ("sum", "max"):
            raise ConfigError(f"quest.group is {self.group!r}: use sum or max")
        if self.dense_layers < 0:
            raise ConfigError(f"quest.dense_layers is {self.dense_layers}: use 0 for none")

    def layer(self, geometry: Geometry) -> LayerState:
        return LayerState(geometry) if geometry.rank < self.dense_layers else QuestState(self, geometry)

    @property
    def beyond_budget(self) -> str | None:
        return "reads the union of what its query heads choose" if self.per_query_head else None

    def limit(self, context: int, geometry: Geometry) -> int | None:
        return None if geometry.rank < self.dense_layers else super().limit(context, geometry)


def page_extremes(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value per dimension in each page of ``size`` keys: two ``[B, H, pages, D]`` for keys
    ``[B, H, n, D]``."""
    batch, heads, count, width = keys.shape
    full = count // size * size
    pages = keys[:, :, :full].reshape(batch, heads, full // size, size, width)
    low, high = pages.amin(3), pages.amax(3)
    if full == count:
        return low, high
    rest = keys[:, :, full:]  # the partial page
    return torch.cat([low, rest.amin(2, keepdim=True)], 2), torch.cat([high, rest.amax(2, keepdim=True)], 2)


def upper_bounds(q: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Upper bounds of q.k over the keys of each page, float32 ``[B, H, G, pages]``, for q ``[B, H, G, D]`` and extremes
    ``[B, H, pages, D]``. Positive components of q are multiplied by the largest values, negative ones by the
    smallest."""
    q = q.float()
    return q.clamp(min=0) @ high.float().transpose(2, 3) + q.clamp(max=0) @ low.float().transpose(2, 3)


def fill(scores: Tensor, size: int, middle: int, count: int) -> Tensor:
    """The first ``count`` of ``middle`` tokens ``[..., count]``, in the order of the scores ``[..., pages]`` of their
    pages.

    The page with the largest score comes first; of equal pages, the older one. Tokens of a page are ordered by age. The
    last page may be partial.
    """
    wanted = -(-count // size) + 1  # one more in case the partial page is among them
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :wanted]
    tokens = (size * best[..., None] + torch.arange(size, device=best.device)).flatten(-2)
    beyond = (tokens >= middle).to(torch.int8)  # places after the end of the partial page are sorted last and cut
    return tokens.gather(-1, beyond.argsort(dim=-1, stable=True)[..., :count])


class QuestState(LayerState):
    """Smallest and largest values of every page, each ``[B, H, pages, D]``, in the type of the keys, on the device."""

    def __init__(self, method: Quest, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        self.low: GrowingBuffer | None = None
        self.high: GrowingBuffer | None = None
        self.covered = 0  # tokens in pages

    def finish_prefill(self, kv: KV) -> None:
        first, stop = self._middle(kv)
        low, high = page_extremes(kv.stored_keys(first, stop), self.method.page_size)
        self.low, self.high = GrowingBuffer(low.to(kv.device)), GrowingBuffer(high.to(kv.device))
        self.covered = stop - first

    def append(self, kv: KV) -> None:
        """Put the tokens that have left the window into pages: first into the partial page, then into new ones."""
        low, high = self._extremes()
        first, stop = self._middle(kv)
        if stop - first <= self.covered:
            return
        joined = kv.keys(first + self.covered, stop)  # [B, H, n, D]
        room = -self.covered % self.method.page_size  # in the partial page
        part, rest = joined[:, :, :room], joined[:, :, room:]
        if part.shape[2]:
            lowest, highest = low.view(len(low) - 1), high.view(len(high) - 1)  # [B, H, 1, D]
            lowest.copy_(torch.minimum(lowest, part.amin(2, keepdim=True)))
            highest.copy_(torch.maximum(highest, part.amax(2, keepdim=True)))
        if rest.shape[2]:
            for buffer, rows in zip((low, high), page_extremes(rest, self.method.page_size), strict=True):
                buffer.append(rows)
        self.covered = stop - first

    def select(self, q: Tensor, kv: KV) -> Selection:
        low, high = self._extremes()
        method, split = self.method, self.method.budget.resolve(kv.length, self.geometry.prompt)
        bounds = upper_bounds(q, low.view(), high.view())  # [B, H, G, pages]
        if not method.per_query_head:
            bounds = bounds.sum(2, keepdim=True) if method.group == "sum" else bounds.amax(2, keepdim=True)
        tokens = fill(bounds, method.page_size, self.covered, split.top_k)  # [B, H, G or 1, top_k]
        if method.per_query_head:
            return _union(tokens, split, kv.length)
        return Selection(split.around(split.sink + tokens[:, :, 0], kv.length))

    def _middle(self, kv: KV) -> tuple[int, int]:
        return self.method.budget.resolve(kv.length, self.geometry.prompt).middle(kv.length)

    def _extremes(self) -> tuple[GrowingBuffer, GrowingBuffer]:
        if self.low is None or self.high is None:
            raise RuntimeError("no pages before finish_prefill()")
        return self.low, self.high

    @property
    def index_bytes(self) -> int:
        return 0 if self.low is None or self.high is None else self.low.bytes + self.high.bytes

    @property
    def resident_bytes(self) -> int:
        return self.index_bytes


def _union(tokens: Tensor, split: Split, length: int) -> Selection:
    """A selection of the middle tokens ``[B, H, G, k]`` of query heads: their union per KV head, padded to the largest
    union with rows that no query head sees."""
    first, stop = split.middle(length)
    chosen = torch.zeros(*tokens.shape[:3], stop - first, dtype=torch.bool, device=tokens.device)
    chosen.scatter_(3, tokens, True)  # [B, H, G, middle]
    top, seen = union_of(chosen)
    return Selection(split.around(first + top, length), functional.pad(seen, (split.sink, split.window), value=True))
