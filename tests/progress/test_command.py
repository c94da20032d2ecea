"""``python -m pqbench.progress``: states, rates and remaining times of runs, from records and heartbeats."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pqbench.progress.command import duration, main
from pqbench.progress.runs import read_runs
from pqbench.records.file import RecordFile
from pqbench.records.heartbeat import NAME, SILENCE_S, Beat, heartbeat, read_beat


def run_folder(root: Path, method: str, ok: int, failed: int = 0, key: str = "0123456789ab") -> Path:
    folder = root / "needle" / "tiny" / f"{method}-{key}"
    folder.mkdir(parents=True)
    rows = [{"version": 1, "sample_id": f"s{i}", "status": "ok" if i < ok else "error"} for i in range(ok + failed)]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sign(folder: Path, **changes: Any) -> None:
    now = time.time()
    beat = Beat("here", 7, now - 120.0, now, 0, 10)
    (folder / NAME).write_text(json.dumps(asdict(beat) | changes))


def lines(root: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[list[str]]:
    assert main([str(root), *options]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out  # no terminal: plain text
    return [line.split() for line in out.splitlines()]


def test_states(tmp_path: Path) -> None:
    sign(run_folder(tmp_path, "a_running", 4))
    sign(run_folder(tmp_path, "b_killed", 4), beat=time.time() - SILENCE_S - 1)
    sign(run_folder(tmp_path, "c_stopped", 4), ended=True)
    sign(run_folder(tmp_path, "d_done", 8, failed=2), ended=True)
    sign(run_folder(tmp_path, "e_killed_when_done", 10), beat=1.0)
    run_folder(tmp_path, "f_older", 4)
    runs = read_runs(tmp_path)
    assert [run.state for run in runs] == ["running", "stalled", "stopped", "done", "done", "unknown"]
    assert [run.left for run in runs] == [6, 6, 6, 0, 0, None]


def test_rates_count_what_this_process_did(tmp_path: Path) -> None:
    """4 of 10 samples are done after 120 s, but one existed before: 3 in 2 minutes, so 6 more take 4 minutes."""
    sign(run_folder(tmp_path, "h2o", 3, failed=1), before=1)
    (run,) = read_runs(tmp_path)
    assert run.rate == pytest.approx(3 / 120, rel=1e-3)
    assert run.eta_s == pytest.approx(240, rel=1e-3)


def test_the_table_sums_the_settings_of_a_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sign(run_folder(tmp_path, "h2o", 4, key="aaaaaaaaaaaa"))
    sign(run_folder(tmp_path, "h2o", 9, failed=1, key="bbbbbbbbbbbb"), ended=True)
    sign(run_folder(tmp_path, "full", 0), planned=None)
    rows = {row[2] if row[0] == "needle" else row[0]: row for row in lines(tmp_path, capsys) if row}
    assert " ".join(rows["h2o"]) == "needle tiny h2o 1 running, 1 done 13 20 1 2.0 3 min"
    assert " ".join(rows["full"]) == "needle tiny full 1 running 0 ? 0 - ?"
    assert " ".join(rows["all"]) == "all 2 running, 1 done 13 20+? 1 2.0 ?"


def test_watching_ends_with_the_last_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sign(run_folder(tmp_path, "h2o", 10), ended=True)
    began = time.perf_counter()
    lines(tmp_path, capsys, "--watch", "100")
    assert time.perf_counter() - began < 50


WRONG_PID = '{"host":"x","pid":"1","started":0,"beat":0,"before":0}'


@pytest.mark.parametrize("text", ["", "[]", "7", '{"host": 1}', WRONG_PID, "[" * 100000])
def test_a_damaged_sign_counts_as_none(tmp_path: Path, text: str) -> None:
    folder = run_folder(tmp_path, "h2o", 4)
    (folder / NAME).write_text(text)
    assert read_runs(tmp_path)[0].state == "unknown"


def test_names_are_inert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path, "[red]x\x1b[31m", 1)
    (row,) = [row for row in lines(tmp_path, capsys) if row[:1] == ["needle"]]
    assert row[2] == "[red]x\ufffd[31m"


def test_no_folder_and_no_number_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main([str(tmp_path / "absent")]) == 1
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path), "--watch", "soon"])
    assert end.value.code == 2
    assert main([str(tmp_path)]) == 0
    assert "no run has started" in capsys.readouterr().out


def test_a_heart_beats_until_the_run_ends(tmp_path: Path) -> None:
    file = RecordFile.create(tmp_path, "needle", "tiny", "h2o", {})
    file.append({"sample_id": "s0", "status": "ok"})
    with pytest.raises(ZeroDivisionError), heartbeat([file], interval=0.01):  # noqa: PT012 - what happens inside counts
        first = read_beat(file.folder)
        assert first is not None
        assert (first.before, first.planned, first.ended) == (1, None, False)
        file.planned = 3
        for _ in range(1000):
            time.sleep(0.01)
            later = read_beat(file.folder)
            if later is not None and later.planned == 3:
                break
        assert later is not None
        assert later.beat > first.beat
        assert read_runs(tmp_path)[0].state == "running"
        raise ZeroDivisionError
    assert read_runs(tmp_path)[0].state == "stopped"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (5340, "89 min"), (11100, "3 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
