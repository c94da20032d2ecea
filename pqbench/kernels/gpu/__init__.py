"""The GPU backend: the operations of :class:`pqbench.kernels.backend.Kernels` in Triton, on the current CUDA stream.

``merge_lists`` and ``find_rows`` are those of the reference backend.

Arguments and shapes are those of :mod:`pqbench.kernels.reference`. Each module holds the kernels of one topic and the
functions that launch them. The modules can be imported wherever Triton is installed; their functions need tensors on a
GPU, or Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

from pqbench.kernels.gpu.attention import attention, dense_attention
from pqbench.kernels.gpu.blocks import admit_blocks, copy_blocks, vacate_rows
from pqbench.kernels.gpu.cells import best_of_cells
from pqbench.kernels.gpu.columns import column_sums
from pqbench.kernels.gpu.fetch import append_rows, fetch_rows
from pqbench.kernels.gpu.kmeans import encode, train_codebook
from pqbench.kernels.gpu.noise import noise
from pqbench.kernels.gpu.rows import copy, gather
from pqbench.kernels.gpu.scoring import exact_probabilities, pq_probabilities
from pqbench.kernels.gpu.select import pq_select
from pqbench.kernels.gpu.top_k import top_k
from pqbench.kernels.reference.cells import merge_lists
from pqbench.kernels.reference.rows import find_rows

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
]


def warm_up() -> float:
    """Does nothing, because Triton compiles a kernel for the shapes of its first launch. Returns 0."""
    return 0.0


def use_threads(count: int) -> None:
    """Does nothing, because the GPU does the work."""
