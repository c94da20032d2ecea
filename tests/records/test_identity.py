"""When two runs are the same: moving code or editing a comment changes no key, editing the code of a method does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from methods.h2o import H2O
from methods.pqcache import PQCache
from methods.vattention import VAttention
from pqbench.records.file import RecordFile, read_all, run_key
from pqbench.records.identity import class_names, harness_code, method_code, source_code
from pqbench.tables.command import main as tables

CODE = '''"""A method."""
from own_methods.helper import twice


class Mine:
    """A class."""

    def choose(self, x):  # a comment
        """Say."""
        return twice(x)
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's package of methods: one module, and a helper that it imports."""
    folder = tmp_path / "own_methods"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "mine.py").write_text(CODE)
    (folder / "helper.py").write_text("def twice(x):\n    return 2 * x\n")
    (folder / "other.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("own_methods.mine")
    yield folder
    for name in [name for name in sys.modules if name.startswith("own_methods")]:
        del sys.modules[name]


def code_now() -> str:
    source_code.cache_clear()
    return source_code("own_methods.mine")


@pytest.mark.parametrize(
    ("file", "old", "new", "changes"),
    [
        ("mine.py", "# a comment", "# another", False),
        ("mine.py", '"""Say."""', '"""Say it otherwise."""', False),
        ("mine.py", '"""A method."""\n', "\n\n", False),
        ("mine.py", "        return twice(x)", "        return (  twice( x ) )", False),
        ("mine.py", "twice(x)", "twice(x) + 1", True),
        ("mine.py", "import twice", "import twice as double", True),
        ("helper.py", "2 * x", "3 * x", True),
        ("other.py", "x = 1", "x = 2", False),
    ],
)
def test_only_code_that_the_method_runs_counts(package: Path, file: str, old: str, new: str, changes: bool) -> None:
    before = code_now()
    text = (package / file).read_text()
    assert old in text
    (package / file).write_text(text.replace(old, new))
    assert (code_now() != before) is changes


def test_a_module_that_moves_keeps_its_code_and_its_key(package: Path, tmp_path: Path) -> None:
    before = code_now()
    (package / "mine.py").rename(package / "moved.py")
    importlib.import_module("own_methods.moved")
    assert source_code("own_methods.moved") == before
    settings = [{"method": {"_target_": f"own_methods.{name}.Mine", "m": 2}} for name in ("mine", "moved")]
    assert run_key(settings[0]) == run_key(settings[1])
    assert run_key(settings[0]) != run_key({"method": {"_target_": "own_methods.mine.Other", "m": 2}})


def test_a_helper_that_moves_changes_no_code(package: Path) -> None:
    before = code_now()
    (package / "helper.py").rename(package / "far.py")
    text = (package / "mine.py").read_text()
    (package / "mine.py").write_text(text.replace("own_methods.helper", "own_methods.far"))
    assert "own_methods.far" in (package / "mine.py").read_text()
    assert code_now() == before


def test_names_of_classes_stand_for_their_paths() -> None:
    nested = {"a": [{"_target_": "x.y.Z", "k": 1}], "_target_": "Z", "b": {"_target_": "q.W"}}
    assert class_names(nested) == {"a": [{"_target_": "Z", "k": 1}], "_target_": "Z", "b": {"_target_": "W"}}


def test_the_code_of_a_method_around_another_holds_both() -> None:
    codes = {method_code(VAttention(PQCache())), method_code(VAttention(PQCache(m=2))), method_code(PQCache())}
    assert len(codes) == 2
    assert method_code(H2O()) not in codes


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for modules of a user that are in no package, and what a test put there is forgotten again."""
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def code_of(module: str, name: str = "Mine") -> str:
    """The code of a method whose class a user wrote."""
    source_code.cache_clear()
    importlib.invalidate_caches()
    return method_code(getattr(importlib.import_module(module), name)())


METHOD = """from dataclasses import dataclass
from {base_module} import {base}

@dataclass(frozen=True)
class Mine({base}):
    extra: int = 1
"""


def test_the_code_of_a_base_class_of_another_package_counts(modules: Path) -> None:
    for package in ("first_own", "second_own", "third_own"):
        (modules / package).mkdir()
        (modules / package / "__init__.py").touch()
    (modules / "third_own/low.py").write_text(METHOD.format(base_module="methods.h2o", base="H2O"))
    (modules / "second_own/far.py").write_text("def far():\n    return 1\n")
    middle = "from second_own.far import far\n" + METHOD.format(base_module="third_own.low", base="Mine as Low")
    (modules / "second_own/middle.py").write_text(middle.replace("Mine(Mine as Low)", "Mine(Low)"))
    top = METHOD.format(base_module="second_own.middle", base="Mine as Middle").replace("(Mine as Middle)", "(Middle)")
    (modules / "first_own/top.py").write_text(top)
    codes = [code_of("first_own.top")]
    for path in ("third_own/low.py", "second_own/far.py", "second_own/middle.py", "first_own/top.py"):
        (modules / path).write_text((modules / path).read_text() + "\nmore = 1\n")
        codes.append(code_of("first_own.top"))
    assert len(set(codes)) == 5
    (modules / "third_own/low.py").write_text((modules / "third_own/low.py").read_text() + "# a comment\n")
    assert code_of("first_own.top") == codes[-1]


def test_a_base_class_that_the_package_hands_on_counts(modules: Path) -> None:
    (modules / "own_hands").mkdir()
    (modules / "own_hands/low.py").write_text(METHOD.format(base_module="methods.h2o", base="H2O"))
    (modules / "own_hands/__init__.py").write_text("from own_hands.low import Mine as Low\n")
    (modules / "own_hands/top.py").write_text(METHOD.format(base_module="own_hands", base="Low"))
    before = code_of("own_hands.top")
    (modules / "own_hands/low.py").write_text((modules / "own_hands/low.py").read_text() + "\nmore = 1\n")
    assert code_of("own_hands.top") != before


def test_a_base_class_in_the_same_package_changes_no_key_of_the_methods_here() -> None:
    assert method_code(H2O()) == source_code("methods.h2o")
    assert method_code(PQCache()) == source_code(PQCache.__module__)


def test_helpers_beside_a_module_that_is_in_no_package_count(modules: Path) -> None:
    (modules / "own_helper.py").write_text("from own_tools import deep\n\ndef twice(x):\n    return 2 * x\n")
    (modules / "own_tools").mkdir()
    (modules / "own_tools/__init__.py").touch()
    (modules / "own_tools/deep.py").write_text("import own_method\nx = 1\n")  # in a circle
    (modules / "own_unused.py").write_text("x = 1\n")
    (modules / "own_method.py").write_text("import own_helper\n" + METHOD.format(base_module="methods.h2o", base="H2O"))
    codes = [code_of("own_method")]
    for name in ("own_helper.py", "own_tools/deep.py", "own_tools/__init__.py", "own_method.py"):
        (modules / name).write_text((modules / name).read_text() + "\nmore = 1\n")
        codes.append(code_of("own_method"))
    assert len(set(codes)) == 5
    (modules / "own_unused.py").write_text("x = 2\n")
    assert code_of("own_method") == codes[-1]


def test_helpers_of_a_method_in_the_file_of_its_package_count(modules: Path) -> None:
    (modules / "own_package").mkdir()
    (modules / "own_package/tool.py").write_text("x = 1\n")
    (modules / "own_package/__init__.py").write_text(
        "from .tool import x\n" + METHOD.format(base_module="methods.h2o", base="H2O")
    )
    before = code_of("own_package")
    (modules / "own_package/tool.py").write_text("x = 2\n")
    assert code_of("own_package") != before


def test_software_that_is_installed_beside_a_module_does_not_count(modules: Path) -> None:
    folder = modules / "site-packages"
    folder.mkdir()
    (folder / "own_helper_2.py").write_text("x = 1\n")
    (folder / "own_method_2.py").write_text(
        "import own_helper_2\n" + METHOD.format(base_module="methods.h2o", base="H2O")
    )
    sys.path.insert(0, str(folder))
    try:
        before = code_of("own_method_2")
    finally:
        sys.path.remove(str(folder))
    (folder / "own_helper_2.py").write_text("x = 2\n")
    assert code_of("own_method_2") == before


def record(sample: str, **fields: Any) -> dict[str, Any]:
    return {
        "benchmark": "needle",
        "model": "tiny",
        "task": "number",
        "sample_id": sample,
        "method": "mine",
        "status": "ok",
        "score": 50.0,
        "scores": {"score": 50.0},
        **fields,
    }


def test_older_code_is_told_left_out_and_shown_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"benchmark": {"lengths": [1]}, "method": {"_target_": "a.b.Mine"}}
    old = RecordFile.create(tmp_path, "needle", "tiny", "mine", settings | {"code": "aaa"})
    old.append(record("a", key="1"))
    caplog.clear()
    new = RecordFile.create(tmp_path, "needle", "tiny", "mine", settings | {"code": "bbb"})
    new.append(record("a", key="2", score=75.0))
    assert any("by other code of the method; this run measures again" in message for message in caplog.messages)
    assert [found["score"] for found in read_all(tmp_path)] == [75.0]
    assert tables([str(tmp_path)]) == 0
    assert "older code" not in capsys.readouterr().out
    assert tables([str(tmp_path), "--all-code"]) == 0
    assert "mine (older code)" in capsys.readouterr().out


def test_runs_with_other_settings_are_not_older_code(tmp_path: Path) -> None:
    for settings in ({"m": 1, "code": "aaa"}, {"m": 2, "code": "aaa"}, {"m": 2, "store": 1, "code": "bbb"}):
        RecordFile.create(tmp_path, "needle", "tiny", "mine", settings).append(record("a"))
    assert len(read_all(tmp_path)) == 3


def test_records_of_the_first_format_are_read_and_measured_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"benchmark": {"lengths": [1]}, "method": {"_target_": "a.b.Mine"}}
    folder = tmp_path / "needle" / "tiny" / "mine-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("benchmark: {lengths: [1]}\nmethod: {_target_: c.Mine}\n")
    (folder / "records.jsonl").write_text('{"version": 1, "sample_id": "a", "status": "ok", "method": "mine"}\n')
    assert [found["sample_id"] for found in read_all(tmp_path)] == ["a"]
    new = RecordFile.create(tmp_path, "needle", "tiny", "mine", settings | {"code": "bbb"})
    assert new.outcomes() == {}
    assert any("by an older version of pqbench; this run measures again" in message for message in caplog.messages)


def test_a_failure_of_other_code_runs_again_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RecordFile.create(tmp_path, "needle", "tiny", "mine", {"m": 1})
    file.append(record("a"))
    file.append(record("b", status="error", error="it broke"))
    assert file.outcomes() == {"a": None, "b": "it broke"}
    monkeypatch.setattr("pqbench.records.file.harness_code", lambda: "mended")
    assert file.outcomes() == {"a": None}
    assert file.append(record("b", status="error", error="it broke"))  # again, by other code: worth a line


@dataclass
class Local:
    x: int = 1


def test_a_class_without_a_file_has_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Local, "__module__", "nowhere")
    assert method_code(Local()) == "unknown"
    assert len(harness_code()) == 12
