"""Where tokens lie on the device: both backends against a plain dict of the place of each token."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pqbench.kernels import cpu, reference

BACKENDS = pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 12), st.integers(1, 40))


@BACKENDS
@given(shape=SHAPES, block=st.integers(1, 7), per_head=st.booleans(), blocks=st.booleans(), seed=st.integers(0, 999))
def test_every_token_is_found_where_it_was_put(
    backend: ModuleType, shape: tuple[int, int, int, int], block: int, per_head: bool, blocks: bool, seed: int
) -> None:
    batch, heads, count, length = shape
    generator = torch.Generator().manual_seed(seed)
    owners, total = (batch * heads if per_head else batch), batch * heads
    resident = 100
    local = torch.where(torch.rand(length, generator=generator) < 0.3, torch.arange(length), -1)
    slots = -(-length // block)
    where = torch.stack([torch.randperm(slots, generator=generator) for _ in range(owners)])
    where[torch.rand(where.shape, generator=generator) < 0.5] = -1
    indices = torch.randint(0, length, (batch, heads, count), generator=generator)
    found = backend.find_rows(indices, local, resident, *((where, block, length) if blocks else ()))

    table = {
        (head, token): head * resident + int(local[token])
        for head in range(total)
        for token in range(length)
        if local[token] >= 0
    }
    counts = torch.zeros(owners, slots, dtype=torch.int64)
    for head in range(total):
        owner = head // (total // owners)
        for token in range(length if blocks else 0):
            if (head, token) not in table and where[owner, token // block] >= 0:
                table[head, token] = (
                    head * resident + length + int(where[owner, token // block]) * block + token % block
                )
    expected = [table.get((n // max(count, 1), token), -1) for n, token in enumerate(indices.flatten().tolist())]
    asked = 0
    for n, token in enumerate(indices.flatten().tolist()):
        if local[token] < 0:
            asked += 1
            counts[n // count // (total // owners), token // block] += 1
    assert found.slots.flatten().tolist() == expected
    assert found.missing.tolist() == [n for n, slot in enumerate(expected) if slot < 0]
    assert found.asked == asked
    assert (found.counts is None) == (not blocks)
    assert found.counts is None or torch.equal(found.counts, counts)


@BACKENDS
@pytest.mark.parametrize("token", [5, 1 << 33])
def test_a_token_that_does_not_exist_is_an_error(backend: ModuleType, token: int) -> None:
    with pytest.raises(IndexError):
        backend.find_rows(torch.tensor([[[0, token]]]), torch.zeros(5, dtype=torch.int64), 8)
    with pytest.raises(IndexError):  # of a block beyond the table
        backend.find_rows(
            torch.tensor([[[0, token]]]), torch.full((20,), -1), 8, torch.zeros(1, 2, dtype=torch.int64), 2
        )
