"""Bytes of a host store."""

from __future__ import annotations

from pqbench.store.base import Usage
from pqbench.store.host.cached import CachedFinder
from pqbench.store.host.holdings import Holdings
from pqbench.store.host.scratch import Scratch


class HostUsage(Usage):
    """Adds the bytes that transfers moved to those that kernels moved."""

    def __init__(self, holdings: Holdings, scratch: Scratch | None) -> None:
        """``scratch`` is the store's buffer for whole contexts; None if it is shared with other stores."""
        super().__init__()
        self._holdings, self._scratch = holdings, scratch

    @property
    def bytes_to_device(self) -> int:
        held = self._holdings
        return held.traffic.to_device + held.counted[0] * held.row_bytes // held.heads

    @property
    def bytes_to_host(self) -> int:
        return self._holdings.traffic.to_host

    @property
    def device_bytes(self) -> int:
        """Bytes of the pool with cached blocks and staging area, and of the scratch buffer unless it is shared."""
        return self._holdings.pool.table.nbytes + (0 if self._scratch is None else self._scratch.nbytes)

    @property
    def host_bytes(self) -> int:
        return self._holdings.outbox.sent * self._holdings.row_bytes

    def open(self) -> None:
        held = self._holdings
        self.opening_bytes, held.traffic.to_device = self.opening_bytes + self.bytes_to_device, 0
        if held.direct is not None:
            held.direct.forget()


class CachedUsage(HostUsage):
    """Also counts what the block cache does."""

    def __init__(self, holdings: Holdings, scratch: Scratch | None, finder: CachedFinder) -> None:
        super().__init__(holdings, scratch)
        self._finder = finder

    @property
    def bytes_to_device(self) -> int:
        return super().bytes_to_device + self._finder.admitted_directly

    @property
    def bytes_admitted(self) -> int:
        return self._finder.bytes_admitted

    @property
    def cache_lookups(self) -> int:
        return self._finder.cache_lookups

    @property
    def cache_hits(self) -> int:
        return self._finder.cache_hits
