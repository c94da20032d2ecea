"""The report describes a method from the source of its class, which is found by name and never imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from plots.report.descriptions import describe, source_description
from plots.report.load import load
from plots.report.page import render
from pqbench.records.file import RecordFile
from tests.plots.sample_results import record


def test_a_class_that_no_yaml_names_is_said_to_be_missing(tmp_path: Path) -> None:
    file = RecordFile.create(tmp_path, "needle", "tiny", "mine", {"method": {"_target_": "somewhere.Gone"}})
    file.append(record("mine", "needle", "t", "a", 1.0))
    assert "The source of <code>Gone</code> was not found here" in render(load(tmp_path))


@pytest.mark.parametrize(
    "target",
    [
        "",
        "x",
        "os.path.join",
        "../methods.full.Full",
        "methods.full.Absent",
        "a.b\x00.c",
        "methods..full.Full",
        "__main__.X",
        "methods.__main__.X",
    ],
)
def test_targets_that_are_no_class_here_have_no_description(target: str) -> None:
    assert source_description(target) is None
    assert describe(target) is None


def test_describing_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "trap_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "inner.py").write_text('"""Inner: words (arXiv 1234.56789)."""\nclass Trap:\n    """Trap text."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    for target in ("trap_package.inner.Trap", "trap_package.Trap"):
        found = source_description(target)
        assert found is not None
        assert found.papers == ["1234.56789"]
