"""Codes that are kept in host memory and brought to the device in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.buffers import GrowingBuffer
from pqbench.method import KV, Arrival


class HostCodes:
    """Codes uint8 ``[B, H, N, m]``. Codes of the prompt are in host memory. For a model on a GPU it is page-locked, so
    that the host never waits for their transfers. Codes of later tokens stay on the device, where they are computed:
    they are small, one byte per sub-space, and moving them to the host would take an extra transfer in every step."""

    def __init__(self, codes: Tensor) -> None:
        """Move codes ``[B, H, N, m]`` from the device to the host."""
        # The copy need not be waited for: only transfers read it, and the device runs them after this one. A copy
        # from a tensor that is not dense would block.
        self._settled = torch.empty(codes.shape, dtype=codes.dtype, pin_memory=codes.is_cuda)
        self._settled.copy_(codes.contiguous(), non_blocking=True)
        self._joined = GrowingBuffer(codes[:, :, :0])

    def __len__(self) -> int:
        return self._settled.shape[2] + len(self._joined)

    @property
    def bytes(self) -> int:
        """Bytes of all codes."""
        return self._settled.nbytes + self._joined.bytes

    def ask(self, kv: KV) -> Arrival:
        """Start to bring the prompt's codes to the device; the caller does not wait."""
        return kv.bring(self._settled)

    def all(self, arrived: Tensor) -> Tensor:
        """All codes ``[B, H, N, m]`` on the device, where ``arrived`` are those of the prompt."""
        return torch.cat([arrived, self._joined.view()], dim=2) if len(self._joined) else arrived

    def append(self, codes: Tensor) -> None:
        """Add codes ``[B, H, n, m]`` on the device."""
        self._joined.append(codes)

    def view(self) -> Tensor:
        """All codes on the device. Waits for the transfer; a decode step uses :meth:`ask` and :meth:`all` instead."""
        return self.all(self._settled.to(self._joined.view().device))
