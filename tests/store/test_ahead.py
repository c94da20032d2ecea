"""Rows that are fetched before the step that needs them: always the right rows, and each at most once."""

from __future__ import annotations

import pytest
import torch

from pqbench.kernels.buffers import gather_rows
from tests.store.support import BATCH, BUDGET, HEADS, PROMPT, ROW, DirectLink, open_store, tokens

STEPS = 120


@pytest.mark.parametrize("cache", ["none", "lfu"])
@pytest.mark.parametrize("captured", [False, True])
def test_rows_that_were_asked_for_ahead(captured: bool, cache: str) -> None:
    """This includes the token whose place in the ring is meanwhile taken by the newest token, in a ring that was
    rebuilt."""
    keys, values = tokens(PROMPT + STEPS)
    generator, used = torch.Generator().manual_seed(2), 0
    with DirectLink(debug=True) as link:
        store = open_store(keys, values, link, cache)
        if captured:
            store.writer.reserve(PROMPT + STEPS)
        number = torch.zeros(1, dtype=torch.int32)
        for at in range(PROMPT, PROMPT + STEPS):
            split = BUDGET.resolve(at + 1, PROMPT)
            first, stop = split.middle(at + 1)
            rows = torch.randint(first, stop, (BATCH, HEADS, split.top_k), generator=generator)
            leaving = at - store._holdings.pool.ring
            if store._holdings.pool.ring and first <= leaving < stop:
                rows[..., 0] = leaving
            sinks, window = torch.arange(split.sink), torch.arange(stop, at + 1)
            whole = [part.expand(BATCH, HEADS, -1) for part in (sinks, window)]
            ahead = torch.cat([whole[0], rows, whole[1]], 2)
            asked = split.sink + split.top_k
            if captured:
                store.writer.prepare(1)
                number.fill_(at)
                store.extent.number = number
            store.fetch_ahead(ahead, torch.tensor([asked], dtype=torch.int32) if captured else asked)
            used += store._finder._ahead is not None
            if captured:
                store.writer.write(keys[:, :, at : at + 1], values[:, :, at : at + 1])
                store.writer.written(1)
            else:
                store.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
            anew = torch.rand(BATCH, HEADS, generator=generator) < 0.4
            other = torch.randint(first, stop, rows.shape, generator=generator)
            wanted = torch.cat([whole[0], torch.where(anew[:, :, None], other, rows), whole[1]], 2)
            found, _, places = store.fetch(wanted, None, anew)
            assert places is not None
            assert torch.equal(gather_rows(found, places), gather_rows(keys, wanted))
        store.settle()
        assert used > STEPS // 2 if cache == "none" else used == 0


def test_rows_that_have_arrived_are_not_brought_again() -> None:
    keys, values = tokens(PROMPT + 1)
    rows = torch.arange(20, 60).expand(BATCH, HEADS, -1)
    moved = {}
    for ahead in (False, True):
        with DirectLink() as link:
            store = open_store(keys, values, link)
            store.append(keys[:, :, PROMPT - 1 : PROMPT], values[:, :, PROMPT - 1 : PROMPT])
            store.fetch(rows)
            before = store.usage.bytes_to_device
            if ahead:
                store.fetch_ahead(rows, 40)
            store.append(keys[:, :, PROMPT:], values[:, :, PROMPT:])
            store.fetch(rows, None, torch.zeros(BATCH, HEADS, dtype=torch.bool) if ahead else None)
            moved[ahead] = store.usage.bytes_to_device - before
            store.settle()
    assert moved[True] == moved[False] == 40 * BATCH * HEADS * ROW
