"""Number of cores, and the threads of background work."""

from __future__ import annotations

import os

import torch
from threadpoolctl import threadpool_limits


def usable_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stay_alone() -> None:
    """Make torch's operations in the calling thread use only this thread; other threads are not affected.

    Otherwise every background thread starts its own OpenMP team, whose members wait actively on the cores that the
    model needs.
    """
    torch.get_num_threads()  # torch sets the number at a thread's first use; later that would undo the limit
    threadpool_limits(1, user_api="openmp")
