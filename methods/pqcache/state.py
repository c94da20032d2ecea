"""The state of :class:`methods.pqcache.method.PQCache` in one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from methods.pqcache.index import KeyIndex, step_numbers
from methods.pqcache.previous import PreviousQuery
from pqbench.method import KV, Check, Geometry, LayerState, Plan, Selection

if TYPE_CHECKING:
    from methods.pqcache.method import PQCache


class PQCacheState(LayerState):
    """The index of the layer and, with selection ahead, the query of the previous step.

    Attributes:
        index: codebook and codes.
        previous: the query of the previous step; None without selection ahead.
        room: size of the selection tensor of a captured step, in tokens.
    """

    def __init__(self, method: PQCache, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method
        self.index = KeyIndex(method, geometry)
        self.previous = None if geometry.correction is None else PreviousQuery(geometry.correction)
        self.room = 0

    def finish_prefill(self, kv: KV) -> Tensor | None:
        self.index.reach(kv, kv.length)
        return None

    def append(self, kv: KV) -> None:
        self.index.reach(kv, kv.length)

    def prefetch(self, kv: KV) -> None:
        self.index.ask(kv)
        if self.index.codes is not None and self.previous is not None and self.previous.query is not None:
            self._choose_ahead(kv, self.previous)

    def reserve(self, kv: KV, rows: int) -> bool:
        if self.index.codes is None or (self.previous is not None and self.previous.query is None):
            return False
        codes = self.index.on_device
        codes.reserve(rows)
        self.room = max(self._step(length)[4] for length in (kv.length + 1, rows))
        if self.previous is not None:
            batch, heads = codes.whole.shape[:2]
            self.previous.chosen = torch.zeros(batch, heads, self.room, dtype=torch.int64, device=kv.device)
        return True

    def plan(self, kv: KV, length: int) -> Plan:
        self.index.reach(kv, length)
        numbers = self._step(length)
        attended = numbers[4]
        if attended > self.room:
            raise RuntimeError(f"a step attends to {attended} tokens, but was captured for at most {self.room}")
        if self.previous is not None:
            self.previous.steps += 1
        return Plan(numbers, attended)

    @property
    def fixed(self) -> list[Tensor]:
        index = self.index
        held = [] if index.codes is None or index.codebook is None else [index.codebook, index.on_device.whole]
        return held + ([] if self.previous is None else self.previous.fixed)

    def select(self, q: Tensor, kv: KV) -> Selection:
        if self.index.codes is None:
            return Selection()
        previous, only = self.previous, None
        chosen = None if previous is None else previous.arrived()
        if previous is not None and chosen is not None:
            only = previous.turned(q)
        indices = self._choose(q, kv, kv.length, only, chosen)
        if previous is not None:
            previous.follow(q)
            if self.numbers is None and only is not None:
                previous.chosen, previous.steps = None, previous.steps + 1
        return Selection(indices, count=None if self.numbers is None else self.numbers[4], anew=only)

    def _choose_ahead(self, kv: KV, previous: PreviousQuery) -> None:
        """Select for the next step with the query of the previous one, and start to fetch the rows."""
        length = kv.length + 1
        if self.numbers is None:
            self.index.reach(kv, length)
        asked = (self.numbers or self._step(length))[5]

        def choose(query: Tensor, chosen: Tensor | None) -> Tensor:
            rows = self._choose(query, kv, length, None, chosen)
            kv.fetch_ahead(rows, asked)
            return rows

        previous.choose_ahead(choose)

    def _choose(self, q: Tensor, kv: KV, length: int, only: Tensor | None, chosen: Tensor | None) -> Tensor:
        """The rows of a step with ``length`` tokens; see :meth:`methods.pqcache.index.KeyIndex.best`. In a captured
        step the step numbers are on the device, and one of them says how many of the codes are valid."""
        if self.numbers is not None:
            return self.index.best(q, self.index.on_device.whole, self.numbers, self.room, only, chosen)
        numbers = self._step(length)
        return self.index.best(q, self.index.arrived(kv), numbers, numbers[4], only, chosen)

    def _step(self, length: int) -> tuple[int, int, int, int, int, int]:
        """The :func:`methods.pqcache.index.step_numbers` of this layer."""
        return step_numbers(self.method.budget, length, self.geometry.prompt)

    @property
    def checks(self) -> list[Check]:
        return self.index.clustering.checks

    @property
    def facts(self) -> dict[str, float]:
        known: dict[str, float] = {"iterations": self.index.clustering.iterations}
        if self.previous is not None:
            known["corrected_heads"] = self.previous.share(self.geometry.batch * self.geometry.kv_heads)
        return known

    @property
    def index_bytes(self) -> int:
        return self.index.bytes_read

    @property
    def resident_bytes(self) -> int:
        return self.index.nbytes
