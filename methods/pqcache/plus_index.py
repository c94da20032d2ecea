"""The index of :class:`methods.pqcache.plus.PQCachePlus` in one layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from methods.pqcache.cells import InvertedLists, cell_numbers, searches_cells
from methods.pqcache.codebook import KeyMap, key_map
from methods.pqcache.index import AHEAD, KeyIndex
from methods.pqcache.queries import SeenQueries
from methods.pqcache.spread import Spread
from pqbench.kernels import reference
from pqbench.kernels.buffers import GrowingBuffer, gather_rows
from pqbench.method import KV, Geometry

if TYPE_CHECKING:
    from methods.pqcache.plus import PQCachePlus

T = TypeVar("T")


def ready(part: T | None) -> T:
    """Returns ``part``. Raises RuntimeError if it is None, because the index was not built yet."""
    if part is None:
        raise RuntimeError("no index before finish_prefill()")
    return part


class Ahead:
    """Encodings of the next tokens that will leave the window. Tokens leave it one by one, in order; they are encoded
    sixteen at a time, which takes as long as encoding one."""

    def __init__(self) -> None:
        self._first = 0
        self._rows: Tensor | None = None

    def take(self, start: int, stop: int, length: int, encode: Callable[[int, int], Tensor]) -> Tensor:
        """The result ``[B, H, n, ...]`` of ``encode(start, stop)``. Calls ``encode`` for up to :data:`AHEAD` tokens at
        a time, none beyond the ``length`` tokens held."""
        rows = self._rows
        if rows is None or start < self._first or stop > self._first + rows.shape[2]:
            rows = self._rows = encode(start, min(length, max(stop, start + AHEAD)))
            self._first = start
        return rows[:, :, start - self._first : stop - self._first]


class PlusIndex(KeyIndex):
    """Adds to :class:`KeyIndex` value codes (stored after the key codes of a token), the spread, and the lists of the
    cells. The codebook is computed in the coordinates of the key map, which may be learnt from queries.

    Attributes:
        map: coordinates of the codebook.
        value_codebook: ``[B, H, m_v, 2**b_v, D/m_v]``; None if values have no codes.
        value_sum: ``[B, H, 1, D]``, sum of the middle's values; None if the tail does not need it.
        spread: likely error of each token's estimated logit; None if it is not used.
        lists: tokens by cell; None if the search scans all codes.
    """

    method: PQCachePlus

    def __init__(self, method: PQCachePlus, geometry: Geometry, queries: SeenQueries) -> None:
        super().__init__(method, geometry)
        self.map = KeyMap()
        self.value_codebook: Tensor | None = None
        self.value_sum: Tensor | None = None
        self.spread: Spread | None = None
        self.lists: InvertedLists | None = None
        self._queries, self._ahead = queries, Ahead()
        self._trained_at = 0  # context length at the last training

    def reach(self, kv: KV, length: int) -> bool:
        """See :meth:`KeyIndex.reach`; with ``refresh``, the codebooks are computed again from time to time."""
        every = self.method.refresh
        if every is None or self.codes is None or length - self._trained_at < every:
            return super().reach(kv, length)
        self.train(kv, *self.method.budget.resolve(length, self.geometry.prompt).middle(length))
        return True

    def train(self, kv: KV, start: int, stop: int) -> None:
        super().train(kv, start, stop)
        self._ahead = Ahead()
        method, codes = self.method, self.known.view()
        if method.tail == "pq":
            sample = None if method.sample is None else method.sample * 2**method.b_v
            iterations = self.clustering.iterations
            self.value_codebook, value_codes = self.geometry.kernels.train_codebook(
                kv.values(start, stop), method.m_v, 2**method.b_v, iterations, method.seed, sample, method.tolerance
            )
            self.codes = GrowingBuffer(torch.cat([codes, value_codes.to(codes.device)], dim=3))
        if method.tail == "mean":
            self.value_sum = kv.values(start, stop).float().sum(2, keepdim=True)
        if searches_cells(method.search, method.m * method.b, stop - start, method.scores_all):
            cells = cell_numbers(codes.to(kv.device), method.b)
            self.lists = InvertedLists(cells, method.m * method.b, self.geometry.kernels)
        self._trained_at = kv.length

    def quantised(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`KeyIndex.quantised`; here in the coordinates of the map. Computes the spread as well, if used."""
        method, device = self.method, self.geometry.device
        moment = self._queries.moment.mean()
        self.map = key_map(method.codebook, keys, moment, method.m, method.seed, device)
        mapped = self.map.keys(keys)
        codebook, codes = self.clustering.train(mapped)
        if method.spread:
            scaled = self.map.moment(moment) * self.geometry.scaling**2
            self.spread = Spread(mapped, codebook, codes, scaled, device)
        return codebook, codes

    def encode(self, kv: KV, start: int, stop: int) -> Tensor:
        """Uint8 ``[B, H, n, m + m_v + 1]``: codes of keys, then codes of values and the spread if they are used."""
        backend = self.geometry.kernels
        keys, book = self.map.keys(kv.keys(start, stop)), ready(self.codebook)
        parts = [backend.encode(keys, book)]
        if self.value_codebook is not None:
            parts.append(backend.encode(kv.values(start, stop), self.value_codebook))
        if self.spread is not None:
            parts.append(self.spread.of(keys, book, parts[0])[..., None])
        return torch.cat(parts, dim=3)

    def join(self, kv: KV, start: int, stop: int) -> None:
        """Add rows ``start`` to ``stop``, which have left the window. Lists and sums hold only the middle, so tokens
        join one by one, although they are encoded together."""
        encoded = self._ahead.take(start, stop, kv.length, partial(self.encode, kv))
        if self.spread is not None:
            self.spread.numbers.append(encoded[..., -1])
            encoded = encoded[..., :-1]
        self.known.append(encoded)
        if self.lists is not None:
            self.lists.append(cell_numbers(self.key_codes(encoded), self.method.b), self.geometry.kernels)
        if self.value_sum is not None:
            self.value_sum = self.value_sum + kv.values(start, stop).float().sum(2, keepdim=True)

    def arrange(self, kv: KV, lists: InvertedLists) -> Tensor:
        """Order middle tokens by their places in the lists. Returns the old row of each new row, ``[B, H, S]``."""
        order, codes = lists.renumber(), self.known.view()
        self.codes = GrowingBuffer(gather_rows(codes, order.to(codes.device)))
        first, stop = self.method.budget.resolve(kv.length, self.geometry.prompt).middle(kv.length)
        rows = torch.arange(kv.length, device=order.device).repeat(*order.shape[:2], 1)
        rows[:, :, first:stop] = first + order
        return rows

    def key_codes(self, codes: Tensor) -> Tensor:
        """The key codes ``[B, H, n, m]`` among all codes ``[B, H, n, m + m_v]``."""
        return codes[..., : self.method.m]

    def logits(self, q: Tensor, codes: Tensor) -> Tensor:
        """Approximate logits ``[B, H, n, M]`` of queries ``[B, H, n, D]``, on the scale of the exact ones."""
        scores = reference.pq_scores(self.map.queries(q), ready(self.codebook), self.key_codes(codes))
        logits = (scores + self.map.constant(q)[..., None]) * self.geometry.scaling
        return logits if self.spread is None else logits + self.spread.added()[:, :, None]

    @property
    def reads_codes(self) -> bool:
        """Whether a step reads the code of every token."""
        return self.lists is None or self.method.tail == "pq"

    @property
    def bytes_read(self) -> int:
        """Bytes that every step reads: codes, spread, the starts of the lists and pending cells."""
        read = super().bytes_read if self.reads_codes else 0
        read += 0 if self.spread is None else self.spread.numbers.bytes
        return read + (0 if self.lists is None else self.lists.step_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        parts = (self.value_codebook, self.value_sum, self.spread, self.lists, self.map)
        return super().nbytes + sum(part.nbytes for part in parts if part is not None)
