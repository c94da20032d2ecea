"""A record is left out only where the same sample was measured again; otherwise every record is shown."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from plots.report.load import load
from pqbench.records.file import RecordFile, read_all

SETTINGS = {"benchmark": {"lengths": [1]}, "method": {"_target_": "a.b.Mine"}}


def run(root: Path, code: str, **samples: str) -> RecordFile:
    """Start the run with this code, and record samples with these statuses; each record tells its code as its score."""
    file = RecordFile.create(root, "needle", "tiny", "mine", SETTINGS | {"code": code})
    for sample, status in samples.items():
        file.append(record(sample, status, code))
    return file


def record(sample: str, status: str, code: str) -> dict[str, Any]:
    facts = {"benchmark": "needle", "model": "tiny", "task": "number", "method": "mine", "made_by": code}
    scores = {"score": 50.0, "scores": {"score": 50.0}} if status == "ok" else {"error": "it broke"}
    return {"sample_id": sample, "status": status, "key": code, **facts, **scores}


def shown(root: Path) -> list[str]:
    """Samples with the code that made their records and their statuses, as tables and plots read them; the report must
    read the same."""
    texts = [
        sorted(f"{one['sample_id']} {one['made_by']} {one['status']}" for one in records)
        for records in (read_all(root), load(root).records)
    ]
    assert texts[0] == texts[1]
    return texts[0]


def test_a_newer_run_without_records_hides_nothing(tmp_path: Path) -> None:
    run(tmp_path, "old", a="ok", b="ok")
    run(tmp_path, "new")
    assert shown(tmp_path) == ["a old ok", "b old ok"]


def test_samples_are_hidden_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, "old", a="ok", b="ok", c="error")
    run(tmp_path, "new", a="ok")
    caplog.clear()
    assert len(read_all(tmp_path)) == 3
    assert ["2 record(s) of older code are kept" in caplog.messages[0], len(caplog.messages)] == [True, 2]
    assert shown(tmp_path) == ["a new ok", "b old ok", "c old error"]
    assert len(read_all(tmp_path, all_code=True)) == 4
    assert load(tmp_path).old_code == 1


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("ok", "ok", ["a new ok"]),
        ("ok", "refused", ["a new refused", "a old ok"]),
        ("ok", "error", ["a new error", "a old ok"]),
        ("refused", "oom", ["a new oom", "a old refused"]),
        ("refused", "refused", ["a new refused"]),
        ("error", "oom", ["a new oom"]),
        ("error", "ok", ["a new ok"]),
    ],
)
def test_a_record_is_hidden_only_by_one_that_is_worth_as_much(
    tmp_path: Path, old: str, new: str, expected: list[str]
) -> None:
    run(tmp_path, "old", a=old)
    run(tmp_path, "new", a=new)
    assert shown(tmp_path) == expected


@pytest.mark.parametrize("copied", [False, True])
def test_the_code_that_was_run_last_is_shown_after_an_edit_was_reverted(tmp_path: Path, copied: bool) -> None:
    results = tmp_path / "results"
    for code in ("first", "edited", "first"):  # the third finds every sample on record
        run(results, code, a="ok", b="ok")
    if copied:  # in another order, and as copies lose times
        shutil.copytree(results, tmp_path / "copy", copy_function=shutil.copyfile)
        results = tmp_path / "copy"
        for path in results.rglob("*"):
            os.utime(path, (1e9, 1e9 + ("first" not in path.read_text() if path.is_file() else 0)))
    assert shown(results) == ["a first ok", "b first ok"]


def test_records_of_the_first_format_stay_until_they_are_measured_again(tmp_path: Path) -> None:
    folder = tmp_path / "needle" / "tiny" / "mine-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("benchmark: {lengths: [1]}\nmethod: {_target_: c.Mine}\n")
    lines = [json.dumps(record(sample, "ok", "first") | {"version": 1}) for sample in ("a", "b")]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    run(tmp_path, "new")
    assert shown(tmp_path) == ["a first ok", "b first ok"]
    run(tmp_path, "new", b="ok")
    for path in folder.iterdir():
        os.utime(path, (4e9, 4e9))  # a later time than that of the new run, as a checkout would give
    assert shown(tmp_path) == ["a first ok", "b new ok"]


@pytest.mark.parametrize("beats", [True, False], ids=["a sign of life", "times of files"])
def test_runs_of_older_versions_are_told_apart_by_what_there_is(tmp_path: Path, beats: bool) -> None:
    for code, time in (("late", 2e9), ("early", 1e9)):  # the names lie in the other order than the times
        folder = run(tmp_path, code, a="ok").folder
        (folder / "run.json").unlink()
        if beats:
            (folder / "progress.json").write_text(json.dumps({"started": time}))
        for path in folder.iterdir():
            os.utime(path, (3e9 - time, 3e9 - time) if beats else (time, time))
    assert shown(tmp_path) == ["a late ok"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"token": 3, "started": 1}', '{"token": "x", "started": "y"}', "[" * 9999]
)
def test_a_damaged_stamp_stops_nobody(tmp_path: Path, content: str) -> None:
    for code in ("one", "two"):
        (run(tmp_path, code, a="ok").folder / "run.json").write_text(content)
    assert len(shown(tmp_path)) == 1
    assert run(tmp_path, "one", b="ok").append(record("c", "ok", "one"))
