"""Finding, copying and counting rows in one call: every backend against a plain dict of the content of each place."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pqbench.kernels import cpu, reference
from pqbench.kernels.reference.rows import Blocks, HostTokens

BACKENDS = pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
BATCH, HEADS, PAIRS, LENGTH, SIZE, SLOTS, FIRST = 2, 2, 4, 30, 4, 3, 9


def world(per_head: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Blocks]:
    """Rows by (head, token), a table of the places of rows, and blocks in some of its slots."""
    generator = torch.Generator().manual_seed(seed)
    pair, token = torch.meshgrid(torch.arange(PAIRS), torch.arange(LENGTH), indexing="ij")
    rows = torch.stack([pair, token], -1).float()[:, :, None, :].repeat(1, 1, 2, 1)  # [B * H, S, 2, 2]
    local = torch.full((LENGTH + 3,), -1)
    local[torch.randperm(LENGTH, generator=generator)[:FIRST]] = torch.arange(FIRST)
    where = torch.full((PAIRS if per_head else BATCH, LENGTH // SIZE + 2), -1)
    for owner in where:
        owner[torch.randperm(LENGTH // SIZE, generator=generator)[:SLOTS]] = torch.randperm(SLOTS, generator=generator)
    resident = FIRST + SLOTS * SIZE
    table = torch.full((PAIRS * resident + PAIRS * 8, 2, 2), -1.0)
    for p in range(PAIRS):
        for t in range(LENGTH):
            if local[t] >= 0:
                table[p * resident + local[t]] = rows[p, t]
            slot = where[p // (PAIRS // len(where)), t // SIZE]
            if slot >= 0:
                table[p * resident + FIRST + slot * SIZE + t % SIZE] = rows[p, t]
    return rows.view(BATCH, HEADS, LENGTH, 2, 2), local, table, Blocks(where, SIZE, FIRST, torch.zeros_like(where))


@BACKENDS
@given(
    number=st.integers(0, 8),
    cached=st.booleans(),
    per_head=st.booleans(),
    seed=st.integers(0, 999),
    cuts=st.lists(st.integers(0, LENGTH), min_size=3, max_size=3).map(sorted),
    counted=st.integers(0, 8),
)
def test_slots_hold_the_rows_asked_for(
    backend: ModuleType, number: int, cached: bool, per_head: bool, seed: int, cuts: list[int], counted: int
) -> None:
    rows, local, table, blocks = world(per_head, seed)
    resident = FIRST + SLOTS * SIZE
    indices = torch.randint(0, LENGTH, (BATCH, HEADS, number), generator=torch.Generator().manual_seed(seed + 1))
    tally, slots = torch.zeros(2, dtype=torch.int64), torch.empty(0)
    first, second, third = cuts
    for start, middle, stop in ((0, first, second), (second, third, LENGTH)):  # four buffers, two at a time
        tokens = HostTokens(
            start, stop, rows[:, :, start:middle].contiguous(), middle, rows[:, :, middle:].contiguous()
        )
        slots = backend.fetch_rows(
            indices, local, table, resident, PAIRS * resident, tokens, tally, blocks if cached else None, counted
        )
    missed, asked = 0, torch.zeros_like(blocks.counts)
    for p, tokens_ in enumerate(indices.flatten(0, 1).tolist()):
        for j, t in enumerate(tokens_[:counted]):
            at = int(slots.flatten(0, 1)[p, j])
            assert torch.equal(table[at], rows.flatten(0, 1)[p, t])
            owner = p // (PAIRS // len(blocks.where))
            held = cached and blocks.where[owner, t // SIZE] >= 0
            asked[owner, t // SIZE] += int(local[t] < 0)
            missed += int(local[t] < 0 and not held)
            assert (at == PAIRS * resident + p * number + j) == (local[t] < 0 and not held)
    assert tally.tolist() == [missed, int(asked.sum())]
    assert torch.equal(blocks.counts, asked if cached else torch.zeros_like(asked))


@BACKENDS
@given(per_head=st.booleans(), seed=st.integers(0, 999))
def test_rows_of_blocks_that_left_are_saved(backend: ModuleType, per_head: bool, seed: int) -> None:
    rows, local, table, blocks = world(per_head, seed)
    resident, generator = FIRST + SLOTS * SIZE, torch.Generator().manual_seed(seed + 1)
    staging = PAIRS * resident
    indices = torch.randint(0, LENGTH, (BATCH, HEADS, 8), generator=generator)
    tokens = HostTokens(0, LENGTH, rows, LENGTH, rows[:, :, :0])
    slots = backend.fetch_rows(indices, local, table, resident, staging, tokens, torch.zeros(2).long(), blocks)
    before = slots.clone()
    blocks.where[torch.rand(blocks.where.shape, generator=generator) < 0.5] = -1
    blocks.where[:, -1] = 0  # a block that was not requested replaces another
    gone = blocks.where[:, :-1] == 0
    blocks.where[:, :-1][gone] = -1
    backend.vacate_rows(indices, slots, table, resident, staging, blocks)
    for p in range(PAIRS):  # rows that are no longer held are overwritten
        for slot in set(range(SLOTS)) - set(blocks.where[p // (PAIRS // len(blocks.where)), :-1].tolist()):
            table[p * resident + FIRST + slot * SIZE :][:SIZE] = float("nan")
    expected = rows.flatten(0, 1)[torch.arange(PAIRS)[:, None], indices.flatten(0, 1)]
    assert torch.equal(table[slots.flatten(0, 1)], expected)
    assert torch.equal(slots[before >= staging], before[before >= staging])


@BACKENDS
def test_a_token_that_does_not_exist_is_an_error(backend: ModuleType) -> None:
    rows, local, table, _ = world(False, 0)
    tokens = HostTokens(0, LENGTH, rows, LENGTH, rows[:, :, :0])
    with pytest.raises(IndexError):
        backend.fetch_rows(
            torch.full((BATCH, HEADS, 1), LENGTH + 9), local, table, 21, 84, tokens, torch.zeros(2, dtype=torch.int64)
        )
