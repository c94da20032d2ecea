"""The Triton backend against the reference without a GPU: Triton's interpreter runs the kernels on CPU tensors.

All checks run in one process, because Triton reads ``TRITON_INTERPRET`` when it is imported, and importing torch takes
longer than most checks. Every check is a test of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.kernels.gpu_checks import CHECKS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install pqbench[gpu]")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """Tracebacks by check (empty for checks that passed), and the output of the process."""

    results: dict[str, str]
    said: str


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    path = tmp_path_factory.mktemp("interpreter") / "results.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.gpu_checks", str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return Outcome(results, process.stdout + process.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_triton_equals_the_reference(name: str, outcome: Outcome) -> None:
    assert name in outcome.results, f"the process ended before this check: {outcome.said}"
    assert not outcome.results[name], outcome.results[name]


def test_the_body_imports_without_a_gpu_and_has_every_operation() -> None:
    code = (
        "from pqbench.kernels import gpu; from pqbench.kernels.backend import Kernels;"
        "names = [n for n in vars(Kernels) if not n.startswith('_')]; assert len(names) >= 10;"
        "assert all(callable(getattr(gpu, n)) for n in names); gpu.use_threads(2)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr


def test_signatures_are_those_of_the_protocol() -> None:
    code = (
        "import inspect; from pqbench.kernels import gpu, reference; from pqbench.kernels.backend import Kernels\n"
        "for name, method in vars(Kernels).items():\n"
        "    if not name.startswith('_'):\n"
        "        wanted = list(inspect.signature(method).parameters.values())[1:]\n"
        "        assert list(inspect.signature(getattr(gpu, name)).parameters.values()) == wanted, name\n"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
