"""The transfers of one store over a link."""

from __future__ import annotations

from collections.abc import Sequence

from pqbench.store.link.base import Copy, Direction, Link, Transfer


class Traffic:
    """Starts a store's transfers and counts their bytes, ``to_device`` and ``to_host``."""

    def __init__(self, link: Link, overlap: bool) -> None:
        """Without ``overlap``, each transfer is waited for at once."""
        self.link, self._overlap = link, overlap
        self.to_device = self.to_host = 0

    def move(self, copies: Sequence[Copy], direction: Direction, name: str, urgent: bool = False) -> Transfer:
        """Start a transfer called ``name``; wait for it if it is urgent."""
        size = sum(copy.nbytes for copy in copies)
        if direction is Direction.TO_HOST:
            self.to_host += size
        else:
            self.to_device += size
        urgent = urgent or not self._overlap
        transfer = self.link.submit(copies, direction, name, urgent=urgent)
        if urgent:
            transfer.wait()
        return transfer
