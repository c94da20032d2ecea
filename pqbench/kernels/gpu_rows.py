"""Triton: the rows with the largest scores, and copies of rows, also straight from pinned host memory.

:func:`top_k` is a radix select on bits whose order is that of the scores, eight at a time: histogram, find the byte of
the threshold, go on with the scores that share it. A row of few scores is one program and one launch; a longer one is
split, each part with histograms of its own, so that parts know where to write without atomics. torch.topk would need a
repair of the ties, and finding the chosen rows' number by nonzero() would wait for the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqbench.kernels.gpu_launch import blocks, dense_rows, on, options, power, split

_WHOLE = 4096  # scores that one program holds
_CHUNK = 4096  # scores of a tile where a row is split
_ROWS = 16  # rows of a tile to copy


@triton.jit
def ordered(score: tl.tensor) -> tl.tensor:
    """uint32 in the order of float32 scores: both zeros are one number, NaN is infinity."""
    score = tl.where(score == 0.0, 0.0, score)
    score = tl.where(score == score, score, float("inf"))
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def cut(histogram: tl.tensor, wanted: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The byte in which the ``wanted``-th largest falls, given how often each byte occurs ``[256]``, and how many with
    that byte are wanted."""
    byte = tl.arange(0, 256)
    above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)  # scores with a larger byte
    chosen = tl.max(tl.where(above + histogram >= wanted, byte, 0), 0)
    return chosen, wanted - tl.sum(tl.where(byte > chosen, histogram, 0), 0)


@triton.jit
def top_of_row(
    scores: tl.tensor, indices: tl.tensor, stride: tl.tensor, total: tl.tensor, count: tl.tensor, block: tl.constexpr
) -> None:
    """Indices ``[R, k]`` of the largest of one row of scores, held in registers."""
    row, n = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    key = ordered(tl.load(scores + row * stride + n, mask=n < total, other=float("-inf")))
    same, larger, wanted = n < total, n < 0, count
    for step in tl.static_range(4):
        byte = ((key >> (24 - 8 * step)) & 255).to(tl.int32)
        chosen_byte, wanted = cut(tl.histogram(byte, 256, mask=same), wanted)
        larger = larger | (same & (byte > chosen_byte))
        same = same & (byte == chosen_byte)
    chosen = (larger | (same & (tl.cumsum(same.to(tl.int32), 0) <= wanted))).to(tl.int32)
    tl.store(indices + row * count + tl.cumsum(chosen, 0) - 1, n.to(tl.int64), mask=chosen > 0)


@triton.jit
def advance(
    histograms: tl.tensor, state: tl.tensor, row: tl.tensor, parts: tl.tensor, rows: tl.tensor, step: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The first ``step`` bytes of the threshold, and how many scores that begin with them are wanted, from the state
    one byte before and the histograms ``[4, R, parts, 256]`` of all parts."""
    byte = tl.arange(0, 256)
    histogram = tl.zeros([256], tl.int32)
    for part in range(parts):
        histogram += tl.load(histograms + (((step - 1) * rows + row) * parts + part) * 256 + byte)
    before = state + ((step - 1) * rows + row) * 2
    chosen, wanted = cut(histogram, tl.load(before + 1))
    return (tl.load(before) << 8) | chosen, wanted


@triton.jit(do_not_specialize=["total", "count", "size", "parts", "rows"])
def count_bytes(
    scores: tl.tensor, histograms: tl.tensor, state: tl.tensor, larger: tl.tensor, stride: tl.tensor, total: tl.tensor,
    count: tl.tensor, size: tl.tensor, parts: tl.tensor, rows: tl.tensor, step: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    """How often each value of byte ``step`` occurs in one part of a row, among the scores that share the bytes before
    with the threshold. ``state`` ``[4, R, 2]`` holds these bytes and the number wanted, ``larger`` ``[R, parts]`` the
    scores of a part known to be above the threshold."""
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    byte = tl.arange(0, 256)
    here = row * parts + number
    prefix, wanted, above = 0, count, 0
    if step > 0:
        prefix, wanted = advance(histograms, state, row, parts, rows, step)
        own = tl.load(histograms + (((step - 1) * rows + row) * parts + number) * 256 + byte)
        above = tl.sum(tl.where(byte > (prefix & 255), own, 0), 0) + (tl.load(larger + here) if step > 1 else 0)
    histogram = tl.zeros([256], tl.int32)
    stop = tl.minimum(total, (number + 1) * size)
    for start in range(number * size, stop, block):
        n = start + tl.arange(0, block)
        key = ordered(tl.load(scores + row * stride + n, mask=n < stop, other=float("-inf")))
        same = n < stop
        if step > 0:
            same = same & ((key >> (32 - 8 * step)).to(tl.int32, bitcast=True) == prefix)
        histogram += tl.histogram(((key >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=same)
    tl.store(histograms + ((step * rows + row) * parts + number) * 256 + byte, histogram)
    tl.store(larger + here, above)
    if number == 0:  # every part computes the same
        tl.store(state + (step * rows + row) * 2, prefix)
        tl.store(state + (step * rows + row) * 2 + 1, wanted)


@triton.jit(do_not_specialize=["total", "count", "size", "parts", "rows"])
def write_top(
    scores: tl.tensor, indices: tl.tensor, histograms: tl.tensor, state: tl.tensor, larger: tl.tensor,
    stride: tl.tensor, total: tl.tensor, count: tl.tensor, size: tl.tensor, parts: tl.tensor, rows: tl.tensor,
    block: tl.constexpr,
) -> None:  # fmt: skip
    """Write the chosen indices of one part of a row behind those of the parts before it."""
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    byte = tl.arange(0, 256)
    prefix, wanted = advance(histograms, state, row, parts, rows, 4)
    threshold = prefix.to(tl.uint32, bitcast=True)
    above, tied = wanted * 0, wanted * 0  # in the parts before
    for part in range(number):
        histogram = tl.load(histograms + ((3 * rows + row) * parts + part) * 256 + byte)
        above += tl.load(larger + row * parts + part) + tl.sum(tl.where(byte > (prefix & 255), histogram, 0), 0)
        tied += tl.sum(tl.where(byte == (prefix & 255), histogram, 0), 0)
    stop = tl.minimum(total, (number + 1) * size)
    for start in range(number * size, stop, block):
        n = start + tl.arange(0, block)
        key = ordered(tl.load(scores + row * stride + n, mask=n < stop, other=float("-inf")))
        level = ((key == threshold) & (n < stop)).to(tl.int32)
        over = ((key > threshold) & (n < stop)).to(tl.int32)
        chosen = tl.where(tied + tl.cumsum(level, 0) <= wanted, level, 0) | over
        place = above + tl.minimum(tied, wanted) + tl.cumsum(chosen, 0) - 1
        tl.store(indices + row * count + place, n.to(tl.int64), mask=chosen > 0)
        above += tl.sum(over, 0)
        tied += tl.sum(level, 0)


def top_k(scores: Tensor, count: int) -> Tensor:
    """See :func:`pqbench.kernels.reference.top_k`."""
    total = scores.shape[-1]
    if count >= total:
        return torch.arange(total, device=scores.device).expand(*scores.shape[:-1], total)
    indices = torch.empty(*scores.shape[:-1], max(count, 0), dtype=torch.int64, device=scores.device)
    if count <= 0:
        return indices
    flat = dense_rows(scores.float().reshape(-1, total))  # [R, S]
    with on(scores):
        if total <= _WHOLE:
            block = power(total, 256)
            top_of_row[(len(flat),)](
                flat, indices, flat.stride(0), total, count, block=block, **options(min(16, block // 256))
            )
        else:
            _split_top_k(flat, indices, count)
    return indices


def _split_top_k(scores: Tensor, indices: Tensor, count: int) -> None:
    """Rows longer than one program holds."""
    rows, total = scores.shape
    parts, size = split(total, _CHUNK, rows, scores.device)
    histograms = torch.empty(4, rows, parts, 256, dtype=torch.int32, device=scores.device)
    state = torch.empty(4, rows, 2, dtype=torch.int32, device=scores.device)
    larger = torch.empty(rows, parts, dtype=torch.int32, device=scores.device)
    shape = (scores.stride(0), total, count, size, parts, rows)
    for step in range(4):
        count_bytes[(rows, parts)](scores, histograms, state, larger, *shape, step=step, block=_CHUNK, **options(8))
    write_top[(rows, parts)](scores, indices, histograms, state, larger, *shape, block=_CHUNK, **options(8))


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
