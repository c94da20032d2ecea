"""The backend for the CPU: the operations of :class:`pqbench.kernels.backend.Kernels`, compiled by Numba. Copying of
tensors is the reference's.
"""

from __future__ import annotations

from pqbench.kernels.cpu.operations import (
    admit_blocks,
    attention,
    best_of_cells,
    column_sums,
    dense_attention,
    encode,
    exact_probabilities,
    find_rows,
    gather,
    merge_lists,
    noise,
    pq_probabilities,
    pq_select,
    top_k,
    train_codebook,
    use_threads,
    warm_up,
)
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
