"""The fake device finds planted faults, and counts nothing that a GPU would not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed: pip install pqbench[gpu]")
import triton.language as tl  # noqa: E402

from pqbench.kernels import gpu  # noqa: E402
from tests.fake_cuda.device import CUDA, Device, fake_device  # noqa: E402
from tests.fake_cuda.tally import COPY, MOST, SYNC, TORCH, TRITON, RunawayError  # noqa: E402


@triton.jit
def specialised(x: tl.tensor, length: tl.tensor, block: tl.constexpr) -> None:
    """Compiled again for some lengths."""


@triton.jit(do_not_specialize=["length"])
def general(x: tl.tensor, length: tl.tensor, block: tl.constexpr) -> None:
    """One code for all lengths."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A fake device without faults so far."""
    with fake_device(monkeypatch) as made:
        yield made


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, device=CUDA)


def test_a_launch_on_pageable_memory_is_found(device: Device) -> None:
    source, indices, target = torch.ones(1, 2, 50, 8), ones(1, 2, 5).long(), ones(1, 2, 5, 8)
    gpu.gather(source.pin_memory()[:, :, 10:], indices, target)
    assert not device.tally.faults
    gpu.gather(source, indices, target)
    (fault,) = device.tally.faults
    assert "pqbench/kernels/gpu/rows.py" in fault
    assert "pageable host memory as source" in fault


def test_a_pinned_buffer_is_known_by_how_it_was_made(device: Device) -> None:
    assert torch.empty(4, pin_memory=True).is_pinned()
    assert torch.empty(4, pin_memory=True)[1:].is_pinned()
    assert torch.ones(4).pin_memory().is_pinned()
    assert not torch.ones(4).is_pinned()


WAITS: dict[str, Callable[[Tensor], object]] = {
    "nonzero": lambda x: x.nonzero(),
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x.all()),
    "int": lambda x: int(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda _: torch.ones(3).to(CUDA),
    "pageable, told not to block": lambda x: x.copy_(torch.ones(3), non_blocking=True),
    "pinned, not told": lambda x: x.copy_(torch.ones(3).pin_memory()),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "index from the host": lambda x: x[torch.tensor([0, 1])],
    "list as an index": lambda x: x[[0, 1]],
    "a number into one place": lambda x: x.__setitem__(0, 5.0),
    "tensor of a list": lambda _: torch.tensor([1.0, 2.0], device=CUDA),
    "bincount": lambda x: torch.bincount(x.int()),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "synchronize": lambda _: torch.cuda.synchronize(),
    "event": lambda _: torch.cuda.current_stream().record_event().synchronize(),
    "stream": lambda _: torch.cuda.Stream().synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_counted_once(name: str, device: Device) -> None:
    x = ones(3)
    with device.tally.part() as counts:
        WAITS[name](x)
    assert counts.of(SYNC) == 1, counts.listed(SYNC)


def test_what_does_not_wait_is_not_counted(device: Device) -> None:
    x, pinned, event = ones(3, 4), torch.empty(3, 4, pin_memory=True), torch.cuda.Event(enable_timing=True)
    with device.tally.part() as counts:
        x.copy_(pinned, non_blocking=True)
        pinned.copy_(x, non_blocking=True)
        event.record()
        torch.cuda.current_stream().wait_event(event)
        event.query()
        x[x > 0] = 1.0
        x[:, 1] = 2.0
        torch.ones(3)[torch.tensor([0, 1])].tolist()
    assert counts.of(SYNC) == 0, counts.listed(SYNC)
    assert counts.of(COPY) == 2


def test_what_is_known_to_have_passed_is_not_waited_for(device: Device) -> None:
    first, last, elsewhere = (torch.cuda.Event() for _ in range(3))
    first.record()
    elsewhere.record(torch.cuda.Stream())
    last.record()
    with device.tally.part() as counts:
        last.synchronize()
        first.synchronize()
        last.synchronize()
    assert counts.of(SYNC) == 1
    with device.tally.part() as counts:
        elsewhere.synchronize()
        first.record()
        first.synchronize()
        first.record()
        first.query()
        first.synchronize()
        last.record()
        ones(1).item()
        last.synchronize()
    assert counts.of(SYNC) == 3, counts.listed(SYNC)


def test_launches_are_counted_and_views_are_not(device: Device) -> None:
    x = ones(3, 4)
    with device.tally.part() as counts:
        x[1:].t().unsqueeze(0).expand(2, -1, -1)
        torch.empty(5, device=CUDA)
        x.new_empty(5)
        x.contiguous()
        x.reshape(12)
        x.to(CUDA)
        x[:0] + 1
    assert counts.launches == 0, counts.listed(TORCH)
    with device.tally.part() as counts:
        x + 1
        x.t().contiguous()
        torch.zeros(3, device=CUDA)
        x.half()
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert counts.of(TORCH) == 5, counts.listed(TORCH)


def test_tensors_of_two_devices_in_one_operation_are_found(device: Device) -> None:
    result = ones(3) * torch.ones(3)
    assert result.device == CUDA
    (fault,) = device.tally.faults
    assert "mul mixes tensors on cuda:0 with a host tensor of shape [3]" in fault
    device.tally.faults.clear()
    ones(3) * torch.tensor(2.0)  # a single number is passed to the kernel
    assert not device.tally.faults


def test_a_generator_of_another_device_is_found(device: Device) -> None:
    torch.rand(3, generator=torch.Generator(CUDA).manual_seed(1), device=CUDA)
    assert not device.tally.faults
    torch.rand(3, generator=torch.Generator().manual_seed(1), device=CUDA)
    assert "draws from a generator that is elsewhere" in str(device.tally.faults)


def test_a_specialised_length_is_found(device: Device) -> None:
    x = ones(64)
    for length in (15, 16, 17, 1):
        specialised[(1,)](x, length, block=16)
        general[(1,)](x, length, block=16)
    assert len(device.tally.keys["specialised"]) == 3
    assert len(device.tally.keys["general"]) == 1
    general[(1,)](x, 2**40, block=16)  # another width of integer is another code
    general[(1,)](x[1:], 5, block=16)  # so is a pointer that is not aligned,
    general[(1,)](x.half(), 5, block=16)  # another type,
    general[(1,)](x, 5, block=32)  # a constant,
    general[(1,)](x, 5, block=16, num_warps=8)  # or an option
    assert len(device.tally.keys["general"]) == 6
    assert device.tally.counts.of(TRITON) == 13


def test_a_grid_that_is_too_large_is_found(device: Device) -> None:
    general[(2**31 - 1, 65535, 65535)](ones(1), 1, block=16)
    assert not device.tally.faults
    general[(1, 65536)](ones(1), 1, block=16)
    general[(2**31,)](ones(1), 1, block=16)
    general[(0,)](ones(1), 1, block=16)
    assert len(device.tally.faults) == 3


def test_copies_row_by_row_end_a_run(device: Device) -> None:
    x, pinned = ones(MOST + 1, 3), torch.empty(MOST + 1, 3, pin_memory=True)
    with pytest.raises(RunawayError):
        [target.copy_(row, non_blocking=True) for row, target in zip(pinned, x, strict=True)]
    assert "copies at once" in str(device.tally.faults)


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = (torch.cuda.is_available(), torch.Generator, torch.cuda.Stream, triton.runtime.jit.JITFunction.run)
    with fake_device(monkeypatch):
        assert torch.cuda.is_available()
        assert ones(2).is_cuda
    after = (torch.cuda.is_available(), torch.Generator, torch.cuda.Stream, triton.runtime.jit.JITFunction.run)
    assert after == before
    assert torch.ones(2).sum().item() == 2.0
