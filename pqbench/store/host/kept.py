"""A device store with the rows that an evicting method keeps of a prompt on the host."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.buffers import GrowingBuffer
from pqbench.store.device import DeviceStore
from pqbench.store.host.rows import HostRows
from pqbench.store.link.base import Direction


class KeptRows(DeviceStore):
    """A device store of kept rows; it shares no memory."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, seen: int, moved: int | None = None) -> None:
        """Keys and values ``[B, H, n, D]`` at positions ``[B, H, n]`` of a context of ``seen`` tokens. ``moved`` is the
        number of bytes that crossed a link; None for all."""
        rows = GrowingBuffer(keys), GrowingBuffer(values)
        super().__init__(*rows, positions=GrowingBuffer(positions), seen=seen)
        self.usage.opening_bytes = keys.nbytes + values.nbytes if moved is None else moved

    @classmethod
    def fetched(cls, host: HostRows, indices: Tensor, seen: int) -> KeptRows:
        """Fetch rows ``indices`` ``[B, H, n]`` of ``seen`` tokens on the host over the link."""
        batch, heads, halves, width = host.shape
        count = indices.shape[2]
        owners = torch.arange(batch * heads, device=indices.device).repeat_interleave(count)
        rows = torch.empty(batch * heads * count, halves, width, dtype=host.dtype, device=host.device)
        copies, order = host.gather(owners, indices.reshape(-1), rows)
        host.link.submit(copies, Direction.TO_DEVICE, "kept rows", urgent=True).wait()
        if order is not None:
            rows = rows[order.argsort()]
        rows = rows.view(batch, heads, count, halves, width)
        return cls(rows[..., 0, :], rows[..., 1, :], indices, seen)
