"""Rows of a prompt that are still on the device while the prompt is copied to the host: they need no transfer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pqbench.kernels.buffers import GrowingBuffer, gather_rows
from pqbench.store.host.rows import HostPrompt
from pqbench.store.host.store import HostStore
from pqbench.store.link.base import Link
from pqbench.store.link.local import LocalLink
from pqbench.store.tiers import HostTier
from tests.store.test_host import PROMPT, STEPS, split_of, tokens


@pytest.fixture
def rows() -> tuple[Tensor, Tensor]:
    """Keys and values of a whole prompt and of the steps after it."""
    return tokens(PROMPT + STEPS)


def near_store(rows: tuple[Tensor, Tensor], link: Link) -> tuple[HostStore, HostPrompt]:
    """A store whose prompt keeps its device rows, as with a link to a GPU."""
    near = rows[0][:, :, :PROMPT].clone(), rows[1][:, :, :PROMPT].clone()
    prompt = HostPrompt.offload(link, *near)
    prompt.near = near
    return HostStore(prompt, split_of, 12), prompt


def test_rows_that_are_near_are_read_there(rows: tuple[Tensor, Tensor]) -> None:
    with LocalLink() as link:
        store, prompt = near_store(rows, link)
        for start, stop in ((0, None), (3, 90), (5, 5), (PROMPT - 1, PROMPT)):
            end = PROMPT if stop is None else stop
            assert torch.equal(store.keys(start, stop), rows[0][:, :, start:end])
            assert torch.equal(store.values(start, stop), rows[1][:, :, start:end])
        assert store.usage.bytes_to_device == 0
        prompt.near = None
        assert torch.equal(store.keys(3, 90), rows[0][:, :, 3:90])
        assert store.usage.bytes_to_device > 0


def test_what_is_kept_of_near_rows_moves_nothing(rows: tuple[Tensor, Tensor]) -> None:
    indices = torch.stack([torch.randperm(PROMPT)[:20].sort().values for _ in range(4)]).view(2, 2, 20)
    with LocalLink() as link:
        store, prompt = near_store(rows, link)
        near = store.keep(indices)
        prompt.near = None
        far = store.keep(indices)
        for kept in (near, far):
            assert torch.equal(kept.keys(), gather_rows(rows[0], indices))
            assert torch.equal(kept.values(), gather_rows(rows[1], indices))
            assert torch.equal(kept.positions, indices)
            assert kept.seen == PROMPT
        assert (near.usage.opening_bytes, far.usage.opening_bytes) == (0, near.keys().nbytes + near.values().nbytes)


def test_steps_read_the_new_tokens_whatever_is_near(rows: tuple[Tensor, Tensor]) -> None:
    keys, values = rows
    with LocalLink() as link:
        store, _ = near_store(rows, link)
        for step in range(40):
            at = PROMPT + step
            store.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
            assert torch.equal(store.keys(at - 20), keys[:, :, at - 20 : at + 1])
            assert torch.equal(store.keys(0, PROMPT + 1), keys[:, :, : PROMPT + 1])
        store.settle()


def test_a_host_keeps_no_second_copy(rows: tuple[Tensor, Tensor]) -> None:
    placement = HostTier(link="local").open(torch.device("cpu"))
    prompt = placement.prompt(GrowingBuffer(rows[0]), GrowingBuffer(rows[1]))
    assert prompt.tensors() == []
    prompt.let_go()
    assert torch.equal(prompt.store(None).keys(), rows[0])
    placement.close()
