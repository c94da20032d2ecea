"""Threads and compilation of the CPU backend."""

from __future__ import annotations

import time

import numba
import torch

from pqbench.kernels.cpu.operations_attention import attention
from pqbench.kernels.cpu.operations_index import column_sums, encode, train_codebook
from pqbench.kernels.cpu.operations_rows import admit_blocks, find_rows, gather
from pqbench.kernels.cpu.operations_search import best_of_cells, merge_lists, noise, pq_probabilities, top_k
from pqbench.kernels.reference.blocks import Residency


def use_threads(count: int) -> None:
    """Set the number of threads that this backend uses when called from the current thread. Torch's number is restored,
    because numba sets it to the number of cores when it starts its threads; both use OpenMP."""
    before = torch.get_num_threads()
    numba.set_num_threads(max(1, min(count, numba.config.NUMBA_NUM_THREADS)))
    torch.set_num_threads(before)


def warm_up() -> float:
    """Compile all kernels, or load them from numba's cache, for keys of any dtype. Returns the seconds that this
    took."""
    start = time.perf_counter()
    q, keys = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 32, 64)
    codebook, codes = train_codebook(keys, 2, 16, 1, 0)
    encode(keys, codebook)
    top = top_k(pq_probabilities(q, codebook, codes, 1.0), 16)
    lists = torch.zeros(1, 1, 257, dtype=torch.int32)
    best_of_cells(q, codebook, *merge_lists(lists, lists[:, :, :0], lists[:, :, :1]), lists[:, :, :0], 1, 1.0)
    attention(q, keys, keys, 1.0, top)
    gather(keys, top, torch.empty_like(keys[:, :, :16]))
    noise(1, 32, 0, q.device)
    find_rows(top, torch.zeros(32, dtype=torch.int64), 32)
    residency = Residency.empty(1, 1, q.device)._replace(where=torch.full((1, 1), -1))
    admit_blocks(torch.ones(1, 1, dtype=torch.int64), 1, 1, True, residency, torch.zeros(1, dtype=torch.int64))
    column_sums(q[:, :, :, None], keys, 1.0)
    return time.perf_counter() - start
