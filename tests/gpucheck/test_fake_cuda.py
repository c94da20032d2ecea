"""The steps of the GPU check on fake CUDA tensors: they run to their end, and their launches are valid on a device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install pqbench[gpu]")

from gpucheck.options import Options
from gpucheck.plan import STEPS
from gpucheck.result import Result
from gpucheck.steps import bandwidth, stores
from pqbench.measure import machine
from pqbench.store.tiers import HostTier
from tests.fake_cuda.device import CUDA, Device, fake_device

FULL = Options("cuda:0")
# Poison is recognised by its values, which fake tensors do not have.
UNPOISONED = [name for name, fields in stores.TIERS.items() if not fields.get("debug")]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A fake device."""
    monkeypatch.setattr(machine, "COPIED", 1 << 16)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: None)
    with fake_device(monkeypatch) as made:
        yield made


def test_bandwidth(device: Device, tmp_path: Path) -> None:
    result = Result(STEPS[4], tmp_path)
    bandwidth.run(result, FULL)
    assert [row for row in result.rows if row.get("error")] == []
    assert len(result.rows) > 25
    assert not device.tally.faults


@pytest.mark.parametrize("name", UNPOISONED)
def test_stores(name: str, device: Device) -> None:
    with stores.paused(CUDA):
        found = stores.compared(HostTier(**stores.TIERS[name]), CUDA, torch.bfloat16, 5_000, 128)
    assert found["steps"] == stores.STEPS
    assert not device.tally.faults
