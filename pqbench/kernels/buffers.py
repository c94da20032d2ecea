"""Buffers that grow along the token axis in amortised constant time, and operations on rows."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.pages import empty_rows


class GrowingBuffer:
    """Rows along the third axis, ``[B, H, S, ...]``, in one allocation with free space (slack) for appends.

    The buffer copies the rows that it is made from. Only :meth:`fork` and :meth:`rows` share memory.
    """

    def __init__(self, rows: Tensor, slack: int = 256) -> None:
        self._slack = slack
        self._length = rows.shape[2]
        self._data = _allocate(rows, self._length + slack)

    @classmethod
    def like(cls, rows: Tensor, capacity: int) -> GrowingBuffer:
        """An empty buffer with room for ``capacity`` rows like ``rows``."""
        return cls(rows[:, :, :0], slack=max(capacity, 1))

    def fork(self) -> GrowingBuffer:
        """A buffer that shares the memory and has its own length."""
        fork = GrowingBuffer.__new__(GrowingBuffer)
        fork._slack, fork._length, fork._data = self._slack, self._length, self._data
        return fork

    def rows(self, index: Tensor | slice, start: int) -> GrowingBuffer:
        """A buffer of the sequences ``index`` without their first ``start`` rows; shares memory if ``index`` is a
        slice."""
        part = GrowingBuffer.__new__(GrowingBuffer)
        part._slack, part._length, part._data = self._slack, self._length - start, self._data[index, :, start:]
        return part

    def __len__(self) -> int:
        return self._length

    @property
    def bytes(self) -> int:
        """Bytes of the rows held, slack excluded."""
        return self.view().nbytes

    def view(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` without a copy."""
        return self._data[:, :, start : self._length if stop is None else stop]

    @property
    def whole(self) -> Tensor:
        """The whole memory, ``[B, H, capacity, ...]``; rows from the length on are undefined."""
        return self._data

    def append(self, rows: Tensor) -> None:
        """Add ``rows`` ``[B, H, n, ...]`` at the end."""
        count = rows.shape[2]
        self.make_room(count)
        self._data[:, :, self._length : self._length + count] = rows
        self._length += count

    def make_room(self, count: int) -> None:
        """Make room for ``count`` more rows. New memory has slack for at least half of the rows held."""
        needed = self._length + count
        if needed > self._data.shape[2]:
            self._data = _allocate(self.view(), needed + max(self._slack, self._length // 2))

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` rows in all, so that the buffer does not move before it holds more."""
        if rows > self._data.shape[2]:
            self._data = _allocate(self.view(), rows)

    def advance(self, count: int) -> None:
        """Increase the length by ``count`` rows, which the caller has written into :attr:`whole`."""
        self._length += count

    def truncate(self, length: int) -> None:
        """Remove all rows from ``length`` on."""
        self._length = min(self._length, length)


class NibbleBuffer:
    """Numbers below 16 along the third axis, ``[B, H, S]``, two per byte; those at even positions are in the low half.

    Args:
        numbers: uint8 ``[B, H, S]``.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._pairs = GrowingBuffer(_paired(numbers))
        self._length = numbers.shape[2]

    def __len__(self) -> int:
        return self._length

    @property
    def bytes(self) -> int:
        """Bytes of the numbers held, slack excluded."""
        return self._pairs.bytes

    def pairs(self) -> Tensor:
        """The bytes ``[B, H, (S + 1) // 2]`` without a copy; if S is odd, the last high half is undefined."""
        return self._pairs.view()

    def append(self, numbers: Tensor) -> None:
        """Add ``numbers`` ``[B, H, n]`` at the end."""
        if self._length % 2:
            last = self._pairs.view(len(self._pairs) - 1)  # [B, H, 1]
            numbers = torch.cat([last & 15, numbers], dim=2)
            self._pairs.truncate(len(self._pairs) - 1)
            self._length -= 1
        self._pairs.append(_paired(numbers))
        self._length += numbers.shape[2]


def _paired(numbers: Tensor) -> Tensor:
    """The numbers, two per byte."""
    even, odd = numbers[:, :, ::2], numbers[:, :, 1::2]
    return even | torch.nn.functional.pad(odd << 4, (0, even.shape[2] - odd.shape[2]))


def _allocate(rows: Tensor, capacity: int) -> Tensor:
    shape = list(rows.shape)
    shape[2] = capacity
    data = empty_rows(shape, rows.dtype, rows.device)
    data[:, :, : rows.shape[2]] = rows
    return data


def _address(indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the first three axes for rows ``[B, H, n]``. Indexing with them copies whole rows, unlike gather()."""
    batch, heads, _ = indices.shape
    sequence = torch.arange(batch, device=indices.device)[:, None, None]
    head = torch.arange(heads, device=indices.device)[:, None]
    return sequence, head, indices


def gather_rows(data: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` ``[B, H, n]`` of ``data`` ``[B, H, S, ...]``: ``[B, H, n, ...]``."""
    return data[_address(indices)]


def swap_remove(buffer: GrowingBuffer, indices: Tensor) -> None:
    """Remove e rows ``[B, H, e]`` by moving the last rows into their places. The cost does not depend on the length.

    Several buffers of equal length stay aligned if the same rows are removed from each.
    """
    count, data = indices.shape[2], buffer.view()
    first = data.shape[2] - count  # the first of the last e rows, whose places are removed
    tail = torch.arange(first, data.shape[2], device=data.device)
    survives = (tail[:, None] != indices[:, :, None, :]).all(-1)  # [B, H, e]: last rows that are not removed themselves
    # There are as many survivors as holes before the tail; the other rows are moved onto themselves.
    source = first + survives.int().argsort(dim=2, descending=True, stable=True)
    holes = indices.masked_fill(indices >= first, data.shape[2]).sort(dim=2).values
    target = torch.where(holes < data.shape[2], holes, source)
    data[_address(target)] = gather_rows(data, source)
    buffer.truncate(first)
