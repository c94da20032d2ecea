"""Sizes of the regions of the pool: the device has room for the sinks and the window of the budget."""

from __future__ import annotations

from collections.abc import Callable

from pqbench.method import Split
from pqbench.store.base import Usage
from pqbench.store.host.finder import Finder
from pqbench.store.host.holdings import Holdings


class Layout:
    """Sets the sizes of the pool's regions, and enlarges them when sinks or window have grown."""

    def __init__(
        self, holdings: Holdings, finder: Finder, usage: Usage, split: Callable[[int], Split | None], margin: int
    ) -> None:
        """``split`` returns the budget's split at a context length. The ring holds ``margin`` tokens beyond the window.
        Bytes that the first layout moves are opening bytes of ``usage``."""
        self._holdings, self._finder, self._usage, self._split, self.margin = holdings, finder, usage, split, margin

    def open(self) -> None:
        """Set up the pool if that was not done yet."""
        if not self._holdings.pool.ring:
            self.fit(self._holdings.extent.length)

    def fit(self, context: int) -> None:
        """Make the pool large enough for the sinks and the window of a context of this length."""
        held, pool = self._holdings, self._holdings.pool
        length, traffic = held.extent.length, held.traffic
        split = self._split(max(context, held.reserved))
        sinks, window = (0, 0) if split is None else (min(split.sink, length), split.window)
        if pool.sinks >= sinks and pool.ring >= window + self.margin:
            return
        self._finder.forget_ahead()
        opening, before = not pool.ring, traffic.to_device
        held.outbox.land(held.outbox.sent)
        self._finder.arrive()
        spare = 0 if opening else 8 + window // 8  # a window that has grown once will grow again
        if opening and split is not None:
            pool.staged = held.heads * split.top_k
        low = max(0, min(pool.low, length - window))
        head, tail = held.rows(0, max(pool.sinks, sinks)), held.rows(low, length)
        pool.resize(max(pool.ring, window + self.margin + spare), head, tail, length)
        if opening:
            self._usage.opening_bytes += traffic.to_device - before
            traffic.to_device = before
