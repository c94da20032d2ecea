"""``python -m plots``: every module with draw() is a figure; for missing figures one line says which command to run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plots.__main__ import figures, main
from plots.data import PUBLISHED, alike, machine, published, without
from pqbench.records.file import VERSION, RecordFile
from pqbench.records.folders import read_folders
from tests.plots.support import Results

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"benchmark": {"lengths": [1024]}, "method": {"_target_": "methods.full.Full"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results with needle records of full attention at two lengths."""
    file = RecordFile.create(tmp_path, "needle", "toy", "full", SETTINGS)
    for length in (1024, 2048):
        file.append(
            {
                "benchmark": "needle",
                "model": "toy",
                "task": "number",
                "sample_id": f"{length}",
                "method": "full",
                "key": file.folder.name.rpartition("-")[2],
                "budget": "all",
                "question": "dense",
                "status": "ok",
                "score": 50.0,
                "metadata": {"length": length, "depth": 0},
            }
        )
    return tmp_path


def test_every_module_that_draws_is_a_figure() -> None:
    drawing = {path.stem for path in (ROOT / "plots").glob("*.py") if "\ndef draw(" in path.read_text(encoding="utf-8")}
    assert figures().keys() >= drawing
    assert {"needle", "latency", "cache", "pareto", "power_law"} <= figures().keys()


def test_every_figure_names_what_makes_its_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in figures():
        caplog.clear()
        assert main([str(tmp_path), name]) == 1
        (line,) = caplog.messages
        assert line.startswith(f"{name} is not drawn: it needs ")
        for word in line.split("`")[1].split():
            if word.startswith("experiment="):
                assert (ROOT / "conf/experiment" / f"{word.removeprefix('experiment=')}.yaml").exists()


def test_some_records_draw_some_figures(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert main([str(folder)]) == 0
    assert (folder / "figures/needle_full.png").exists()
    assert any(line.startswith("not drawn: ablation, attention,") for line in caplog.messages)
    assert main([str(folder), "needle"]) == 0
    assert main([str(folder), "needle", "cache"]) == 1
    assert "cache is not drawn: it needs latency records of one method with two sizes" in caplog.text


def test_an_unknown_figure_is_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([str(folder), "pie"]) == 1
    assert caplog.messages == [f"there is no figure pie: use some of {', '.join(figures())}"]


def test_records_of_another_version_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = folder.rglob("records.jsonl")
    foreign = json.loads(path.read_text().splitlines()[0]) | {"version": 99, "score": 0, "sample_id": "x"}
    path.write_text(path.read_text() + json.dumps(foreign) + "\nnot json\n")
    assert main([str(folder), "needle"]) == 0
    assert "left out 1 record(s) of format version 99" in caplog.text


def test_records_without_settings_or_columns_break_nothing(folder: Path) -> None:
    (config,) = folder.rglob("config.yaml")
    config.write_text("- [: not yaml")
    (path,) = folder.rglob("records.jsonl")
    for benchmark in ("needle", "latency", "infinitebench", "attention", "attention_scores"):
        bare = {"version": 1, "benchmark": benchmark, "sample_id": benchmark, "status": "ok", "method": "x", "key": "k"}
        path.write_text(path.read_text() + json.dumps(bare) + "\n")
    assert main([str(folder)]) == 0
    (run,) = read_folders(folder)
    assert run.settings == {}
    assert run.environments[0]["packages"]["pqbench"]


def test_settings_come_from_the_folder(folder: Path) -> None:
    (run,) = read_folders(folder)
    assert run.settings == SETTINGS
    assert run.environments[0]["processor"]


def test_runs_are_alike_but_for_what_is_swept() -> None:
    found = Results("needle")
    for m, seed in ((1, 0), (2, 0), (2, 1)):
        found.run("pqcache", "pqcache", [{"score": 1}], {"m": m, "seed": seed})
    groups = [
        sorted(settings["method"]["m"] for settings in part["settings"]) for part in alike(found.table, "method.m")
    ]
    assert groups == [[1, 2], [2]]  # the largest first
    settings = {"method": {"m": 1, "b": 8}, "store": "x"}
    assert without(settings, "method.m", "absent.path") == '{"method": {"b": 8}, "store": "x"}'
    assert settings == {"method": {"m": 1, "b": 8}, "store": "x"}  # a copy was made smaller


def test_the_footer_names_machines_of_both_kinds_of_record() -> None:
    found = Results("needle")
    found.run("pqcache", "pqcache", [{"score": 1}, {"score": 1, "device": "NVIDIA H100", "threads": 2}])
    assert machine(found.table) == "Test CPU, NVIDIA H100, 2 threads"


def test_no_published_numbers_are_an_empty_table(tmp_path: Path) -> None:
    assert list(published("absent", tmp_path).columns) == PUBLISHED
    assert published("absent", tmp_path).empty


def test_too_few_records_for_any_figure_are_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = RecordFile.create(tmp_path, "ruler", "toy", "full", SETTINGS)
    good = {"version": VERSION, "benchmark": "ruler", "model": "toy", "task": "vt", "sample_id": "1", "method": "full"}
    file.append({**good, "key": "aa", "status": "ok"})
    caplog.set_level("INFO")
    assert main([str(tmp_path)]) == 0
    (line,) = caplog.messages
    assert line.startswith(f"1 record(s) in {tmp_path} are too few to draw any figure")


def test_failed_records_alone_are_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = RecordFile.create(tmp_path, "ruler", "toy", "full", SETTINGS)
    bad = {"version": VERSION, "benchmark": "ruler", "model": "toy", "task": "vt", "sample_id": "1", "method": "full"}
    file.append({**bad, "key": "aa", "status": "error", "error": "x"})
    assert main([str(tmp_path)]) == 1
    assert "no records to draw" in caplog.text
