"""The results that remain if a step fails, dies or hangs, and their summary."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpucheck.__main__ import _settled
from gpucheck.options import Options
from gpucheck.plan import STEPS
from gpucheck.process import Ended, run
from gpucheck.result import CUT, Result, read_json, write_json
from gpucheck.summary import summarise
from gpucheck.targets import TARGETS

KERNELS, LATENCY = STEPS[1], STEPS[6]


def read(folder: Path, number: int) -> dict[str, Any]:
    return read_json(folder / STEPS[number].file)


def test_every_row_is_in_the_file_at_once(tmp_path: Path) -> None:
    result = Result(KERNELS, tmp_path)
    for count in (1, 2):
        result.row(f"row {count}", True, figure=float("nan"))
        content = read(tmp_path, 1)
        assert len(content["rows"]) == count
        assert content["rows"][-1]["figure"] is None  # JSON knows no NaN
        assert (content["status"], content["message"]) == ("failed", CUT)
    result.close()
    assert read(tmp_path, 1)["status"] == "ok"


def test_an_error_is_a_row_and_the_step_goes_on(tmp_path: Path) -> None:
    result = Result(KERNELS, tmp_path)
    with result.guarded("first"):
        raise ValueError("of no use\nat all")
    with result.guarded("second"):
        result.row("second", True)
    result.close()
    content = read(tmp_path, 1)
    assert [row["ok"] for row in content["rows"]] == [False, True]
    assert content["rows"][0]["error"] == "ValueError: of no use at all"
    assert content["status"] == "failed"
    assert "wrong: first" in content["message"]


def test_a_process_that_died_or_hung_is_told_apart_from_one_that_ended(tmp_path: Path) -> None:
    options = Options("cpu", "tiny", results=str(tmp_path))
    result = Result(KERNELS, tmp_path)
    result.row("row", True)
    died = _settled(KERNELS, Ended(-11, 3.0, "Segmentation fault"), read(tmp_path, 1), options)
    assert died["status"] == "failed"
    assert "exit code -11: Segmentation fault" in died["message"]
    hung = _settled(KERNELS, Ended(None, 9.0, ""), read(tmp_path, 1), options)
    assert (hung["status"], hung["message"]) == ("timeout", "out of time after 9 s with 1 rows")
    result.close()
    assert _settled(KERNELS, Ended(None, 9.0, ""), read(tmp_path, 1), options)["status"] == "ok"  # only its end hung
    before_any_row = _settled(LATENCY, Ended(1, 1.0, "ImportError"), {}, options)
    assert (before_any_row["rows"], before_any_row["status"]) == ([], "failed")


def test_a_process_out_of_time_is_ended_with_its_children(tmp_path: Path) -> None:
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    code = f"import subprocess, sys; print('here', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    began = time.monotonic()
    ended = run([sys.executable, "-c", code], 1.5, tmp_path / "log", group=True)
    assert ended.code is None
    assert ended.said == "here"
    time.sleep(max(0.0, 6 - (time.monotonic() - began)))
    assert not (tmp_path / "late").exists()


def record(folder: Path, number: int, rows: list[dict[str, Any]], status: str = "ok", **machine: Any) -> None:
    result = Result(STEPS[number], folder, machine)
    result.rows = rows
    result.close(status, "as told" if status != "ok" else "")


def test_only_what_is_wrong_counts_as_wrong(tmp_path: Path) -> None:
    record(tmp_path, 0, [{"name": "packages", "ok": None, "torch": "2.11"}], device="a card", counts=True)
    record(
        tmp_path, 5, [{"name": "layer", "ok": None, "total_ms": 1.0}], "timeout", counts=True
    )  # measures: nothing shown wrong
    record(tmp_path, 6, [], "skipped", counts=True)
    assert summarise(tmp_path).wrong == []
    record(tmp_path, 3, [], "timeout", counts=True)  # proves: it has not
    record(tmp_path, 1, [{"name": "top_k", "ok": False, "error": "IndexError: 7"}], "failed")
    assert summarise(tmp_path).wrong == ["step 1 kernels: top_k: IndexError: 7", "step 3 tokens: as told"]


def test_where_figures_do_not_count_every_step_must_come_to_its_end(tmp_path: Path) -> None:
    for status in ("timeout", "skipped"):
        record(tmp_path, 5, [{"name": "layer", "ok": None, "total_ms": 1.0}], status, counts=False)
        assert summarise(tmp_path).wrong == ["step 5 attention: as told"]


def test_targets_are_judged_by_what_was_measured(tmp_path: Path) -> None:
    def latency(method: str, store: str, milliseconds: float, **more: Any) -> dict[str, Any]:
        return {
            "name": method,
            "ok": None,
            "method": method,
            "store": store,
            "context": 131_072,
            "wanted_budget": 1024,
            "tpot_ms": milliseconds,
            "tt2t_s": 20.0,
            **more,
        }

    record(tmp_path, 0, [], device="a card", counts=True)
    rows = [latency("full", "device", 11.5), latency("pqcache", "device", 9.0), latency("pqcache", "host", 12.0)]
    record(tmp_path, 6, [*rows, latency("pqcache", "device", 6.5, graphs=True, tt2t_s=20.5)])
    record(tmp_path, 4, [{"name": "pq_select", "ok": None, "microseconds": 75.0, "selects": True}])
    found = {target["name"]: target for target in summarise(tmp_path).content["targets"]}
    assert len(found) == len(TARGETS)
    assert found["pqcache, 128K, 1024 tokens, KV on the device"]["met"] is True  # the faster way of two
    assert found["pqcache, 128K, 1024 tokens, KV on the host"]["met"] is False
    assert found["time to second token, pqcache against full"]["measured"] == "1 x"
    assert found["selection at 128K"]["met"] is False
    assert found["row gather from the host against memcpy"]["met"] is None
    assert summarise(tmp_path).wrong == []  # a missed target is no error
    assert "| missed |" in summarise(tmp_path).text


def test_a_cpu_is_not_held_against_targets(tmp_path: Path) -> None:
    record(tmp_path, 0, [], device="a CPU", counts=False)
    assert summarise(tmp_path).content["targets"] == []


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_result_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "1_kernels.json").write_text(text)
    assert read(tmp_path, 1) == {}
    write_json(tmp_path / "1_kernels.json", {"rows": (1, float("inf"))})
    assert json.loads((tmp_path / "1_kernels.json").read_text()) == {"rows": [1, None]}
