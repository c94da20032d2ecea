"""New tokens on their way from the device to the host."""

from __future__ import annotations

from pqbench.store.host.pool import Pool
from pqbench.store.host.rows import HostRows
from pqbench.store.host.traffic import Traffic
from pqbench.store.link.base import Copy, Direction, Transfer


class Outbox:
    """Copies tokens out of the ring in batches, beside the computation. ``sent`` tokens are on the host or on their way
    there; a slot of the ring is free, and a row on the host holds its token, once :meth:`land` has been called."""

    def __init__(self, host: HostRows, pool: Pool, sent: int, traffic: Traffic) -> None:
        self.host, self._pool, self._traffic = host, pool, traffic
        self.sent = self._landed = self._readable = sent
        self._leaving: list[Transfer] = []

    def send(self, stop: int) -> None:
        """Start to copy the tokens before ``stop`` that have not been sent yet; the ring holds them."""
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
        """Have the tokens before ``stop``, of those sent, on the host before what is done next: at once where the CPU
        does it, else in the order of the device's work."""
        if stop > self._landed:
            for transfer in self._leaving:
                transfer.order()
            self._leaving, self._landed = self._leaving[-1:], self.sent  # the last one is there when all are

    def export(self, stop: int) -> None:
        """Have the tokens before ``stop`` on the host, where the CPU may read them."""
        self.send(stop)
        if stop > self._readable:
            self.land(self.sent)
            for transfer in self._leaving:
                transfer.wait()
            self._leaving, self._readable = [], self.sent
