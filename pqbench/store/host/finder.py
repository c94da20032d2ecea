"""Finds the rows of the pool that hold the tokens of a selection, after fetching the missing ones from the host."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.number import Number
from pqbench.kernels.reference.rows import Found
from pqbench.store.host.holdings import Holdings
from pqbench.store.link.base import Direction


class Finder:
    """Finds and fetches rows for the steps of one store, without a block cache."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._ahead: tuple[Tensor, Number] | None = None  # table rows of tokens fetched ahead, and their number

    def arrive(self) -> None:
        """Wait for all transfers into the pool."""

    def prepare(self) -> None:
        """Called before each step: do what the host cannot do inside a captured step."""
        if self._holdings.extent.number is not None:
            self.arrive()  # a graph cannot wait for transfers

    def find(self, indices: Tensor, count: Number | None, anew: Tensor | None) -> Tensor:
        """Rows of the pool's table that hold tokens ``[B, H, n]``; see :meth:`pqbench.store.base.Store.fetch`."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or anew is None:
            return self._slots(indices, count)
        return self._completed(indices, count, anew, *ahead)

    def ask_ahead(self, rows: Tensor, count: Number) -> None:
        """See :meth:`pqbench.method.KV.fetch_ahead`. Nothing has to wait, because all tokens that are not in the ring
        are on the host."""
        held = self._holdings
        direct, pool = held.direct, held.pool
        roomy = rows.numel() <= pool.staged  # otherwise the table would move while the previous step uses it
        if direct is not None and roomy and pool.ring and held.cache is None:
            self._ahead = direct.fetch(rows, held.most, count), count

    def forget_ahead(self) -> None:
        """Called when the pool changes its layout: rows that were fetched ahead are lost."""
        self._ahead = None

    def _completed(self, indices: Tensor, count: Number | None, anew: Tensor, ahead: Tensor, asked: Number) -> Tensor:
        """As :meth:`_slots`, when the first ``asked`` tokens of every head that is not ``anew`` were fetched ahead, to
        rows ``ahead``. A token whose place in the ring was taken by the newest token is fetched again."""
        extent = self._holdings.extent
        newest = extent.length - 1 if extent.number is None else extent.number.long()  # the newest token is in the ring
        places = torch.arange(indices.shape[2], device=indices.device)
        kept = ~anew[:, :, None] & (places < asked) & (indices != newest - self._holdings.pool.ring)
        return torch.where(kept, ahead, self._slots(torch.where(kept, newest, indices), count))

    def _slots(self, indices: Tensor, count: Number | None) -> Tensor:
        """Rows of the pool's table that hold tokens ``[B, H, n]``, after fetching those that it does not hold."""
        held, direct = self._holdings, self._holdings.direct
        if direct is not None:
            held.outbox.land(held.pool.low)
            return direct.fetch(indices, held.most, count)
        found = self._find(indices)
        if found.asked:
            self._bring(indices, found)
        return found.slots

    def _find(self, indices: Tensor) -> Found:
        """Find tokens ``[B, H, n]`` in the pool."""
        held, pool = self._holdings, self._holdings.pool
        return held.kernels.find_rows(indices, pool.local[: held.extent.length], pool.resident)

    def _bring(self, indices: Tensor, found: Found) -> None:
        """Fetch those of the tokens ``[B, H, n]`` that the pool does not hold, and enter their rows in ``found``."""
        place = self._holdings.pool.stage(len(found.missing))
        found.slots.put_(found.missing, self._request(indices, found.missing, place))

    def _request(self, indices: Tensor, missing: Tensor, target: Tensor) -> Tensor:
        """Fetch the tokens at places ``[M]`` of ``indices`` into ``target``, the first rows of the staging area.
        Returns their rows in the table, ``[M]``."""
        held, pool = self._holdings, self._holdings.pool
        held.outbox.land(pool.low)
        copies, order = held.host.gather(missing // indices.shape[2], indices.take(missing), target)
        held.traffic.move(copies, Direction.TO_DEVICE, "selected rows", urgent=True)
        slots = torch.arange(pool.staging, pool.staging + len(missing), device=missing.device)
        return slots if order is None else torch.empty_like(slots).index_copy_(0, order, slots)
