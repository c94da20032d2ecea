"""The store of the host tier: keys and values in host memory, sinks and newest tokens also on the device (arXiv
2407.12820)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pqbench.kernels.backend import kernels
from pqbench.kernels.buffers import gather_rows
from pqbench.kernels.number import Number
from pqbench.method import Split
from pqbench.store.base import Store
from pqbench.store.host.blocks import BlockCache, CacheOptions
from pqbench.store.host.cached import CachedFinder
from pqbench.store.host.finder import Finder
from pqbench.store.host.holdings import BOTH, KEYS, VALUES, Holdings
from pqbench.store.host.kept import KeptRows
from pqbench.store.host.layout import Layout
from pqbench.store.host.rows import HostPrompt
from pqbench.store.host.scratch import Scratch
from pqbench.store.host.usage import CachedUsage, HostUsage
from pqbench.store.host.writer import HostWriter
from pqbench.store.link.base import Arriving, Copy, Direction


class HostStore(Store):
    """Every token has a row on the host, numbered by position unless :meth:`arrange` was called. The device holds
    copies of the sinks and, in a ring, of the newest tokens. Other tokens of a selection are fetched into a staging
    area.

    New tokens are written to the ring and copied from there to the host, in batches and in the background. A slot of
    the ring is overwritten only after the copy of its token is done, and a row on the host is read only after the copy
    into it is done. Keys and values of the newest tokens are views of the ring, valid until the next append.
    """

    def __init__(
        self,
        prompt: HostPrompt,
        split: Callable[[int], Split | None],
        margin: int = 64,
        overlap: bool = True,
        scratch: Scratch | None = None,
        cache: CacheOptions | None = None,
        backend: str = "auto",
        reserve: int = 0,
    ) -> None:
        """
        Args:
            prompt: rows of the whole prompt, shared with other stores; no store writes there.
            split: returns the budget's split at a context length, or None for all tokens. It only determines which
                rows are kept on the device; any row can be fetched at any time.
            margin: tokens that the ring holds beyond the window, at least 2; half as many are copied to the host at a
                time.
            overlap: run transfers in the background; False waits for each at once, with the same results.
            scratch: buffer for whole contexts, which layers that run one after another can share.
            cache: options of the block cache; None for no cache.
            backend: name of the backend that finds rows.
            reserve: tokens after the prompt for which host memory is taken at the start.
        """
        found = kernels(prompt.device, backend)
        blocks = None
        if cache is not None:
            blocks = BlockCache(cache, prompt.rows.shape[0], prompt.rows.shape[1], prompt.device, found)
            blocks.table(prompt.length + reserve)  # large enough from the start, so that it does not move
        self._holdings = held = Holdings(prompt, overlap, found, blocks, reserve)
        self._scratch = Scratch() if scratch is None else scratch
        self._arriving: Arriving | None = None
        own = self._scratch if scratch is None else None
        self._finder, usage = Finder(held), HostUsage(held, own)
        if blocks is not None:
            self._finder = cached = CachedFinder(held, blocks)
            usage = CachedUsage(held, own, cached)
        self._layout = Layout(held, self._finder, usage, split, margin)
        super().__init__(held.extent, prompt.device, usage, HostWriter(held, self._layout, self._finder))

    @property
    def positions(self) -> Tensor:
        order = self._holdings.order
        batch, heads = self._holdings.prompt.rows.shape[:2]
        own = torch.arange(self.length, device=self.device).expand(batch, heads, -1)
        return own if order is None else torch.cat([order, own[:, :, order.shape[2] :]], dim=2)

    def keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._read(self._holdings.half(start, self.length if stop is None else stop, KEYS))

    def values(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._holdings.half(start, self.length if stop is None else stop, VALUES)

    def stored_keys(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Keys ``[B, H, n, D]`` on the host, a view if one chunk holds them all. For a model on a GPU, they are brought
        to the GPU, which builds an index from them much faster than the host."""
        held, stop = self._holdings, self.length if stop is None else stop
        if held.link.pinned:
            return self.keys(start, stop)
        held.outbox.export(stop)
        pieces = [piece.rows[..., 0, :] for piece in held.host.pieces(start, stop)]
        found = pieces[0] if len(pieces) == 1 else torch.cat([held.prompt.rows[:, :, :0, 0], *pieces], 2)
        return self._read(found)

    def keys_at(self, rows: Tensor) -> Tensor:
        keys, _, places = self.fetch(rows)
        if places is None:
            raise RuntimeError("rows that were asked for have places")
        found = keys.new_empty(*rows.shape, keys.shape[3])
        self._holdings.kernels.gather(keys, places, found)
        return self._read(found)

    def bring(self, rows: Tensor) -> Arriving:
        self._wait_for_index()
        target = torch.empty_like(rows, device=self.device, memory_format=torch.contiguous_format)
        transfer = self._holdings.traffic.move([Copy(rows, target)], Direction.TO_DEVICE, "index")
        self._arriving = Arriving(transfer, target)
        return self._arriving

    def fetch(
        self, indices: Tensor | None, count: Number | None = None, anew: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :meth:`Store.fetch`. For a selection, keys and values are those of the whole pool, the same for every
        head. For None, all rows are copied into the scratch buffer in the order of positions.

        Raises:
            RuntimeError: ``indices`` is None in a captured step, where the number of rows is not fixed.
        """
        held = self._holdings
        self._layout.open()
        self._finder.arrive()
        if indices is None and self.extent.number is not None:
            raise RuntimeError("all rows of the host tier are of no fixed number: they cannot be fetched in a graph")
        if indices is None:
            rows = self._scratch.rows(held.pool.rows, self.length)
            held.read(0, self.length, rows, BOTH)
            return rows[..., 0, :], rows[..., 1, :], None
        slots = self._finder.find(indices, count, anew)  # before pool.halves, because the table may move
        return *held.pool.halves, slots

    def fetch_ahead(self, rows: Tensor, count: Number) -> None:
        self._finder.ask_ahead(rows, count)

    def keep(self, indices: Tensor) -> KeptRows:
        """See :meth:`Store.keep`. Rows are fetched over the link; their bytes are opening bytes of the new store."""
        held = self._holdings
        near = held.prompt.near
        if near is not None and held.order is None:
            keys, values = (gather_rows(rows, indices) for rows in near)
            return KeptRows(keys, values, indices, self.length, moved=0)
        held.outbox.export(self.length)
        return KeptRows.fetched(held.host, indices, self.length)

    def arrange(self, indices: Tensor) -> HostStore:
        """See :meth:`Store.arrange`. The rows are copied within host memory; the original rows stay for other stores of
        the prompt.

        Raises:
            RuntimeError: the first step has begun.
        """
        held = self._holdings
        if held.pool.ring or self.length > held.prompt.length:
            raise RuntimeError("arrange() after the first step: rows already have copies on the device")
        held.attach(held.prompt.arranged(indices), indices)
        return self

    def settle(self) -> None:
        """Copy all tokens that are not on the host yet to the host, and wait for every transfer."""
        held = self._holdings
        held.prompt.wait()
        held.outbox.export(self.length)
        self._finder.arrive()
        self._wait_for_index()

    def _wait_for_index(self) -> None:
        if self._arriving is not None:
            self._arriving.wait()
            self._arriving = None
