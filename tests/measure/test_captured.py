"""Timings with ``graphs=true``: records name captured steps, which compute the same as ordinary steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methods.full import Full
from methods.h2o import H2O
from methods.pqcache import PQCache
from pqbench.engine.meter import PHASES
from pqbench.engine.setting import Setting
from pqbench.errors import ConfigError
from pqbench.measure.geometries import SHAPES
from pqbench.measure.latency import Latency
from pqbench.measure.layer.attention import Attention
from pqbench.measure.layer.captured import STEPS, CapturedSteps
from pqbench.measure.layer.turns import Layer, Subject
from pqbench.measure.source import synthetic
from pqbench.method import Budget, Method
from pqbench.models.sources import LoadedModel
from tests.measure.conftest import Run

CAPTURED = Setting(backend="reference", graphs=True)
PQ = PQCache(Budget(ratio=0.25), m=2, b=4)
METHODS: dict[str, Method] = {"full": Full(), "pqcache": PQ}
SMALL: dict[str, Any] = {
    "geometry": "tiny",
    "contexts": [512],
    "budgets": [0.25],
    "repeats": 2,
    "steps": 2,
    "warmup": 0,
    "sweep_mb": 0,
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@torch.inference_mode()
def test_a_captured_step_gives_what_a_step_gives(method: Method) -> None:
    shape, outputs = SHAPES["tiny"], {}
    for graphs in (False, True):
        setting = Setting(backend="reference", graphs=graphs)
        layer = Layer(shape, torch.float32, 300, 40, synthetic(shape, 0), torch.device("cpu"), setting)
        group = Subject("x", "reference", "all", method).build(layer)
        found, captured = [], None
        for step in range(40):
            token = layer.token(step)
            if graphs and step:
                captured = captured or CapturedSteps.of(group, 340, token)
                assert captured is not None
                captured.place(token)
                found.append(captured.step().clone())
            else:
                group.append(*token[:2])
                found.append(group.attend(token[2]))
        outputs[graphs] = torch.stack(found)
    torch.testing.assert_close(outputs[True], outputs[False])


def test_rows_of_one_layer_say_that_they_were_captured(measure: Run) -> None:
    done, records = measure(Attention(**SMALL), METHODS, setting=CAPTURED)
    assert done.failures == []
    by_kernel = {(r["method"], r["kernel"]): r for r in records}
    assert set(by_kernel) == {
        ("full", "torch sdpa grouped"),
        ("full", "torch sdpa enable_gqa"),
        ("full", "reference dense captured"),
        ("pqcache", "reference"),
    }
    for (_, kernel), record in by_kernel.items():
        captured = not kernel.startswith("torch")
        assert record.get("graphs", False) is captured
        assert [f"{phase}_s" in record for phase in PHASES] == [not captured] * len(PHASES)
        assert record["timed_steps"] == 4
        assert record["total_s"] > 0
        assert record["bandwidth_gbps"] > 0
    attended = [512 + STEPS + 1 + step for step in range(4)]
    assert by_kernel["full", "reference dense captured"]["attended_tokens"] == sum(attended) / 4


def test_rows_of_a_model_say_that_they_were_captured(measure: Run, loaded: LoadedModel) -> None:
    settings = Latency(contexts=[160], new_tokens=10, repeats=1, warmup=0)
    done, records = measure(settings, METHODS, loaded, setting=CAPTURED)
    assert (done.measured, done.failures) == (2, [])
    for record in records:
        assert record["graphs"] is True
        assert not any(f"{phase}_step_s" in record for phase in (*PHASES, "dense"))
        assert len(record["steps_s"]) == 9
        replays = sorted(record["steps_s"][4:])  # two one by one, the rehearsal, the capture
        assert record["tpot_s"] == pytest.approx(replays[2], abs=1e-8)


def test_a_method_that_cannot_is_named_before_anything_runs(measure: Run, loaded: LoadedModel) -> None:
    for settings in (Attention(**SMALL), Latency(contexts=[160], new_tokens=4)):
        with pytest.raises(ConfigError, match="graphs=true: h2o has steps of changing shape"):
            measure(settings, {"h2o": H2O()}, loaded, setting=CAPTURED)
