"""Kernels compiled for the CPU; meaning and shapes are those of :mod:`pqbench.kernels.reference`.

float32 and bfloat16 are read as they lie, at any stride but that of the last axis; arithmetic is float32. What does not
fit (other types or devices, head dimensions that are no multiple of 16) goes to the reference. Results do not depend on
the number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pqbench.kernels import reference
from pqbench.kernels.backend import Number
from pqbench.kernels.cpu.attention import attend
from pqbench.kernels.cpu.blocks import choose
from pqbench.kernels.cpu.cells import merge, search
from pqbench.kernels.cpu.columns import sum_columns
from pqbench.kernels.cpu.kmeans import encode_keys, train
from pqbench.kernels.cpu.noise import fill_noise
from pqbench.kernels.cpu.rows import copy_rows, find
from pqbench.kernels.cpu.scoring import probabilities
from pqbench.kernels.cpu.top_k import top_of_rows
from pqbench.kernels.cpu.vector import BLOCK
from pqbench.kernels.reference.blocks import Residency
from pqbench.kernels.reference.select import check_room, lay_out

_SMALL_WORK = 1 << 17  # multiplications or so below which waking another thread costs more than it saves
_LOG2_E = 1.4426950408889634
_STORED = (torch.float32, torch.bfloat16)  # what is read as it lies


@contextmanager
def _threads_for(work: int) -> Iterator[None]:
    """One thread for little work."""
    count = numba.get_num_threads()
    if work >= _SMALL_WORK or count == 1:
        yield
        return
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(count)


def _fits(x: Tensor) -> bool:
    """Whether compiled code reads ``x`` ``[..., D]`` as it lies."""
    return x.dtype in _STORED and x.is_cpu and x.numel() > 0 and (x.stride(-1) == 1 or x.shape[-1] == 1)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Bytes between sequences, heads and rows."""
    size, (batch, head, row) = x.element_size(), x.stride()[:3]
    return batch * size, head * size, row * size


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _check_rows(valid: bool, x: Tensor) -> None:
    if not valid:
        raise IndexError(f"rows must lie between 0 and {x.shape[2] - 1}")


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
    """Exact attention of q ``[B, H, G, D]`` over rows ``indices`` ``[B, H, n]`` of keys and values ``[B, H, S, D]``, or
    over all, or the first ``count`` of them: output like q, log-sum-exp ``[B, H, G]`` and, where wanted, weights
    ``[B, H, G, n]``."""
    given = keys.shape[2] if indices is None else indices.shape[2]
    used = given if count is None else min(given, int(count))
    if not (_fits(keys) and _fits(values) and keys.dtype == values.dtype and used and keys.shape[3] % BLOCK == 0):
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
    queries = (q if q.dtype in _STORED else q.float()).contiguous()
    rows = None if indices is None else indices.long().contiguous()
    shape = (batch, heads, group, count)
    seen = None if visible is None else visible.expand(shape).contiguous()
    added = None if log_weights is None else log_weights.float().expand(shape).contiguous()
    output = torch.empty(q.shape if values is not None else 0, dtype=queries.dtype)
    lse = torch.empty(batch, heads, group, dtype=torch.float32)
    weights = torch.empty(batch, heads, group, count, dtype=torch.float32) if need_weights else None
    with _threads_for(batch * heads * group * count * dims):
        valid = attend(
            keys.dtype == torch.bfloat16,
            queries.dtype == torch.bfloat16,
            queries.data_ptr(),
            keys.data_ptr(),
            *_strides(keys),
            _address(values),
            *(_strides(keys) if values is None else _strides(values)),
            _address(rows),
            _address(seen),
            _address(added),
            _address(weights),
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
    _check_rows(valid, keys)
    return output.to(q.dtype), lse, weights


def dense_attention(q: Tensor, keys: Tensor, values: Tensor, scaling: float, count: Number | None = None) -> Tensor:
    """Attention of one query per head over all rows, or the first ``count``: ``[B, H, G, D]``."""
    return attention(q, keys, values, scaling, count=count)[0]


def exact_probabilities(q: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Softmax of q . keys per query head, summed over the group: float32 ``[B, H, S]``."""
    if not _fits(keys) or keys.shape[3] % BLOCK:
        return reference.exact_probabilities(q, keys, scaling)
    weights = _attend(q, keys, None, scaling, None, None, True)[2]
    assert weights is not None
    return weights.sum(2)


def pq_probabilities(q: Tensor, codebook: Tensor, codes: Tensor, scaling: float) -> Tensor:
    """Softmax of approximate scores per query head, summed over the group: float32 ``[B, H, S]``."""
    batch, heads, group, dims = q.shape
    _, _, parts, clusters, _ = codebook.shape
    count = codes.shape[2]
    if q.device.type != "cpu" or count == 0 or (parts > 1 and codes.stride(3) != 1) or codes.dtype != reference.CODE:
        return reference.pq_probabilities(q, codebook, codes, scaling)
    queries = (q.float() * (scaling * _LOG2_E)).contiguous()
    centroids = codebook.float().contiguous()
    output = torch.empty(batch, heads, count, dtype=torch.float32)
    with _threads_for(batch * heads * group * (count * parts + clusters * dims)):
        probabilities(
            queries.data_ptr(),
            centroids.data_ptr(),
            codes.data_ptr(),
            *_strides(codes),
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
    """Sinks, the best ``top_k`` tokens of the middle by approximate attention, and the window: int64
    ``[B, H, room]``."""
    check_room(codes, sink, top_k, length, middle, room, only, out)
    best = _best_of_codes(q, codebook, codes[:, :, : int(middle)], scaling, int(top_k))
    return lay_out(best, int(sink), int(length), int(middle), room, only, out)


def _best_of_codes(q: Tensor, codebook: Tensor, codes: Tensor, scaling: float, wanted: int) -> Tensor:
    return top_k(pq_probabilities(q, codebook, codes, scaling), wanted)


def best_of_cells(
    q: Tensor, codebook: Tensor, starts: Tensor, tokens: Tensor, pending: Tensor, wanted: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """The best tokens int64 ``[B, H, wanted]`` from lists by cell, and the weight of the others ``[B, H, G]``; see
    :func:`pqbench.kernels.reference.cells.best_of_cells`."""
    batch, heads, group, _ = q.shape
    _, _, parts, clusters, width = codebook.shape
    lists = [part.contiguous() for part in (starts, tokens, pending)]
    wanted = min(wanted, tokens.shape[2] + pending.shape[2])
    if q.device.type != "cpu" or any(part.dtype != torch.int32 for part in lists) or wanted == 0:
        return reference.best_of_cells(q, codebook, starts, tokens, pending, wanted, scaling)
    queries = (q.float() * (scaling * _LOG2_E)).contiguous()
    centroids = codebook.float().contiguous()
    found = torch.empty(batch, heads, wanted, dtype=torch.int64)
    log_weight = torch.empty(batch, heads, group, dtype=torch.float32)
    with _threads_for(batch * heads * group * clusters**parts * 64):
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
    """Lists by cell, ``starts`` ``[B, H, C + 1]`` and ``tokens`` ``[B, H, N + P]``, with the pending tokens at their
    ends."""
    lists = [part.contiguous() for part in (starts, tokens, pending)]
    if starts.device.type != "cpu" or any(part.dtype != torch.int32 for part in lists):
        return reference.merge_lists(starts, tokens, pending)
    batch, heads, bounds = starts.shape
    begins = torch.empty_like(lists[0])
    merged = torch.empty(batch, heads, tokens.shape[2] + pending.shape[2], dtype=torch.int32)
    with _threads_for(batch * heads * (merged.shape[2] + bounds)):
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
    """Indices ``[..., k]`` of the largest of ``[..., S]``, ascending; ties to the lower index, NaN largest."""
    total = scores.shape[-1]
    if scores.dtype != torch.float32 or scores.device.type != "cpu" or not 0 < count < total or scores.numel() == 0:
        return reference.top_k(scores, count)
    lines = scores.contiguous()
    chosen = torch.empty(*scores.shape[:-1], count, dtype=torch.int64)
    with _threads_for(scores.numel() * 4):
        top_of_rows(lines.data_ptr(), scores.numel() // total, total, count, chosen.data_ptr())
    return chosen


def train_codebook(
    keys: Tensor,
    parts: int,
    clusters: int,
    iterations: int,
    seed: int,
    sample: int | None = None,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Product quantiser of keys ``[B, H, S, D]``: codebook float32 ``[B, H, m, K, D/m]``, codes uint8 ``[B, H, S, m]``.

    Computes in the calling thread and the threads of its team; other Python threads go on meanwhile.
    """
    batch, heads, count, dims = keys.shape
    if not _fits(keys) or clusters > 256:
        return reference.train_codebook(keys, parts, clusters, iterations, seed, sample, tolerance)
    if count < clusters:
        raise ValueError(f"{clusters} centroids need as many keys, got {count}")
    order = reference.draw(count, seed)
    codebook = torch.empty(batch, heads, parts, clusters, dims // parts, dtype=torch.float32)
    codes = torch.empty(batch, heads, count, parts, dtype=reference.CODE)
    with _threads_for(batch * heads * count * dims * clusters):
        train(
            keys.dtype == torch.bfloat16,
            keys.data_ptr(),
            *_strides(keys),
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
    if not _fits(keys):
        return reference.encode(keys, codebook)
    batch, heads, count, dims = keys.shape
    _, _, parts, clusters, _ = codebook.shape
    centroids = codebook.float().contiguous()
    codes = torch.empty(batch, heads, count, parts, dtype=reference.CODE)
    with _threads_for(batch * heads * (count + 1) * dims * clusters):
        encode_keys(
            keys.dtype == torch.bfloat16,
            keys.data_ptr(),
            *_strides(keys),
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
    """Attention each key ``[B, H, S, D]`` received from the last queries ``[B, H, G, n, D]``: float32 ``[B, H, S]``.

    ``rows`` is how the reference cuts its work; here tiles are fixed."""
    batch, heads, group, count, dims = q.shape
    total = keys.shape[2]
    if not _fits(keys) or q.numel() == 0:
        return reference.column_sums(q, keys, scaling, band, rows)
    queries = q.float().contiguous()
    sums = torch.empty(batch, heads, total, dtype=torch.float32)
    with _threads_for(batch * heads * group * count * total * dims):
        sum_columns(
            keys.dtype == torch.bfloat16,
            queries.data_ptr(),
            keys.data_ptr(),
            *_strides(keys),
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


def noise(heads: int, tokens: int, seed: int, device: torch.device) -> Tensor:
    """Random numbers int32 ``[H, S]``; see :func:`pqbench.kernels.reference.noise.noise`."""
    if device.type != "cpu":
        return reference.noise(heads, tokens, seed, device)
    numbers = np.empty((heads, tokens), dtype=np.int32)
    fill_noise(numbers, seed & 0xFFFFFFFF, seed >> 32)
    return torch.from_numpy(numbers)


def _row_bytes(x: Tensor) -> int:
    """Bytes of a row ``[...]`` of ``x`` ``[B, H, S, ...]``, or 0 where its numbers do not follow each other."""
    expected = 1
    for size, stride in zip(reversed(x.shape[3:]), reversed(x.stride()[3:]), strict=True):
        if size != 1 and stride != expected:
            return 0
        expected *= size
    return expected * x.element_size()


def gather(source: Tensor, indices: Tensor, target: Tensor) -> None:
    """Copy rows ``indices`` ``[B, H, n]`` of ``source`` ``[B, H, S, ...]`` into ``target`` ``[B, H, n, ...]``."""
    size = _row_bytes(source)
    plain = source.device.type == target.device.type == "cpu" and source.dtype == target.dtype
    if not plain or size == 0 or _row_bytes(target) != size or target.numel() == 0:
        reference.gather(source, indices, target)
        return
    batch, heads, count = indices.shape
    rows = indices.long().contiguous()
    with _threads_for(target.numel() * target.element_size() // 2):
        valid = copy_rows(
            source.data_ptr(),
            *_strides(source),
            rows.data_ptr(),
            target.data_ptr(),
            *_strides(target),
            batch,
            heads,
            source.shape[2],
            count,
            size,
        )
    _check_rows(valid, source)


def find_rows(
    indices: Tensor, local: Tensor, resident: int, where: Tensor | None = None, block: int = 1, first: int = 0
) -> reference.Found:
    """Where tokens ``[B, H, n]`` lie in a table of ``resident`` rows per head, and which are missing."""
    if not indices.is_cpu or len(local) >= 1 << 32:
        return reference.find_rows(indices, local, resident, where, block, first)
    (batch, heads, count), rows, held = indices.shape, indices.long().contiguous(), local.contiguous()
    owners, blocks = (1, 0) if where is None else where.shape
    slots, missing = torch.empty_like(rows), torch.empty(rows.numel(), dtype=torch.int64)
    counts = None if where is None else torch.zeros(owners, blocks, dtype=torch.int64)
    table = None if where is None else where.contiguous()
    valid, absent = find(
        rows.data_ptr(),
        batch * heads,
        count,
        held.data_ptr(),
        len(held),
        resident,
        _address(table),
        batch * heads // owners,
        blocks,
        block,
        first,
        slots.data_ptr(),
        missing.data_ptr(),
        _address(counts),
    )
    if not valid:
        raise IndexError(f"tokens must lie between 0 and {len(local) - 1}")
    return reference.Found(slots, missing[:absent], counts)


def admit_blocks(
    counts: Tensor, complete: Number, admit: int, frequent: bool, residency: Residency, tally: Tensor
) -> Tensor:
    """Which blocks a cache lets in, and where; see :func:`pqbench.kernels.reference.blocks.admit_blocks`."""
    (owners, every), capacity = counts.shape, residency.held.shape[1]
    most = min(admit, capacity)
    moves = torch.full((owners, most, 2), -1, dtype=torch.int64)
    asked = counts.long().contiguous()
    tally[0] += choose(
        asked.data_ptr(),
        every,
        min(int(complete), every),
        most,
        frequent,
        *(part.data_ptr() for part in residency),
        moves.data_ptr(),
        owners,
        capacity,
    )
    counts.zero_()
    return moves


def use_threads(count: int) -> None:
    """Threads of this backend in the calling thread. Torch keeps its number: numba sets it to that of all cores when it
    starts its threads, since both count OpenMP's."""
    before = torch.get_num_threads()
    numba.set_num_threads(max(1, min(count, numba.config.NUMBA_NUM_THREADS)))
    torch.set_num_threads(before)


def warm_up() -> float:
    """Compile, or load from numba's cache, everything, for keys of any dtype; returns the seconds it took."""
    start = time.perf_counter()
    q, keys = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 32, 64)
    codebook, codes = train_codebook(keys, 2, 16, 1, 0)
    encode(keys, codebook)
    top = top_k(pq_probabilities(q, codebook, codes, 1.0), 16)
    lists = torch.zeros(1, 1, 257, dtype=torch.int32)
    best_of_cells(q, codebook, *merge_lists(lists, lists[:, :, :0], lists[:, :, :1]), lists[:, :, :0], 1, 1.0)
    attention(q, keys, keys, 1.0, top)
    gather(keys, top, torch.empty_like(keys[:, :, :16]))
    noise(1, 32, 0, q.device)
    find_rows(top, torch.zeros(32, dtype=torch.int64), 32)
    residency = Residency.empty(1, 1, q.device)._replace(where=torch.full((1, 1), -1))
    admit_blocks(torch.ones(1, 1, dtype=torch.int64), 1, 1, True, residency, torch.zeros(1, dtype=torch.int64))
    column_sums(q[:, :, :, None], keys, 1.0)
    return time.perf_counter() - start
