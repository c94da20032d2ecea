"""What an evicting method keeps of a prompt that lies on the host: a device store of some of its rows."""

from __future__ import annotations

from torch import Tensor

from pqbench.kernels.buffers import GrowingBuffer
from pqbench.store.device import DeviceStore


class KeptRows(DeviceStore):
    """Rows that were chosen from more; owns its memory."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, seen: int) -> None:
        """Keys and values ``[B, H, n, D]`` at positions ``[B, H, n]``, of ``seen`` tokens."""
        super().__init__(GrowingBuffer(keys), GrowingBuffer(values))
        self._positions = GrowingBuffer(positions)
        self._seen = seen
        self.opening_bytes = keys.nbytes + values.nbytes
