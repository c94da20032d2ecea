"""Which rows of the pool hold the tokens of a selection; tokens that it does not hold are brought there first."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.number import Number
from pqbench.kernels.reference.rows import Found
from pqbench.store.host.holdings import Holdings
from pqbench.store.link.base import Direction


class Finder:
    """Finds and brings rows for the steps of one store, without a cache of blocks."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._ahead: tuple[Tensor, Number] | None = None  # table rows of the tokens asked for ahead, and how many

    @property
    def bytes_admitted(self) -> int:
        """Bytes of the blocks that a cache has let in."""
        return 0

    @property
    def admitted_directly(self) -> int:
        """Those of them that kernels have copied, which no transfer of the link has counted."""
        return 0

    @property
    def cache_lookups(self) -> int:
        """See :attr:`pqbench.store.base.Usage.cache_lookups`."""
        return 0

    @property
    def cache_hits(self) -> int:
        """See :attr:`pqbench.store.base.Usage.cache_hits`."""
        return 0

    def arrive(self) -> None:
        """Wait for whatever is on its way into the pool."""

    def prepare(self) -> None:
        """Do the host's part before a step that may be captured."""
        if self._holdings.extent.number is not None:
            self.arrive()  # nobody waits inside a graph

    def find(self, indices: Tensor, count: Number | None, anew: Tensor | None) -> Tensor:
        """Rows of the pool's table that hold tokens ``[B, H, n]``; see :meth:`pqbench.store.base.Store.fetch`."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or anew is None:
            return self._slots(indices, count)
        return self._completed(indices, count, anew, *ahead)

    def ask_ahead(self, rows: Tensor, count: Number) -> None:
        """See :meth:`pqbench.method.KV.fetch_ahead`. Tokens that the ring no longer holds are on the host already, so
        that there is nothing to wait for."""
        held = self._holdings
        direct, pool = held.direct, held.pool
        roomy = rows.numel() <= pool.staged  # a table that must grow would move while the step before works on it
        if direct is not None and roomy and pool.ring and held.cache is None:
            self._ahead = direct.fetch(rows, held.most, count), count

    def forget_ahead(self) -> None:
        """The pool is laid out anew, and rows that were brought ahead do not move along."""
        self._ahead = None

    def _completed(self, indices: Tensor, count: Number | None, anew: Tensor, ahead: Tensor, asked: Number) -> Tensor:
        """:meth:`_slots` where the first ``asked`` tokens of every head that is not ``anew`` have been brought to the
        rows ``ahead``. The token whose place in the ring the newest token has taken since is asked for again."""
        extent = self._holdings.extent
        newest = extent.length - 1 if extent.number is None else extent.number.long()  # which is on the device
        places = torch.arange(indices.shape[2], device=indices.device)
        kept = ~anew[:, :, None] & (places < asked) & (indices != newest - self._holdings.pool.ring)
        return torch.where(kept, ahead, self._slots(torch.where(kept, newest, indices), count))

    def _slots(self, indices: Tensor, count: Number | None) -> Tensor:
        """Rows of the pool's table that hold tokens ``[B, H, n]``; those it does not hold are brought there first."""
        held, direct = self._holdings, self._holdings.direct
        if direct is not None:
            held.outbox.land(held.pool.low)
            return direct.fetch(indices, held.most, count)
        found = self._find(indices)
        if found.asked:
            self._bring(indices, found)
        return found.slots

    def _find(self, indices: Tensor) -> Found:
        """Where the pool holds tokens ``[B, H, n]``."""
        held, pool = self._holdings, self._holdings.pool
        return held.kernels.find_rows(indices, pool.local[: held.extent.length], pool.resident)

    def _bring(self, indices: Tensor, found: Found) -> None:
        """Bring the tokens ``[B, H, n]`` that the pool does not hold to the device, and note where they are."""
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
