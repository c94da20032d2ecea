"""A tensor that grows along its token axis in amortised constant time, and row operations on it."""

from __future__ import annotations

import torch
from torch import Tensor


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

    def append(self, rows: Tensor) -> None:
        """Add ``rows`` ``[B, H, n, ...]`` at the end."""
        needed = self._length + rows.shape[2]
        if needed > self._data.shape[2]:
            self._data = _allocate(self.view(), needed + max(self._slack, self._length // 2))
        self._data[:, :, self._length : needed] = rows
        self._length = needed

    def truncate(self, length: int) -> None:
        """Forget all rows from ``length`` on."""
        self._length = min(self._length, length)


def _allocate(rows: Tensor, capacity: int) -> Tensor:
    shape = list(rows.shape)
    shape[2] = capacity
    data = torch.empty(shape, dtype=rows.dtype, device=rows.device)
    data[:, :, : rows.shape[2]] = rows
    return data


def expand_like(indices: Tensor, data: Tensor) -> Tensor:
    """``indices`` ``[B, H, n]`` repeated over the trailing axes of ``data`` ``[B, H, S, ...]``, for gather and scatter."""
    trailing = data.shape[3:]
    return indices.reshape(*indices.shape, *(1 for _ in trailing)).expand(*indices.shape, *trailing)


def gather_rows(data: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` ``[B, H, n]`` of ``data`` ``[B, H, S, ...]``: ``[B, H, n, ...]``."""
    return data.gather(2, expand_like(indices, data))


def swap_remove(buffer: GrowingBuffer, indices: Tensor) -> None:
    """Remove rows ``[B, H, e]`` by moving the last rows into their places: O(e), whatever the length.

    The same indices applied to several buffers of equal length leave them aligned.
    """
    count, data = indices.shape[2], buffer.view()
    length = data.shape[2]
    removed = torch.zeros(*indices.shape[:2], length, dtype=torch.bool, device=data.device)
    removed.scatter_(2, indices, True)
    # Rows of the last `count` that survive, and holes before them: as many of one as of the other per head.
    tail_kept = ~removed[:, :, length - count :]  # [B, H, e]
    order = tail_kept.int().argsort(dim=2, descending=True, stable=True)  # survivors first
    source = length - count + order
    holes = indices.masked_fill(indices >= length - count, length).sort(dim=2).values  # holes before the tail first
    target = torch.where(holes < length, holes, source)  # the others move onto themselves
    moved = gather_rows(data, source)
    data.scatter_(2, expand_like(target, data), moved)
    buffer.truncate(length - count)
