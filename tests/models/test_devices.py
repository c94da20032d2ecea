"""If a machine has no GPU, too old a GPU, no Triton or too little memory, one line says so before any work."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.full import Full
from methods.pqcache import PQCache
from pqbench.engine.setting import Setting
from pqbench.errors import ModelError
from pqbench.measure.base import Job
from pqbench.measure.layer import attention
from pqbench.measure.layer.attention import Attention
from pqbench.method import Method
from pqbench.models import devices
from pqbench.models.devices import check_kernels, check_room
from pqbench.store.tiers import HostTier
from pqbench.support.loading import load_model

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = (
    "needle",
    "infinitebench_quick",
    "ruler_quick",
    "longbench",
    "fidelity",
    "latency",
    "attention",
    "attention_scores",
)
METHODS: dict[str, Method] = {"full": Full(), "pqcache": PQCache(m=2, b=4)}


def command(*overrides: str) -> tuple[int, list[str], str]:
    """Exit code, error lines and output of a command as users type it."""
    line = [sys.executable, "-m", "pqbench", *overrides, "model=tiny", "threads=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, [line for line in done.stderr.splitlines() if line.startswith("error")], done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_kernels_without_a_gpu_are_one_line_for_every_benchmark(tmp_path: Path) -> None:
    sweep = ("--multirun", f"benchmark={','.join(BENCHMARKS)}")
    code, errors, output = command(*sweep, "kernels=gpu", f"results={tmp_path}")
    assert code == 1
    once, count, again = errors
    assert once.endswith(again.removeprefix("error: "))  # the first message also names the run
    assert "kernels=gpu computes on a GPU, not on cpu: there is none here, set kernels=auto" in once
    assert count == f"error: {len(BENCHMARKS)} failures in {len(BENCHMARKS)} runs:"
    assert output.strip() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["multirun"]  # Hydra's own: no sample was begun


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_one_line(tmp_path: Path) -> None:
    code, errors, _ = command("benchmark=attention", "benchmark.device=cuda", f"results={tmp_path}")
    assert code == 1
    assert len(errors) == 1
    assert "no CUDA device is available here" in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", ["gpu", "auto"])
def test_a_card_that_is_too_old_says_what_is_needed(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    with pytest.raises(ModelError, match=r"compute capability 8\.0, and Tesla T4 has 7\.5: set kernels=reference"):
        check_kernels(backend, torch.device("cuda"))
    check_kernels("reference", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    check_kernels(backend, torch.device("cuda"))


def test_a_gpu_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="pip install triton"):
        check_kernels("auto", torch.device("cuda"))
    check_kernels("auto", torch.device("cpu"))


def test_too_little_room_names_bytes_and_remedy() -> None:
    check_room(10, torch.device("cpu"), "three words", "do this")
    with pytest.raises(ModelError, match=r"three words need 1000000000\.0 GB on cpu and .* GB are free: do this"):
        check_room(10**18, torch.device("cpu"), "three words", "do this")


def test_a_model_larger_than_the_device_is_refused_before_it_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_bytes", lambda _: 1000)
    with pytest.raises(ModelError, match=r"the weights of tiny need 0\.0 GB on cpu and 0\.0 GB are free"):
        load_model("tiny")


def test_one_layer_on_the_host_needs_room_for_a_copy_per_method(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(HostTier, "check", lambda _, tokens, row_bytes: asked.append((tokens, row_bytes)))
    monkeypatch.setattr(attention, "take_turns", lambda *_: None)
    benchmark = Attention(geometry="tiny", contexts=[512], budgets=[0.25])
    job: Any = Job(None, METHODS, {}, Setting(HostTier(), backend="reference"))
    benchmark._check_room(job, attention.Condition("float32", 512, 0.25), torch.device("cpu"))
    assert asked == [(512, 2 * (2 * 2 * 16 * 4))]
