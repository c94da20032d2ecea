"""Holds host memory that a device still reads or writes.

Torch reuses page-locked memory when no tensor refers to it and torch's own copies are done. It does not know that a
kernel reads such memory, so the code that launched the kernel must hold the memory until the kernel is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Mark(Protocol):
    """A point in the queue of a device, such as a CUDA event."""

    def query(self) -> bool:
        """Whether all work before this point is done."""

    def synchronize(self) -> None:
        """Wait until all work before this point is done."""


class Held:
    """Buffers that are held until all their marks have passed; usable from any thread."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Sequence[Mark], Sequence[Tensor]]] = deque()

    def hold(self, buffers: Sequence[Tensor], marks: Sequence[Mark]) -> None:
        """Hold ``buffers`` until ``marks`` have passed, and free buffers whose marks have passed."""
        self._waiting.append((marks, buffers))
        for _ in range(len(self._waiting)):
            try:
                entry = self._waiting.popleft()
            except IndexError:  # another thread has emptied it
                return
            if not all(mark.query() for mark in entry[0]):
                self._waiting.append(entry)

    def __len__(self) -> int:
        return len(self._waiting)

    def drain(self) -> None:
        """Wait for all marks, and free all buffers."""
        while self._waiting:
            marks, _ = self._waiting.popleft()
            for mark in marks:
                mark.synchronize()
