"""Triton: K-Means per head and sub-space. Initial rows and empty clusters are handled as in the reference backend.

The host never waits for the GPU. All iterations are launched for every problem; the GPU itself decides whether a
problem has converged, and its further kernels then return at once. The rows that are drawn on the host are copied from
page-locked memory. Sums have a fixed order, so results do not depend on timing.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqbench.kernels.gpu.launch import (
    blocks,
    chunk_for,
    dense_rows,
    on,
    options,
    outer,
    power,
    precision_for,
    product,
    rows_of,
    split,
    upload,
)
from pqbench.kernels.reference import CODE, draw

_POINTS = 64  # points of a tile
_CLUSTERS = 64


@triton.jit(do_not_specialize=["point_batch", "point_head", "count"])
def assign(
    points: tl.tensor,
    centroids: tl.tensor,
    codes: tl.tensor,
    active: tl.tensor,
    moved: tl.tensor,
    point_batch: tl.tensor,
    point_head: tl.tensor,
    point_row: tl.tensor,
    heads: tl.tensor,
    count: tl.tensor,
    clusters: tl.tensor,
    unit: tl.constexpr,
    parts: tl.constexpr,
    width: tl.constexpr,
    chunk: tl.constexpr,
    precision: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
) -> None:
    """Nearest centroid (of equally near ones, the lowest index) of a block of one problem's points: codes
    ``[B*H, N, m]``.

    ``points`` ``[B, H, N, D]`` contain m problems, ``centroids`` are ``[B*H*m, K, D/m]``. A problem whose ``active``
    ``[B*H*m]`` is 0 keeps its codes. The number of codes that changed is added to ``moved`` ``[B*H*m]``. Both may be
    None.
    """
    problem = tl.program_id(1)
    live = 1
    if active is not None:
        live = tl.load(active + problem)
    if live != 0:
        pair, part = problem // parts, problem % parts
        n = tl.program_id(0) * block_n + tl.arange(0, block_n)
        rows = rows_of(points, (point_batch, point_head), pair, heads, unit) + part * width + n.to(tl.int64) * point_row
        best, code = tl.full([block_n], float("-inf"), tl.float32), tl.zeros([block_n], tl.int32)
        for start in range(0, clusters, block_k):
            k = start + tl.arange(0, block_k)
            own = centroids + (problem.to(tl.int64) * clusters + k) * width
            score, norm = tl.zeros([block_n, block_k], tl.float32), tl.zeros([block_k], tl.float32)
            for first_w in range(0, width, chunk):
                w = first_w + tl.arange(0, chunk)
                inside = (n < count)[:, None] & (w < width)[None, :]
                point = tl.load(rows[:, None] + w[None, :], mask=inside, other=0.0)
                held = (k < clusters)[:, None] & (w < width)[None, :]
                centroid = tl.load(own[:, None] + w[None, :], mask=held, other=0.0)
                score += product(point, tl.trans(centroid), precision)
                norm += tl.sum(centroid * centroid, 1)
            score = tl.where((k < clusters)[None, :], score - 0.5 * norm[None, :], float("-inf"))  # nearest: largest
            value, index = tl.max(score, 1, return_indices=True)
            better = value > best  # of equal scores, the lower index stays
            best, code = tl.where(better, value, best), tl.where(better, start + index, code)
        cell = (pair.to(tl.int64) * count + n) * parts + part
        if moved is not None:
            before = tl.load(codes + cell, mask=n < count, other=0).to(tl.int32)
            changed = tl.sum(tl.where((n < count) & (before != code), 1, 0), 0)
            tl.atomic_add(moved + problem, changed)  # integers: the order does not matter
        tl.store(codes + cell, code.to(tl.uint8), mask=n < count)


@triton.jit(do_not_specialize=["point_batch", "point_head", "count", "size"])
def sum_clusters(
    points: tl.tensor,
    codes: tl.tensor,
    active: tl.tensor,
    sums: tl.tensor,
    sizes: tl.tensor,
    point_batch: tl.tensor,
    point_head: tl.tensor,
    point_row: tl.tensor,
    heads: tl.tensor,
    count: tl.tensor,
    size: tl.tensor,
    clusters: tl.tensor,
    unit: tl.constexpr,
    parts: tl.constexpr,
    width: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    block_w: tl.constexpr,
    precision: tl.constexpr,
) -> None:
    """Sums ``[B*H*m, pieces, K, D/m]`` and sizes ``[B*H*m, pieces, K]`` of a block of clusters over one piece of the
    points. They are computed as a product with the one-hot matrix of the codes, without atomic additions."""
    number, problem = tl.program_id(0), tl.program_id(2)
    if tl.load(active + problem) != 0:
        pair, part = problem // parts, problem % parts
        k, w = tl.program_id(1) * block_k + tl.arange(0, block_k), tl.arange(0, block_w)
        first = rows_of(points, (point_batch, point_head), pair, heads, unit) + part * width
        total, members = tl.zeros([block_k, block_w], tl.float32), tl.zeros([block_k], tl.float32)
        stop = tl.minimum(count, (number + 1) * size)
        for start in range(number * size, stop, block_n):
            n = start + tl.arange(0, block_n)
            code = tl.load(codes + (pair.to(tl.int64) * count + n) * parts + part, mask=n < stop, other=0).to(tl.int32)
            inside = (n < stop)[:, None] & (w < width)[None, :]
            point = tl.load(first + n.to(tl.int64)[:, None] * point_row + w[None, :], mask=inside, other=0.0)
            mine = ((k[:, None] == code[None, :]) & (n < stop)[None, :]).to(tl.float32)  # [K, n]
            total += product(mine.to(point.dtype), point, precision)
            members += tl.sum(mine, 1)
        row = (problem.to(tl.int64) * tl.num_programs(0) + number) * clusters + k
        tl.store(sums + row[:, None] * width + w[None, :], total, mask=(k < clusters)[:, None] & (w < width)[None, :])
        tl.store(sizes + row, members, mask=k < clusters)


@triton.jit(do_not_specialize=["pieces"])
def means(
    sums: tl.tensor,
    sizes: tl.tensor,
    active: tl.tensor,
    centroids: tl.tensor,
    pieces: tl.tensor,
    clusters: tl.tensor,
    width: tl.constexpr,
    block_k: tl.constexpr,
    block_w: tl.constexpr,
) -> None:
    """Set the centroids of a block of clusters to the means over all pieces; an empty cluster keeps its centroid."""
    problem = tl.program_id(0)
    if tl.load(active + problem) != 0:
        k, w = tl.program_id(1) * block_k + tl.arange(0, block_k), tl.arange(0, block_w)
        held = (k < clusters)[:, None] & (w < width)[None, :]
        total, members = tl.zeros([block_k, block_w], tl.float32), tl.zeros([block_k], tl.float32)
        for piece in range(pieces):
            row = (problem.to(tl.int64) * pieces + piece) * clusters + k
            total += tl.load(sums + row[:, None] * width + w[None, :], mask=held, other=0.0)
            members += tl.load(sizes + row, mask=k < clusters, other=0.0)
        cell = (problem.to(tl.int64) * clusters + k)[:, None] * width + w[None, :]
        mean = total / tl.maximum(members, 1.0)[:, None]
        tl.store(centroids + cell, mean, mask=held & (members > 0)[:, None])


def encode(keys: Tensor, codebook: Tensor) -> Tensor:
    """See :func:`pqbench.kernels.reference.encode`."""
    keys = dense_rows(keys)
    codes = torch.empty(*keys.shape[:3], codebook.shape[2], dtype=CODE, device=keys.device)
    _assign(keys, codebook.float().contiguous(), codes)
    return codes


def train_codebook(
    keys: Tensor,
    parts: int,
    clusters: int,
    iterations: int,
    seed: int,
    sample: int | None = None,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See :func:`pqbench.kernels.reference.train_codebook` and the docstring of the module."""
    keys = dense_rows(keys)
    batch, heads, count, dimension = keys.shape
    kept = max(clusters, min(sample or 0, count))
    drawn = upload(_first_drawn(count, seed, kept, keys.device.type == "cuda"), keys.device)
    start = keys[:, :, drawn[:clusters]].float().view(batch, heads, clusters, parts, dimension // parts)
    codebook = start.transpose(2, 3).contiguous()  # [B, H, m, K, D/m]
    if sample is not None and sample < count:
        _lloyd(keys[:, :, drawn], codebook, iterations, tolerance)
        iterations = min(iterations, 1)
    return codebook, _lloyd(keys, codebook, iterations, tolerance)


@lru_cache(maxsize=4)
def _first_drawn(count: int, seed: int, kept: int, pinned: bool) -> Tensor:
    """The first rows of the draw, ``[kept]``, on the host, page-locked if ``pinned``. All layers of a prompt use the
    same draw, which is cached because shuffling 131072 numbers takes a millisecond, for which the prefill would wait.
    The result must not be changed."""
    rows = draw(count, seed)[:kept].clone()  # a view would hold the whole draw
    return rows.pin_memory() if pinned else rows


def _lloyd(keys: Tensor, codebook: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Run Lloyd's algorithm on ``codebook`` ``[B, H, m, K, D/m]`` in place. Returns the codes ``[B, H, N, m]`` of the
    nearest final centroids."""
    batch, heads, parts, clusters, width = codebook.shape
    count, problems = keys.shape[2], batch * heads * parts
    codes = torch.empty(batch, heads, count, parts, dtype=CODE, device=keys.device)
    _assign(keys, codebook, codes)
    block_w = power(width, 16)
    block_n = block_k = 64 if block_w < 64 else 32  # the sums of a block of clusters stay in registers
    pieces = split(count, block_n, problems * blocks(clusters, block_k), keys.device)
    size = blocks(blocks(count, block_n), pieces) * block_n
    unit, strides = outer(keys)
    sums = codebook.new_empty(problems, pieces, clusters, width)
    sizes = codebook.new_empty(problems, pieces, clusters)
    moved = torch.zeros(iterations, problems, dtype=torch.int32, device=keys.device)
    active = torch.ones(problems, dtype=torch.int32, device=keys.device)
    for step in range(iterations):
        with on(keys):
            sum_clusters[(pieces, blocks(clusters, block_k), problems)](
                keys,
                codes,
                active,
                sums,
                sizes,
                *strides[0],
                keys.stride(2),
                heads,
                count,
                size,
                clusters,
                unit=unit,
                parts=parts,
                width=width,
                block_n=block_n,
                block_k=block_k,
                block_w=block_w,
                precision=precision_for(keys),
                **options(8),
            )
            _take_means(sums, sizes, active, codebook, block_k, block_w)
        _assign(keys, codebook, codes, active, moved[step])
        active = (moved[step] > int(tolerance * count)).int()
    return codes


def _take_means(sums: Tensor, sizes: Tensor, active: Tensor, codebook: Tensor, block_k: int, block_w: int) -> None:
    """Set the centroids of active problems to the means of their clusters."""
    problems, pieces, clusters, width = sums.shape
    means[(problems, blocks(clusters, block_k))](
        sums,
        sizes,
        active,
        codebook,
        pieces,
        clusters,
        width=width,
        block_k=block_k,
        block_w=block_w,
        **options(8),
    )


def _assign(
    keys: Tensor, codebook: Tensor, codes: Tensor, active: Tensor | None = None, moved: Tensor | None = None
) -> None:
    batch, heads, parts, clusters, width = codebook.shape
    count, precision, (unit, strides) = keys.shape[2], precision_for(keys, codebook), outer(keys)
    with on(keys):
        assign[(blocks(count, _POINTS), batch * heads * parts)](
            keys,
            codebook,
            codes,
            active,
            moved,
            *strides[0],
            keys.stride(2),
            heads,
            count,
            clusters,
            unit=unit,
            parts=parts,
            width=width,
            chunk=chunk_for(width, precision),
            precision=precision,
            block_n=_POINTS,
            block_k=min(_CLUSTERS, power(clusters, 16)),
            **options(),
        )
