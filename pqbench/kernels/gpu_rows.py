"""Triton: copies of rows, also straight from pinned host memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pqbench.kernels.gpu_launch import blocks, on, options, power

_ROWS = 16  # rows of a tile to copy


@triton.jit(do_not_specialize=["count"])
def copy_rows(
    source: tl.tensor, indices: tl.tensor, target: tl.tensor, source_strides: tl.tensor, target_strides: tl.tensor,
    heads: tl.tensor, count: tl.tensor, width: tl.constexpr, block_n: tl.constexpr, block_w: tl.constexpr,
) -> None:  # fmt: skip
    """Rows ``indices`` ``[B*H, n]`` of ``source`` ``[B, H, S, width]`` into ``target`` ``[B, H, n, width]``."""
    pair = tl.program_id(1)
    sequence, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    n = tl.program_id(0) * block_n + tl.arange(0, block_n)
    rows = tl.load(indices + pair.to(tl.int64) * count + n, mask=n < count, other=0).to(tl.int64)
    first = source + sequence * source_strides[0] + head * source_strides[1]
    goal = target + sequence * target_strides[0] + head * target_strides[1]
    for start in tl.static_range(0, width, block_w):
        w = start + tl.arange(0, block_w)
        inside = (n < count)[:, None] & (w < width)[None, :]
        row = tl.load(first + rows[:, None] * source_strides[2] + w[None, :] * source_strides[3], mask=inside)
        cell = n.to(tl.int64)[:, None] * target_strides[2] + w[None, :] * target_strides[3]
        tl.store(goal + cell, row, mask=inside)


def gather(source: Tensor, indices: Tensor, target: Tensor) -> None:
    """See :func:`pqbench.kernels.reference.gather`.

    ``source`` or ``target`` may be pinned host memory: the launcher asks the driver for the address under which the GPU
    sees it, and rows cross the link straight from where they are. The kernel runs on the current stream; whoever reuses
    or frees host memory must wait for it first. ``indices`` are on the GPU or pinned as well.
    """
    if source.ndim == 3:
        source, target = source[..., None], target[..., None]
    if source.ndim > 4 and not (_packed(source) and _packed(target)):
        for i in range(source.shape[3]):
            gather(source[:, :, :, i], indices, target[:, :, :, i])
        return
    batch, heads, count = indices.shape
    width = source.shape[3:].numel()
    block_w = min(256, power(width))
    with on(target, source):
        copy_rows[(blocks(count, _ROWS), batch * heads)](
            source, indices.contiguous(), target, _strides(source), _strides(target), heads, count, width=width,
            block_n=_ROWS, block_w=block_w, **options(),
        )  # fmt: skip


def _strides(rows: Tensor) -> tuple[int, ...]:
    """Strides of sequences, heads, rows, and elements of a row."""
    return (*rows.stride()[:3], rows.stride(3) if rows.ndim == 4 else 1)


def _packed(rows: Tensor) -> bool:
    """Whether each row ``[B, H, S, ...]`` lies in one piece."""
    expected = 1
    for size, stride in zip(reversed(rows.shape[3:]), reversed(rows.stride()[3:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
