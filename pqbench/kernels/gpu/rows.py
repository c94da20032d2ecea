"""Triton: copies of rows, also directly from page-locked host memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqbench.kernels.gpu.launch import blocks, on, options, outer, power, rows_of

_TILE = 4096  # bytes that one program loads at once: two loads of 16 bytes for each of its threads


@triton.jit(do_not_specialize=["count", "source_batch", "source_head", "target_batch", "target_head"])
def copy_rows(
    source: tl.tensor,
    indices: tl.tensor,
    target: tl.tensor,
    source_batch: tl.tensor,
    source_head: tl.tensor,
    target_batch: tl.tensor,
    target_head: tl.tensor,
    heads: tl.tensor,
    count: tl.tensor,
    unit: tl.constexpr,
    source_row: tl.constexpr,
    source_step: tl.constexpr,
    target_row: tl.constexpr,
    target_step: tl.constexpr,
    given: tl.constexpr,
    width: tl.constexpr,
    block_n: tl.constexpr,
    block_w: tl.constexpr,
) -> None:
    """Copy rows ``indices`` ``[B*H, n]`` of ``source`` ``[B, H, S, width]``, or its first n rows unless ``given``, into
    ``target`` ``[B, H, n, width]``."""
    pair = tl.program_id(1)
    n = (tl.program_id(0) * block_n + tl.arange(0, block_n)).to(tl.int64)
    rows = n
    if given:
        rows = tl.load(indices + pair.to(tl.int64) * count + n, mask=n < count, other=0).to(tl.int64)
    first = rows_of(source, (source_batch, source_head), pair, heads, unit)
    goal = rows_of(target, (target_batch, target_head), pair, heads, unit)
    for start in tl.static_range(0, width, block_w):
        w = start + tl.arange(0, block_w)
        inside = (n < count)[:, None] & (w < width)[None, :]
        row = tl.load(first + rows[:, None] * source_row + w[None, :] * source_step, mask=inside)
        tl.store(goal + n[:, None] * target_row + w[None, :] * target_step, row, mask=inside)


def gather(source: Tensor, indices: Tensor, target: Tensor) -> None:
    """See :func:`pqbench.kernels.reference.gather`.

    ``source`` or ``target`` may be page-locked host memory: the launcher asks the driver for its address on the GPU,
    and rows cross the link directly. The kernel runs on the current stream. Host memory may be reused or freed only
    after the kernel is done, see :mod:`pqbench.store.link.held`. ``indices`` are on the GPU or page-locked as well.
    """
    _copy(source, indices.contiguous(), target)


def copy(source: Tensor, target: Tensor) -> None:
    """See :func:`pqbench.kernels.reference.rows.copy`. Tensors ``[B, H, n, ...]`` with contiguous rows are copied by
    one launch, others by torch."""
    if source.ndim < 4 or source.dtype != target.dtype or not (_packed(source) and _packed(target)):
        target.copy_(source, non_blocking=True)
    elif source.numel():
        _copy(source, None, target)


def _copy(source: Tensor, indices: Tensor | None, target: Tensor) -> None:
    """Copy the rows ``indices``, or all rows if that is None."""
    if source.ndim == 3:
        source, target = source[..., None], target[..., None]
    if source.ndim > 4 and not (_packed(source) and _packed(target)):
        for i in range(source.shape[3]):
            _copy(source[:, :, :, i], indices, target[:, :, :, i])
        return
    (batch, heads, count), width = target.shape[:3], source.shape[3:].numel()
    unit, strides = outer(source, target)
    sizes = tile(width, target.dtype)
    with on(target, source):
        copy_rows[(blocks(count, sizes["block_n"]), batch * heads)](
            source,
            source if indices is None else indices,
            target,
            *strides[0],
            *strides[1],
            heads,
            count,
            unit=unit,
            source_row=source.stride(2),
            source_step=_step(source),
            target_row=target.stride(2),
            target_step=_step(target),
            given=indices is not None,
            **sizes,
            **options(),
        )


def tile(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes for copying rows of ``width`` numbers: one program copies ``block_n`` rows, ``block_w`` numbers of each at
    a time."""
    block_w = min(power(width), _TILE // dtype.itemsize)
    return {"width": width, "block_n": _TILE // (block_w * dtype.itemsize), "block_w": block_w}


def _step(rows: Tensor) -> int:
    """Stride between the numbers of a row, in elements."""
    return rows.stride(3) if rows.ndim == 4 else 1


def _packed(rows: Tensor) -> bool:
    """Whether each row of ``[B, H, S, ...]`` is contiguous."""
    expected = 1
    for size, stride in zip(reversed(rows.shape[3:]), reversed(rows.stride()[3:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
