"""The CPU backend: the operations of :class:`pqbench.kernels.backend.Kernels`, compiled by Numba.

Operations that only copy tensors are those of the reference backend.
"""

from __future__ import annotations

from pqbench.kernels.cpu.operations_attention import attention, dense_attention, exact_probabilities
from pqbench.kernels.cpu.operations_index import column_sums, encode, train_codebook
from pqbench.kernels.cpu.operations_rows import admit_blocks, find_rows, gather
from pqbench.kernels.cpu.operations_search import (
    best_of_cells,
    merge_lists,
    noise,
    pq_probabilities,
    pq_select,
    top_k,
)
from pqbench.kernels.cpu.threads import use_threads, warm_up
from pqbench.kernels.reference.rows import append_rows, copy, copy_blocks, fetch_rows, vacate_rows

__all__ = [
    "admit_blocks",
    "append_rows",
    "attention",
    "best_of_cells",
    "column_sums",
    "copy",
    "copy_blocks",
    "dense_attention",
    "encode",
    "exact_probabilities",
    "fetch_rows",
    "find_rows",
    "gather",
    "merge_lists",
    "noise",
    "pq_probabilities",
    "pq_select",
    "top_k",
    "train_codebook",
    "use_threads",
    "vacate_rows",
    "warm_up",
]
