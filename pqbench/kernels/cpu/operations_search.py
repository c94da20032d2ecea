"""Selecting tokens on the CPU, by codes or by lists of cells; see :mod:`pqbench.kernels.reference`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pqbench.kernels import reference
from pqbench.kernels.cpu.calls import LOG2_E, strides, threads_for
from pqbench.kernels.cpu.cells import merge, search
from pqbench.kernels.cpu.noise import fill_noise
from pqbench.kernels.cpu.scoring import probabilities
from pqbench.kernels.cpu.top_k import top_of_rows
from pqbench.kernels.number import Number
from pqbench.kernels.reference.select import check_room, lay_out


def pq_probabilities(q: Tensor, codebook: Tensor, codes: Tensor, scaling: float) -> Tensor:
    """Softmax of approximate scores per query head, summed over the query group: float32 ``[B, H, S]``."""
    batch, heads, group, dims = q.shape
    _, _, parts, clusters, _ = codebook.shape
    count = codes.shape[2]
    if q.device.type != "cpu" or count == 0 or (parts > 1 and codes.stride(3) != 1) or codes.dtype != reference.CODE:
        return reference.pq_probabilities(q, codebook, codes, scaling)
    queries = (q.float() * (scaling * LOG2_E)).contiguous()
    centroids = codebook.float().contiguous()
    output = torch.empty(batch, heads, count, dtype=torch.float32)
    with threads_for(batch * heads * group * (count * parts + clusters * dims)):
        probabilities(
            queries.data_ptr(),
            centroids.data_ptr(),
            codes.data_ptr(),
            *strides(codes),
            output.data_ptr(),
            batch,
            heads,
            group,
            count,
            dims,
            parts,
            clusters,
        )
    return output


def pq_select(
    q: Tensor,
    codebook: Tensor,
    codes: Tensor,
    scaling: float,
    sink: Number,
    top_k: Number,
    length: Number,
    middle: Number,
    room: int,
    only: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Selection int64 ``[B, H, room]`` of sinks, the ``top_k`` middle tokens with the largest approximate attention,
    and window; see :func:`pqbench.kernels.reference.pq_select`."""
    check_room(codes, sink, top_k, length, middle, room, only, out)
    best = _best_of_codes(q, codebook, codes[:, :, : int(middle)], scaling, int(top_k))
    return lay_out(best, int(sink), int(length), int(middle), room, only, out)


def _best_of_codes(q: Tensor, codebook: Tensor, codes: Tensor, scaling: float, wanted: int) -> Tensor:
    return top_k(pq_probabilities(q, codebook, codes, scaling), wanted)


def best_of_cells(
    q: Tensor, codebook: Tensor, starts: Tensor, tokens: Tensor, pending: Tensor, wanted: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """The best tokens int64 ``[B, H, wanted]``, found in lists by cell, and the log-weight ``[B, H, G]`` of the others;
    see :func:`pqbench.kernels.reference.cells.best_of_cells`."""
    batch, heads, group, _ = q.shape
    _, _, parts, clusters, width = codebook.shape
    lists = [part.contiguous() for part in (starts, tokens, pending)]
    wanted = min(wanted, tokens.shape[2] + pending.shape[2])
    if q.device.type != "cpu" or any(part.dtype != torch.int32 for part in lists) or wanted == 0:
        return reference.best_of_cells(q, codebook, starts, tokens, pending, wanted, scaling)
    queries = (q.float() * (scaling * LOG2_E)).contiguous()
    centroids = codebook.float().contiguous()
    found = torch.empty(batch, heads, wanted, dtype=torch.int64)
    log_weight = torch.empty(batch, heads, group, dtype=torch.float32)
    with threads_for(batch * heads * group * clusters**parts * 64):
        search(
            queries.data_ptr(),
            centroids.data_ptr(),
            *(part.data_ptr() for part in lists),
            found.data_ptr(),
            log_weight.data_ptr(),
            batch * heads,
            group,
            parts,
            clusters,
            width,
            tokens.shape[2],
            pending.shape[2],
            wanted,
        )
    return found, log_weight


def merge_lists(starts: Tensor, tokens: Tensor, pending: Tensor) -> tuple[Tensor, Tensor]:
    """Lists by cell, ``starts`` ``[B, H, C + 1]`` and ``tokens`` ``[B, H, N + P]``, after the pending tokens were added
    at their ends."""
    lists = [part.contiguous() for part in (starts, tokens, pending)]
    if starts.device.type != "cpu" or any(part.dtype != torch.int32 for part in lists):
        return reference.merge_lists(starts, tokens, pending)
    batch, heads, bounds = starts.shape
    begins = torch.empty_like(lists[0])
    merged = torch.empty(batch, heads, tokens.shape[2] + pending.shape[2], dtype=torch.int32)
    with threads_for(batch * heads * (merged.shape[2] + bounds)):
        merge(
            *(part.data_ptr() for part in lists),
            begins.data_ptr(),
            merged.data_ptr(),
            batch * heads,
            bounds - 1,
            tokens.shape[2],
            pending.shape[2],
        )
    return begins, merged


def top_k(scores: Tensor, count: int) -> Tensor:
    """Indices ``[..., k]`` of the largest scores ``[..., S]``; see :func:`pqbench.kernels.reference.top_k`."""
    total = scores.shape[-1]
    if scores.dtype != torch.float32 or scores.device.type != "cpu" or not 0 < count < total or scores.numel() == 0:
        return reference.top_k(scores, count)
    lines = scores.contiguous()
    chosen = torch.empty(*scores.shape[:-1], count, dtype=torch.int64)
    with threads_for(scores.numel() * 4):
        top_of_rows(lines.data_ptr(), scores.numel() // total, total, count, chosen.data_ptr())
    return chosen


def noise(heads: int, tokens: int, seed: int, device: torch.device) -> Tensor:
    """Random numbers int32 ``[H, S]``; see :func:`pqbench.kernels.reference.noise.noise`."""
    if device.type != "cpu":
        return reference.noise(heads, tokens, seed, device)
    numbers = np.empty((heads, tokens), dtype=np.int32)
    fill_noise(numbers, seed & 0xFFFFFFFF, seed >> 32)
    return torch.from_numpy(numbers)
