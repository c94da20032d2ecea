"""The packages that the check carries, and its messages if a package is missing."""

from __future__ import annotations

import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from gpucheck import needs, wheels
from gpucheck.needs import Need, bring, missing, pins
from gpucheck.options import UsageError

ABSENT = Need("pqbench-test-absent", "pqbench_test_absent")


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that lacks one small package."""
    monkeypatch.setattr(needs, "CARRIED", (Need("pytest", "pytest"), ABSENT))
    monkeypatch.setattr(sys, "path", list(sys.path))


def wheel(folder: Path, tag: str) -> None:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"pqbench_test_absent-1.0-{tag}.whl", "w") as archive:
        archive.writestr(f"{ABSENT.module}.py", "VALUE = 7\n")


@pytest.mark.usefixtures("lacking")
def test_a_wheel_of_plain_python_is_unpacked_and_imported(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "py3-none-any")
    assert bring(tmp_path / "wheels", tmp_path / "packages") == [ABSENT]
    spec = find_spec(ABSENT.module)
    assert spec is not None
    assert spec.origin == str(tmp_path / "packages" / f"{ABSENT.module}.py")


@pytest.mark.usefixtures("lacking")
def test_compiled_wheels_are_left_alone(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "cp312-cp312-linux_x86_64")
    with pytest.raises(UsageError, match=r"has no wheels of them: run `.* -m pip install pqbench-test-absent`"):
        bring(tmp_path / "wheels", tmp_path / "packages")


@pytest.mark.usefixtures("lacking")
def test_without_a_folder_the_message_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no folder .*make gpu-wheels") as caught:
        bring(tmp_path / "wheels", tmp_path / "packages")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("gpu-check needs pqbench-test-absent, and")  # not pytest, which is there


def test_what_no_folder_brings_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "IMAGE", (ABSENT,))
    with pytest.raises(UsageError, match="gpu-check needs pqbench-test-absent, which"):
        bring(tmp_path, tmp_path)


def test_versions_are_those_that_were_tested_together() -> None:
    assert pins(["hydra-core", "antlr4-python3-runtime", "PyYAML", "unheard-of"]) == [
        "hydra-core==1.3.8",
        "antlr4-python3-runtime==4.9.3",
        "PyYAML==6.0.3",
        "unheard-of",
    ]


def test_everything_is_there_in_the_environment_of_the_tests() -> None:
    assert missing([*needs.IMAGE, *needs.CARRIED]) == []


def test_wheels_that_pip_cannot_make_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "CARRIED", (Need("", ""),))  # no requirement at all: pip refuses
    with pytest.raises(UsageError, match="pip could not make the wheels") as caught:
        wheels.make(tmp_path / "wheels")
    assert "\n" not in str(caught.value)
