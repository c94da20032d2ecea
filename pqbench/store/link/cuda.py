"""A link to a CUDA device: one stream per direction, ordered by events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pqbench.errors import ConfigError
from pqbench.kernels.backend import Kernels, kernels
from pqbench.kernels.buffers import gather_rows
from pqbench.store.link.base import Copy, Direction, Link, Meters, Transfer
from pqbench.store.link.held import Held

_PIECE = 1 << 18  # bytes; launching a smaller copy takes longer than the copy itself


class CudaTransfer(Transfer):
    """A transfer that is done when its event has passed. Waiting for bytes on the device makes the current stream wait
    and returns at once. Waiting for bytes on the host blocks the caller, because host code will read them."""

    def __init__(self, meters: Meters, event: Any, direction: Direction, device: torch.device, direct: bool) -> None:
        super().__init__(meters)
        self._event, self._direction, self._device, self._direct = event, direction, device, direct

    @property
    def done(self) -> bool:
        return bool(self._event.query())

    def order(self) -> None:
        if self._direct:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        else:  # the CPU gathers rows, so it must wait itself
            self.wait()

    def _finish(self) -> None:
        if self._direction is Direction.TO_HOST:
            self._event.synchronize()
        else:
            torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaLink(Link):
    """Page-locked host rows, and one side stream per direction.

    If the GPU backend is available, its kernels read and write page-locked memory directly, for selected rows and for
    copies that consist of small pieces. Otherwise the CPU gathers rows into a page-locked buffer, which is then copied.

    Host memory of a transfer is held until the event of the transfer has passed, because torch does not know which
    kernels read it. Other code that launches such kernels calls :meth:`reads`; buffers that it releases are held until
    its streams have finished their work so far. :meth:`close` waits for that.

    Raises:
        ConfigError: there is no CUDA device.
    """

    label = "cuda"
    pinned = True

    def __init__(self, device: torch.device, backend: str = "auto", debug: bool = False) -> None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise ConfigError("store.link=cuda, but no CUDA device is available here: use store.link=local")
        super().__init__(debug)
        self._device = device
        self._streams = {direction: torch.cuda.Stream(device) for direction in Direction}
        self._backend = _kernels(device, backend)
        self.direct = self._backend is not None
        self._readers: dict[int, torch.cuda.Stream] = {}
        self._held = Held()

    def reads(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        self._readers[stream.cuda_stream] = stream

    def release(self, buffers: Sequence[Tensor]) -> None:
        streams = [*self._streams.values(), *self._readers.values()]
        self._held.hold(list(buffers), [stream.record_event() for stream in streams])

    def close(self) -> None:
        self._held.drain()
        super().close()

    def _start(self, copies: Sequence[Copy], direction: Direction, size: int, urgent: bool) -> Transfer:
        buffers = [tensor for copy in copies for tensor in (copy.source, copy.target, copy.rows) if tensor is not None]

        def move() -> None:
            for copy in copies:
                self._move(copy)

        return self._queue(move, direction, buffers)

    def _launch(self, work: Callable[[], None], direction: Direction, uses: Sequence[Tensor]) -> Transfer:
        return self._queue(work, direction, uses)

    def _queue(self, work: Callable[[], None], direction: Direction, buffers: Sequence[Tensor]) -> Transfer:
        """Queue ``work`` on the stream of a direction; ``buffers`` are the tensors that it uses."""
        stream = self._streams[direction]
        # Runs after the queued work that writes the source or still reads the target.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            work()
            for tensor in buffers:
                if tensor.is_cuda:
                    tensor.record_stream(stream)  # so that its memory is not reused before this stream is done
            event = torch.cuda.Event()
            event.record(stream)
        if buffers:
            self._held.hold([tensor for tensor in buffers if not tensor.is_cuda], [event])
        return CudaTransfer(self.meters, event, direction, self._device, self.direct)

    def _move(self, copy: Copy) -> None:
        if copy.rows is None:
            _copy(copy.source, copy.target, self._backend)
        elif self._backend is not None and copy.source.is_pinned():
            # Page-locked memory has a device address under unified addressing, so a kernel can read it.
            self._backend.gather(copy.source, copy.rows.to(self._device), copy.target)
        else:
            rows = gather_rows(copy.source, copy.rows.cpu())
            _copy(rows.pin_memory(), copy.target, None)  # torch frees pinned memory only after its copies


def _copy(source: Tensor, target: Tensor, backend: Kernels | None) -> None:
    """Queue a copy. Torch would copy strided tensors through pageable memory and block. They are therefore copied in
    dense pieces, or by one kernel if these pieces are small."""
    if source.dim() <= 1 or (source.is_contiguous() and target.is_contiguous()):
        target.copy_(source, non_blocking=True)
        return
    reachable = all(tensor.is_cuda or tensor.is_pinned() for tensor in (source, target))
    if backend is not None and reachable and source.dim() >= 4 and _dense_bytes(source, target) < _PIECE:
        backend.copy(source, target)
        return
    for part, place in zip(source, target, strict=True):
        _copy(part, place, backend)


def _dense_bytes(*tensors: Tensor) -> int:
    """Bytes of the largest pieces that are dense in all of these tensors, which have equal shapes."""
    size = 1
    for axis in reversed(range(tensors[0].dim())):
        if any(tensor.shape[axis] > 1 and tensor.stride(axis) != size for tensor in tensors):
            break
        size *= tensors[0].shape[axis]
    return size * tensors[0].element_size()


def _kernels(device: torch.device, backend: str) -> Kernels | None:
    """The kernels that read page-locked memory from the device; None if there are none."""
    if backend not in ("auto", "gpu"):
        return None
    try:
        return kernels(device, "gpu")
    except ImportError:
        return None
