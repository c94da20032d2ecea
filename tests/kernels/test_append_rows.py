"""Where new rows are written: every backend against plain dicts of the content of each place."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pqbench.kernels import cpu, reference

BACKENDS = pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])


def tokens(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Keys ``[2, 3, count, 4]`` in which every row of every head has its own number, and their negatives as values."""
    head = torch.arange(6).view(2, 3, 1)
    keys = (torch.arange(first, first + count) * 6 + head)[..., None].expand(2, 3, count, 4).float()
    return keys, -keys


@BACKENDS
@given(held=st.integers(0, 5), count=st.integers(1, 4), room=st.integers(0, 3), known=st.booleans())
def test_rows_go_behind_those_held(backend: ModuleType, held: int, count: int, room: int, known: bool) -> None:
    pairs = torch.zeros(2, 3, held + count + room, 2, 4)
    keys, values = tokens(held, count)
    at = held if known else torch.tensor([held], dtype=torch.int32)
    backend.append_rows(keys, values, pairs[..., 0, :], pairs[..., 1, :], at)
    assert torch.equal(pairs[:, :, held : held + count, 0], keys)
    assert torch.equal(pairs[:, :, held : held + count, 1], values)
    assert int(pairs[:, :, :held].count_nonzero() + pairs[:, :, held + count :].count_nonzero()) == 0


@BACKENDS
@given(sinks=st.integers(0, 3), ring=st.integers(1, 6), first=st.integers(0, 9), counts=st.lists(st.integers(1, 6)))
def test_a_ring_holds_the_newest_tokens(
    backend: ModuleType, sinks: int, ring: int, first: int, counts: list[int]
) -> None:
    first += sinks
    local = torch.full((first + sum(counts) + 5,), -1)
    local[:sinks] = torch.arange(sinks)
    rows = torch.zeros(2, 3, sinks + ring, 2, 4)
    lies = {token: token for token in range(sinks)}
    for count in (min(count, ring) for count in counts):
        place = rows[:, :, sinks:]
        backend.append_rows(*tokens(first, count), place[..., 0, :], place[..., 1, :], first, local, sinks)
        for token in range(first, first + count):
            lies = {old: row for old, row in lies.items() if old < sinks or old > token - ring}
            lies[token] = sinks + token % ring
        first += count
        assert {token: int(row) for token, row in enumerate(local) if row >= 0} == lies
        for token in range(max(sinks, first - ring), first):
            if token in lies:
                keys, values = tokens(token, 1)
                assert torch.equal(rows[:, :, lies[token]], torch.stack([keys, values], 3)[:, :, 0])
