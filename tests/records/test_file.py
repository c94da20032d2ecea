"""Records survive kills, other processes, manual edits and unusual content."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pqbench.errors import DataError
from pqbench.records import file as records
from pqbench.records.environment import differences
from pqbench.records.file import VERSION, RecordFile, encode, parse, plain_name, read_all, run_key, write_atomically

SETTINGS = {"benchmark": {"lengths": [1, 2]}, "method": {"m": 2}}


def row(sample: str, status: str = "ok", **fields: Any) -> dict[str, Any]:
    return {"version": VERSION, "sample_id": sample, "status": status, **fields}


def ids(file: RecordFile) -> list[str]:
    return [record["sample_id"] for record in file.read()]


@pytest.fixture
def file(tmp_path: Path) -> RecordFile:
    return RecordFile(tmp_path)


def test_key_ignores_order_and_sees_every_value() -> None:
    assert run_key({"a": 1, "b": [1, 2]}) == run_key({"b": [1, 2], "a": 1})
    assert len({run_key(s) for s in ({"a": 1}, {"a": 2}, {"a": "1"}, {"a": None}, {"b": 1}, {"a": [1]})}) == 6


def test_runs_of_different_settings_never_share_a_folder(tmp_path: Path) -> None:
    one = RecordFile.create(tmp_path, "needle", "tiny", "full", SETTINGS)
    same = RecordFile.create(tmp_path, "needle", "tiny", "full", SETTINGS)
    other = RecordFile.create(tmp_path, "needle", "tiny", "full", SETTINGS | {"question": "select"})
    assert one.folder == same.folder != other.folder
    assert yaml.safe_load((one.folder / "config.yaml").read_text()) == SETTINGS
    assert one.folder == tmp_path / "needle" / "tiny" / f"full-{run_key(SETTINGS)}"


def test_config_and_environment_are_written_once(tmp_path: Path) -> None:
    folder = RecordFile.create(tmp_path, "b", "m", "x", SETTINGS).folder
    before = {name: (folder / name).stat().st_mtime_ns for name in ("config.yaml", "environment.json")}
    RecordFile.create(tmp_path, "b", "m", "x", SETTINGS)
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "environment.json",
        "records.jsonl",
        "records.jsonl.lock",
        "run.json",
    ]


def test_another_environment_is_added_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = {"packages": {"torch": "1"}, "threads": 1}
    monkeypatch.setattr(records, "environment", lambda: first)
    folder = RecordFile.create(tmp_path, "b", "m", "x", SETTINGS).folder
    second = {"packages": {"torch": "2"}, "threads": 1}
    monkeypatch.setattr(records, "environment", lambda: second)
    RecordFile.create(tmp_path, "b", "m", "x", SETTINGS)
    RecordFile.create(tmp_path, "b", "m", "x", SETTINGS)
    assert json.loads((folder / "environment.json").read_text()) == [first, second]
    assert [message for message in caplog.messages if "another environment" in message] == [
        f"{folder / 'environment.json'}: this run continues in another environment: torch 1 -> 2"
    ]
    assert differences(first, second | {"new": 1}) == ["torch 1 -> 2", "new None -> 1"]


@pytest.mark.parametrize("again", [False, True], ids=["deleted", "replaced"])
def test_a_folder_that_is_deleted_meanwhile_stops_the_run(tmp_path: Path, again: bool) -> None:
    file = RecordFile.create(tmp_path, "b", "m", "x", SETTINGS)
    assert file.append(row("a"))
    file.folder.rename(tmp_path / "elsewhere")
    if again:
        file.folder.mkdir()
    with pytest.raises(DataError, match=r"was deleted or replaced while this run wrote to it; 1 record\(s\)"):
        file.append(row("b"))
    assert not (file.folder / "records.jsonl").exists()


def test_a_folder_made_anew_by_another_process_stops_the_run(tmp_path: Path) -> None:
    """A file system may give the new folder the inode of the old one, so that inodes cannot tell them apart."""
    file = RecordFile.create(tmp_path, "b", "m", "x", SETTINGS)
    assert file.append(row("a"))
    kept = [(path, path.read_bytes()) for path in file.folder.iterdir()]
    for path, _ in kept:
        path.unlink()  # the folder keeps its inode
    other = RecordFile.create(tmp_path, "b", "m", "x", SETTINGS)
    assert other.append(row("c"))
    with pytest.raises(DataError, match=r"deleted or replaced while this run wrote to it; 1 record\(s\)"):
        file.append(row("b"))
    assert ids(other) == ["c"]
    for path, content in kept:
        path.write_bytes(content)  # the folder as it was
    assert file.append(row("b"))


KEPT = [None, b"", encode(row("b")), encode(row("c")) + encode(row("d"))]


@pytest.mark.parametrize("kept", KEPT, ids=["nothing", "empty", "one record", "other records"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "replaced"])
def test_records_that_are_deleted_meanwhile_stop_the_run(tmp_path: Path, kept: bytes | None, in_place: bool) -> None:
    file = RecordFile.create(tmp_path, "b", "m", "x", SETTINGS)
    assert file.append(row("a"))
    assert file.append(row("b"))
    if not in_place:
        file.path.rename(tmp_path / "elsewhere")
    if kept is not None:
        file.path.write_bytes(kept)
    elif in_place:
        file.path.unlink()
    gone = 1 if kept == encode(row("b")) else 2
    for _ in range(2):  # and it goes on saying so
        with pytest.raises(DataError, match=rf"records.jsonl was deleted or replaced .*; {gone} record\(s\)"):
            file.append(row("e"))
        with pytest.raises(DataError, match="was deleted or replaced"):
            file.outcome("e")
    again = RecordFile.create(tmp_path, "b", "m", "x", SETTINGS)
    assert again.append(row("a"))


def test_append_and_read_back(file: RecordFile) -> None:
    for sample in ("a", "b", "c"):
        assert file.append(row(sample, score=1.5))
    assert ids(file) == ["a", "b", "c"]
    assert set(file.outcomes()) == {"a", "b", "c"}


def test_a_finished_sample_is_not_written_twice(file: RecordFile) -> None:
    other = RecordFile(file.folder)
    assert file.append(row("a", score=1))
    assert not other.append(row("a", score=2))
    assert not other.append(row("a", "error", error="late"))
    assert [record["score"] for record in file.read()] == [1]


def test_error_rows_are_replaced_but_not_repeated(file: RecordFile) -> None:
    assert file.append(row("a", "error", error="first"))
    assert not RecordFile(file.folder).append(row("a", "error", error="first"))
    assert file.append(row("a", "error", error="second"))
    assert file.outcomes() == {"a": "second"}
    assert file.append(row("a"))
    assert [record["status"] for record in file.read()] == ["ok"]
    assert file.path.read_bytes().count(b"\n") == 3


def test_lines_are_strict_json_in_ascii(file: RecordFile) -> None:
    odd: dict[str, Any] = {
        "nan": float("nan"),
        "inf": float("-inf"),
        "numpy": np.float32(0.5),
        "ids": (np.int64(3),),
        "path": Path("x"),
    }
    file.append(row("a", prediction='\udce9"\n\u2028é\x00' + "x" * 100_000, **odd))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = file.path.read_bytes()
    assert line.isascii()
    assert line.count(b"\n") == 1
    assert json.loads(line, parse_constant=refuse)["nan"] is None
    (record,) = file.read()
    assert len(record["prediction"]) == 100_006
    assert (record["inf"], record["numpy"], record["ids"], record["path"]) == (None, 0.5, [3], "x")


BROKEN = [
    b"{",
    b"[1]",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b'{"sample_id": 3, "status": "ok"}',
    b'{"sample_id": "x"}',
    b'{"sample_id": ["x"], "status": "ok"}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_broken_lines_are_skipped_and_counted(file: RecordFile, line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    file.path.write_bytes(encode(row("a")) + line + b"\n" + encode(row("b")))
    assert ids(file) == ["a", "b"]
    (warning,) = caplog.messages
    assert "skipped 1 broken line(s) (2)" in warning
    assert file.append(row("x"))
    assert ids(file) == ["a", "b", "x"]


def test_a_line_cut_by_a_kill_runs_again(file: RecordFile, caplog: pytest.LogCaptureFixture) -> None:
    whole = encode(row("b", prediction="y" * 50))
    for kept in (1, 10, len(whole) // 2, len(whole) - 2):
        file.path.write_bytes(encode(row("a")) + whole[:kept])
        again = RecordFile(file.folder)
        caplog.clear()
        assert set(again.outcomes()) == {"a"}
        assert len(caplog.messages) == 1
        assert again.append(row("b", prediction="z"))
        assert file.path.read_bytes() == encode(row("a")) + encode(row("b", prediction="z"))


def test_a_whole_record_without_newline_is_kept(file: RecordFile) -> None:
    file.path.write_bytes((encode(row("a")) + encode(row("b"))).rstrip(b"\n"))
    again = RecordFile(file.folder)
    assert not again.append(row("b"))
    assert again.append(row("c"))
    assert ids(file) == ["a", "b", "c"]
    assert all(parse(line) for line in file.path.read_bytes().splitlines())


def test_deleting_a_line_makes_that_sample_due(file: RecordFile) -> None:
    for sample in ("a", "b", "c"):
        file.append(row(sample))
    lines = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(lines[0] + lines[2])  # in place, while ``file`` still remembers three lines
    assert set(file.outcomes()) == {"a", "c"}
    assert file.append(row("b"))
    assert ids(file) == ["a", "c", "b"]


def test_a_rewritten_file_is_read_again(file: RecordFile) -> None:
    for sample in ("a", "b"):
        file.append(row(sample))
    write_atomically(file.path, encode(row("a", prediction="longer than the two before" * 9)))
    assert file.append(row("b"))
    assert not file.append(row("a"))
    assert ids(file) == ["a", "b"]


def test_appending_reads_only_what_grew(file: RecordFile, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []

    def counting(line: bytes) -> records.Record | None:
        parsed.append(line)
        return parse(line)

    monkeypatch.setattr(records, "parse", counting)
    for i in range(200):
        file.append(row(str(i)))
    assert len([line for line in parsed if line]) == 0  # its own lines are known
    other = RecordFile(file.folder)
    for i in range(200, 220):
        other.append(row(str(i)))
    assert len([line for line in parsed if line]) == 200


def test_records_of_another_version_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("x", "y"):
        folder = tmp_path / "needle" / "tiny" / name
        folder.mkdir(parents=True)
        (folder / "records.jsonl").write_bytes(
            encode(row("a", version=0)) + encode({"sample_id": "b", "status": "ok"}) + encode(row("c"))
        )
    assert [record["sample_id"] for record in read_all(tmp_path)] == ["c", "c"]
    (message,) = caplog.messages
    assert "left out 4 record(s) of format version 0, unknown; this pqbench reads 1, 2" in message
    assert set(RecordFile(folder).outcomes()) == {"c"}
    assert RecordFile(folder).append(row("a"))


@pytest.mark.parametrize("place", ["file", "/proc/pqbench-results"])
def test_an_unwritable_folder_is_one_line(tmp_path: Path, place: str) -> None:
    root = tmp_path / place
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        DataError, match=r"cannot write results to .*; set results=FOLDER to one you may write"
    ) as caught:
        RecordFile.create(root, "b", "m", "x", SETTINGS)
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line(file: RecordFile, monkeypatch: pytest.MonkeyPatch) -> None:
    file.append(row("a"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        file.append(row("b"))


def test_no_results_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results folder"):
        read_all(tmp_path / "absent")
    assert read_all(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "safe"), [("../../etc", "_.._etc"), ("a b/c", "a_b_c"), ("", "_"), ("..", "_"), ("x.1-y_z", "x.1-y_z")]
)
def test_names_stay_inside_the_folder(name: str, safe: str) -> None:
    assert plain_name(name) == safe


def _append_many(folder: Path, process: int, start: Any) -> None:
    logging.disable(logging.CRITICAL)
    file = RecordFile(folder)
    start.wait()
    for i in range(40):
        file.append(row(f"{process}-{i}", prediction="x" * (50_000 if i % 10 == 0 else 10), process=process))
        file.append(row(f"shared-{i}", process=process))


def test_eight_processes_lose_double_and_interleave_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(8)
    processes = [context.Process(target=_append_many, args=(tmp_path, i, start)) for i in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * 8
    lines = RecordFile(tmp_path).path.read_bytes().splitlines()
    parsed = [parse(line) for line in lines]
    assert all(parsed)
    written = [record["sample_id"] for record in parsed if record]
    assert sorted(written) == sorted(
        [f"{p}-{i}" for p in range(8) for i in range(40)] + [f"shared-{i}" for i in range(40)]
    )


def _append_forever(folder: Path, started: Any) -> None:
    file = RecordFile(folder)
    started.set()
    for i in range(1_000_000):
        file.append(row(str(i), prediction="x" * 200_000))


def test_a_writer_killed_at_any_moment_leaves_whole_lines_and_a_free_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for round_ in range(5):
        folder = tmp_path / str(round_)
        folder.mkdir()
        started = context.Event()
        process = context.Process(target=_append_forever, args=(folder, started))
        process.start()
        assert started.wait(60)
        time.sleep(0.05 + 0.013 * round_)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        file = RecordFile(folder)
        before = ids(file)
        assert before == [str(i) for i in range(len(before))]
        assert file.append(row("after"))
        assert all(parse(line) for line in file.path.read_bytes().splitlines())
