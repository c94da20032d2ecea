"""Jobs on the tiny geometry and model, which give every figure of a timing within milliseconds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pqbench.engine.setting import Setting
from pqbench.measure import machine
from pqbench.measure.base import Job, Measured, Measurement
from pqbench.method import Method
from pqbench.models.sources import LoadedModel
from pqbench.records.file import Record, RecordFile
from pqbench.support.loading import load_model

Run = Callable[..., tuple[Measured, list[Record]]]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make buffers small, since these tests are not about bandwidth or the memory of earlier runs."""
    monkeypatch.setattr(machine, "COPIED", 1 << 16)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # a third of a second in a process with torch
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    """The random model of conf/model/tiny.yaml."""
    return load_model("tiny")


@pytest.fixture
def measure(tmp_path: Path) -> Run:
    """Runs a measurement into one folder; returns its summary and all records of the folder."""

    def call(
        measurement: Measurement, methods: dict[str, Method], loaded: LoadedModel | None = None, **options: Any
    ) -> tuple[Measured, list[Record]]:
        names = dict.fromkeys([*methods, *measurement.further])
        files = {name: RecordFile.create(tmp_path, measurement.name, "x", name, {}) for name in names}
        setting = options.pop("setting", Setting(backend="reference"))
        done = measurement.measure(Job(loaded, methods, files, setting, **options))
        return done, [record for file in files.values() for record in file.read()]

    return call
