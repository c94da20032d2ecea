"""Triton: the selection of a step in three launches, without waiting for the host.

1. Look-up tables, a scan of the codes, and the log-sum-exps of parts (:func:`pqbench.kernels.gpu.scoring.scan`).
2. Probabilities summed over the query group, and for each piece of a row a histogram of them with 256 bins.
3. Each piece adds up the histograms of its row. This gives the edge bin, which contains the threshold of the selection,
   and the number of tokens in this bin or higher ones in the pieces before. The piece writes its own such tokens after
   those of the pieces before. The piece of a row that finishes last finds the exact threshold among the tokens of the
   edge bin and writes the selected tokens.

The last piece reads little more than the selected tokens, unless many tokens are in the edge bin. If all tokens of a
context are equal, it reads all of them, which takes longer. The result is always exact; of equal probabilities, the
lower index is taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pqbench.kernels.gpu import launch
from pqbench.kernels.gpu.launch import read, share
from pqbench.kernels.gpu.scoring import UNIT, awake, bin_of, pieces_for, scan, sum_over_group
from pqbench.kernels.gpu.top_k import cut, ordered, parts_of, placed
from pqbench.kernels.number import Number
from pqbench.kernels.reference.select import check_room


@triton.jit
def threshold_of(
    keys: tl.tensor, count: tl.tensor, wanted: tl.tensor, block: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The ``wanted``-th largest of ``count`` keys, found one byte at a time, and how many of the keys that are equal to
    it are wanted."""
    prefix = tl.full([], 0, tl.int32)
    for step in tl.static_range(4):
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, count, block):
            n = start + tl.arange(0, block)
            key = tl.load(keys + n, mask=n < count, other=0).to(tl.uint32, bitcast=True)
            same = n < count
            if step > 0:
                same = same & ((key >> (32 - 8 * step)).to(tl.int32, bitcast=True) == prefix)
            histogram += tl.histogram(((key >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=same)
        byte, wanted = cut(histogram, wanted)
        prefix = (prefix << 8) | byte
    return prefix.to(tl.uint32, bitcast=True), wanted


@triton.jit(do_not_specialize=["given", "sink", "top_k", "length", "middle", "room"])
def collect(
    sums: tl.tensor,
    histograms: tl.tensor,
    only: tl.tensor,
    counters: tl.tensor,
    lists: tl.tensor,
    indices: tl.tensor,
    given: tl.tensor,
    sink: tl.tensor,
    top_k: tl.tensor,
    length: tl.tensor,
    middle: tl.tensor,
    room: tl.tensor,
    lanes: tl.constexpr,
    most: tl.constexpr,
    unit: tl.constexpr,
) -> None:
    """The selection ``indices`` ``[B*H, room]`` of one row: sinks, the best middle tokens, and the window. There is one
    program for each piece of a row. ``sums`` ``[B*H, S]`` and ``histograms`` ``[B*H, pieces, 256]`` come from
    :func:`pqbench.kernels.gpu.scoring.sum_group`; ``counters`` ``[B*H]`` are 0 before. ``lists`` ``[3, B*H, S]`` is
    scratch memory for the tokens in the edge bin and higher bins, their keys, and the keys in the edge bin."""
    pair, number, pieces = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    sink, length, middle = read(sink), read(length), read(middle)
    wanted, lane = tl.minimum(read(top_k), middle), tl.arange(0, unit)
    row = indices + pair * room
    for start in range(number * unit, length - middle, pieces * unit):
        j = start + lane
        place, token = j + tl.where(j < sink, 0, wanted), j + tl.where(j < sink, 0, middle)
        tl.store(row + place, token.to(tl.int64), mask=(j < length - middle) & (place < room))
    tokens = lists + pair * given
    rows = tl.num_programs(0).to(tl.int64) * given
    keys, levels = tokens + rows, tokens + 2 * rows
    count = awake(middle, only, pair)
    wanted = tl.minimum(wanted, count)
    held = parts_of(histograms + pair * pieces * 256, pieces, most)
    whole = tl.sum(held, 0)
    edge, ties = cut(whole, wanted)
    part, every = tl.arange(0, most)[:, None], tl.arange(0, 256)[None, :]
    kept = tl.sum(tl.sum(tl.where((part < number) & (every >= edge), held, 0), 1), 0)  # in the pieces before
    level = tl.sum(tl.sum(tl.where((part < number) & (every == edge), held, 0), 1), 0)
    first, stop = share(count, unit)
    for start in range(first, stop, unit):
        n = start + lane
        key = ordered(tl.load(sums + pair * given + n, mask=n < stop, other=0.0))
        which = bin_of(key, middle, lanes)
        from_edge, on_edge = (n < stop) & (which >= edge), (n < stop) & (which == edge)
        both = from_edge.to(tl.int32) + (on_edge.to(tl.int32) << 16)
        rank = tl.cumsum(both, 0)
        place = kept + (rank & 65535) - 1
        tl.store(tokens + place, n, mask=from_edge)
        tl.store(keys + place, key.to(tl.int32, bitcast=True), mask=from_edge)
        tl.store(levels + level + (rank >> 16) - 1, key.to(tl.int32, bitcast=True), mask=on_edge)
        size = tl.sum(both, 0)
        kept += size & 65535
        level += size >> 16
    tl.debug_barrier()  # all threads have written before the counter is increased
    if tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu") == pieces - 1:
        level = tl.sum(tl.where(tl.arange(0, 256) == edge, whole, 0), 0)
        threshold, equal = threshold_of(levels, level, ties, unit)
        above, tied = level * 0, level * 0
        for start in range(0, wanted - ties + level, unit):
            n = start + lane
            seen = n < wanted - ties + level
            key = tl.load(keys + n, mask=seen, other=0).to(tl.uint32, bitcast=True)
            token = tl.load(tokens + n, mask=seen, other=0)
            place, chosen, above, tied = placed(key, seen, threshold, equal, above, tied)
            chosen = chosen & (sink + place < room)
            tl.store(row + sink + place, (sink + token).to(tl.int64), mask=chosen)


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
    """See :func:`pqbench.kernels.reference.pq_select` and the docstring of the module."""
    check_room(codes, sink, top_k, length, middle, room, only, out)
    batch, heads, given, _ = codes.shape
    indices = q.new_empty(batch, heads, room, dtype=torch.int64) if out is None else out
    chosen = None if only is None else only.contiguous().view(torch.uint8)
    pieces = pieces_for(batch * heads, q.device)
    scores, part_lse, counters = scan(q, codebook, codes, scaling, middle, chosen)
    histograms = q.new_empty(batch, heads, pieces, 256, dtype=torch.int32)
    sums = sum_over_group(q, scores, part_lse, middle, chosen, histograms)
    lanes = scores.shape[3]
    # Logits are not needed after they were summed, so their memory is used for the lists if it is large enough.
    lists = scores.view(torch.int32) if lanes >= 3 else q.new_empty(3, batch, heads, given, dtype=torch.int32)
    with launch.on(q):
        collect[(batch * heads, pieces)](
            sums,
            histograms,
            chosen,
            counters,
            lists,
            indices,
            given,
            sink,
            top_k,
            length,
            middle,
            room,
            lanes=lanes,
            most=pieces,
            unit=UNIT,
            **launch.options(16),
        )
    return indices
