"""Sweeps with launchers, which use several processes, make the same records as a sequential sweep."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from pqbench.progress.runs import read_runs
from pqbench.records.file import parse

# Four runs. The runs of both budgets write to the same folder of ``full``, which has no budget; that tests a race.
SWEEP = (
    "-m",
    "model=tiny",
    "threads=1",
    "method=[full,h2o]",
    "benchmark=needle,ruler_quick",
    "benchmark.lengths=[2048]",
    "benchmark.per_cell=1",
    "budget.ratio=0.2,0.5",
)
pytestmark = pytest.mark.slow  # each launcher starts processes that import everything
LAUNCHERS = {
    "joblib": ("joblib", ["hydra.launcher.n_jobs=2"]),
    "submitit_local": ("submitit", ["hydra.sweeper.max_batch_size=2"]),
    "ray": (
        "ray",
        [
            "hydra.launcher.ray.init.address=local",
            "+hydra.launcher.ray.init.num_cpus=2",
            "+hydra.launcher.ray.init.include_dashboard=false",
        ],
    ),
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def sweep(results: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the sweep as users start it."""
    line = [sys.executable, "-m", "pqbench", *SWEEP, f"results={results}", *overrides]
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)


def launched(name: str) -> list[str]:
    """Overrides that choose a launcher; skips the test where it is not installed."""
    package, overrides = LAUNCHERS[name]
    for module in (package, "hydra_plugins"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the {name} launcher is not installed: make setup-sweep")
    if importlib.util.find_spec(f"hydra_plugins.hydra_{package}_launcher") is None:
        pytest.skip(f"the {name} launcher is not installed: make setup-sweep")
    return [f"hydra/launcher={name}", *overrides]


def untimed(results: Path) -> dict[str, list[dict[str, Any]]]:
    """Records by folder, without times and in the order of samples."""
    found = {}
    for path in sorted(results.rglob("records.jsonl")):
        rows = [parse(line) for line in path.read_bytes().splitlines()]
        assert all(rows)
        kept = [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows if row]
        found[str(path.parent.relative_to(results))] = sorted(kept, key=lambda row: row["sample_id"])
    return found


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Records of the sweep run by Hydra's own launcher, one run after the other; once for the whole suite."""
    base = tmp_path_factory.getbasetemp()
    results = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sequential"
    with FileLock(results.with_suffix(".lock")):
        if not results.exists():
            done = sweep(results)
            assert done.returncode == 0, done.stderr
    records = untimed(results)
    assert {folder.rsplit("-", 1)[0]: len(rows) for folder, rows in records.items()} == {
        "needle/tiny/full": 5,
        "needle/tiny/h2o": 5,
        "ruler/tiny/full": 3,
        "ruler/tiny/h2o": 3,
    }
    assert len(records) == 6  # h2o twice, once for each budget
    return records


@pytest.fixture(scope="module", params=LAUNCHERS)
def distributed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The overrides of a launcher, and the results of its sweep."""
    overrides, results = launched(request.param), tmp_path_factory.mktemp(request.param)
    done = sweep(results, *overrides)
    assert done.returncode == 0, done.stderr
    return overrides, results


def test_a_launcher_leaves_the_records_of_the_sequential_run(
    distributed: tuple[list[str], Path], request: pytest.FixtureRequest
) -> None:
    _, results = distributed
    assert untimed(results) == request.getfixturevalue("sequential")
    assert [run.state for run in read_runs(results)] == ["done"] * 6


def test_again_nothing_is_measured_and_a_run_that_fails_in_its_process_fails_the_command(
    distributed: tuple[list[str], Path],
) -> None:
    overrides, results = distributed
    before = {path: path.read_bytes() for path in results.rglob("records.jsonl")}
    again = sweep(results, *overrides, "benchmark=needle", "budget.ratio=2,0.2")  # part of the sweep is enough
    assert again.returncode == 1
    last = again.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert ": budget.ratio is 2" in last  # after the cell of the sweep that failed
    assert "Traceback" not in again.stderr
    assert {path: path.read_bytes() for path in results.rglob("records.jsonl")} == before
    assert {run.state for run in read_runs(results)} == {"done"}
