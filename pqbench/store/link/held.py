"""Host memory that a device still reads or writes.

Torch reuses page-locked memory once nobody holds it and the copies it knows of have passed. It cannot know that a
kernel reads such memory, so whoever launched the kernel must hold the memory until the kernel is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Mark(Protocol):
    """A place in the work of a device; a CUDA event is one."""

    def query(self) -> bool:
        """Whether all work before it is done."""

    def synchronize(self) -> None:
        """Wait for that."""


class Held:
    """Buffers, each held until all its marks have been passed, from any thread."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Sequence[Mark], Sequence[Tensor]]] = deque()

    def hold(self, buffers: Sequence[Tensor], marks: Sequence[Mark]) -> None:
        """Hold ``buffers`` until ``marks`` are passed, and let go what need not be held any more."""
        self._waiting.append((marks, buffers))
        for _ in range(len(self._waiting)):
            try:
                entry = self._waiting.popleft()
            except IndexError:  # another thread was faster
                return
            if not all(mark.query() for mark in entry[0]):
                self._waiting.append(entry)

    def __len__(self) -> int:
        return len(self._waiting)

    def drain(self) -> None:
        """Wait for all marks, and let everything go."""
        while self._waiting:
            marks, _ = self._waiting.popleft()
            for mark in marks:
                mark.synchronize()
