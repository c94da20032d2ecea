"""The rows of one host store: on the host, and copies on the device. The parts of the store share this object."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.backend import Kernels
from pqbench.store.base import Extent
from pqbench.store.host.blocks import BlockCache
from pqbench.store.host.direct import DirectRows
from pqbench.store.host.outbox import Outbox
from pqbench.store.host.pool import Pool
from pqbench.store.host.rows import HostPrompt, HostRows
from pqbench.store.host.traffic import Traffic
from pqbench.store.link.base import Copy, Direction

BOTH, KEYS, VALUES = slice(0, 2), slice(0, 1), slice(1, 2)  # parts of a row [2, D]


class Holdings:
    """Every token has a row on the host. The pool on the device holds copies of the sinks, of the newest tokens in a
    ring, and of cached blocks. New tokens go to the ring and from there to the host, through the outbox.

    Attributes:
        prompt: rows of the prompt on the host, which several stores may share.
        order: ``[B, H, prompt]``, the position of each row of an arranged prompt; None for the order of positions.
        extent: rows held.
        reserved: number of rows that the store was asked to make room for.
        kernels: the kernels that find, write and fetch rows.
        cache: the block cache; None for no cache.
        host, outbox, by_kernels: rows on the host, new tokens on their way there, and fetching by kernels. They are
            replaced when the prompt is arranged.
    """

    def __init__(
        self, prompt: HostPrompt, overlap: bool, kernels: Kernels, cache: BlockCache | None, reserve: int
    ) -> None:
        self.prompt, self.link, self.overlap = prompt, prompt.link, overlap
        self.order: Tensor | None = None
        self.extent = Extent(prompt.length, prompt.length)
        self.reserved = prompt.length
        self.kernels, self.cache = kernels, cache
        cached = 0 if cache is None else cache.rows
        self.pool = Pool(prompt.rows, prompt.device, prompt.length, cached, self.link.debug)
        self.traffic = Traffic(self.link, overlap)
        self._reserve = reserve
        self.attach(prompt)

    def attach(self, prompt: HostPrompt, order: Tensor | None = None) -> None:
        """Use these rows of the prompt on the host from now on; ``order`` as in the attribute."""
        self.prompt, self.order = prompt, order
        self.host = HostRows(prompt, self._reserve)
        self.outbox = Outbox(self.host, self.pool, self.extent.length, self.traffic)
        self.by_kernels = DirectRows(self.host, self.pool, self.kernels, self.cache)

    @property
    def device(self) -> torch.device:
        """Where queries and the pool are."""
        return self.prompt.device

    @property
    def direct(self) -> DirectRows | None:
        """The object that fetches rows by kernels; None if the link fetches them. In a captured step kernels always
        fetch them, because the threads of a link cannot be part of a graph."""
        return self.by_kernels if self.link.direct or self.extent.number is not None else None

    @property
    def counted(self) -> tuple[int, int, int]:
        """The counts of the kernels, see :meth:`DirectRows.counted`; zeros if the link fetches rows."""
        direct = self.direct
        return (0, 0, 0) if direct is None else direct.counted()

    @property
    def most(self) -> int:
        """Upper bound of the tokens that a selection may name: those held, or in a captured step those reserved."""
        return self.extent.length if self.extent.number is None else self.reserved

    @property
    def heads(self) -> int:
        """KV heads of all sequences together."""
        return self.prompt.rows.shape[0] * self.prompt.rows.shape[1]

    @property
    def row_bytes(self) -> int:
        """Bytes of key and value of one token, all heads and sequences together."""
        return self.prompt.rows[:, :, :1].nbytes

    def half(self, start: int, stop: int, part: slice) -> Tensor:
        """Keys or values of tokens ``start`` to ``stop`` on the device, ``[B, H, n, D]``. This is a view if the tensors
        of the prefill or the ring hold them in one piece."""
        near = self.prompt.near
        if near is not None and stop <= self.prompt.length and self.order is None:
            return near[part.start][:, :, start:stop]
        if self.pool.low <= start < stop:
            pieces = list(self.pool.ring_pieces(start, stop))
            if len(pieces) == 1:
                return pieces[0][2][..., part.start, :]
        return self.rows(start, stop, part)[..., 0, :]

    def rows(self, start: int, stop: int, part: slice = BOTH) -> Tensor:
        """Tokens ``start`` to ``stop`` on the device, ``[B, H, n, 1 or 2, D]``."""
        batch, heads, _, _, width = self.prompt.rows.shape
        rows = self.pool.table.new_empty(batch, heads, stop - start, part.stop - part.start, width)
        self.read(start, stop, rows, part)
        return rows

    def read(self, start: int, stop: int, target: Tensor, part: slice) -> None:
        """Copy ``part`` of tokens ``start`` to ``stop`` into ``target`` on the device, from the device or the host."""
        pool = self.pool
        ring = max(start, min(pool.low, stop))  # tokens from here on are in the ring
        host = max(start, min(pool.sinks, ring))  # tokens from here to the ring are on the host
        if host < ring:
            self.outbox.land(ring)
            copies = [
                Copy(piece.rows[..., part, :], target[:, :, piece.start - start : piece.stop - start])
                for piece in self.host.pieces(host, ring)
            ]
            self.traffic.move(copies, Direction.TO_DEVICE, "rows", urgent=True)
        target[:, :, : host - start] = pool.rows[:, :, start:host, part]
        for first, last, rows in pool.ring_pieces(ring, stop):
            target[:, :, first - start : last - start] = rows[..., part, :]
