"""The interface of a captured graph, whatever records it."""

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
        """Capture the work and return the tensor of its result. Only :meth:`replay` fills this tensor, and each replay
        overwrites it."""

    def replay(self) -> None:
        """Do the captured work again with the present contents of its tensors."""
