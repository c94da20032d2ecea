"""What a captured graph does, whatever records it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Work = Callable[[], Tensor]


class Graph(Protocol):
    """Device work that is captured once and then replayed. Only the contents of memory may change between replays."""

    def rehearse(self, work: Work) -> Tensor:
        """Run the work once without capturing it, so that kernels are compiled and libraries are opened."""

    def capture(self, work: Work) -> Tensor:
        """Capture the work and return the tensor of its result, which only :meth:`replay` fills, every time anew."""

    def replay(self) -> None:
        """Do the captured work again, with what its tensors hold now."""
