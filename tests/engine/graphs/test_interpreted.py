"""Captured steps in Triton's interpreter, with every launch of Triton frozen as in a CUDA graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.engine.graphs.interpreted import CASES, NEW

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install pqbench[gpu]")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[int]]]:
    path = tmp_path_factory.mktemp("interpreted") / "tokens.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.engine.graphs.interpreted", str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    results: dict[str, dict[str, list[int]]] = json.loads(path.read_text(encoding="utf-8"))
    return results


@pytest.mark.parametrize("name", CASES)
def test_launches_read_their_numbers_when_they_are_replayed(name: str, found: dict[str, dict[str, list[int]]]) -> None:
    tokens = found[name]
    assert len(tokens["reference"]) == NEW
    assert len(set(tokens["reference"])) > 2
    assert tokens["captured"] == tokens["reference"]
