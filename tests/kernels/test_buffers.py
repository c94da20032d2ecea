"""Growing buffers and swap_remove against plain Python lists."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pqbench.kernels.buffers import GrowingBuffer, NibbleBuffer, gather_rows, swap_remove


def rows(start: int, count: int) -> Tensor:
    """Rows ``[2, 2, count, 3]`` in which every row of every head has its own number."""
    ids = torch.arange(start, start + count) * 4
    return (ids[None, None] + torch.tensor([[0, 1], [2, 3]])[..., None])[..., None].expand(2, 2, count, 3).float()


actions = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 9)),
        st.tuples(st.just("truncate"), st.integers(0, 30)),
        st.tuples(st.just("fork"), st.just(0)),
    ),
    max_size=25,
)


@given(st.integers(0, 5), st.integers(0, 4), actions)
def test_growing_buffer_is_a_list(initial: int, slack: int, todo: list[tuple[str, int]]) -> None:
    buffer, model = GrowingBuffer(rows(0, initial), slack), list(range(initial))
    counter = initial
    for action, number in todo:
        if action == "append":
            buffer.append(rows(counter, number))
            model += range(counter, counter + number)
            counter += number
        elif action == "truncate":
            buffer.truncate(number)
            model = model[:number]
        else:
            buffer = buffer.fork()
        assert len(buffer) == len(model)
        expected = torch.stack([rows(i, 1)[:, :, 0] for i in model], 2) if model else rows(0, 0)
        assert torch.equal(buffer.view(), expected)
        assert buffer.bytes == len(model) * 2 * 2 * 3 * 4
        assert torch.equal(buffer.view(1, len(model) - 1), expected[:, :, 1 : max(0, len(model) - 1)]) or len(model) < 2


def test_rows_are_copied_in() -> None:
    source = rows(0, 3)[..., :1].clone()
    buffer = GrowingBuffer(source)
    source.zero_()
    assert torch.equal(buffer.view(), rows(0, 3)[..., :1])


def test_a_fork_appends_without_changing_its_origin() -> None:
    origin = GrowingBuffer(rows(0, 3), slack=2)
    fork = origin.fork()
    fork.append(rows(3, 1))  # into the shared slack
    fork.append(rows(4, 5))  # beyond it: memory of its own
    assert (len(origin), len(fork)) == (3, 9)
    assert torch.equal(origin.view(), rows(0, 3))
    assert torch.equal(fork.view(), rows(0, 9))


def test_like_is_empty_with_room() -> None:
    buffer = GrowingBuffer.like(rows(0, 3).half(), 7)
    assert len(buffer) == 0
    buffer.append(rows(0, 7).half())
    assert torch.equal(buffer.view(), rows(0, 7).half())


def test_rows_of_some_sequences() -> None:
    buffer = GrowingBuffer(rows(0, 5))
    part = buffer.rows(torch.tensor([1]), 2)
    assert torch.equal(part.view(), rows(0, 5)[1:, :, 2:])
    part.append(rows(5, 1)[1:])
    assert torch.equal(buffer.view(), rows(0, 5))
    assert torch.equal(buffer.rows(slice(None), 2).view(), rows(2, 3))


@given(st.integers(1, 14), st.data())
def test_swap_remove_against_a_list(length: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, length))
    drawn = [[data.draw(st.permutations(range(length)))[:count] for _ in range(2)] for _ in range(2)]
    buffer, other = GrowingBuffer(rows(0, length)), GrowingBuffer(rows(0, length)[..., 0].clone())
    swap_remove(buffer, torch.tensor(drawn))
    swap_remove(other, torch.tensor(drawn))
    for b in range(2):
        for h in range(2):
            left = set(range(length)) - set(drawn[b][h])
            expected = sorted(float(rows(i, 1)[b, h, 0, 0]) for i in left)
            assert sorted(buffer.view()[b, h, :, 0].tolist()) == expected
            untouched = [i for i in range(length - count) if i in left]  # rows before the tail stay where they are
            assert all(float(buffer.view()[b, h, i, 0]) == float(rows(i, 1)[b, h, 0, 0]) for i in untouched)
    assert torch.equal(buffer.view()[..., 0], other.view())  # buffers stay aligned


def test_gather_rows_against_loops() -> None:
    data, indices = rows(0, 6), torch.tensor([[[0, 5], [3, 3]], [[1, 2], [4, 0]]])
    result = gather_rows(data, indices)
    for b in range(2):
        for h in range(2):
            for n in range(2):
                assert torch.equal(result[b, h, n], data[b, h, indices[b, h, n]])
    assert torch.equal(gather_rows(data[..., 0], indices), result[..., 0])


@given(st.integers(0, 300), st.lists(st.integers(0, 5), max_size=12), st.integers(0, 9))
def test_a_nibble_buffer_is_a_list_at_half_a_byte_each(initial: int, added: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(16, (2, 3, initial + sum(added)), generator=generator).byte()
    buffer, length = NibbleBuffer(numbers[:, :, :initial]), initial
    for count in added:
        buffer.append(numbers[:, :, length : length + count])
        length += count
        assert len(buffer) == length
    pairs = buffer.pairs().tolist()
    assert buffer.bytes == 2 * 3 * ((length + 1) // 2)
    for b, h, s in np.ndindex(2, 3, length):
        byte = pairs[b][h][s // 2]
        assert (byte // 16 if s % 2 else byte % 16) == int(numbers[b, h, s])
