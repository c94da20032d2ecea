"""The results pages are those that the command makes from the committed records, and their figures are right."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from plots.pages.__main__ import PAGES, made, main, read
from plots.pages.answer import choice
from plots.pages.marks import replaced
from plots.pages.packed import pack, unpack
from plots.pages.quick import methods_of
from plots.pages.source import wrapped
from pqbench.errors import DataError
from pqbench.records.file import RecordFile, read_all

ROOT = Path(__file__).resolve().parents[2]


def records(name: str) -> list[dict[str, Any]]:
    """The records of a committed file, read without the project's own code."""
    lines = gzip.decompress((ROOT / "results" / "measured" / f"{name}.jsonl.gz").read_bytes()).splitlines()
    return [json.loads(line)["record"] for line in lines if b'"record"' in line[:20]]


def cells(page: str, heading: str, row: str) -> list[str]:
    """The cells of the first row of a name in the first table whose heading holds a word."""
    tables = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    [table, *_] = [table for table in tables if heading in table.splitlines()[0]]
    [line, *_] = [line for line in table.splitlines() if line.startswith(f"| {row} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_committed_pages_and_the_readme_are_what_the_command_makes() -> None:
    texts = made(read(ROOT), (ROOT / "README.md").read_text(encoding="utf-8"))
    assert "README.md" in texts
    for name, text in texts.items():
        there = (ROOT / name).read_text(encoding="utf-8")
        assert text == there, f"{name} differs: `python -m plots.pages` brings it up to date"


def test_every_page_of_results_is_made_from_records() -> None:
    there = {path.stem for path in (ROOT / "docs" / "results").glob("*.md")}
    assert there == set(read(ROOT)) | {"gpu"}  # gpu.md is made by gpucheck.page and tested there
    assert sum(path.stat().st_size for path in (ROOT / "results" / "measured").iterdir()) < 500_000


def test_scores_on_the_page_are_means_of_the_records() -> None:
    page = (ROOT / "docs/results/quick_suite.md").read_text(encoding="utf-8")
    for method in ("full", "pqcache", "h2o", "infllm"):
        expected = [
            fmean(r["score"] for r in records("quick_suite") if (r["method"], r["benchmark"]) == (method, name))
            for name in ("needle", "infinitebench", "ruler")
        ]
        assert cells(page, "InfiniteBench", method) == [method, *(f"{value:.1f}" for value in expected)]


def test_errors_on_the_page_are_means_over_documents() -> None:
    page = (ROOT / "docs/results/fidelity.md").read_text(encoding="utf-8")
    found = records("fidelity")
    for method in ("oracle", "pqcache_plus", "h2o"):
        rows = [r for r in found if r["method"] == method and r["ratio"] == 0.1]
        row = cells(page, "error at 10 %", method)
        heading = cells(page, "error at 10 %", "method")
        assert row[heading.index("error at 10 %")] == f"{fmean(r['output_error'] for r in rows):.3f}"
        assert row[heading.index("KL at 10 %")] == f"{fmean(r['kl'] for r in rows):.4f}"


def test_recommended_methods_win_by_the_records() -> None:
    """No other method of the same kind has a smaller error or a higher score, computed again from the raw records."""
    found = choice(read(ROOT)["quick_suite"], read(ROOT)["fidelity"])
    suite, faith = records("quick_suite"), records("fidelity")

    def error(method: str) -> float:
        return fmean(r["output_error"] for r in faith if r["method"] == method and r["ratio"] == 0.1)

    dropping = {"h2o", "snapkv", "pyramidkv", "tova", "streaming_llm"}
    assert set(found.candidates(True)) == dropping
    assert found.dropper() == min(dropping, key=error)
    # Full, the exact top-k, a method that reads as many bytes, and random tokens are never recommended.
    choosing = {r["method"] for r in suite} - dropping - {"full", "oracle", "magicpig", "random_tokens"}
    assert set(found.candidates(False)) == choosing
    assert found.faithful() == min(choosing, key=error)
    scores = {
        method: fmean(
            fmean(r["score"] for r in suite if (r["method"], r["benchmark"]) == (method, name))
            for name in ("needle", "infinitebench", "ruler")
        )
        for method in choosing
    }
    assert scores[found.finder()] == max(scores.values())


def results(folder: Path, samples: Sequence[dict[str, Any]]) -> Path:
    """A results folder with one run."""
    file = RecordFile.create(folder, "needle", "tiny", "full", {"method": {"_target_": "methods.full.Full"}})
    for sample in samples:
        file.append({"benchmark": "needle", "model": "tiny", "method": "full", "status": "ok"} | sample)
    return folder


def test_packing_keeps_the_newest_record_of_every_sample_and_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = results(tmp_path / "results", [{"sample_id": str(i), "score": float(i)} for i in range(3)])
    first, second = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"
    assert pack(folder, first, "a command") == pack(folder, second, "a command") == 3
    assert first.read_bytes() == second.read_bytes()
    found = unpack(first)
    assert found.command == "a command"
    assert list(found.records) == read_all(folder)
    [(settings, environment)] = found.runs.values()
    assert settings == {"method": {"_target_": "methods.full.Full"}}
    assert environment["packages"]["torch"]


def test_bad_records_end_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results folder"):
        pack(tmp_path / "none", tmp_path / "x.jsonl.gz", "c")
    damaged = tmp_path / "quick_suite.jsonl.gz"
    damaged.write_bytes(b"not compressed")
    with pytest.raises(DataError, match=r"cannot read .*quick_suite"):
        unpack(damaged)
    damaged.write_bytes(gzip.compress(b'{"command": "c", "date": "d"}\n{"record": {"version": 99}}\n'))
    with pytest.raises(DataError, match="records of format 99"):
        unpack(damaged)
    with pytest.raises(DataError, match="README needs the lines"):
        replaced("no marks here", {"answer": "text"})


def test_the_command_makes_a_checkout_without_pages_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([str(tmp_path)]) == 1
    assert "no records in" in caplog.text
    assert main([str(tmp_path), "--pack", "needles", str(tmp_path), "--command", "c"]) == 1
    assert f"there is no page needles: use one of {', '.join(PAGES)}" in caplog.text
    shutil.copytree(ROOT / "results" / "measured", tmp_path / "results" / "measured")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    bare = re.sub(r"(<!-- \w+: made by.*?-->\n).*?(<!-- end of)", r"\1\2", readme, flags=re.DOTALL)
    assert bare != readme
    (tmp_path / "README.md").write_text(bare)
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == readme
    for page in [tmp_path / "README.md", *tmp_path.glob("docs/results/*.md")]:
        for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).stat().st_size > 10_000, link


def test_speed_needs_no_more_than_records(tmp_path: Path) -> None:
    """The page of times is made if there are records of times."""
    shutil.copytree(ROOT / "results" / "measured", tmp_path / "results" / "measured")
    shutil.copy(ROOT / "README.md", tmp_path)
    timed = tmp_path / "timed"
    for method, seconds in (("full", 2.0), ("h2o", 1.0)):
        file = RecordFile.create(timed, "latency", "tiny", method, {"method": {"_target_": f"methods.{method}.X"}})
        for context in (1024, 2048):
            file.append(
                {"benchmark": "latency", "model": "tiny", "method": method, "sample_id": str(context), "status": "ok"}
                | {"key": file.folder.name.rpartition("-")[2], "context": context, "new_tokens": 8, "budget": "10 %"}
                | {"ttft_s": seconds, "tt2t_s": seconds, "tpot_s": seconds / 100, "kind": "latency"}
            )
    assert main([str(tmp_path), "--pack", "speed", str(timed), "--command", "python -m pqbench benchmark=latency"]) == 0
    page = (tmp_path / "docs/results/speed.md").read_text(encoding="utf-8")
    assert "python -m pqbench benchmark=latency\n" in page
    assert "1.00" in cells(page, "TTFT s", "1024")  # of full attention, by itself
    assert "0.50" in page
    assert (tmp_path / "docs" / "figures" / "latency_tiny.png").exists()


def test_commands_are_cut_between_arguments() -> None:
    command = "python -m pqbench " + " ".join(f"option{i}=value" for i in range(20)) + " '+methods.x={a: 1, b: 2}'"
    lines = wrapped(command)
    assert all(line.endswith(" \\") for line in lines[:-1])
    assert " ".join(" ".join(line.removesuffix("\\") for line in lines).split()) == command


def test_methods_are_ordered_by_score(tmp_path: Path) -> None:
    found = read(ROOT)["quick_suite"].records
    assert methods_of(found)[:1] == ["full"]
