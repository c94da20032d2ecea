"""Selection ahead: rows chosen with the query of the step before, and which heads must choose anew.

Queries of neighbouring tokens resemble each other. The rows that one query chooses therefore nearly serve the next
query, and a selection need not wait for its own query (InfiniGen, arXiv 2406.19707; FreeKV, arXiv 2505.13109). A KV
head whose query has turned since then is corrected: it chooses with its present query.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which every layer selects ahead, while the layer before computes."""
    return torch.cuda.Stream(device)


class PreviousQuery:
    """The query of the step before in one layer, and how often it did not serve.

    Differs from FreeKV, which selects pages of tokens, attends with what was brought for the step before and lets the
    first layer select with its own query: here tokens are selected, over all that the step can see, in every layer.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.chosen: Tensor | None = None  # [B, H, room], rows chosen for the step under way
        self.steps = 0  # that had chosen rows
        self._query: Tensor | None = None
        self._there: torch.cuda.Event | None = None  # when rows are chosen, on a GPU
        self._corrected: Tensor | None = None  # heads so far, on the device: nobody waits for it in a step

    @property
    def query(self) -> Tensor | None:
        """The query ``[B, H, G, D]`` of the step before; None in the first."""
        return self._query

    @property
    def fixed(self) -> list[Tensor]:
        """Tensors that keep their place in memory from step to step."""
        return [kept for kept in (self.chosen, self._query, self._corrected) if kept is not None]

    def follow(self, q: Tensor) -> None:
        """The step's query ``[B, H, G, D]``, which is the next step's previous one."""
        if self._query is None:
            self._query, self._corrected = q.clone(), torch.zeros((), dtype=torch.int64, device=q.device)
        else:
            self._query.copy_(q)

    def choose_ahead(self, choose: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        """Have ``choose`` compute :attr:`chosen` from the previous query, beside whatever else a GPU does. If there
        is a tensor already, it is written into that tensor."""
        if self._query is None:
            raise RuntimeError("there is no step before the first")
        if not self._query.is_cuda:
            self.chosen = choose(self._query, self.chosen)
            return
        device = self._query.device
        current, side = torch.cuda.current_stream(device), _side_stream(device)
        self._there = torch.cuda.Event() if self._there is None else self._there
        side.wait_stream(current)
        with torch.cuda.stream(side):
            chosen = choose(self._query, self.chosen)
            self._there.record(side)
        if chosen is not self.chosen:
            chosen.record_stream(current)
        self.chosen = chosen

    def arrived(self) -> Tensor | None:
        """:attr:`chosen`, ordered before all work that is launched from now on; None where nothing was chosen
        ahead."""
        if self.chosen is not None and self._there is not None:
            torch.cuda.current_stream(self.chosen.device).wait_event(self._there)
        return self.chosen

    def turned(self, q: Tensor) -> Tensor:
        """KV heads to correct, bool ``[B, H]``: the cosine between a query head's q and the one before, averaged over
        the group, is at most the threshold. They are counted."""
        if self._query is None or self._corrected is None:
            raise RuntimeError("turned() in the first step")
        cosine = torch.cosine_similarity(q.float(), self._query.float(), dim=-1).mean(-1)
        flags = ~(cosine.clamp(max=1.0) > self.threshold)  # NaN counts as turned
        self._corrected += flags.sum()
        return flags

    def share(self, heads: int) -> float:
        """Share of the heads that were corrected, where a step has ``heads`` of them. Waits for the device."""
        return 0.0 if self._corrected is None or not self.steps else int(self._corrected) / (self.steps * heads)
