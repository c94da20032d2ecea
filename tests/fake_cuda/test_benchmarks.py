"""``benchmark=attention benchmark.device=cuda`` from its rows to its records, and the link between host and device, on
the fake device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install pqbench[gpu]")

from pqbench.engine.setting import Setting
from pqbench.measure import machine
from pqbench.measure.base import Job
from pqbench.measure.geometries import shape_of
from pqbench.measure.layer.attention import Attention
from pqbench.measure.source import on, synthetic
from pqbench.records.file import RecordFile
from pqbench.store.link.base import Copy, Direction
from pqbench.store.link.cuda import CudaLink
from tests.fake_cuda.device import CUDA, Device, fake_device
from tests.fake_cuda.drive import TIERS, method_of
from tests.fake_cuda.tally import COPY, SYNC, TRITON

OPTIONS: dict[str, Any] = {
    "contexts": [4096],
    "budgets": [1024],
    "dtypes": ["bfloat16"],
    "device": "cuda:0",
    "repeats": 1,
    "steps": 2,
    "warmup": 1,
    "sweep_mb": 1,
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A fake device."""
    monkeypatch.setattr(machine, "COPIED", 1 << 16)
    machine.device_name.cache_clear()
    with fake_device(monkeypatch) as made:
        yield made
    machine.device_name.cache_clear()


def test_rows_are_made_on_the_device(device: Device) -> None:
    source = on(synthetic(shape_of("llama31_8b"), 0), CUDA)
    device.tally.faults.clear()
    made = (*source.block(0, 4096), *source.decoded(80), source.last_queries(64))
    assert {tensor.device for tensor in made} == {CUDA}
    assert not device.tally.faults


@pytest.mark.parametrize("tier", TIERS)
def test_one_layer_is_timed(tier: str, device: Device, tmp_path: Path) -> None:
    benchmark, methods = Attention(**OPTIONS), {name: method_of(name) for name in ("full", "pqcache")}
    names = dict.fromkeys([*methods, *benchmark.further])
    files = {name: RecordFile.create(tmp_path, benchmark.name, "x", name, {}) for name in names}
    done = benchmark.measure(Job(None, methods, files, Setting(TIERS[tier])))
    assert done.failures == []
    records = [record for file in files.values() for record in file.read()]
    assert len(records) >= 3
    assert {record["status"] for record in records} == {"ok"}
    assert {record["device"] for record in records} == {"fake"}
    assert not device.tally.faults


def test_the_link_waits_for_nothing_on_the_way_to_the_device(device: Device) -> None:
    link = CudaLink(CUDA)
    host, target = torch.empty(1, 8, 500, 2, 128, pin_memory=True), torch.zeros(1, 8, 500, 2, 128, device=CUDA)
    with device.tally.part() as counts:
        link.to_device(host, target).wait()
    assert counts.of(COPY) == 1
    assert counts.of(SYNC) == 0
    with device.tally.part() as counts:
        link.to_host(target, host)
    assert counts.of(SYNC) == 0
    assert not device.tally.faults


@pytest.mark.parametrize("half", [0, 1])
def test_keys_or_values_alone_do_not_cross_the_link_row_by_row(half: int, device: Device) -> None:
    link = CudaLink(CUDA)
    host, target = torch.empty(1, 8, 500, 2, 128, pin_memory=True), torch.zeros(1, 8, 500, 128, device=CUDA)
    with device.tally.part() as counts:
        link.submit([Copy(host[..., half, :], target)], Direction.TO_DEVICE).wait()
    assert counts.of(COPY) <= 8, "one memcpy for each row"
    assert counts.of(COPY, TRITON) >= 1
    assert counts.of(SYNC) == 0, counts.listed(SYNC)
    assert not device.tally.faults


def test_rows_are_gathered_by_the_device_from_pinned_memory(device: Device) -> None:
    link = CudaLink(CUDA)
    host, rows = torch.empty(1, 8, 500, 2, 128, pin_memory=True), torch.zeros(1, 8, 30, dtype=torch.int64, device=CUDA)
    target = torch.zeros(1, 8, 30, 2, 128, device=CUDA)
    with device.tally.part() as counts:
        link.gather(host, rows, target).wait()
    assert counts.of(TRITON) == 1
    assert counts.of(SYNC, COPY) == 0, counts.listed(SYNC, COPY)
    assert not device.tally.faults
