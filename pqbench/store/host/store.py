"""KV in host memory; sinks and the newest tokens on the device (arXiv 2407.12820)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pqbench.kernels.backend import Number, kernels
from pqbench.kernels.buffers import gather_rows
from pqbench.kernels.reference.rows import Found
from pqbench.method import Split
from pqbench.store.base import Store
from pqbench.store.host.blocks import BlockCache
from pqbench.store.host.direct import DirectRows
from pqbench.store.host.kept import KeptRows
from pqbench.store.host.outbox import Outbox
from pqbench.store.host.pool import Pool
from pqbench.store.host.rows import HostPrompt, HostRows
from pqbench.store.host.scratch import Scratch
from pqbench.store.host.traffic import Traffic
from pqbench.store.link.base import Arriving, Copy, Direction

_BOTH, _KEYS, _VALUES = slice(0, 2), slice(0, 1), slice(1, 2)  # of a row [2, D]


class HostStore(Store):
    """Every token has a row on the host, numbered by position unless :meth:`arrange` was called. The device holds
    copies: of the sinks, of the newest tokens in a ring; what else a selection asks for is fetched into a staging area.

    New tokens go to the ring and from there to the host, in batches and in the background. A ring slot is overwritten
    only after the copy of its token has been waited for, a host row is read only after the copy into it has. Keys and
    values of the newest tokens are views of the ring, valid until the next append.
    """

    def __init__(
        self,
        prompt: HostPrompt,
        split: Callable[[int], Split | None],
        margin: int = 64,
        overlap: bool = True,
        scratch: Scratch | None = None,
        cache: BlockCache | None = None,
        backend: str = "auto",
        reserve: int = 0,
    ) -> None:
        """
        Args:
            prompt: rows of the whole prompt, shared with other stores; none of them writes there.
            split: the budget at a context length, None where there is none. It only says what is worth keeping on the
                device; any row can be fetched at any time.
            margin: tokens the ring holds beyond the window, at least 2; half as many are copied to the host at a time.
            overlap: False waits for every transfer at once, for the same results.
            scratch: where whole contexts are fetched to; layers that run one after another can share it.
            cache: blocks that lie on the device as well.
            backend: which kernels find rows.
            reserve: tokens behind the prompt that have memory on the host from the start.
        """
        self._prompt, self._split, self._link = prompt, split, prompt.link
        self._order: Tensor | None = None  # [B, H, prompt], position of each row of the prompt; None for their own
        self._margin, self._overlap = margin, overlap
        self._scratch, self._shares = Scratch() if scratch is None else scratch, scratch is not None
        self._kernels = kernels(prompt.device, backend)
        cached = 0 if cache is None else cache.rows
        self._pool = Pool(prompt.rows, prompt.device, prompt.length, cached, self._link.debug)
        self._length = self._reserved = prompt.length
        self._reserve, self._cache = reserve, cache
        self._arriving: Arriving | None = None
        self._ahead: tuple[Tensor, Number] | None = None  # rows of the table that hold rows asked for ahead; how many
        self._traffic = Traffic(self._link, overlap)
        self._attach(HostRows(prompt, reserve))

    def _attach(self, host: HostRows) -> None:
        """Go on with these rows on the host."""
        self._host = host
        self._outbox = Outbox(host, self._pool, self._length, self._traffic)
        self._by_kernels = DirectRows(host, self._pool, self._kernels, self._cache)

    @property
    def _direct(self) -> DirectRows | None:
        """Where kernels bring rows. In a captured step they do so over any link: no thread of a link is part of it."""
        return self._by_kernels if self._link.direct or self.number is not None else None

    @property
    def bytes_to_device(self) -> int:
        return self._traffic.to_device + self._counted[0] * self._row_bytes // self._heads

    @property
    def bytes_to_host(self) -> int:
        return self._traffic.to_host

    @property
    def _counted(self) -> tuple[int, int, int]:
        """What kernels have counted, see :meth:`DirectRows.counted`."""
        return (0, 0, 0) if self._direct is None else self._direct.counted()

    def open(self) -> None:
        self.opening_bytes, self._traffic.to_device = self.opening_bytes + self.bytes_to_device, 0
        if self._direct is not None:
            self._direct.forget()

    @property
    def length(self) -> int:
        return self._length

    @property
    def seen(self) -> int:
        return self._length

    @property
    def device(self) -> torch.device:
        return self._prompt.device

    @property
    def positions(self) -> Tensor:
        batch, heads = self._prompt.rows.shape[:2]
        own = torch.arange(self._length, device=self._prompt.device).expand(batch, heads, -1)
        return own if self._order is None else torch.cat([self._order, own[:, :, self._order.shape[2] :]], dim=2)

    def keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._half(start, stop, _KEYS)

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._half(start, stop, _VALUES)

    def stored_keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Keys ``[B, H, n, D]`` where they lie on the host, a view where one chunk holds them all. Those of a GPU's
        model are read on the GPU, which makes an index of them in a small part of the time that the host takes."""
        stop = self._length if stop is None else stop
        if self._link.pinned:
            return self.keys(start, stop)
        self._outbox.export(stop)
        pieces = [piece.rows[..., 0, :] for piece in self._host.pieces(start, stop)]
        return pieces[0] if len(pieces) == 1 else torch.cat([self._prompt.rows[:, :, :0, 0], *pieces], 2)

    def bring(self, rows: Tensor) -> Arriving:
        self._wait_for_index()
        target = torch.empty_like(rows, device=self.device, memory_format=torch.contiguous_format)
        self._arriving = Arriving(self._traffic.move([Copy(rows, target)], Direction.TO_DEVICE, "index"), target)
        return self._arriving

    def append(self, keys: Tensor, values: Tensor) -> None:
        """See :meth:`Store.append`; one after the other, so that any number can be flushed on the way."""
        for step in range(keys.shape[2]):
            super().append(keys[:, :, step : step + 1], values[:, :, step : step + 1])

    def prepare(self, count: int) -> None:
        """See :meth:`Store.prepare`; for at most half a margin."""
        self._fit(self._length + count)
        self._outbox.land(self._length + count - self._pool.ring)  # the tokens whose slots are overwritten
        self._pool.cover(self._length + count)
        if self.number is not None:
            self._arrive()  # in a graph nobody waits

    def write(self, keys: Tensor, values: Tensor) -> None:
        pool, at = self._pool, self._length if self.number is None else self.number
        ring = pool.rows[:, :, pool.sinks : pool.sinks + pool.ring]
        self._kernels.append_rows(keys, values, ring[..., 0, :], ring[..., 1, :], at, pool.local, pool.sinks)

    def written(self, count: int) -> None:
        self._length += count
        self._pool.low = max(self._pool.low, self._length - self._pool.ring)
        if self._length - self._outbox.sent >= self._margin // 2:
            self._outbox.send(self._length)

    def reserve(self, rows: int) -> None:
        """See :meth:`Store.reserve`. The regions on the device are laid out for the largest window from the start."""
        self._reserved = max(self._reserved, rows)
        self._host.reserve(rows)
        self._pool.cover(rows)

    @property
    def fixed(self) -> list[Tensor]:
        return [self._pool.table, self._pool.local, *self._by_kernels.fixed]

    def fetch(
        self, indices: Tensor | None, count: Number | None = None, anew: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :meth:`Store.fetch`. The rows are those of the pool, the same for every head. None moves all rows that
        neither sinks nor ring hold into a buffer, in the order of positions."""
        if not self._pool.ring:
            self._fit(self._length)
        self._arrive()
        if indices is None and self.number is not None:
            raise RuntimeError("all rows of the host tier are of no fixed number: they cannot be fetched in a graph")
        if indices is None:
            rows = self._scratch.rows(self._pool.rows, self._length)
            self._read(0, self._length, rows, _BOTH)
            return rows[..., 0, :], rows[..., 1, :], None
        ahead, self._ahead = self._ahead, None
        if ahead is not None and anew is not None:
            slots = self._completed(indices, count, anew, *ahead)
        else:
            slots = self._slots(indices, count)  # before the halves: a table that must grow moves
        return *self._pool.halves, slots

    def fetch_ahead(self, rows: Tensor, count: Number) -> None:
        """See :meth:`Store.fetch_ahead`. What the ring has let go of is on the host, so that there is nothing to wait
        for."""
        roomy = rows.numel() <= self._pool.staged  # else the table would move while the step before works on it
        if self._direct is not None and roomy and self._pool.ring and self._cache is None:
            self._ahead = self._direct.fetch(rows, self._most, count), count

    def keys_at(self, rows: Tensor) -> Tensor:
        keys, _, places = self.fetch(rows)
        if places is None:
            raise RuntimeError("rows that were asked for have places")
        found = keys.new_empty(*rows.shape, keys.shape[3])
        self._kernels.gather(keys, places, found)
        return found

    def keep(self, indices: Tensor) -> KeptRows:
        """Fetch rows ``[B, H, n]`` over the link; their bytes open the new store."""
        near = self._prompt.near
        if near is not None and self._order is None:
            keys, values = (gather_rows(rows, indices) for rows in near)
            return KeptRows(keys, values, indices, self._length, moved=0)
        self._outbox.export(self._length)
        return KeptRows.fetched(self._host, indices, self._length)

    def arrange(self, indices: Tensor) -> HostStore:
        """See :meth:`Store.arrange`. The rows are copied within host memory, where the prompt's own rows stay for the
        stores that share them."""
        if self._pool.ring or self._length > self._prompt.length:
            raise RuntimeError("arrange() after the first step: rows already have copies on the device")
        self._prompt, self._order = self._prompt.arranged(indices), indices
        self._attach(HostRows(self._prompt, self._reserve))
        return self

    def drop(self, indices: Tensor) -> None:
        raise RuntimeError("drop() on the host tier: what an evicting method keeps lies on the device, see keep()")

    def settle(self) -> None:
        """Copy out all tokens that are not on the host yet, and wait for every transfer."""
        self._prompt.wait()
        self._outbox.export(self._length)
        self._arrive()
        self._wait_for_index()

    @property
    def device_bytes(self) -> int:
        """The pool, cache and staging included; and the buffer for whole contexts unless it is shared."""
        return self._pool.table.nbytes + (0 if self._shares else self._scratch.nbytes)

    @property
    def host_bytes(self) -> int:
        return self._outbox.sent * self._row_bytes

    @property
    def _heads(self) -> int:
        return self._prompt.rows.shape[0] * self._prompt.rows.shape[1]

    @property
    def _row_bytes(self) -> int:
        return self._prompt.rows[:, :, :1].nbytes

    def _half(self, start: int, stop: int | None, part: slice) -> Tensor:
        """Keys or values of some rows on the device: a view of the ring where it can be one."""
        stop = self._length if stop is None else stop
        near = self._prompt.near
        if near is not None and stop <= self._prompt.length and self._order is None:
            return near[part.start][:, :, start:stop]
        if self._pool.low <= start < stop:
            pieces = list(self._pool.ring_pieces(start, stop))
            if len(pieces) == 1:
                return pieces[0][2][..., part.start, :]
        return self._rows(start, stop, part)[..., 0, :]

    def _read(self, start: int, stop: int, target: Tensor, part: slice) -> None:
        """Copy ``part`` of tokens ``start`` to ``stop`` into ``target`` on the device, from wherever they are."""
        pool = self._pool
        ring = max(start, min(pool.low, stop))  # from here on in the ring
        host = max(start, min(pool.sinks, ring))  # from here on on the host
        if host < ring:
            self._outbox.land(ring)
            copies = [
                Copy(piece.rows[..., part, :], target[:, :, piece.start - start : piece.stop - start])
                for piece in self._host.pieces(host, ring)
            ]
            self._traffic.move(copies, Direction.TO_DEVICE, "rows", urgent=True)
        target[:, :, : host - start] = pool.rows[:, :, start:host, part]
        for first, last, rows in pool.ring_pieces(ring, stop):
            target[:, :, first - start : last - start] = rows[..., part, :]

    def _fit(self, context: int) -> None:
        """Make the pool hold what this context wants on the device."""
        split, pool = self._split(max(context, self._reserved)), self._pool
        sinks, window = (0, 0) if split is None else (min(split.sink, self._length), split.window)
        if pool.sinks >= sinks and pool.ring >= window + self._margin:
            return
        self._ahead = None  # its rows do not move along
        opening, before = not pool.ring, self._traffic.to_device
        self._outbox.land(self._outbox.sent)
        self._arrive()
        spare = 0 if opening else 8 + window // 8  # a window that has grown will grow again
        if opening and split is not None:
            pool.staged = self._prompt.rows.shape[:2].numel() * split.top_k
        low = max(0, min(pool.low, self._length - window))
        head, tail = self._rows(0, max(pool.sinks, sinks)), self._rows(low, self._length)
        pool.resize(max(pool.ring, window + self._margin + spare), head, tail, self._length)
        if opening:
            self.opening_bytes += self._traffic.to_device - before
            self._traffic.to_device = before

    def _rows(self, start: int, stop: int, part: slice = _BOTH) -> Tensor:
        """Tokens ``start`` to ``stop`` on the device, ``[B, H, n, 1 or 2, D]``."""
        batch, heads, _, _, width = self._prompt.rows.shape
        rows = self._pool.table.new_empty(batch, heads, stop - start, part.stop - part.start, width)
        self._read(start, stop, rows, part)
        return rows

    def _completed(self, indices: Tensor, count: Number | None, anew: Tensor, ahead: Tensor, asked: Number) -> Tensor:
        """:meth:`_slots` where the first ``asked`` of every head that is not ``anew`` have been brought to ``ahead``.
        The token whose place in the ring the newest has taken since is asked for again."""
        newest = self._length - 1 if self.number is None else self.number.long()  # which lies on the device
        places = torch.arange(indices.shape[2], device=indices.device)
        kept = ~anew[:, :, None] & (places < asked) & (indices != newest - self._pool.ring)
        return torch.where(kept, ahead, self._slots(torch.where(kept, newest, indices), count))

    @property
    def _most(self) -> int:
        """Tokens that a selection may name: those held; in a captured step those it may ever hold."""
        return self._length if self.number is None else self._reserved

    def _slots(self, indices: Tensor, count: Number | None) -> Tensor:
        """Rows of the pool's table that hold tokens ``[B, H, n]``; those it does not hold are brought there first."""
        if self._direct is not None:
            self._outbox.land(self._pool.low)
            return self._direct.fetch(indices, self._most, count)
        found = self._find(indices)
        if found.asked:
            self._bring(indices, found)
        return found.slots

    def _find(self, indices: Tensor) -> Found:
        """Where the pool holds tokens ``[B, H, n]``."""
        return self._kernels.find_rows(indices, self._pool.local[: self._length], self._pool.resident)

    def _bring(self, indices: Tensor, found: Found) -> None:
        """Bring what the pool does not hold of tokens ``[B, H, n]`` to the device, and note where it is then."""
        place = self._pool.stage(len(found.missing))
        found.slots.put_(found.missing, self._request(indices, found.missing, place))

    def _request(self, indices: Tensor, missing: Tensor, target: Tensor) -> Tensor:
        """Fetch the tokens at places ``[M]`` of ``indices`` into ``target``, the first rows of the staging area; where
        they are in the table, ``[M]``."""
        self._outbox.land(self._pool.low)
        copies, order = self._host.gather(missing // indices.shape[2], indices.take(missing), target)
        self._traffic.move(copies, Direction.TO_DEVICE, "selected rows", urgent=True)
        slots = torch.arange(self._pool.staging, self._pool.staging + len(missing), device=missing.device)
        return slots if order is None else torch.empty_like(slots).index_copy_(0, order, slots)

    def _wait_for_index(self) -> None:
        if self._arriving is not None:
            self._arriving.wait()
            self._arriving = None

    def _arrive(self) -> None:
        """Wait for what is on its way into the pool."""
