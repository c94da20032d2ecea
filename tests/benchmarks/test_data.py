"""Reading official files: where they are found, and one clear error line for each of their possible faults."""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pqbench.benchmarks import data
from pqbench.benchmarks.data import ANSWERS, INTEGER, TEXT, TEXTS_OR_NULL, find, hub_file, read_rows
from pqbench.errors import ConfigError, DataError

FIELDS = {"input": TEXT, "answers": ANSWERS, "length": INTEGER, "all_classes": TEXTS_OR_NULL}
REMEDY = "download the archive"


def row(**changes: Any) -> dict[str, Any]:
    return {"input": "Wer? 谁", "answers": ["a"], "length": 3, "all_classes": None, "more": 1} | changes


def lines(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in rows)


def failure(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(path, FIELDS)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_rows_come_in_order_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(row(length=1)) + b"\n  \n" + lines(row(length=2)).rstrip(b"\n"))
    assert [each["length"] for each in read_rows(path, FIELDS)] == [1, 2]
    assert read_rows(str(path), FIELDS)[0] == row(length=1)


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(lines(row(), row()) + b"{broken")
    assert len(read_rows(path, FIELDS, limit=2)) == 2
    with pytest.raises(DataError, match="line 3"):
        read_rows(path, FIELDS, limit=3)


@pytest.mark.parametrize("layout", ["set.jsonl", "set.jsonl.gz", "data/set.jsonl", "data/set.jsonl.gz"])
def test_a_file_is_found_plain_and_gzipped(tmp_path: Path, layout: str) -> None:
    path = tmp_path / layout
    path.parent.mkdir(exist_ok=True)
    content = lines(row(), row())
    path.write_bytes(gzip.compress(content) if layout.endswith("gz") else content)
    assert len(read_rows(find(tmp_path, "set.jsonl", remedy=REMEDY), FIELDS)) == 2


def test_a_file_is_found_in_an_archive_in_the_folder_or_given_itself(tmp_path: Path) -> None:
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("__MACOSX/data/._set.jsonl", b"\0")
        opened.writestr("__MACOSX/data/set.jsonl", b"\0")
        opened.writestr("data/set.jsonl", lines(row()))
        opened.writestr("data/other_set.jsonl", lines(row(length="wrong")))
    for root in (tmp_path, archive, str(archive)):
        assert read_rows(find(root, "set.jsonl", remedy=REMEDY), FIELDS) == [row()]
    with pytest.raises(DataError, match=r"data\.zip/data/other_set\.jsonl, line 1: field 'length' must be an integer"):
        read_rows(find(tmp_path, "other_set.jsonl", remedy=REMEDY), FIELDS)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"set\.jsonl is missing in .*: {REMEDY}"):
        find(tmp_path, "set.jsonl", remedy=REMEDY)
    with pytest.raises(ConfigError, match=rf"data_dir=.*nowhere does not exist: {REMEDY}"):
        find(tmp_path / "nowhere", "set.jsonl", remedy=REMEDY)
    with pytest.raises(DataError, match="is missing"):
        read_rows(tmp_path / "set.jsonl", FIELDS)


def test_a_cut_line_is_named(tmp_path: Path) -> None:
    content = lines(row(), row())
    assert "line 2: not a whole JSON object" in failure(tmp_path / "set.jsonl", content[:-20])
    assert "line 1: not a whole JSON object" in failure(tmp_path / "set.jsonl", content[20:])


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    message = failure(tmp_path / "set.jsonl", lines(row()) + b'{"input": "caf\xe9"}\n')
    assert "line 2: byte 15 is not UTF-8" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answers": "a"}, "field 'answers' must be a list of at least one string, found \"a\""),
        ({"answers": []}, "field 'answers' must be a list of at least one string, found []"),
        ({"answers": ["a", 3]}, 'found ["a", 3]'),
        ({"answers": None}, "found null"),
        ({"input": None}, "field 'input' must be a string, found null"),
        ({"length": "3"}, "field 'length' must be an integer"),
        ({"length": True}, "field 'length' must be an integer, found true"),
        ({"all_classes": {"a": 1}}, "field 'all_classes' must be a list of strings or null"),
        ({"input": ["long " * 1000]}, 'found ["long long'),
    ],
)
def test_a_wrong_type_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    message = failure(tmp_path / "set.jsonl", lines(row(), row(**changes)))
    assert "line 2" in message
    assert words in message
    assert len(message) < 300 + len(str(tmp_path))


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    short = row()
    del short["answers"]
    assert "line 1: field 'answers' is missing (found 'input', 'length'" in failure(tmp_path / "a.jsonl", lines(short))
    assert "line 1: expected a JSON object, found list" in failure(tmp_path / "b.jsonl", b"[1, 2]\n")


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    assert "holds no rows" in failure(tmp_path / "set.jsonl", b"\n\n")


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    packed = gzip.compress(lines(*[row(input=str(n) * 50) for n in range(200)]))
    assert "is damaged" in failure(tmp_path / "cut.jsonl.gz", packed[:-40])
    assert "is damaged" in failure(tmp_path / "not.jsonl.gz", lines(row()))
    (tmp_path / "data.zip").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(DataError, match="not a whole zip archive"):
        find(tmp_path, "set.jsonl", remedy=REMEDY)


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("set.jsonl", lines(row(input="x" * 500)))
    content = archive.read_bytes()
    archive.write_bytes(content.replace(b"xxxx", b"xxyx", 1))
    with pytest.raises(DataError, match="is damaged"):
        read_rows(find(tmp_path, "set.jsonl", remedy=REMEDY), FIELDS)


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    for reachable, reason in ((True, "no route"), (False, "it cannot be reached, and nothing is cached")):
        monkeypatch.setattr("pqbench.models.loading.hub_reachable", lambda reachable=reachable: reachable)
        with pytest.raises(DataError) as caught:
            hub_file("owner/set", data.ARCHIVE, remedy=REMEDY)
        assert str(caught.value) == f"cannot download data.zip of owner/set from the hub ({reason}): {REMEDY}"


def test_the_hub_path_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def download(*args: Any, **options: Any) -> str:
        asked.append((args, options))
        return str(tmp_path / "file")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for reachable in (True, False):  # without a network only earlier downloads are used
        monkeypatch.setattr("pqbench.models.loading.hub_reachable", lambda reachable=reachable: reachable)
        assert hub_file("owner/set", "file", remedy=REMEDY, revision="abc") == tmp_path / "file"
        options = {"repo_type": "dataset", "revision": "abc", "local_files_only": not reachable}
        assert asked.pop() == (("owner/set", "file"), options)
