"""The selection of a step on a GPU."""

from __future__ import annotations

from torch import Tensor

from pqbench.kernels.backend import Number
from pqbench.kernels.gpu_rows import top_k as best_rows
from pqbench.kernels.gpu_scoring import pq_probabilities
from pqbench.kernels.reference_select import check_room, lay_out


def pq_select(
    q: Tensor, codebook: Tensor, codes: Tensor, scaling: float, sink: Number, top_k: Number, length: Number,
    middle: Number, room: int, only: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See :func:`pqbench.kernels.reference.pq_select`."""
    check_room(codes, sink, top_k, length, middle, room, only, out)
    best = best_rows(pq_probabilities(q, codebook, codes[:, :, : int(middle)], scaling), int(top_k))
    return lay_out(best, int(sink), int(length), int(middle), room, only, out)
