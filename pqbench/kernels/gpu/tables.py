"""Triton: look-up tables of products of centroids with queries, computed by a launch or inside another kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqbench.kernels.gpu import launch


@triton.jit
def look_up_tables(
    q: tl.tensor,
    codebook: tl.tensor,
    tables: tl.tensor,
    q_strides: tl.tensor,
    heads: tl.tensor,
    clusters: tl.tensor,
    scaling: tl.tensor,
    parts: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    lanes: tl.constexpr,
    block_k: tl.constexpr,
    block_w: tl.constexpr,
) -> None:
    """Scaled products ``tables`` ``[B*H, m, K, L]`` of the centroids of a codebook ``[B*H, m, K, D/m]`` with the same
    sub-space of every query head. There is one program per sub-space and block of centroids."""
    problem = tl.program_id(0)
    pair, part = problem // parts, problem % parts
    sequence, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    k, w = tl.program_id(1) * block_k + tl.arange(0, block_k), tl.arange(0, block_w)
    row = problem.to(tl.int64) * clusters + k
    inside = (k < clusters)[:, None] & (w < width)[None, :]
    centroid = tl.load(codebook + row[:, None] * width + w[None, :], mask=inside, other=0.0)
    first = q + sequence * q_strides[0] + head * q_strides[1] + part * width
    for g in range(group):
        query = tl.load(first + g * q_strides[2] + w, mask=w < width, other=0.0).to(tl.float32)
        tl.store(tables + row * lanes + g, tl.sum(centroid * query[None, :], 1) * scaling, mask=k < clusters)


@triton.jit
def fill_tables(
    q: tl.tensor,
    codebook: tl.tensor,
    tables: tl.tensor,
    row: tl.tensor,
    scaling: tl.tensor,
    clusters: tl.constexpr,
    parts: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    lanes: tl.constexpr,
    block_k: tl.constexpr,
    block_w: tl.constexpr,
) -> tl.tensor:
    """Scaled products ``tables`` ``[m, K, L]`` of the centroids ``[m, K, D/m]`` of one head with its queries, which are
    ``row`` elements apart; zero for padding. Returns the number m * K of table rows."""
    k, w = tl.arange(0, block_k), tl.arange(0, block_w)
    for part in tl.static_range(parts):
        for start in range(0, clusters, block_k):
            held = start + k < clusters
            place = part * clusters + start + k
            inside = held[:, None] & (w < width)[None, :]
            centroid = tl.load(codebook + place[:, None] * width + w[None, :], mask=inside, other=0.0).to(tl.float32)
            for g in range(lanes):
                inside_w = (w < width) & (g < group)
                query = tl.load(q + g * row + part * width + w, mask=inside_w, other=0.0).to(tl.float32)
                product = tl.sum(centroid * query[None, :], 1) * scaling
                tl.store(tables + place * lanes + g, tl.where(g < group, product, 0.0), mask=held)
    return tl.full([], parts * clusters, tl.int32)


def scored_tables(q: Tensor, codebook: Tensor, scaling: float) -> Tensor:
    """Scaled products ``[B, H, m, K, L]`` of q ``[B, H, G, D]`` with a contiguous codebook ``[B, H, m, K, D/m]``."""
    batch, heads, group, _ = q.shape
    parts, clusters, width = codebook.shape[2:]
    lanes, block_k = launch.power(group), min(64, launch.power(clusters, 16))
    tables = q.new_empty(batch, heads, parts, clusters, lanes, dtype=torch.float32)
    with launch.on(q):
        look_up_tables[(batch * heads * parts, launch.blocks(clusters, block_k))](
            q,
            codebook,
            tables,
            q.stride()[:3],
            heads,
            clusters,
            float(scaling),
            parts=parts,
            group=group,
            width=width,
            lanes=lanes,
            block_k=block_k,
            block_w=launch.power(width),
            **launch.options(),
        )
    return tables
