"""Memory in huge pages, for rows that are read at random places.

With pages of 4 KiB, every selected row of a long context needs a walk through page tables that are in no cache. Reading
1024 of 131072 bfloat16 rows per head took 1.5 times as long as with huge pages.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

_HUGE = 2 << 20  # bytes of a huge page
_LEAST = 8 << 20  # bytes; smaller tensors gain nothing


def empty_rows(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory of this shape; large tensors on the CPU are in huge pages if the system has them."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # the system has none: small pages are slower but work
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the mapping until the last view of it is gone
    start = -whole.data_ptr() % _HUGE
    return whole[start : start + size].view(dtype).view(tuple(shape))
