"""Numbers that a captured step reads from device memory and that the host writes before every replay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SLOTS = 4  # copies that may be in progress at once: the host may run this many steps ahead of the device


class Numbers:
    """``count`` numbers in one int32 tensor on the device. They arrive by one asynchronous copy from pinned memory. A
    slot of pinned memory is written again only after its last copy is complete."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.values = torch.zeros(count, dtype=torch.int32, device=device)
        self._pinned = device.type == "cuda"
        slots = _SLOTS if self._pinned else 1
        self._host = [torch.zeros(count, dtype=torch.int32, pin_memory=self._pinned) for _ in range(slots)]
        self._left: list[torch.cuda.Event | None] = [None] * slots
        self._next = 0

    def views(self, first: int, count: int) -> tuple[Tensor, ...]:
        """The ``count`` numbers from ``first`` on, each as a tensor with one element."""
        return tuple(self.values[i : i + 1] for i in range(first, first + count))

    def send(self, numbers: Sequence[int]) -> None:
        """Send these numbers to the device. Everything that is launched on the current stream from now on reads
        them."""
        slot, self._next = self._next, (self._next + 1) % len(self._host)
        left = self._left[slot]
        if left is not None:
            left.synchronize()
        self._host[slot].copy_(torch.tensor(numbers, dtype=torch.int32))
        self.values.copy_(self._host[slot], non_blocking=True)
        if self._pinned:
            self._left[slot] = left = torch.cuda.Event() if left is None else left
            left.record(torch.cuda.current_stream(self.values.device))
