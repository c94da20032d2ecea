"""New tokens on their way from the device to the host."""

from __future__ import annotations

from pqbench.store.host.pool import Pool
from pqbench.store.host.rows import HostRows
from pqbench.store.host.traffic import Traffic
from pqbench.store.link.base import Copy, Direction, Transfer


class Outbox:
    """Copies tokens from the ring to the host in batches, beside the computation. The first ``sent`` tokens are on the
    host or on their way there. Only after :meth:`land` may their slots of the ring be overwritten and their rows on the
    host be read by the device."""

    def __init__(self, host: HostRows, pool: Pool, sent: int, traffic: Traffic) -> None:
        self.host, self._pool, self._traffic = host, pool, traffic
        self.sent = self._landed = self._readable = sent
        self._leaving: list[Transfer] = []

    def send(self, stop: int) -> None:
        """Start to copy all tokens before ``stop`` that were not sent yet; they are in the ring."""
        if stop <= self.sent:
            return
        self.land(self.sent)
        copies = [
            Copy(rows, piece.rows[:, :, first - piece.start : last - piece.start])
            for piece in self.host.pieces(self.sent, stop)
            for first, last, rows in self._pool.ring_pieces(piece.start, piece.stop)
        ]
        self._leaving.append(self._traffic.move(copies, Direction.TO_HOST, "new rows"))
        self.sent = stop

    def land(self, stop: int) -> None:
        """Ensure that sent tokens before ``stop`` are on the host before the work that follows. If the device does this
        work, it is queued after the transfers; if the CPU does it, this waits."""
        if stop > self._landed:
            for transfer in self._leaving:
                transfer.order()
            self._leaving, self._landed = self._leaving[-1:], self.sent  # when the last one is done, all are

    def export(self, stop: int) -> None:
        """Send all tokens before ``stop``, and wait until the CPU may read them on the host."""
        self.send(stop)
        if stop > self._readable:
            self.land(self.sent)
            for transfer in self._leaving:
                transfer.wait()
            self._leaving, self._readable = [], self.sent
