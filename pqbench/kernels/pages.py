"""Memory for rows that are read at random places: in huge pages where the system has them.

With pages of 4 KiB every selected row of a long context costs a walk through page tables that no cache holds: of 131072
bfloat16 rows, 1024 per head took 1.5 times as long.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

_HUGE = 2 << 20  # bytes of a huge page
_LEAST = 8 << 20  # bytes; address translation keeps up with less


def empty_rows(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; in huge pages where it is large, on the CPU of a system that has them."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: small pages serve as well, slower
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping until the last view of it is gone
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + size].view(dtype).view(tuple(shape))
