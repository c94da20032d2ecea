"""An error of the device during a run belongs to the present sample, and no finished measurement is lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.full import Full
from methods.h2o import H2O
from pqbench.engine.clock import CudaStreams
from pqbench.engine.setting import Setting
from pqbench.errors import DeviceError
from pqbench.measure import machine
from pqbench.measure.base import Job, Measurement
from pqbench.measure.latency import Latency
from pqbench.measure.layer.attention import Attention
from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection
from pqbench.models.sources import LoadedModel, Random
from pqbench.records.file import Record, RecordFile
from tests.engine.streams import Streams
from tests.measure.test_scored import job, records, run


@dataclass(frozen=True)
class Failing(Method):
    """Fails in prompts of ``length`` tokens. ``answers`` says whether the device still works after ``error``.

    With ``where="late"`` it fails when the result is read, like an error of queued work.
    """

    streams: Streams
    length: int
    error: type[Exception] = torch.AcceleratorError
    answers: bool = False
    where: str = "select"
    budget: Budget = field(default_factory=lambda: Budget(ratio=0.5))

    def layer(self, geometry: Geometry) -> LayerState:
        return FailingState(self, geometry)


class FailingState(LayerState):
    """See :class:`Failing`."""

    def __init__(self, method: Failing, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method

    def _fail(self, where: str) -> None:
        method = self.method
        if self.geometry.prompt == method.length and method.where == where and self.geometry.layer == 0:
            method.streams.answers = method.answers
            raise method.error("CUDA error: an illegal memory access was encountered")

    def finish_prefill(self, kv: KV) -> None:
        self._fail("finish_prefill")

    def select(self, q: Tensor, kv: KV) -> Selection:
        self._fail("select")
        return Selection(torch.arange((kv.length + 1) // 2, kv.length).expand(*q.shape[:2], -1))

    @property
    def facts(self) -> dict[str, float]:
        self._fail("facts")
        return {}


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make buffers small, since these tests are not about bandwidth."""
    monkeypatch.setattr(machine, "COPIED", 1 << 16)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return Random(name="tiny").load()


def setting_of(streams: Streams) -> Setting:
    return Setting(streams=streams, backend="reference")


@pytest.mark.parametrize("where", ["finish_prefill", "select", "facts"])
def test_a_device_that_is_gone_stops_the_run_and_keeps_the_rows(
    loaded: LoadedModel, tmp_path: Path, where: str
) -> None:
    streams = Streams()
    methods: dict[str, Method] = {"full": Full(), "failing": Failing(streams, 250, where=where), "h2o": H2O()}
    done = job(loaded, tmp_path, methods, setting=setting_of(streams))
    with pytest.raises(DeviceError, match=r"failing on s250.*illegal memory access.*continues from there"):
        run(done)
    outcomes = {name: [(r["sample_id"], r["status"]) for r in records(done, name)] for name in methods}
    assert outcomes["full"] == [("s200", "ok"), ("s250", "ok")]
    assert outcomes["failing"] == [("s200", "ok"), ("s250", "error")]
    assert outcomes["h2o"] == [("s200", "ok")]  # no method could measure s250 on that device
    streams.answers = True
    again = job(loaded, tmp_path, methods, setting=setting_of(streams))  # the process that is started again
    summary = run(again)
    assert len(summary.failures) == 1
    assert summary.measured == 2 + 1 + 1  # h2o on two samples, the others on the last


def test_a_device_that_runs_out_of_memory_goes_on(loaded: LoadedModel, tmp_path: Path) -> None:
    streams = Streams()
    failing = Failing(streams, 250, torch.OutOfMemoryError, answers=True, where="finish_prefill")
    done = job(loaded, tmp_path, {"failing": failing}, setting=setting_of(streams))
    assert len(run(done).failures) == 1
    assert [record["status"] for record in records(done, "failing")] == ["ok", "oom", "ok"]


def timed(
    tmp_path: Path, measurement: Measurement, methods: dict[str, Method], streams: Streams, loaded: LoadedModel | None
) -> list[Record]:
    """The records of a timing run that a device error ends."""
    names = dict.fromkeys([*methods, *measurement.further])
    files = {name: RecordFile.create(tmp_path, measurement.name, "x", name, {}) for name in names}
    with pytest.raises(DeviceError, match="illegal memory access"):
        measurement.measure(Job(loaded, methods, files, setting_of(streams)))
    return [record for file in files.values() for record in file.read()]


def test_latency_stops_and_keeps_its_rows(loaded: LoadedModel, tmp_path: Path) -> None:
    streams = Streams()
    methods: dict[str, Method] = {
        "full": Full(),
        "failing": Failing(streams, 40),
        "h2o": H2O(Budget(tokens=20, sink=4, ratio=None)),
    }
    found = timed(tmp_path, Latency(contexts=[24, 40], new_tokens=4, repeats=1, warmup=0), methods, streams, loaded)
    outcomes: dict[str, list[Any]] = {}
    for record in found:
        outcomes.setdefault(record["method"], []).append((record["context"], record["status"]))
    assert outcomes == {"full": [(24, "ok"), (40, "ok")], "failing": [(24, "ok"), (40, "error")], "h2o": [(24, "ok")]}


def test_one_layer_stops_and_keeps_the_rows_of_the_cells_before(tmp_path: Path) -> None:
    streams = Streams()
    measurement = Attention("tiny", contexts=[128, 256], budgets=[0.5], repeats=1, steps=1, warmup=0, sweep_mb=0)
    found = timed(tmp_path, measurement, {"failing": Failing(streams, 256)}, streams, None)
    assert {(r["context"], r["status"]) for r in found if r["method"] == "full"} == {(128, "ok")}
    assert [(r["context"], r["status"]) for r in found if r["method"] == "failing"] == [(128, "ok"), (256, "error")]


def test_where_no_gpu_was_ever_used_there_is_none_to_be_gone() -> None:
    assert CudaStreams().alive()
