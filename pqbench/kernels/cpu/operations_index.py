"""Building indexes on the CPU: codebooks, codes, and the attention that keys receive from a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels import reference
from pqbench.kernels.cpu.calls import fits, strides, threads_for
from pqbench.kernels.cpu.columns import sum_columns
from pqbench.kernels.cpu.kmeans import encode_keys, train


def train_codebook(
    keys: Tensor,
    parts: int,
    clusters: int,
    iterations: int,
    seed: int,
    sample: int | None = None,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Codebook float32 ``[B, H, m, K, D/m]`` and codes uint8 ``[B, H, S, m]`` of keys ``[B, H, S, D]``.

    Computes in the calling thread and the threads of its team, without the interpreter lock (GIL).

    Raises:
        ValueError: there are fewer keys than ``clusters``.
    """
    batch, heads, count, dims = keys.shape
    if not fits(keys) or clusters > 256:
        return reference.train_codebook(keys, parts, clusters, iterations, seed, sample, tolerance)
    if count < clusters:
        raise ValueError(f"{clusters} centroids need as many keys, got {count}")
    order = reference.draw(count, seed)
    codebook = torch.empty(batch, heads, parts, clusters, dims // parts, dtype=torch.float32)
    codes = torch.empty(batch, heads, count, parts, dtype=reference.CODE)
    with threads_for(batch * heads * count * dims * clusters):
        train(
            keys.dtype == torch.bfloat16,
            keys.data_ptr(),
            *strides(keys),
            order.data_ptr(),
            codebook.data_ptr(),
            codes.data_ptr(),
            batch,
            heads,
            count,
            dims,
            parts,
            clusters,
            iterations,
            sample or 0,
            tolerance,
        )
    return codebook, codes


def encode(keys: Tensor, codebook: Tensor) -> Tensor:
    """Codes uint8 ``[B, H, S, m]`` of keys ``[B, H, S, D]`` in a codebook ``[B, H, m, K, D/m]``."""
    if not fits(keys):
        return reference.encode(keys, codebook)
    batch, heads, count, dims = keys.shape
    _, _, parts, clusters, _ = codebook.shape
    centroids = codebook.float().contiguous()
    codes = torch.empty(batch, heads, count, parts, dtype=reference.CODE)
    with threads_for(batch * heads * (count + 1) * dims * clusters):
        encode_keys(
            keys.dtype == torch.bfloat16,
            keys.data_ptr(),
            *strides(keys),
            centroids.data_ptr(),
            codes.data_ptr(),
            batch,
            heads,
            count,
            dims,
            parts,
            clusters,
        )
    return codes


def column_sums(q: Tensor, keys: Tensor, scaling: float, band: int | None = None, rows: int = 128) -> Tensor:
    """Attention that each key ``[B, H, S, D]`` received from the last queries ``[B, H, G, n, D]``, float32
    ``[B, H, S]``. Only the reference backend uses ``rows``; here tiles have a fixed size."""
    batch, heads, group, count, dims = q.shape
    total = keys.shape[2]
    if not fits(keys) or q.numel() == 0:
        return reference.column_sums(q, keys, scaling, band, rows)
    queries = q.float().contiguous()
    sums = torch.empty(batch, heads, total, dtype=torch.float32)
    with threads_for(batch * heads * group * count * total * dims):
        sum_columns(
            keys.dtype == torch.bfloat16,
            queries.data_ptr(),
            keys.data_ptr(),
            *strides(keys),
            sums.data_ptr(),
            batch,
            heads,
            group,
            count,
            total,
            dims,
            total if band is None else band,
            scaling,
        )
    return sums
