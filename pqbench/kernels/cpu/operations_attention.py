"""Exact attention on the CPU; arguments and shapes are those of :mod:`pqbench.kernels.reference`.

Tensors of float32 and bfloat16 are read without conversion, at any stride except that of the last axis; arithmetic is
float32. The reference backend computes other types, other devices, and head dimensions that are not a multiple of 16.
Results do not depend on the number of threads. The same holds for the other operations of this backend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from pqbench.kernels import reference
from pqbench.kernels.cpu.attention import attend
from pqbench.kernels.cpu.calls import STORED, address, check_rows, fits, strides, threads_for
from pqbench.kernels.cpu.vector import BLOCK
from pqbench.kernels.number import Number


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    indices: Tensor | None = None,
    visible: Tensor | None = None,
    need_weights: bool = False,
    log_weights: Tensor | None = None,
    count: Number | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Exact attention of q ``[B, H, G, D]``: output like q, log-sum-exp ``[B, H, G]``, and probabilities
    ``[B, H, G, n]`` if needed. See :func:`pqbench.kernels.reference.attention`."""
    given = keys.shape[2] if indices is None else indices.shape[2]
    used = given if count is None else min(given, int(count))
    if not (fits(keys) and fits(values) and keys.dtype == values.dtype and used and keys.shape[3] % BLOCK == 0):
        return reference.attention(q, keys, values, scaling, indices, visible, need_weights, log_weights, count)
    if used < given:
        keys, values = (keys[:, :, :used], values[:, :, :used]) if indices is None else (keys, values)
        indices, visible, log_weights = (None if x is None else x[..., :used] for x in (indices, visible, log_weights))
    output, lse, weights = _attend(q, keys, values, scaling, indices, visible, need_weights, log_weights)
    return output, lse, weights if weights is None or used == given else pad(weights, (0, given - used))


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    scaling: float,
    indices: Tensor | None,
    visible: Tensor | None,
    need_weights: bool,
    log_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, heads, group, dims = q.shape
    count = keys.shape[2] if indices is None else indices.shape[2]
    queries = (q if q.dtype in STORED else q.float()).contiguous()
    rows = None if indices is None else indices.long().contiguous()
    shape = (batch, heads, group, count)
    seen = None if visible is None else visible.expand(shape).contiguous()
    added = None if log_weights is None else log_weights.float().expand(shape).contiguous()
    output = torch.empty(q.shape if values is not None else 0, dtype=queries.dtype)
    lse = torch.empty(batch, heads, group, dtype=torch.float32)
    weights = torch.empty(batch, heads, group, count, dtype=torch.float32) if need_weights else None
    with threads_for(batch * heads * group * count * dims):
        valid = attend(
            keys.dtype == torch.bfloat16,
            queries.dtype == torch.bfloat16,
            queries.data_ptr(),
            keys.data_ptr(),
            *strides(keys),
            address(values),
            *(strides(keys) if values is None else strides(values)),
            address(rows),
            address(seen),
            address(added),
            address(weights),
            0 if values is None else output.data_ptr(),
            lse.data_ptr(),
            batch,
            heads,
            group,
            keys.shape[2],
            count,
            dims,
            scaling,
        )
    check_rows(valid, keys)
    return output.to(q.dtype), lse, weights


def dense_attention(q: Tensor, keys: Tensor, values: Tensor, scaling: float, count: Number | None = None) -> Tensor:
    """Attention of one query per head over all rows, or the first ``count``: ``[B, H, G, D]``."""
    return attention(q, keys, values, scaling, count=count)[0]


def exact_probabilities(q: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Softmax of q.k per query head, summed over the query group: float32 ``[B, H, S]``."""
    if not fits(keys) or keys.shape[3] % BLOCK:
        return reference.exact_probabilities(q, keys, scaling)
    weights = _attend(q, keys, None, scaling, None, None, True)[2]
    assert weights is not None
    return weights.sum(2)
