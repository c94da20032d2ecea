"""The iterations figure draws fixed counts as a line, and the adaptive choice at its count."""

from __future__ import annotations

from pathlib import Path

import pytest

from plots import iterations
from tests.plots.support import Results, texts


def results(benchmark: str) -> Results:
    found = Results(benchmark, store={"link": "local"})
    for asked, done in ((1, 1), (5, 5), (None, 3)):
        rows = [
            {
                "score": 10 * done,
                "output_error": 0.5 / done,
                "index_build_s": 0.1 * done,
                "tt2t_s": 2 + done,
                "wait_s": 0.01,
                "index_facts": {"iterations": done},
                "context": 2048,
            }
            for _ in range(2)
        ]
        if benchmark != "latency":
            rows = [{name: value for name, value in row.items() if name != "context"} for row in rows]
        found.run(f"pqcache_{asked}", "pqcache", rows, {"iterations": asked, "m": 4})
    return found


def test_quality_and_build_time() -> None:
    figure = iterations.panels(iterations.counted(results("needle").table))
    score, error, build = figure.axes
    fixed, star = score.lines
    assert list(fixed.get_ydata()) == [10, 50]
    assert [label.get_text() for label in score.get_xticklabels()] == ["1", "5"]
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([0.5], [30])  # 3 lies half way between 1 and 5
    assert [text.get_text() for text in score.texts] == ["adaptive: 3"]
    assert list(error.lines[0].get_ydata()) == pytest.approx([50, 10])
    assert list(build.lines[0].get_ydata()) == pytest.approx([0.1, 0.5])
    assert "n = 2 per point, mean" in texts(figure)


def test_times(tmp_path: Path) -> None:
    table = results("latency").table
    figure = iterations.panels(iterations.counted(table))
    tt2t, build, _ = figure.axes
    assert list(tt2t.lines[0].get_ydata()) == [3, 7]
    assert list(build.lines[1].get_ydata()) == pytest.approx([0.3])
    assert "2048 tokens" in texts(figure)
    assert "median" in texts(figure)
    assert {path.name for path in iterations.draw(table, tmp_path)} == {
        "iterations_latency_toy_2048.png",
        "iterations_latency_toy_2048.pdf",
    }
    assert "[emulated]" in texts(iterations.panels(iterations.counted(table.assign(emulated=True))))


def test_one_count_is_no_figure(tmp_path: Path) -> None:
    table = results("needle").table
    assert iterations.draw(table[table["method"] == "pqcache_1"], tmp_path) == []
    assert iterations.draw(table.drop(columns="index_facts"), tmp_path) == []
    assert iterations.draw(table.drop(columns="index_build_s"), tmp_path) == []


def test_places_between_counts() -> None:
    assert [iterations.place(count, [1, 5, 10]) for count in (0, 1, 3, 5, 10, 300)] == [0, 0, 0.5, 1, 2, 2]
