"""The reference backend: the operations of :class:`pqbench.kernels.backend.Kernels` in plain torch, and their parts. It
defines all results; the other backends are tested against it.
"""

from __future__ import annotations

from pqbench.kernels.reference.blocks import admit_blocks
from pqbench.kernels.reference.cells import best_of_cells, merge_lists
from pqbench.kernels.reference.noise import noise
from pqbench.kernels.reference.operations import (
    CODE,
    assign,
    attention,
    column_sums,
    dense_attention,
    draw,
    encode,
    exact_probabilities,
    gather,
    group_probabilities,
    kmeans,
    lloyd,
    merge,
    pq_probabilities,
    pq_scores,
    pq_select,
    rotate,
    subspaces,
    top_k,
    train_codebook,
    update,
    use_threads,
    warm_up,
)
from pqbench.kernels.reference.rows import Found, append_rows, copy, copy_blocks, fetch_rows, find_rows, vacate_rows

__all__ = [
    "CODE",
    "Found",
    "admit_blocks",
    "append_rows",
    "assign",
    "attention",
    "best_of_cells",
    "column_sums",
    "copy",
    "copy_blocks",
    "dense_attention",
    "draw",
    "encode",
    "exact_probabilities",
    "fetch_rows",
    "find_rows",
    "gather",
    "group_probabilities",
    "kmeans",
    "lloyd",
    "merge",
    "merge_lists",
    "noise",
    "pq_probabilities",
    "pq_scores",
    "pq_select",
    "rotate",
    "subspaces",
    "top_k",
    "train_codebook",
    "update",
    "use_threads",
    "vacate_rows",
    "warm_up",
]
