"""The overlap figure: two bars per context up to the second token, and the time in which the index was built."""

from __future__ import annotations

from pathlib import Path

import pytest

from plots import overlap
from tests.plots.support import Results, texts


@pytest.fixture
def results() -> Results:
    found = Results("latency")
    for overlaps, wait in ((True, 0.1), (False, 0.5)):
        row = {
            "ttft_s": 2.0,
            "tt2t_s": 2.1 + wait,
            "wait_s": wait,
            "index_build_s": 0.5,
            "context": 1024,
            "link": "local",
            "device": "Test CPU",
        }
        found.run("pqcache", "pqcache", [row], overlap=overlaps)
    return found


def test_bars(results: Results, tmp_path: Path) -> None:
    figure = overlap.panel(overlap.paired(overlap.parts(results.table)))
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1K, one after the other", "1K, overlap"]
    bars = [(round(bar.get_x(), 6), round(bar.get_width(), 6)) for box in axis.containers for bar in box]
    #       prefill     wait        first step   index build, ending where the wait ends
    assert bars == [(0, 2), (2, 0.5), (2.5, 0.1), (2.0, 0.5), (0, 2), (2, 0.1), (2.1, 0.1), (1.6, 0.5)]
    assert [text.get_text() for text in axis.texts] == ["2.60 s", "2.20 s"]
    assert "with and without overlap, KV over local" in texts(figure)
    assert len(overlap.draw(results.table, tmp_path)) == 2


def test_one_way_is_no_figure(results: Results, tmp_path: Path) -> None:
    table = results.table
    assert overlap.draw(table[:1], tmp_path) == []
    assert overlap.draw(table.drop(columns="wait_s"), tmp_path) == []
    assert overlap.draw(table.drop(columns="settings"), tmp_path) == []
