"""Codes that lie in host memory and cross the link in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels.buffers import GrowingBuffer
from pqbench.method import KV, Arrival


class HostCodes:
    """Codes uint8 ``[B, H, N, m]``. Those of the prompt lie in host memory, page-locked beside a GPU, so that the
    host does not wait in either direction. Codes of tokens that joined later stay on the device, where they are
    made: they take a byte for each sub-space, and to move them one by one would take a transfer in every step."""

    def __init__(self, codes: Tensor) -> None:
        """Take over codes ``[B, H, N, m]`` on the device."""
        # Read by transfers alone, which the device orders behind this one. Only a dense copy does not block.
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
        """Ask for the prompt's codes; they cross the link while the caller goes on."""
        return kv.bring(self._settled)

    def all(self, arrived: Tensor) -> Tensor:
        """All codes on the device, when those that were asked for have ``arrived``."""
        return torch.cat([arrived, self._joined.view()], dim=2) if len(self._joined) else arrived

    def append(self, codes: Tensor) -> None:
        """Add codes ``[B, H, n, m]`` on the device."""
        self._joined.append(codes)

    def view(self) -> Tensor:
        """All codes on the device at once, for a look at the index; a step does not use this."""
        return self.all(self._settled.to(self._joined.view().device))
