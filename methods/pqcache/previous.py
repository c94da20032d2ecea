"""Selection ahead: rows are selected with the query of the previous step, and some heads are corrected.

Queries of neighbouring tokens are similar, and so are the rows that they select. A step can therefore use a selection
that was made with the previous query, before its own query is known (InfiniGen, arXiv 2406.19707; FreeKV, arXiv
2505.13109). A KV head whose query has changed direction too much ("turned") is corrected: it selects again with its
current query.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which every layer selects ahead while the previous layer computes."""
    return torch.cuda.Stream(device)


class PreviousQuery:
    """The query of the previous step in one layer, and the number of heads that were corrected.

    Differs from FreeKV, which selects pages of tokens, attends to the tokens that were brought for the previous step,
    and lets the first layer select with its own query. Here single tokens are selected in every layer, among all tokens
    that the step can see.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.chosen: Tensor | None = None  # [B, H, room], rows selected for the current step
        self.steps = 0  # steps for which rows were selected ahead
        self._query: Tensor | None = None
        self._there: torch.cuda.Event | None = None  # on a GPU, passed when rows are selected
        self._corrected: Tensor | None = None  # number of corrected heads, on the device so that no step waits for it

    @property
    def query(self) -> Tensor | None:
        """The query ``[B, H, G, D]`` of the previous step; None in the first step."""
        return self._query

    @property
    def fixed(self) -> list[Tensor]:
        """Tensors that keep their place in memory from step to step."""
        return [kept for kept in (self.chosen, self._query, self._corrected) if kept is not None]

    def follow(self, q: Tensor) -> None:
        """Store the query ``[B, H, G, D]`` of this step as the previous query of the next step."""
        if self._query is None:
            self._query, self._corrected = q.clone(), torch.zeros((), dtype=torch.int64, device=q.device)
        else:
            self._query.copy_(q)

    def choose_ahead(self, choose: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        """Let ``choose`` compute :attr:`chosen` from the previous query; on a GPU this runs beside other work. If
        :attr:`chosen` is a tensor already, the result is written into it."""
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
        """:attr:`chosen`, ready for all work that is launched from now on; None if nothing was selected ahead."""
        if self.chosen is not None and self._there is not None:
            torch.cuda.current_stream(self.chosen.device).wait_event(self._there)
        return self.chosen

    def turned(self, q: Tensor) -> Tensor:
        """Which KV heads to correct, bool ``[B, H]``: those for which the cosine between q ``[B, H, G, D]`` and the
        previous query, averaged over the query group, is at most the threshold. Counts them."""
        if self._query is None or self._corrected is None:
            raise RuntimeError("turned() in the first step")
        cosine = torch.cosine_similarity(q.float(), self._query.float(), dim=-1).mean(-1)
        flags = ~(cosine.clamp(max=1.0) > self.threshold)  # NaN counts as turned
        self._corrected += flags.sum()
        return flags

    def share(self, heads: int) -> float:
        """Share of the heads that were corrected so far, when a step has ``heads`` heads. Waits for the device."""
        return 0.0 if self._corrected is None or not self.steps else int(self._corrected) / (self.steps * heads)
