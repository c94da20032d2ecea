"""A device buffer for whole contexts."""

from __future__ import annotations

from torch import Tensor


class Scratch:
    """A buffer that the layers of a model share: each layer overwrites the rows that the previous one is done with."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None  # flat

    def rows(self, like: Tensor, count: int) -> Tensor:
        """``count`` rows ``[B, H, count, 2, D]`` like those of a device tensor ``[B, H, *, 2, D]``."""
        batch, heads, _, _, width = like.shape
        needed = batch * heads * count * 2 * width
        if self._buffer is None or self._buffer.dtype != like.dtype or len(self._buffer) < needed:
            self._buffer = None  # freed before the larger one is made
            self._buffer = like.new_empty(needed + needed // 8)
        return self._buffer[:needed].view(batch, heads, count, 2, width)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self._buffer is None else self._buffer.nbytes
