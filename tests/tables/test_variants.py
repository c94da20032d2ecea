"""Tables distinguish runs of one method by the settings in which they differ, and read each configuration once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pqbench.records import folders
from pqbench.records.file import Record, RecordFile
from pqbench.tables.command import main
from pqbench.tables.variants import variants, with_variants


def put(root: Path, method: str, settings: dict[str, Any], benchmark: str = "needle", **fields: Any) -> None:
    file = RecordFile.create(root, benchmark, "toy", method, settings)
    record: Record = {
        "kind": "scores",
        "benchmark": benchmark,
        "model": "toy",
        "task": "number",
        "sample_id": "a",
        "method": method,
        "key": file.key,
        "budget": "10 %",
        "question": "dense",
        "status": "ok",
        "score": 50.0,
        "scores": {"score": 50.0},
    }
    file.append(record | fields)


def method(**options: Any) -> dict[str, Any]:
    return {"method": {"_target_": "a.b.Mine", **options, "budget": {"ratio": 0.1}}, "store": {"_target_": "a.Device"}}


def rows_of(text: str) -> list[list[str]]:
    """The cells of the first markdown table of a text, without heading and rule."""
    table = text.split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[2:]]


def test_only_what_differs_is_named_and_shortly() -> None:
    runs = {"x": method(m=2, b=4, tail=None), "y": method(m=2, b=8, tail="pq"), "z": method(m=2, b=8, tail=[1, 2])}
    assert variants(runs) == {"x": "b=4, tail=null", "y": "b=8, tail=pq", "z": "b=8, tail=[1, 2]"}


def test_names_that_two_groups_share_are_given_in_full() -> None:
    found = variants({"x": {"method": {"seed": 1}, "benchmark": {"seed": 2}}, "y": {"method": {"seed": 3}}})
    assert found == {"x": "benchmark.seed=2, method.seed=1", "y": "method.seed=3"}


def test_import_paths_budgets_and_code_tell_nothing() -> None:
    first = method() | {"code": "aaa"}
    second = {**first, "code": "bbb", "store": {"_target_": "elsewhere.now.Device"}}
    second["method"] = {**first["method"], "budget": {"ratio": 0.2}}
    assert variants({"x": first, "y": second}) == {"x": "-", "y": "-"}


def test_a_run_of_its_own_and_one_without_settings_have_no_variant() -> None:
    records = [{"key": key, "method": name, "benchmark": "b", "model": "m"} for key, name in (("x", "h"), ("y", "p"))]
    assert with_variants(records, {"x": {"m": 1}}) == records


def test_tables_name_the_settings_instead_of_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for b in (4, 8):
        put(tmp_path, "pqcache", method(b=b))
    put(tmp_path, "h2o", method(b=4))
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.count("key") == 0
    assert sorted(row[:2] for row in rows_of(text)) == [["h2o", "-"], ["pqcache", "b=4"], ["pqcache", "b=8"]]


def test_times_name_the_settings_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for b in (4, 8):
        put(tmp_path, "pqcache", method(b=b), "latency", kind="latency", context=64, repeat=0, tpot_s=0.1)
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.count("key") == 0
    assert sorted(row[:4] for row in rows_of(text)) == [
        ["64", "pqcache", "10 %", "b=4"],
        ["64", "pqcache", "10 %", "b=8"],
    ]


def test_every_configuration_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for b in (4, 8):
        put(tmp_path, "pqcache", method(b=b))
    read: list[Path] = []
    original = folders.settings_of

    def counting(folder: Path) -> dict[str, Any]:
        read.append(folder)
        return original(folder)

    monkeypatch.setattr(folders, "settings_of", counting)
    assert main([str(tmp_path)]) == 0
    assert len(read) == len(set(read)) == 2
