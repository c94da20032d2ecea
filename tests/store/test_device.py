"""The device store against plain lists of rows: append, fetch, keep, drop, leases and meters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pqbench.kernels.buffers import GrowingBuffer, gather_rows
from pqbench.store.base import Store
from pqbench.store.device import DeviceRows, DeviceStore
from tests.support import store_of


def rows(start: int, count: int) -> Tensor:
    """Keys ``[1, 2, count, 2]`` whose component 0 is the position and component 1 the head."""
    position = torch.arange(start, start + count).expand(1, 2, count)
    return torch.stack([position, torch.tensor([0, 1])[None, :, None].expand_as(position)], -1).float()


@given(st.integers(1, 12), st.integers(0, 5), st.data())
def test_positions_follow_rows_through_keep_append_and_drop(prompt: int, steps: int, data: st.DataObject) -> None:
    store: Store = store_of(rows(0, prompt), -rows(0, prompt))
    size = data.draw(st.integers(1, prompt))
    kept = [data.draw(st.permutations(range(prompt)))[:size] for _ in range(2)]
    store.keep(torch.tensor([kept]))
    model = [list(head) for head in kept]
    for step in range(steps):
        store.append(rows(prompt + step, 1), -rows(prompt + step, 1))
        for head in model:
            head.append(prompt + step)
        if data.draw(st.booleans()):
            victims = [data.draw(st.integers(0, len(head) - 1)) for head in model]
            gone = [int(store.positions[0, h, v]) for h, v in enumerate(victims)]
            store.drop(torch.tensor([[[v] for v in victims]]))
            for head, position in zip(model, gone, strict=True):
                head.remove(position)
    assert store.seen == prompt + steps
    assert store.length == len(model[0])
    assert [sorted(head) for head in store.positions[0].tolist()] == [sorted(head) for head in model]
    assert torch.equal(store.keys()[..., 0].long(), store.positions)  # a row's position is the one it was appended at
    assert torch.equal(store.values(), -store.keys())
    assert store.usage.device_bytes == 2 * 2 * store.length * 2 * 4
    assert store.usage.host_bytes == store.usage.link_bytes == 0


def test_an_arranged_store_leaves_the_prompt_to_others() -> None:
    keys, values = GrowingBuffer(rows(0, 4)), GrowingBuffer(-rows(0, 4))
    lease: list[DeviceRows] = []
    first, second = (DeviceStore(keys.fork(), values.fork(), lease) for _ in range(2))
    order = torch.tensor([[[3, 0, 2, 1], [1, 2, 3, 0]]])
    assert first.after_prefill(None, False) is first
    arranged = first.after_prefill(order, False)
    arranged.append(rows(4, 1), -rows(4, 1))
    assert arranged.keys()[0, :, :, 0].tolist() == [[3, 0, 2, 1, 4], [1, 2, 3, 0, 4]]
    assert torch.equal(arranged.keys()[..., 0].long(), arranged.positions)
    second.append(rows(4, 1), -rows(4, 1))
    assert torch.equal(second.keys(), rows(0, 5))


def test_fetch_brings_the_rows_asked_for() -> None:
    store = store_of(rows(0, 6), -rows(0, 6))
    keys, values, chosen = store.fetch(torch.tensor([[[5, 0], [2, 3]]]))
    keys, values = gather_rows(keys, chosen), gather_rows(values, chosen)
    assert keys[0, :, :, 0].tolist() == [[5, 0], [2, 3]]
    assert torch.equal(values, -keys)
    everything, _, chosen = store.fetch(None)
    assert chosen is None
    assert torch.equal(everything, rows(0, 6))
    assert torch.equal(store.keys(2, 4), rows(2, 2))
    assert torch.equal(store.values(4), -rows(4, 2))


def test_a_prompt_cannot_be_dropped_from_in_place() -> None:
    with pytest.raises(RuntimeError, match=r"before keep"):
        store_of(rows(0, 3), rows(0, 3)).drop(torch.zeros(1, 2, 1, dtype=torch.long))


def test_an_older_store_of_the_same_prompt_cannot_write() -> None:
    keys, values, lease = GrowingBuffer(rows(0, 3)), GrowingBuffer(rows(0, 3)), []  # type: ignore[var-annotated]
    older = DeviceStore(keys.fork(), values.fork(), lease)
    older.append(rows(3, 1), rows(3, 1))
    younger = DeviceStore(keys.fork(), values.fork(), lease)
    with pytest.raises(RuntimeError, match="stale"):
        older.append(rows(4, 1), rows(4, 1))
    younger.append(rows(9, 1), rows(9, 1))
    assert torch.equal(younger.keys()[:, :, :3], rows(0, 3))


def test_separated_stores_of_a_prompt_write_side_by_side() -> None:
    keys, values, lease = GrowingBuffer(rows(0, 3)), GrowingBuffer(rows(0, 3)), []  # type: ignore[var-annotated]
    stores = [DeviceStore(keys.fork(), values.fork(), lease) for _ in range(3)]
    for store in stores[:2]:
        store.separate()
    for i, store in enumerate(stores):
        store.append(rows(10 * i, 1), -rows(10 * i, 1))
    for i, store in enumerate(stores):
        assert torch.equal(store.keys(), torch.cat([rows(0, 3), rows(10 * i, 1)], 2))
        assert torch.equal(store.values()[:, :, 3:], -rows(10 * i, 1))


def test_an_evicting_store_owns_its_memory() -> None:
    keys, values, lease = GrowingBuffer(rows(0, 4)), GrowingBuffer(rows(0, 4)), []  # type: ignore[var-annotated]
    evicting = DeviceStore(keys.fork(), values.fork(), lease)
    evicting.keep(torch.tensor([[[3, 1], [3, 1]]]))
    other = DeviceStore(keys.fork(), values.fork(), lease)
    other.append(rows(4, 1), rows(4, 1))
    evicting.append(rows(4, 1), rows(4, 1))  # both may write
    evicting.drop(torch.tensor([[[0], [0]]]))
    assert sorted(evicting.positions[0, 0].tolist()) == [1, 4]
    assert torch.equal(other.keys(), rows(0, 5))
    assert torch.equal(keys.view(), rows(0, 4))


@pytest.mark.parametrize("known", [True, False])
def test_rows_are_written_where_the_device_says(known: bool) -> None:
    store = store_of(rows(0, 3), -rows(0, 3))
    store.writer.reserve(300)
    place = store.keys().data_ptr()
    number = torch.zeros(1, dtype=torch.int32)
    store.extent.number = None if known else number
    for at in range(3, 300):
        store.writer.prepare(1)
        number.fill_(at)
        store.writer.write(rows(at, 1), -rows(at, 1))
        store.writer.written(1)
    assert (store.length, store.seen) == (300, 300)
    assert torch.equal(store.keys(), rows(0, 300))
    assert torch.equal(store.values(), -rows(0, 300))
    assert store.keys().data_ptr() == place  # there was room from the start
    keys, _, _ = store.fetch(None)
    assert keys.data_ptr() == place
    assert keys.shape[2] == 300
