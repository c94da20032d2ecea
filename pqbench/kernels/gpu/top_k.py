"""Triton: the indices of the largest scores.

:func:`top_k` is a radix select on integers (keys) that have the order of the scores, one byte at a time: it makes a
histogram, finds the byte of the threshold, and continues with the scores that share this byte. A short row takes one
program and one launch. A longer row is split into parts with their own histograms, so that each part knows where to
write without atomic operations. torch.topk does not define which of equal scores it takes, and nonzero() would wait for
the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqbench.kernels.gpu import launch
from pqbench.kernels.gpu.launch import MOST_SPLITS, blocks, dense_rows, on, options, power, share

_WHOLE = 4096  # most scores that one program holds
_CHUNK = 4096  # scores of a tile of a row that is split


@triton.jit
def ordered(score: tl.tensor) -> tl.tensor:
    """Key uint32 with the same order as float32 scores; -0 equals 0, and NaN equals infinity."""
    score = tl.where(score == 0.0, 0.0, score)
    score = tl.where(score == score, score, float("inf"))
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def cut(histogram: tl.tensor, wanted: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The bin that contains the ``wanted``-th largest entry of a histogram ``[256]``, and how many entries of this bin
    are wanted."""
    every = tl.arange(0, 256)
    above = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)  # scores in larger bins
    chosen = tl.max(tl.where(above + histogram >= wanted, every, 0), 0)
    return chosen, wanted - tl.sum(tl.where(every > chosen, histogram, 0), 0)


@triton.jit(do_not_specialize=["stride", "total", "count"])
def top_of_row(
    scores: tl.tensor, indices: tl.tensor, stride: tl.tensor, total: tl.tensor, count: tl.tensor, block: tl.constexpr
) -> None:
    """Indices ``[R, k]`` of the largest scores of one row, which is held in registers."""
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
def parts_of(counts: tl.tensor, parts: tl.tensor, most: tl.constexpr) -> tl.tensor:
    """Histograms ``[most, 256]`` of all parts of a row; zero for missing parts."""
    part, every = tl.arange(0, most)[:, None], tl.arange(0, 256)[None, :]
    return tl.load(counts + part * 256 + every, mask=part < parts, other=0)


@triton.jit
def advance(
    histograms: tl.tensor,
    state: tl.tensor,
    row: tl.tensor,
    parts: tl.tensor,
    rows: tl.tensor,
    step: tl.constexpr,
    most: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Find the first ``step`` bytes of the threshold from the state of the previous step and the histograms
    ``[4, R, parts, 256]``. Returns these bytes, how many of the scores that begin with them are wanted, and the
    histograms of the last of these bytes by part."""
    held = parts_of(histograms + ((step - 1) * rows + row) * parts * 256, parts, most)
    before = state + ((step - 1) * rows + row) * 2
    chosen, wanted = cut(tl.sum(held, 0), tl.load(before + 1))
    return (tl.load(before) << 8) | chosen, wanted, held


@triton.jit(do_not_specialize=["stride", "total", "count", "parts", "rows"])
def count_bytes(
    scores: tl.tensor,
    histograms: tl.tensor,
    state: tl.tensor,
    larger: tl.tensor,
    stride: tl.tensor,
    total: tl.tensor,
    count: tl.tensor,
    parts: tl.tensor,
    rows: tl.tensor,
    step: tl.constexpr,
    most: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Count how often each value of byte ``step`` occurs in one part of a row, among the scores whose previous bytes
    are those of the threshold. ``state`` ``[4, R, 2]`` holds these bytes and the number of scores wanted; ``larger``
    ``[R, parts]`` holds how many scores of a part are known to be above the threshold."""
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    byte = tl.arange(0, 256)
    here = row * parts + number
    prefix, wanted, above = 0, count, 0
    if step > 0:
        prefix, wanted, _ = advance(histograms, state, row, parts, rows, step, most)
        own = tl.load(histograms + (((step - 1) * rows + row) * parts + number) * 256 + byte)
        above = tl.sum(tl.where(byte > (prefix & 255), own, 0), 0) + (tl.load(larger + here) if step > 1 else 0)
    histogram = tl.zeros([256], tl.int32)
    first, stop = share(total, block)
    for start in range(first, stop, block):
        n = start + tl.arange(0, block)
        key = ordered(tl.load(scores + row * stride + n, mask=n < stop, other=float("-inf")))
        same = n < stop
        if step > 0:
            same = same & ((key >> (32 - 8 * step)).to(tl.int32, bitcast=True) == prefix)
        histogram += tl.histogram(((key >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=same)
    tl.store(histograms + ((step * rows + row) * parts + number) * 256 + byte, histogram)
    tl.store(larger + here, above)
    if number == 0:  # every part computes the same state
        tl.store(state + (step * rows + row) * 2, prefix)
        tl.store(state + (step * rows + row) * 2 + 1, wanted)


@triton.jit(do_not_specialize=["stride", "total", "count", "parts", "rows"])
def write_top(
    scores: tl.tensor,
    indices: tl.tensor,
    histograms: tl.tensor,
    state: tl.tensor,
    larger: tl.tensor,
    stride: tl.tensor,
    total: tl.tensor,
    count: tl.tensor,
    parts: tl.tensor,
    rows: tl.tensor,
    most: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write the selected indices of one part of a row after those of the parts before it."""
    row, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, byte = tl.arange(0, most), tl.arange(0, 256)[None, :]
    prefix, wanted, held = advance(histograms, state, row, parts, rows, 4, most)
    threshold = prefix.to(tl.uint32, bitcast=True)
    held = tl.where((part < number)[:, None], held, 0)  # only the parts before
    above = tl.sum(tl.load(larger + row * parts + part, mask=part < number, other=0), 0)
    above += tl.sum(tl.sum(tl.where(byte > (prefix & 255), held, 0), 1), 0)
    tied = tl.sum(tl.sum(tl.where(byte == (prefix & 255), held, 0), 1), 0)
    first, stop = share(total, block)
    for start in range(first, stop, block):
        n = start + tl.arange(0, block)
        key = ordered(tl.load(scores + row * stride + n, mask=n < stop, other=float("-inf")))
        place, chosen, above, tied = placed(key, n < stop, threshold, wanted, above, tied)
        tl.store(indices + row * count + place, n.to(tl.int64), mask=chosen)


@triton.jit
def placed(
    key: tl.tensor, seen: tl.tensor, threshold: tl.tensor, ties: tl.tensor, above: tl.tensor, tied: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The place of each key of a tile in the result, and which keys are selected: those above the threshold, and the
    first ``ties`` of those equal to it. ``above`` and ``tied`` are the numbers of keys above and equal in earlier
    tiles; they are returned with the numbers of this tile added."""
    level, over = seen & (key == threshold), seen & (key > threshold)
    both = tl.cumsum(over.to(tl.int32) + (level.to(tl.int32) << 16), 0)  # a tile has fewer than 2**16 keys
    rank = tied + (both >> 16)
    place = above + (both & 65535) + tl.minimum(rank, ties) - 1
    size = tl.sum(over.to(tl.int32) + (level.to(tl.int32) << 16), 0)
    return place, over | (level & (rank <= ties)), above + (size & 65535), tied + (size >> 16)


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
            top_of_row[(len(flat),)](flat, indices, flat.stride(0), total, count, block=_WHOLE, **options(16))
        else:
            _split_top_k(flat, indices, count)
    return indices


def _split_top_k(scores: Tensor, indices: Tensor, count: int) -> None:
    """:func:`top_k` for rows ``[R, S]`` that are longer than one program holds."""
    rows, total = scores.shape
    wanted = min(MOST_SPLITS, blocks(2 * launch.processors(scores.device), rows))
    parts = min(wanted, blocks(total, _CHUNK))
    histograms = torch.empty(4, rows, parts, 256, dtype=torch.int32, device=scores.device)
    state = torch.empty(4, rows, 2, dtype=torch.int32, device=scores.device)
    larger = torch.empty(rows, parts, dtype=torch.int32, device=scores.device)
    shape = (scores.stride(0), total, count, parts, rows)
    sizes = {"most": power(wanted), "block": _CHUNK, **options(8)}  # one compilation for any number of parts
    for step in range(4):
        count_bytes[(rows, parts)](scores, histograms, state, larger, *shape, step=step, **sizes)
    write_top[(rows, parts)](scores, indices, histograms, state, larger, *shape, **sizes)
