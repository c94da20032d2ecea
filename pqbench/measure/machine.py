"""Facts about this machine: used memory, a clock, and how fast it moves bytes."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from pqbench.records.environment import environment

COPIED = 1 << 28  # bytes of the buffer with which bandwidth is measured; far larger than any CPU cache
QUEUED = 10  # copies timed together on a GPU, because one copy takes no longer than a launch and a synchronisation


def clock(device: torch.device) -> Callable[[], float]:
    """A wall clock in seconds that first waits for everything queued on the device."""
    if device.type != "cuda":
        return time.perf_counter

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


@contextmanager
def undisturbed() -> Iterator[None]:
    """Turn off Python's garbage collection inside this context, because a collection takes milliseconds and would be
    counted as part of a step."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@cache
def device_name(device: torch.device) -> str:
    """Name of the accelerator, or of the processor."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return str(environment()["processor"])


def forget_peak(device: torch.device) -> None:
    """Reset the peaks of memory, if the system allows it: Linux lets a process reset its own peak of resident
    memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak is then that of the whole process


def peak_rss() -> int:
    """Peak bytes of resident memory of this process since :func:`forget_peak`, or since its start if the system cannot
    reset the peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device(device: torch.device) -> dict[str, int]:
    """Peak bytes of the CUDA allocator; empty for other devices."""
    if device.type != "cuda":
        return {}
    return {
        "cuda_peak_bytes": torch.cuda.max_memory_allocated(device),
        "cuda_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second that this process can move on this machine. Times are compared with this upper limit.

    Attributes:
        copy: rate of a large contiguous copy, counting bytes read and bytes written.
        read: rate of the same copy, counting only bytes read (half of ``copy``).
        gather: rate of copying rows of ``row_bytes`` from random places of a large buffer, counting bytes read and
            written.
    """

    copy: float
    read: float
    gather: float

    def facts(self) -> dict[str, float]:
        """The rates in GB/s, for a record."""
        names = {"copy": "copy_bandwidth_gbps", "read": "copy_read_gbps", "gather": "gather_bandwidth_gbps"}
        return {names[name]: value / 1e9 for name, value in asdict(self).items()}


@torch.inference_mode()
def bandwidth(device: torch.device, row_bytes: int = 512, size: int | None = None, repeats: int = 5) -> Bandwidth:
    """Measure the bandwidth with buffers of ``size`` bytes: the fastest of ``repeats`` runs after one warm-up run."""
    size = COPIED if size is None else size
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = _fastest(lambda: target.copy_(source), device, repeats)
    width = max(1, row_bytes // 4)
    table = source[: len(source) // width * width].view(-1, width)
    rows = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))[: max(1, len(table) // 4)].to(device)
    gathered = target[: len(rows) * width].view(-1, width)
    gathering = _fastest(lambda: torch.index_select(table, 0, rows, out=gathered), device, repeats)
    copied = source.nbytes / seconds
    return Bandwidth(2 * copied, copied, 2 * gathered.nbytes / gathering)


def _fastest(run: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    now, times = clock(device), []
    count = 1 if device.type == "cpu" else QUEUED
    for _ in range(repeats + 1):
        began = now()
        for _ in range(count):
            run()
        times.append((now() - began) / count)
    return min(times[1:])


class Sweeper:
    """Overwrites a buffer, so that CPU caches no longer hold data of the previous timed step when the next step begins.
    In a model, the other layers have the same effect."""

    def __init__(self, megabytes: int, device: torch.device) -> None:
        self._buffer = torch.zeros(megabytes * (1 << 20) // 4, device=device)

    def sweep(self) -> None:
        """Write every byte once."""
        if len(self._buffer):
            self._buffer.add_(1.0)


def spread(name: str, values: Sequence[float], digits: int = 9) -> dict[str, float]:
    """The median of some seconds as ``<name>_s``, and ``<name>_p10_s``, ``<name>_p90_s`` and ``<name>_min_s``."""
    low, high = np.percentile(values, [10, 90])
    figures = {"": median(values), "_p10": low, "_p90": high, "_min": min(values)}
    return {f"{name}{suffix}_s": round(float(value), digits) for suffix, value in figures.items()}
