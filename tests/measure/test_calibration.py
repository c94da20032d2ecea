"""Fits of the times of this hardware, their file, and the paper's rule that reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from methods.pqcache import PQCache, adaptive_iterations
from pqbench.engine.prefill import prefill
from pqbench.engine.setting import Setting
from pqbench.errors import ConfigError
from pqbench.kernels.backend import kernels
from pqbench.measure import calibration
from pqbench.measure.calibration import calibrate, fit, stored
from pqbench.method import Budget
from tests.support import SHAPE, prompt_of, randomize


@given(st.floats(1e-5, 1e-2), st.floats(1e-7, 1e-4), st.floats(1e-11, 1e-8))
def test_the_fit_recovers_its_own_law(a: float, b: float, c: float) -> None:
    lengths = [128.0, 256.0, 512.0, 1024.0, 2048.0]
    found = fit([[1.0, s, s * s] for s in lengths], [a + b * s + c * s * s for s in lengths])
    for s in (300.0, 1500.0, 4000.0):
        assert found[0] + found[1] * s + found[2] * s * s == pytest.approx(a + b * s + c * s * s, rel=1e-4)


@pytest.mark.parametrize(
    ("idle", "points", "expected"),
    [(0.131, 1000, 10), (0.0, 1000, 3), (0.05, 10_000, 3), (100.0, 1000, 300), (0.1309, 1000, 9)],
)
def test_iterations_fill_the_idle_time_within_the_released_limits(idle: float, points: int, expected: int) -> None:
    """T = (idle - a) / (b s) with a = 0.031 s and b = 10 us, clipped to 3..300."""
    assert adaptive_iterations(idle, (0.031, 1e-5), points) == expected


def test_a_calibration_is_measured_once_for_a_machine_and_a_shape(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = calibrate(llama, "reference", tmp_path)
    shape = first.clustering(4, 8, 16)
    monkeypatch.setattr(calibration, "_seconds", lambda *_: pytest.fail("measured again"))
    again = calibrate(llama, "reference", tmp_path)
    assert again.layer == first.layer
    assert again.clustering(4, 8, 16) == shape
    other = randomize(LlamaForCausalLM(LlamaConfig(**{**SHAPE, "intermediate_size": 64})))
    with pytest.raises(BaseException, match="measured again"):
        calibrate(other, "reference", tmp_path)
    assert len(json.loads((tmp_path / "calibration.json").read_text())) == 2


def test_what_clusters_is_what_is_timed(llama: PreTrainedModel, tmp_path: Path) -> None:
    """Keys lie on the device of the model, so its backend there is timed. Each backend has times of its own."""
    for backend in ("reference", "cpu"):
        found = calibrate(llama, backend, tmp_path)
        assert (found.device, found.backend) == (llama.device, kernels(llama.device, backend))
        found.clustering(4, 8, 16)
    names = [name for name in json.loads((tmp_path / "calibration.json").read_text()) if "kmeans" in name]
    assert sorted(name.split("kmeans-")[1] for name in names) == ["cpu-4x8x16", "reference-4x8x16"]


def test_a_torn_file_is_measured_again(tmp_path: Path) -> None:
    (tmp_path / "calibration.json").write_text('{"x": [1')
    assert stored(tmp_path, "x", lambda: [2.0]) == [2.0]
    assert stored(tmp_path, "x", lambda: pytest.fail("kept")) == [2.0]


def test_beside_a_cpu_model_a_small_share_of_a_layer_counts_as_idle(llama: PreTrainedModel, tmp_path: Path) -> None:
    found = calibrate(llama, "reference", tmp_path)
    a, b, c = found.layer
    assert found.idle_seconds(1000) == pytest.approx(0.05 * max(0.0, a + b * 1000 + c * 1e6))


def test_a_model_too_short_to_calibrate_says_what_to_do(tmp_path: Path) -> None:
    short = randomize(LlamaForCausalLM(LlamaConfig(**{**SHAPE, "max_position_embeddings": 200})))
    with pytest.raises(ConfigError, match="iterations"):
        calibrate(short, "reference", tmp_path)


class Fixed:
    """A calibration with fixed times."""

    def __init__(self, idle: float) -> None:
        self.idle, self.asked = idle, 0

    def idle_seconds(self, length: int) -> float:
        self.asked = length
        return self.idle

    def clustering(self, problems: int, width: int, clusters: int) -> tuple[float, float]:
        assert (problems, width, clusters) == (4, 8, 8)  # 2 KV heads x 2 sub-spaces, D = 16
        return 0.0, 1e-5


@pytest.mark.parametrize(("idle", "expected"), [(0.01, 12), (1.0, 300), (0.0, 3)])
def test_pqcache_adapts_when_asked_to(llama: PreTrainedModel, idle: float, expected: int) -> None:
    """A 100-token prompt with 4 + 13 sinks and window has 83 middle keys: 0.01 s / (83 x 10 us) = 12."""
    known = Fixed(idle)
    method = PQCache(Budget(sink=4, ratio=0.3, minimum=8), m=2, b=3, iterations=None)
    prefilled = prefill(llama, prompt_of(100), [method], setting=Setting(calibration=known))
    prefilled.build(0)
    states = [prefilled.observer(0, layer, 0).state for layer in prefilled.layers]
    assert known.asked == 100
    assert [state.facts["iterations"] for state in states] == [expected] * len(states)
    fixed = PQCache(Budget(sink=4, ratio=0.3, minimum=8), m=2, b=3, iterations=7)
    assert not fixed.needs_calibration
    torch.testing.assert_close(states[0].index.codebook.shape[3], 8)  # type: ignore[attr-defined]
