"""The page of results on a GPU is made from the existing records, and is up to date."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpucheck.page import OnGpu, page
from gpucheck.plan import STEPS
from pqbench.records.file import RecordFile

ROOT = Path(__file__).resolve().parent.parent
CARD = {"device": "Some Card", "driver": "1.2", "cuda": "13.0", "torch": "9.9", "capability": "9.0", "commit": "abc"}
TIMES = {"ttft_s": 1.0, "tt2t_s": 1.5, "tpot_s": 0.0123, "context": 4096, "budget": "10 %", "dtype": "bfloat16"}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """The results that are part of the checkout, without those of a developer."""
    listed = subprocess.run(["git", "ls-files", "results/gpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    for name in listed.stdout.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path / "results"


def put(folder: Path, number: int, machine: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> None:
    """Write a result in the format of a step."""
    step = STEPS[number]
    content = {
        "step": number,
        "name": step.name,
        "title": step.title,
        "status": "ok",
        "seconds": 12.3,
        "message": "",
        "finished": "2030-01-02T03:04:05Z",
        "machine": machine,
        "rows": rows,
        **more,
    }
    (folder / "gpu").mkdir(parents=True, exist_ok=True)
    (folder / "gpu" / step.file).write_text(json.dumps(content))


def test_the_page_is_what_the_command_makes_of_the_records(results: Path) -> None:
    command = [sys.executable, "-m", "gpucheck.page", str(results)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    there = (ROOT / "docs/results/gpu.md").read_text(encoding="utf-8")
    assert made == there, "`python -m gpucheck.page > docs/results/gpu.md` brings the page up to date"


def test_what_was_never_run_says_so(tmp_path: Path) -> None:
    found = OnGpu.read(tmp_path / "none")
    assert page(found).count("| not yet run |") == len(STEPS)
    assert page(found).count("Not yet run.") == len(STEPS)
    assert "Nothing of this has run on a GPU yet." in page(found)


def test_a_run_on_the_cpu_is_none_on_a_gpu(tmp_path: Path) -> None:
    put(tmp_path, 1, {"device": "a processor"}, [{"name": "top_k", "ok": True}])
    RecordFile.create(tmp_path, "latency", "x", "full", {}).append(
        {
            "kind": "latency",
            "benchmark": "latency",
            "model": "x",
            "method": "full",
            "sample_id": "a",
            "status": "ok",
            **TIMES,
        }
    )
    assert page(OnGpu.read(tmp_path)) == page(OnGpu.read(tmp_path / "none"))


def test_results_of_a_gpu_are_shown_with_their_machine(tmp_path: Path) -> None:
    put(
        tmp_path,
        1,
        CARD,
        [{"name": "top_k", "ok": True}, {"name": "attention", "ok": False, "error": "is | off"}],
        status="failed",
        message="wrong: attention",
    )
    put(tmp_path, 4, CARD, [{"name": "scan", "ok": None, "gbps": 2500.0}])
    RecordFile.create(tmp_path / "gpu" / "records", "latency", "llama31_8b", "pqcache", {}).append(
        {
            "kind": "latency",
            "benchmark": "latency",
            "model": "llama31_8b",
            "method": "pqcache",
            "sample_id": "a",
            "status": "ok",
            "weights": "random",
            "cuda_peak_bytes": 1,
            "kernels": "gpu",
            **TIMES,
        }
    )
    text = page(OnGpu.read(tmp_path))
    table = text.partition("## Targets")[0]
    assert "- device Some Card, driver 1.2, cuda 13.0, torch 9.9, commit abc; 2030-01-02T03:04:05Z\n" in table
    assert table.count("not yet run") == len(STEPS) - 2
    assert "failed, 1 right, 1 wrong" in table
    assert "attention: is | off" in text or "attention: is / off" in text
    assert "- scan: gbps 2500" in text
    assert "latency of llama31_8b (bfloat16, kernels gpu, random weights)" in text
    assert "12.3" in text.partition("## Seconds")[2]
    assert text.count("Not yet run.") == len(STEPS) - 2


def test_targets_are_judged_by_a_full_run_alone(tmp_path: Path) -> None:
    row = {"name": "x", "ok": None, "method": "pqcache", "store": "device", "wanted_budget": 1024, "context": 131_072}
    put(tmp_path, 6, {**CARD, "counts": False}, [{**row, "tpot_ms": 5.0}])
    assert "One H100" in page(OnGpu.read(tmp_path))
    put(tmp_path, 6, {**CARD, "counts": True}, [{**row, "tpot_ms": 5.0}])
    [line] = [
        line
        for line in page(OnGpu.read(tmp_path)).splitlines()
        if line.startswith("| pqcache, 128K, 1024") and "device" in line
    ]
    assert "5 ms a token" in line
    assert " met" in line
