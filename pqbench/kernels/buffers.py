"""A tensor that grows along its token axis in amortised constant time, and row operations on it."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.pages import empty_rows


class GrowingBuffer:
    """Rows along the third axis, ``[B, H, S, ...]``, kept in one allocation with slack for appends.

    Rows are copied in, so the buffer never aliases the tensor it was made from; :meth:`fork` shares on purpose.
    """

    def __init__(self, rows: Tensor, slack: int = 256) -> None:
        self._slack = slack
        self._length = rows.shape[2]
        self._data = _allocate(rows, self._length + slack)

    @classmethod
    def like(cls, rows: Tensor, capacity: int) -> GrowingBuffer:
        """An empty buffer for rows like ``rows`` with room for ``capacity`` of them."""
        return cls(rows[:, :, :0], slack=max(capacity, 1))

    def fork(self) -> GrowingBuffer:
        """A buffer over the same memory with a length of its own."""
        fork = GrowingBuffer.__new__(GrowingBuffer)
        fork._slack, fork._length, fork._data = self._slack, self._length, self._data
        return fork

    def rows(self, index: Tensor | slice, start: int) -> GrowingBuffer:
        """The buffer of some sequences without their first ``start`` rows; shares memory when ``index`` is a slice."""
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
        """All rows there is room for, ``[B, H, capacity, ...]``; those from the length on mean nothing."""
        return self._data

    def append(self, rows: Tensor) -> None:
        """Add ``rows`` ``[B, H, n, ...]`` at the end."""
        count = rows.shape[2]
        self.make_room(count)
        self._data[:, :, self._length : self._length + count] = rows
        self._length += count

    def make_room(self, count: int) -> None:
        """Have room for ``count`` more rows, and for a share more than that where memory must be taken for them."""
        needed = self._length + count
        if needed > self._data.shape[2]:
            self._data = _allocate(self.view(), needed + max(self._slack, self._length // 2))

    def reserve(self, rows: int) -> None:
        """Have room for ``rows`` rows in all, so that the buffer does not move before it holds more."""
        if rows > self._data.shape[2]:
            self._data = _allocate(self.view(), rows)

    def advance(self, count: int) -> None:
        """Count ``count`` rows more: somebody has written them into :attr:`whole`."""
        self._length += count

    def truncate(self, length: int) -> None:
        """Forget all rows from ``length`` on."""
        self._length = min(self._length, length)


class NibbleBuffer:
    """Numbers below 16 along the third axis, ``[B, H, S]``, two to a byte: a number of even position in the low half.

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
        """The bytes ``[B, H, (S + 1) // 2]`` without a copy; with an odd S the last high half means nothing."""
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
    """Two numbers to a byte."""
    even, odd = numbers[:, :, ::2], numbers[:, :, 1::2]
    return even | torch.nn.functional.pad(odd << 4, (0, even.shape[2] - odd.shape[2]))


def _allocate(rows: Tensor, capacity: int) -> Tensor:
    shape = list(rows.shape)
    shape[2] = capacity
    data = empty_rows(shape, rows.dtype, rows.device)
    data[:, :, : rows.shape[2]] = rows
    return data


def _address(indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the first three axes that name rows ``[B, H, n]``; indexing so moves whole rows, unlike gather()."""
    batch, heads, _ = indices.shape
    sequence = torch.arange(batch, device=indices.device)[:, None, None]
    head = torch.arange(heads, device=indices.device)[:, None]
    return sequence, head, indices


def gather_rows(data: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` ``[B, H, n]`` of ``data`` ``[B, H, S, ...]``: ``[B, H, n, ...]``."""
    return data[_address(indices)]


def swap_remove(buffer: GrowingBuffer, indices: Tensor) -> None:
    """Remove e rows ``[B, H, e]`` by moving the last rows into their places, whatever the length of the buffer.

    The same indices applied to several buffers of equal length leave them aligned.
    """
    count, data = indices.shape[2], buffer.view()
    first = data.shape[2] - count  # of the last e rows, which go
    tail = torch.arange(first, data.shape[2], device=data.device)
    survives = (tail[:, None] != indices[:, :, None, :]).all(-1)  # [B, H, e]: last rows that are not removed themselves
    # As many survivors as holes before the tail; the rest of both move onto themselves.
    source = first + survives.int().argsort(dim=2, descending=True, stable=True)
    holes = indices.masked_fill(indices >= first, data.shape[2]).sort(dim=2).values
    target = torch.where(holes < data.shape[2], holes, source)
    data[_address(target)] = gather_rows(data, source)
    buffer.truncate(first)
