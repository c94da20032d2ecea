"""Every table marks rows in which a method had nothing to skip, since these are full attention."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pqbench.__main__ import main
from pqbench.records.file import Record, read_all
from pqbench.records.kinds import ATTENTION, FIDELITY, LATENCY, TOO_SHORT, skipped_nothing
from pqbench.tables.command import main as tables
from pqbench.tables.kinds import sections

RUN = ("model=tiny", "benchmark=needle", "benchmark.depths=[50]", "benchmark.max_new_tokens=3", "threads=1")


def run(results: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pqbench", *RUN, f"results={results}", *overrides])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0


def test_a_short_prompt_is_marked_and_a_longer_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pqcache has 256 centroids, so it makes no index for 256 tokens; streaming_llm drops tokens of any prompt."""
    run(tmp_path, monkeypatch, "method=[full,pqcache,streaming_llm]", "benchmark.lengths=[256,1024]")
    shown = capsys.readouterr().out
    assert "2 (1 dense)" in next(line for line in shown.splitlines() if "pqcache" in line)
    assert shown.count(TOO_SHORT) == 1
    assert tables([str(tmp_path)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if TOO_SHORT in line]
    assert rows
    assert all(row.startswith("| pqcache") for row in rows)
    attended = {(r["method"], r["prompt_tokens"] > 500): r["attended_tokens"] for r in read_all(tmp_path)}
    assert attended["pqcache", False] == attended["full", False]


@pytest.mark.parametrize("override", ["question=select", "benchmark.max_new_tokens=1"])
def test_a_short_prompt_is_marked_wherever_its_question_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    """Steps that read the question see less than the whole prompt, and all of what there is; or there is no step."""
    run(tmp_path, monkeypatch, "method=[full,pqcache]", "benchmark.lengths=[256]", override)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if "(1 dense)" in line] == ["pqcache"]
    assert {record["skipped_nothing"] for record in read_all(tmp_path)} == {True}


def test_a_method_that_exceeds_its_budget_by_design_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SnapKV as published keeps every generated token beside those of its budget."""
    run(tmp_path, monkeypatch, "method=[snapkv]", "benchmark.lengths=[512]", "methods.snapkv.evict_generated=false")
    assert "10 % (varies)" in capsys.readouterr().out
    run(tmp_path / "other", monkeypatch, "method=[snapkv]", "benchmark.lengths=[512]")
    assert "(varies)" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "marked"),
    [
        ({"budget": "10 %", "prompt_tokens": 100, "attended_tokens": 100.5}, True),
        ({"budget": "64 tokens", "context": 64, "attended_tokens": 64}, True),
        ({"budget": "10 %", "prompt_tokens": 100, "attended_tokens": 99.5}, False),
        ({"budget": "all", "prompt_tokens": 100, "attended_tokens": 101}, False),
        ({"budget": "100 %", "prompt_tokens": 100, "attended_tokens": 101}, False),
        ({"budget": "10 %", "status": "error"}, False),
        ({"budget": "1024 tokens", "prompt_tokens": 1000, "attended_tokens": 1020, "skipped_nothing": False}, False),
        ({"budget": "10 %", "prompt_tokens": 100, "attended_tokens": 90, "skipped_nothing": True}, True),
        ({"budget": "100 %", "prompt_tokens": 100, "attended_tokens": 101, "skipped_nothing": True}, False),
    ],
)
def test_which_records_are_marked(fields: Record, marked: bool) -> None:
    assert skipped_nothing(fields) is marked


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": LATENCY, "context": 128, "repeat": 0, "ttft_s": 1.0},
        {"kind": ATTENTION, "context": 128, "kernel": "-", "total_s": 1.0},
        {"kind": FIDELITY, "length": 128, "document": "a", "ratio": 0.5, "steps": 4, "output_error": 0.0},
    ],
)
def test_times_and_fidelity_are_marked_as_well(fields: dict[str, Any]) -> None:
    record = {"status": "ok", "model": "tiny", "method": "pqcache", "key": "k", "budget": "50 %", **fields}
    for attended, marked in ((129.0, True), (70.0, False)):
        rows = [row for part in sections([{**record, "attended_tokens": attended}]) for row in part.rows]
        assert rows
        assert all(any(TOO_SHORT in cell for cell in row) for row in rows) is marked
