"""The breakdown stacks the phases of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plots import breakdown
from tests.plots.support import Results, texts

FIELDS = ("dense_step_s", "select_step_s", "fetch_step_s", "attend_step_s", "append_step_s")


@pytest.fixture
def results() -> Results:
    found = Results("latency")
    for method, seconds in (("pqcache", (0.05, 0.004, 0.003, 0.002, 0.001)), ("full", (0.05, 0, 0, 0.02, 0))):
        for context in (1024, 2048):
            phases: dict[str, Any] = dict(zip(FIELDS, seconds, strict=True))
            rows = [
                phases
                | {
                    "tpot_s": sum(seconds),
                    "context": context,
                    "new_tokens": 24,
                    "device": "Test CPU",
                    "link": "local",
                    "sample_id": f"{context}-{repeat}",
                }
                for repeat in range(2)
            ]
            found.run(method, method, rows)
    return found


def test_bars_are_the_phases_in_ms(results: Results, tmp_path: Path) -> None:
    table = results.table
    figure = breakdown.panels(table)
    assert [axis.get_title() for axis in figure.axes] == ["1K tokens", "2K tokens"]
    axis = figure.axes[1]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["full", "pqcache"]
    model, select, fetch, attend, append = axis.containers
    assert [bar.get_width() for bar in model] == pytest.approx([50, 50])
    assert [bar.get_width() for bar in select] == pytest.approx([0, 4])
    assert [bar.get_x() for bar in attend] == pytest.approx([50, 57])
    assert [bar.get_width() for bar in append] == pytest.approx([0, 1])
    assert [bar.get_width() for bar in fetch] == pytest.approx([0, 3])
    assert [text.get_text() for text in axis.texts] == ["70 ms", "60 ms"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["model", "select", "fetch", "attend", "append"]
    assert "A decode step of toy, KV over local" in texts(figure)
    assert "n = 2 per bar, means over 24 tokens; Test CPU" in texts(figure)
    assert "[emulated]" in texts(breakdown.panels(table.assign(emulated=True)))
    assert [path.name for path in breakdown.draw(table, tmp_path)] == ["breakdown_toy.png", "breakdown_toy.pdf"]


def test_nothing_without_phases(results: Results, tmp_path: Path) -> None:
    assert breakdown.draw(results.table.drop(columns="fetch_step_s"), tmp_path) == []
    assert breakdown.draw(results.table.assign(status="oom"), tmp_path) == []
    assert breakdown.draw(results.table[:4], tmp_path) == []  # of one method
