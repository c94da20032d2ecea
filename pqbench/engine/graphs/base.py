"""What a captured graph does, whatever records it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Work = Callable[[], Tensor]


class Graph(Protocol):
    """Device work that is captured once and replayed with everything frozen but the contents of memory."""

    def rehearse(self, work: Work) -> Tensor:
        """Run the work once, uncaptured, where it will be captured: kernels are compiled and libraries opened."""

    def capture(self, work: Work) -> Tensor:
        """Capture the work and return its result, which every :meth:`replay` overwrites. Only a replay fills it."""

    def replay(self) -> None:
        """Do the captured work again, on what its tensors hold now."""
