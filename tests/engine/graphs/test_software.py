"""The recording that replaces a CUDA graph on the CPU: it freezes exactly what a graph freezes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pqbench.engine.graphs.software import SoftwareGraph
from pqbench.errors import ModelError
from pqbench.kernels import reference
from pqbench.kernels.backend import Kernels, kernels

CPU = torch.device("cpu")


def body() -> Kernels:
    return kernels(CPU, "reference")


def test_a_replay_computes_from_what_the_tensors_hold_now() -> None:
    x, total = torch.arange(6.0).view(2, 3), torch.zeros(2)
    graph = SoftwareGraph(body())

    def work() -> Tensor:
        rows = x.t().reshape(3, 2)[1:]  # views and a copy
        total.add_(x.sum(1))
        return torch.cat([rows.exp(), total[None]]) @ torch.ones(2, 2)

    result = graph.capture(work)
    for step in range(1, 4):
        x.mul_(0.5)
        before = total.clone()
        if step == 1:
            x.mul_(2.0)  # the first step ran while it was recorded
            before.zero_()
        graph.replay()
        expected = torch.cat([x.t()[1:].exp(), (before + x.sum(1))[None]]) @ torch.ones(2, 2)
        torch.testing.assert_close(result, expected)


def test_a_number_of_the_host_is_frozen_and_one_in_memory_is_not() -> None:
    x, length, number = torch.arange(8.0)[None, None, :, None], 3, torch.tensor([3], dtype=torch.int32)
    q = torch.zeros(1, 1, 1, 1)
    graph = SoftwareGraph(body())

    def work() -> Tensor:
        frozen = x[:, :, :length].mean(2, keepdim=True)
        return torch.stack([frozen, reference.dense_attention(q, x, x, 1.0, number)])

    result = graph.capture(work)
    assert result.flatten().tolist() == [1.0, 1.0]
    graph.replay()
    length = 5
    number.fill_(5)
    graph.replay()
    assert result.flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("read", ["item", "bool", "nonzero"])
def test_reading_the_device_on_the_host_is_refused(read: str) -> None:
    x = torch.ones(3)

    def work() -> Tensor:
        if read == "item":
            return x * x.sum().item()
        if read == "bool":
            return x if (x > 0).all() else -x
        return x[x > 0]

    with pytest.raises(ModelError, match="reads on the host"):
        SoftwareGraph(body()).capture(work)


def test_the_kernels_are_themselves_again_afterwards() -> None:
    before = {name: getattr(reference, name) for name in vars(Kernels) if not name.startswith("_")}
    graph = SoftwareGraph(body())
    with pytest.raises(ValueError, match="planted"):
        graph.capture(_fails)
    assert {name: getattr(reference, name) for name in before} == before


def _fails() -> Tensor:
    raise ValueError("planted")
