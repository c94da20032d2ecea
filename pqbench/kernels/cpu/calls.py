"""What every call of a compiled kernel needs: addresses, strides, and a suitable number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numba
import torch
from torch import Tensor

_SMALL_WORK = 1 << 17  # multiplications; for fewer, waking other threads takes longer than the work
LOG2_E = 1.4426950408889634
STORED = (torch.float32, torch.bfloat16)  # types that kernels read without conversion


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """Within this context, use one thread if there is little ``work`` (multiplications), otherwise all threads."""
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
    """Whether compiled code can read ``x`` ``[..., D]`` without a copy or conversion."""
    return x.dtype in STORED and x.is_cpu and x.numel() > 0 and (x.stride(-1) == 1 or x.shape[-1] == 1)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of sequences, heads and rows in bytes."""
    size, (batch, head, row) = x.element_size(), x.stride()[:3]
    return batch * size, head * size, row * size


def address(x: Tensor | None) -> int:
    """Address of a tensor in memory; 0 for None."""
    return 0 if x is None else x.data_ptr()


def check_rows(valid: bool, x: Tensor) -> None:
    """Raises IndexError if a kernel reported (``valid`` is False) a row that ``x`` ``[B, H, S, ...]`` does not have."""
    if not valid:
        raise IndexError(f"rows must lie between 0 and {x.shape[2] - 1}")
