"""What every call of a compiled kernel needs: addresses, strides, and as many threads as the work is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numba
import torch
from torch import Tensor

_SMALL_WORK = 1 << 17  # multiplications or so below which waking another thread costs more than it saves
LOG2_E = 1.4426950408889634
STORED = (torch.float32, torch.bfloat16)  # types that are read as they lie


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """One thread for little work."""
    count = numba.get_num_threads()
    if work >= _SMALL_WORK or count == 1:
        yield
        return
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(count)


def fits(x: Tensor) -> bool:
    """Whether compiled code reads ``x`` ``[..., D]`` as it lies."""
    return x.dtype in STORED and x.is_cpu and x.numel() > 0 and (x.stride(-1) == 1 or x.shape[-1] == 1)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Bytes between sequences, heads and rows."""
    size, (batch, head, row) = x.element_size(), x.stride()[:3]
    return batch * size, head * size, row * size


def address(x: Tensor | None) -> int:
    """Where a tensor lies in memory, 0 for None."""
    return 0 if x is None else x.data_ptr()


def check_rows(valid: bool, x: Tensor) -> None:
    """Raises IndexError when a kernel found a row that ``x`` ``[B, H, S, ...]`` does not have."""
    if not valid:
        raise IndexError(f"rows must lie between 0 and {x.shape[2] - 1}")
