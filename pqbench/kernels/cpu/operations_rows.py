"""Copying and finding rows on the CPU, and the policy of the block cache."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.kernels import reference
from pqbench.kernels.cpu.blocks import choose
from pqbench.kernels.cpu.calls import address, check_rows, strides, threads_for
from pqbench.kernels.cpu.rows import copy_rows, find
from pqbench.kernels.number import Number
from pqbench.kernels.reference.blocks import Residency


def _row_bytes(x: Tensor) -> int:
    """Bytes of a row ``[...]`` of ``x`` ``[B, H, S, ...]``; 0 if the row is not contiguous."""
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
    with threads_for(target.numel() * target.element_size() // 2):
        valid = copy_rows(
            source.data_ptr(),
            *strides(source),
            rows.data_ptr(),
            target.data_ptr(),
            *strides(target),
            batch,
            heads,
            source.shape[2],
            count,
            size,
        )
    check_rows(valid, source)


def find_rows(
    indices: Tensor, local: Tensor, resident: int, where: Tensor | None = None, block: int = 1, first: int = 0
) -> reference.Found:
    """Find tokens ``[B, H, n]`` in a table of ``resident`` rows per head; see
    :func:`pqbench.kernels.reference.rows.find_rows`."""
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
        address(table),
        batch * heads // owners,
        blocks,
        block,
        first,
        slots.data_ptr(),
        missing.data_ptr(),
        address(counts),
    )
    if not valid:
        raise IndexError(f"tokens must lie between 0 and {len(local) - 1}")
    return reference.Found(slots, missing[:absent], counts)


def admit_blocks(
    counts: Tensor, complete: Number, admit: int, frequent: bool, residency: Residency, tally: Tensor
) -> Tensor:
    """Choose the blocks that enter a cache; see :func:`pqbench.kernels.reference.blocks.admit_blocks`."""
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
