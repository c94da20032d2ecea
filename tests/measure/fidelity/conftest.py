"""Jobs on the tiny model, and a text file that is long enough for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pqbench.engine.setting import Setting
from pqbench.measure.base import Job, Measured
from pqbench.measure.fidelity.benchmark import FidelityBenchmark
from pqbench.method import Method
from pqbench.models.sources import LoadedModel
from pqbench.records.file import Record, RecordFile
from pqbench.support.loading import load_model

Run = Callable[..., tuple[Measured, list[Record]]]


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    """The random model of conf/model/tiny.yaml."""
    return load_model("tiny")


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 6000 numbered lines."""
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text("".join(f"Line {i} tells of {i * 7919 % 1000} ships.\n" for i in range(6000)), encoding="utf-8")
    return path


@pytest.fixture
def measure(tmp_path: Path, loaded: LoadedModel) -> Run:
    """Runs a measurement into one folder; returns its summary and all records of the folder."""

    def call(
        benchmark: FidelityBenchmark, methods: dict[str, Method], model: LoadedModel | None = loaded, **options: Any
    ) -> tuple[Measured, list[Record]]:
        torch.set_num_threads(1)
        files = {name: RecordFile.create(tmp_path, benchmark.name, "x", name, {}) for name in methods}
        done = benchmark.measure(Job(model, methods, files, Setting(backend="reference"), **options))
        return done, [record for file in files.values() for record in file.read()]

    return call
