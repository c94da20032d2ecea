"""Where the memory of a machine holds a short context and not a long one, every measurement records the long one as a
failure and measures the short one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from methods.full import Full
from methods.h2o import H2O
from pqbench.engine.setting import Setting
from pqbench.measure.base import Measurement
from pqbench.measure.fidelity.benchmark import FidelityBenchmark
from pqbench.measure.latency import Latency
from pqbench.measure.layer.attention import Attention
from pqbench.measure.layer.scores import AttentionScores
from pqbench.method import Budget, Method
from pqbench.models.sources import LoadedModel
from pqbench.store.tiers import HostTier
from tests.measure.conftest import Run

AVAILABLE = 1_300_000  # bytes
METHODS: dict[str, Method] = {"full": Full(), "h2o": H2O(Budget(ratio=0.5, sink=4))}


def fidelity(folder: Path) -> FidelityBenchmark:
    book = folder / "book.txt"
    book.write_text("".join(f"Line {i} tells of {i * 7919 % 1000} ships.\n" for i in range(2000)), encoding="utf-8")
    return FidelityBenchmark(lengths=[128, 2048], documents=1, text=str(book), steps=4, ratios=[0.5])


@pytest.mark.parametrize("setting", [Setting(backend="reference"), Setting(HostTier(), backend="reference")])
@pytest.mark.parametrize(
    ("made", "methods"),
    [
        (lambda _: Latency(contexts=[2048, 128], new_tokens=4, repeats=1, warmup=1), METHODS),
        (fidelity, METHODS),
        (lambda _: AttentionScores(contexts=[2048, 128], queries=8), {}),
        (lambda _: Attention("tiny", [8192, 512], [0.25], repeats=1, steps=1, warmup=0, sweep_mb=0), METHODS),
    ],
)
def test_a_context_that_does_not_fit_is_a_row_and_the_others_are_measured(
    measure: Run,
    loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    setting: Setting,
    made: Callable[[Path], Measurement],
    methods: dict[str, Method],
) -> None:
    measurement = made(tmp_path)
    plenty = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: plenty._replace(available=AVAILABLE))
    model = None if measurement.name == "attention" else loaded
    done, records = measure(measurement, methods, model, setting=setting)
    told = {
        (record["method"], (record.get("context") or record["length"]) > 1024, record["status"]) for record in records
    }
    names = methods or {"full": Full()}
    assert told == {(name, *place) for name in names for place in ((True, "oom"), (False, "ok"))}
    assert done.failures
    assert all("are free" in line or "are available" in line for line in done.failures)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: plenty)
    again, records = measure(measurement, methods, model, setting=setting, retry_failed=True)
    assert again.failures == []
    assert again.measured > 0
