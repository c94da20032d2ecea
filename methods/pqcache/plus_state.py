"""The state of :class:`methods.pqcache.plus.PQCachePlus` in one layer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from methods.pqcache.index import step_numbers
from methods.pqcache.plus_index import PlusIndex
from methods.pqcache.plus_search import Search
from methods.pqcache.plus_tail import Tail
from methods.pqcache.queries import SeenQueries
from pqbench.kernels.sampling import draw_rest, sample_log_weights, step_seed
from pqbench.method import KV, Check, Geometry, LayerState, Selection, Split

if TYPE_CHECKING:
    from methods.pqcache.plus import PQCachePlus

_CALIBRATION = 64  # queries that the tail is fitted to


class PQCachePlusState(LayerState):
    """The parts of the state: queries seen so far, the index, the search in it, and the tail."""

    def __init__(self, method: PQCachePlus, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        first = max(0, geometry.prompt - (method.queries or geometry.prompt))
        self.queries = SeenQueries(geometry, first, _CALIBRATION if method.calibrates else 0)
        self.index = PlusIndex(method, geometry, self.queries)
        self.search = Search(method, geometry, self.index)
        self.tail = Tail(method, geometry, self.index, self.queries)

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        self.queries.add(q, keys.shape[2] - 1)

    def finish_prefill(self, kv: KV) -> Tensor | None:
        self.append(kv)
        lists = self.index.lists
        return None if lists is None or not self.method.arranged else self.index.arrange(kv, lists)

    def append(self, kv: KV) -> None:
        if self.index.reach(kv, kv.length):
            self.tail.calibrate(kv)

    def prefetch(self, kv: KV) -> None:
        if self.index.reads_codes:
            self.index.ask(kv)

    def select(self, q: Tensor, kv: KV) -> Selection:
        method, index = self.method, self.index
        if method.refresh is not None:
            self.queries.add(q[:, :, :, None], kv.length - 1)
        if index.codes is None:
            return Selection()
        if index.lists is None and method.tail == "none" and not method.scores_all:  # only codes are needed
            numbers = step_numbers(method.budget, kv.length, self.geometry.prompt)
            codes = index.key_codes(index.arrived(kv))
            return Selection(index.best(index.map.queries(q), codes, numbers, numbers[4]))
        split = method.budget.resolve(kv.length, self.geometry.prompt)
        if method.tail == "sampled":
            return self._with_sample(q, kv, split)
        found = self.search.best(q, kv, split)
        indices, residual = split.around(split.sink + found.top, kv.length), None
        if method.estimates_tail and found.log_weight is not None:
            residual = self.tail.residual(q, found.log_weight, found.weights, found.codes)
        if found.seen is None:
            return Selection(indices, residual=residual)
        visible = torch.nn.functional.pad(found.seen, (split.sink, split.window), value=True)
        return Selection(indices, visible[:, :, None].expand(-1, -1, q.shape[2], -1), residual=residual)

    def _with_sample(self, q: Tensor, kv: KV, split: Split) -> Selection:
        """A selection of top_k middle tokens. A share of them is a random sample of the tokens that the codes did not
        select; each sampled token is weighted by the number of tokens that it represents."""
        wanted, tokens = int(split.top_k * self.method.sampled_share), len(self.index.known)
        top = self.search.best(q, kv, replace(split, top_k=split.top_k - wanted)).top
        sample = draw_rest(top, tokens, wanted, step_seed(self.method.seed, self.geometry.layer, kv.length))
        indices = split.around(split.sink + torch.cat([top, sample.sort(-1).values], dim=2), kv.length)
        if sample.shape[2] == 0:
            return Selection(indices)
        chosen = top.shape[2]
        weights = sample_log_weights(sample, tokens - chosen, split.sink + chosen, split.window)
        return Selection(indices, log_weights=weights)

    @property
    def checks(self) -> list[Check]:
        return self.index.clustering.checks

    @property
    def facts(self) -> dict[str, float]:
        return {
            "iterations": self.index.clustering.iterations,
            "tail_log_factor": float(self.tail.log_factor.mean()),
            "by_cells": float(self.index.lists is not None),
        }

    @property
    def index_bytes(self) -> int:
        return self.index.bytes_read + self.search.bytes_taken

    @property
    def resident_bytes(self) -> int:
        return self.index.nbytes + self.queries.nbytes
