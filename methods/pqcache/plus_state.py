"""One layer of :class:`methods.pqcache.plus.PQCachePlus` at work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from methods.pqcache.cells import InvertedLists, cell_numbers, searches_cells
from methods.pqcache.codebook import KeyMap, key_map
from methods.pqcache.method import AHEAD, PQCacheState
from methods.pqcache.queries import SeenQueries
from methods.pqcache.spread import Spread
from methods.pqcache.tail import log_mass, quantised_mean, smallest_set, tail_share, tail_weights, without
from pqbench.kernels import reference
from pqbench.kernels.buffers import GrowingBuffer, gather_rows
from pqbench.kernels.sampling import draw_rest, sample_log_weights, step_seed
from pqbench.method import KV, Geometry, Residual, Selection, Split

if TYPE_CHECKING:
    from methods.pqcache.plus import PQCachePlus

T = TypeVar("T")
_CALIBRATION = 64  # queries
_TILE = 1 << 24  # elements of the largest temporary of calibration


class Ahead:
    """What the index says of the next tokens to leave the window: tokens leave one by one, in order, and to encode one
    takes as long as to encode sixteen."""

    def __init__(self) -> None:
        self._first = 0
        self._rows: Tensor | None = None

    def take(self, start: int, stop: int, length: int, encode: Callable[[int, int], Tensor]) -> Tensor:
        """``encode(start, stop)`` ``[B, H, n, ...]``, by calls for up to :data:`AHEAD` of ``length`` tokens."""
        rows = self._rows
        if rows is None or start < self._first or stop > self._first + rows.shape[2]:
            rows = self._rows = encode(start, min(length, max(stop, start + AHEAD)))
            self._first = start
        return rows[:, :, start - self._first : stop - self._first]


class PQCachePlusState(PQCacheState):
    """Beside the keys' codebook: value codes (stored behind the key codes of a token), the spread, what was learnt from
    queries, the lists of the cells, and the factor of the tail."""

    method: PQCachePlus

    def __init__(self, method: PQCachePlus, geometry: Geometry) -> None:
        super().__init__(method, geometry)
        self.ahead = Ahead()
        self.map = KeyMap()
        self.value_codebook: Tensor | None = None  # [B, H, m_v, 2**b_v, D/m_v]
        self.value_sum: Tensor | None = None  # [B, H, 1, D] over the middle
        self.spread: Spread | None = None
        self.lists: InvertedLists | None = None
        self.log_factor = torch.zeros(geometry.batch, geometry.kv_heads, device=geometry.device)
        first = max(0, geometry.prompt - (method.queries or geometry.prompt))
        self.queries = SeenQueries(geometry, first, _CALIBRATION if self._calibrates else 0)
        self._trained_at = 0  # length of the context
        self._taken = 0  # tokens that the last step took from the lists

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        self.queries.add(q, keys.shape[2] - 1)

    def finish_prefill(self, kv: KV) -> Tensor | None:
        super().finish_prefill(kv)
        return None if self.lists is None or not self.method.arranged else self._arrange(kv, self.lists)

    def _arrange(self, kv: KV, lists: InvertedLists) -> Tensor:
        """Number middle tokens by their places in the lists: ``[B, H, S]``, which row each row was."""
        order, codes = lists.renumber(), self._known.view()
        self.codes = GrowingBuffer(gather_rows(codes, order.to(codes.device)))
        first, stop = self.method.budget.resolve(kv.length, self.geometry.prompt).middle(kv.length)
        rows = torch.arange(kv.length, device=order.device).repeat(*order.shape[:2], 1)
        rows[:, :, first:stop] = first + order
        return rows

    def prefetch(self, kv: KV) -> None:
        if self._reads_codes:
            super().prefetch(kv)

    def select(self, q: Tensor, kv: KV) -> Selection:
        if self.method.refresh is not None:
            self.queries.add(q[:, :, :, None], kv.length - 1)
        if self.codebook is None or self.codes is None:
            return Selection()
        if self._scans_only:
            codes = self._key_codes(self._codes(kv))
            return self._best_by_scan(self.map.queries(q), self.codebook, codes, kv)
        split = self.method.budget.resolve(kv.length, self.geometry.prompt)
        if self.method.tail == "sampled":
            return self._with_sample(q, kv, split)
        top, seen, residual = self._best(q, kv, split)
        indices = split.around(split.sink + top, kv.length)
        if seen is None:
            return Selection(indices, residual=residual)
        visible = torch.nn.functional.pad(seen, (split.sink, split.window), value=True)
        return Selection(indices, visible[:, :, None].expand(-1, -1, q.shape[2], -1), residual=residual)

    def _best(self, q: Tensor, kv: KV, split: Split) -> tuple[Tensor, Tensor | None, Residual | None]:
        """The best middle tokens ``[B, H, k]`` for q ``[B, H, G, D]``, which of them a head attends to if not to all
        and, where the tail is made from codes, what the others add."""
        backend, method, wanted = self.geometry.kernels, self.method, split.top_k
        codes = self._codes(kv) if self._reads_codes else None
        wants_logits = method.tail in ("mean", "pq") or method.spread or method.top_p is not None
        logits = self._logits(q, codes) if codes is not None and wants_logits else None
        seen = log_weight = None
        if self.lists is not None:
            top, log_weight = self._best_by_cells(q, self.lists, wanted)
        elif logits is not None and method.top_p is not None:
            top, seen = self._enough(q, kv, logits, split, method.top_p)
        elif logits is not None:
            top = backend.top_k(reference.group_probabilities(logits), wanted)
        else:
            mapped, scaling = self.map.queries(q), self.geometry.scaling
            scores = backend.pq_probabilities(mapped, self._ready(self.codebook), self._key_codes(codes), scaling)
            top = backend.top_k(scores, wanted)
        if method.tail not in ("mean", "pq"):
            return top, seen, None
        weights: Tensor | None = None
        if logits is not None:
            weights, log_weight = tail_weights(without(logits, top, seen))
        value = self._tail_value(q, weights, codes)
        return top, seen, Residual(value, self._ready(log_weight) + self.log_factor[:, :, None])

    def _best_by_cells(self, q: Tensor, lists: InvertedLists, wanted: int) -> tuple[Tensor, Tensor]:
        """The same tokens from inverted lists, and the log-weight ``[B, H, G]`` of the others."""
        self._taken = wanted
        mapped, scaling = self.map.queries(q), self.geometry.scaling
        top, rest = self.geometry.kernels.best_of_cells(
            mapped, self._ready(self.codebook), lists.starts, lists.tokens, lists.pending, wanted, scaling
        )
        return top, rest + self.map.constant(q) * scaling

    def _enough(self, q: Tensor, kv: KV, logits: Tensor, split: Split, share: float) -> tuple[Tensor, Tensor]:
        """The fewest middle tokens that, with sinks and window, hold ``share`` of the group's mean attention, estimated
        by ``logits`` ``[B, H, G, M]``; at most top_k of them. See :func:`methods.pqcache.tail.smallest_set`."""
        first, stop = split.middle(kv.length)
        outside = torch.cat([kv.keys(0, first), kv.keys(stop)], dim=2).float()
        held = (q.float() @ outside.transpose(2, 3) * self.geometry.scaling).logsumexp(-1)  # [B, H, G]
        whole = torch.logaddexp(held, log_mass(logits))
        shares = (logits - whole[..., None]).exp().mean(2)
        top = self.geometry.kernels.top_k(shares, split.top_k)
        return smallest_set(shares, top, share - (held - whole).exp().mean(2))

    def _with_sample(self, q: Tensor, kv: KV, split: Split) -> Selection:
        """top_k middle tokens, a share of them drawn from what the codes did not choose and weighted by what it stands
        for."""
        wanted, tokens = int(split.top_k * self.method.sampled_share), len(self._known)
        top, _, _ = self._best(q, kv, replace(split, top_k=split.top_k - wanted))
        sample = draw_rest(top, tokens, wanted, step_seed(self.method.seed, self.geometry.layer, kv.length))
        indices = split.around(split.sink + torch.cat([top, sample.sort(-1).values], dim=2), kv.length)
        if sample.shape[2] == 0:
            return Selection(indices)
        chosen = top.shape[2]
        weights = sample_log_weights(sample, tokens - chosen, split.sink + chosen, split.window)
        return Selection(indices, log_weights=weights)

    def _logits(self, q: Tensor, codes: Tensor) -> Tensor:
        """Approximate logits ``[B, H, n, M]`` of queries ``[B, H, n, D]``, on the scale of the exact ones."""
        scores = reference.pq_scores(self.map.queries(q), self._ready(self.codebook), self._key_codes(codes))
        logits = (scores + self.map.constant(q)[..., None]) * self.geometry.scaling
        return logits if self.spread is None else logits + self.spread.added()[:, :, None]

    def _tail_value(self, q: Tensor, weights: Tensor | None, codes: Tensor | None) -> Tensor:
        """Mean value ``[B, H, G, D]`` of the tail, by weights ``[B, H, G, M]`` and value codes where they are kept."""
        if self.method.tail == "pq":
            value_codes = self._ready(codes)[..., self.method.m :]
            return quantised_mean(self._ready(weights), value_codes, self._ready(self.value_codebook))
        return (self._ready(self.value_sum) / len(self._known)).expand(q.shape)

    def _cover(self, kv: KV) -> None:
        every = self.method.refresh
        if every is not None and self.codes is not None and kv.length - self._trained_at >= every:
            self._train(kv, *self.method.budget.resolve(kv.length, self.geometry.prompt).middle(kv.length))
        else:
            super()._cover(kv)

    def _train(self, kv: KV, start: int, stop: int) -> None:
        super()._train(kv, start, stop)
        self.ahead = Ahead()
        method, codes = self.method, self._known.view()
        if method.tail == "pq":
            sample = None if method.sample is None else method.sample * 2**method.b_v
            self.value_codebook, value_codes = self.geometry.kernels.train_codebook(
                kv.values(start, stop),
                method.m_v,
                2**method.b_v,
                self.iterations,
                method.seed,
                sample,
                method.tolerance,
            )
            self.codes = GrowingBuffer(torch.cat([codes, value_codes.to(codes.device)], dim=3))
        if method.tail == "mean":
            self.value_sum = kv.values(start, stop).float().sum(2, keepdim=True)
        if searches_cells(method.search, method.m * method.b, stop - start, self._scores_all):
            cells = cell_numbers(codes.to(kv.device), method.b)
            self.lists = InvertedLists(cells, method.m * method.b, self.geometry.kernels)
        self._trained_at = kv.length
        if self._calibrates and self.queries.recent is not None:
            self.log_factor = self._fitted(kv, start, self.queries.recent)

    def _clustered(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class; here in the coordinates of the map, with the spread where it is wanted."""
        method, device = self.method, self.geometry.device
        moment = self.queries.moment.mean()
        self.map = key_map(method.codebook, keys, moment, method.m, method.seed, device)
        mapped = self.map.keys(keys)
        codebook, codes = super()._clustered(mapped)
        if method.spread:
            scaled = self.map.moment(moment) * self.geometry.scaling**2
            self.spread = Spread(mapped, codebook, codes, scaled, device)
        return codebook, codes

    def _encode(self, kv: KV, start: int, stop: int) -> Tensor:
        """Uint8 ``[B, H, n, m + m_v + 1]``: codes of keys and, where they are kept, of values, and the spread."""
        backend = self.geometry.kernels
        keys, book = self.map.keys(kv.keys(start, stop)), self._ready(self.codebook)
        parts = [backend.encode(keys, book)]
        if self.value_codebook is not None:
            parts.append(backend.encode(kv.values(start, stop), self.value_codebook))
        if self.spread is not None:
            parts.append(self.spread.of(keys, book, parts[0])[..., None])
        return torch.cat(parts, dim=3)

    def _join(self, kv: KV, start: int, stop: int) -> None:
        """Rows ``start`` to ``stop`` have left the window. Lists and sums hold the middle alone, so tokens join one by
        one, but they are encoded together."""
        encoded = self.ahead.take(start, stop, kv.length, partial(self._encode, kv))
        if self.spread is not None:
            self.spread.numbers.append(encoded[..., -1])
            encoded = encoded[..., :-1]
        self._known.append(encoded)
        if self.lists is not None:
            self.lists.append(cell_numbers(self._key_codes(encoded), self.method.b), self.geometry.kernels)
        if self.value_sum is not None:
            self.value_sum = self.value_sum + kv.values(start, stop).float().sum(2, keepdim=True)

    def _fitted(self, kv: KV, first: int, recent: Tensor) -> Tensor:
        """Log of true over estimated tail mass ``[B, H]`` of the queries ``[B, H, G, n, D]`` seen last."""
        batch, heads, group, count, _ = recent.shape
        last, top_k = self.queries.last, self.method.budget.resolve(kv.length, self.geometry.prompt).top_k
        # Where a prompt was too short for codebooks, some middle tokens are younger than the queries; these are masked.
        keys, codes = (kv.keys(0, max(last + 1, first + len(self._known))), self._known.view().to(kv.device))
        true = guessed = torch.zeros(batch, heads, device=kv.device)
        rows = max(1, _TILE // (batch * heads * group * (last + 1)))
        for start in range(0, count, rows):
            q = recent[:, :, :, start : start + rows]
            estimated = self._logits(q.flatten(2, 3), codes).view(*q.shape[:4], -1)
            position = last - count + start + q.shape[3]  # of the block's last query
            part = tail_share(q, keys, estimated, first, position, top_k, self.geometry.scaling)
            true, guessed = true + part[0], guessed + part[1]
        return torch.where((true > 0) & (guessed > 0), true.log() - guessed.log(), torch.zeros_like(true))

    def _key_codes(self, codes: Tensor | None) -> Tensor:
        return self._ready(codes)[..., : self.method.m]

    def _ready(self, part: T | None) -> T:
        if part is None:
            raise RuntimeError("no index before finish_prefill()")
        return part

    @property
    def _calibrates(self) -> bool:
        return self.method.calibrated and self.method.tail in ("mean", "pq")

    @property
    def _scores_all(self) -> bool:
        """Whether a step scores every token whatever the search."""
        return self.method.tail == "pq" or self.method.spread or self.method.top_p is not None

    @property
    def _scans_only(self) -> bool:
        """Whether a step needs nothing but the best tokens by codes."""
        return self.lists is None and self.method.tail == "none" and not self._scores_all

    @property
    def _reads_codes(self) -> bool:
        return self.lists is None or self.method.tail == "pq"

    @property
    def facts(self) -> dict[str, float]:
        return super().facts | {
            "tail_log_factor": float(self.log_factor.mean()),
            "by_cells": float(self.lists is not None),
        }

    @property
    def index_bytes(self) -> int:
        read = super().index_bytes if self._reads_codes else 0
        read += 0 if self.spread is None else self.spread.numbers.bytes
        if self.lists is None:
            return read
        heads = self.geometry.batch * self.geometry.kv_heads
        return read + self.lists.step_bytes + heads * self._taken * 4

    @property
    def resident_bytes(self) -> int:
        parts = (self.codebook, self.value_codebook, self.value_sum, self.spread, self.lists, self.map)
        held = 0 if self.codes is None else self.codes.bytes
        return held + self.queries.nbytes + sum(part.nbytes for part in parts if part is not None)
