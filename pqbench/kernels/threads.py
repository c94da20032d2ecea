"""How many threads background work takes."""

from __future__ import annotations

import os

import torch
from threadpoolctl import threadpool_limits


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stay_alone() -> None:
    """Let torch's operations in the calling thread run in that thread only; other threads keep their number.

    Otherwise every background thread opens an OpenMP team of its own, whose members wait actively on the cores that the
    model computes with.
    """
    torch.get_num_threads()  # a thread's number is set at its first use, which would undo the limit
    threadpool_limits(1, user_api="openmp")
