"""A link to a CUDA device: a stream per direction, ordered by events.

Never run where it was written: no such device was at hand. What it relies on is said beside each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pqbench.errors import ConfigError
from pqbench.kernels.backend import Kernels, kernels
from pqbench.kernels.buffers import gather_rows
from pqbench.store.link import Copy, Direction, Link, Meters, Transfer


class CudaTransfer(Transfer):
    """Done when its event is. A wait for bytes on the device orders the current stream and returns at once; a wait for
    bytes on the host blocks the caller, since host code is about to read them."""

    def __init__(self, meters: Meters, event: Any, direction: Direction, device: torch.device) -> None:
        super().__init__(meters)
        self._event, self._direction, self._device = event, direction, device

    @property
    def done(self) -> bool:
        return bool(self._event.query())

    def _finish(self) -> None:
        if self._direction is Direction.TO_HOST:
            self._event.synchronize()
        else:
            torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaLink(Link):
    """Page-locked host rows and a side stream per direction.

    Rows are gathered by the device's own kernel reading page-locked memory, where there is one, else by the CPU into a
    page-locked buffer that is then copied.

    Raises:
        ConfigError: no CUDA device.
    """

    label = "cuda"
    pinned = True

    def __init__(self, device: torch.device, body: str = "auto", debug: bool = False) -> None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise ConfigError("store.link=cuda, but no CUDA device is available here: use store.link=local")
        super().__init__(debug)
        self._device = device
        self._streams = {direction: torch.cuda.Stream(device) for direction in Direction}
        self._body = _gatherer(device, body)

    def _start(self, copies: Sequence[Copy], direction: Direction, size: int, urgent: bool) -> Transfer:
        stream = self._streams[direction]
        # After all that is queued: what writes the source, and what still reads the target.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for copy in copies:
                self._move(copy)
                for tensor in (copy.source, copy.target, copy.rows):
                    if tensor is not None and tensor.is_cuda:
                        tensor.record_stream(stream)  # its memory is not reused before this stream is through
            event = torch.cuda.Event()
            event.record(stream)
        return CudaTransfer(self.meters, event, direction, self._device)

    def _move(self, copy: Copy) -> None:
        if copy.rows is None:
            _copy(copy.source, copy.target)
        elif self._body is not None and copy.source.is_pinned():
            # Page-locked memory has a device address under unified addressing, so a kernel can read it.
            self._body.gather(copy.source, copy.rows.to(self._device), copy.target)
        else:
            rows = gather_rows(copy.source, copy.rows.cpu())
            _copy(rows.pin_memory(), copy.target)  # freed pinned blocks wait for their copies in the host allocator


def _copy(source: Tensor, target: Tensor) -> None:
    """Queue a copy. One of strided tensors would go through pageable memory and block: it is cut into dense pieces."""
    if source.dim() <= 1 or (source.is_contiguous() and target.is_contiguous()):
        target.copy_(source, non_blocking=True)
        return
    for part, place in zip(source, target, strict=True):
        _copy(part, place)


def _gatherer(device: torch.device, body: str) -> Kernels | None:
    """The kernels that read page-locked memory from the device; None where plain torch or nothing else is there."""
    if body not in ("auto", "gpu"):
        return None
    try:
        return kernels(device, "gpu")
    except ImportError:
        return None
