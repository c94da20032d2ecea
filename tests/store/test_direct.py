"""A host store whose kernels read host memory directly, with numbers that only the device knows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pqbench.kernels.buffers import gather_rows
from pqbench.store.link.local import LocalLink
from tests.store.support import (
    BATCH,
    BUDGET,
    CACHES,
    HEADS,
    PROMPT,
    STEPS,
    DirectLink,
    fetched,
    open_store,
    run,
    selections,
    tokens,
)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("cache", CACHES)
def test_rows_are_written_where_the_device_says(cache: str, direct: bool) -> None:
    keys, values = tokens(PROMPT + STEPS)
    number = torch.zeros(1, dtype=torch.int32)
    with (DirectLink if direct else LocalLink)(debug=True) as link:
        store = open_store(keys, values, link, cache)
        store.extent.number = number
        store.writer.reserve(PROMPT + STEPS)
        for step, indices in enumerate(selections()):
            at = PROMPT + step
            store.writer.prepare(1)
            number.fill_(at)
            store.writer.write(keys[:, :, at : at + 1], values[:, :, at : at + 1])
            store.writer.written(1)
            if indices is not None:
                assert torch.equal(fetched(store, indices)[1], gather_rows(values, indices))
            assert (
                store._holdings.pool.ring == BUDGET.resolve(PROMPT + STEPS, PROMPT).window + 12
            )  # for the largest window, from the start
        with pytest.raises(RuntimeError, match="no fixed number"):
            store.fetch(None)
        store.settle()
        assert torch.equal(store.stored_keys(), keys)


@pytest.mark.parametrize("cache", CACHES)
def test_kernels_that_read_the_host_bring_and_count_the_same(cache: str) -> None:
    keys, values = tokens(PROMPT + STEPS)
    with LocalLink() as link:
        wanted = run(open_store(keys, values, link, cache), keys, values)
    for overlap, debug, reserve in ((True, False, STEPS), (False, False, 30), (True, True, 0)):
        with DirectLink(debug) as link:
            assert run(open_store(keys, values, link, cache, overlap, reserve=reserve), keys, values) == wanted


def test_with_room_for_all_tokens_no_memory_is_taken_while_decoding() -> None:
    keys, values = tokens(PROMPT + STEPS)
    with DirectLink() as link:
        store = open_store(keys, values, link, "lfu", reserve=STEPS)
        buffers = [chunk.rows.data_ptr() for chunk in store._holdings.host._chunks]
        run(store, keys, values)
        assert [chunk.rows.data_ptr() for chunk in store._holdings.host._chunks] == buffers
        assert len(store._holdings.host.tokens()) == 1  # one launch reads both


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("cache", CACHES)
def test_keys_alone_are_those_of_the_rows_asked_for(cache: str, direct: bool) -> None:
    keys, values = tokens(PROMPT + 30)
    with (DirectLink if direct else LocalLink)(debug=True) as link:
        store = open_store(keys, values, link, cache)
        for at in range(PROMPT, PROMPT + 30):
            store.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
            rows = torch.randint(0, at + 1, (BATCH, HEADS, 17))
            assert torch.equal(store.keys_at(rows), gather_rows(keys, rows))
        moved, opening = store.usage.bytes_to_device, store.usage.opening_bytes
        assert moved > 0
        store.usage.open()
        assert (store.usage.bytes_to_device, store.usage.opening_bytes) == (0, opening + moved)
        store.settle()


def test_host_buffers_are_released_when_their_store_is_gone() -> None:
    released: list[int] = []

    class Noting(DirectLink):
        def release(self, buffers: Sequence[Tensor]) -> None:
            released.extend(buffer.data_ptr() for buffer in buffers)

    keys, values = tokens(PROMPT)
    with Noting() as link:
        store = open_store(keys, values, link, reserve=20)
        wanted = [buffer.data_ptr() for buffer in store._holdings.host._buffers]
        assert not released
        del store
        assert released == wanted
