"""The memory figure: the formula on the left, measured bytes on the right."""

from __future__ import annotations

from pathlib import Path

import pytest

from plots import memory
from plots.data import published
from tests.plots.support import Results, texts


@pytest.fixture
def results() -> Results:
    found = Results("latency")
    for context in (1024, 2048):
        common = {"context": context, "device": "Test CPU"}
        found.run(
            "full", "full", [common | {"device_bytes": 2e6, "host_bytes": context * 1e3, "index_resident_bytes": 0}]
        )
        found.run(
            "h2o", "h2o", [common | {"device_bytes": context * 1e2, "host_bytes": 0, "index_resident_bytes": 5e4}]
        )
    return found


def test_formula_and_bars(results: Results, tmp_path: Path) -> None:
    (left, right) = memory.panels(results.table, published("memory")).axes
    one = left.lines[0]
    # 32 layers x 8 heads x 128 x (key + value) x 2 bytes = 131072 bytes a token, so 4096 tokens are half a GiB.
    assert one.get_ydata()[0] == pytest.approx(2**29 / 1e9)
    assert one.get_xdata()[-1] == 2**20
    assert left.lines[1].get_ydata()[0] == pytest.approx(8 * 2**29 / 1e9)
    paper = next(line for line in left.lines if line.get_label() == "published")
    assert (list(paper.get_xdata()), list(paper.get_ydata())) == ([131072], [1000])
    assert {"one 80 GB GPU", "eight: 640 GB", "batch 128"} <= {text.get_text() for text in left.texts}
    assert [label.get_text() for label in right.get_yticklabels()] == ["full", "h2o"]
    device, host, index = right.containers
    assert [bar.get_width() for bar in device] == pytest.approx([2, 0.2048])  # of the longest context
    assert [bar.get_width() for bar in host] == pytest.approx([2.048, 0])
    assert [bar.get_x() for bar in index] == pytest.approx([4.048, 0.2048])
    written = texts(memory.panels(results.table, published("memory")))
    assert "modelled" in written
    assert "the formula gives 2.2 TB, and 8.8 TB without grouped queries" in written
    assert len(memory.draw(results.table, tmp_path)) == 2


def test_nothing_without_latency_records_that_hold_bytes(results: Results, tmp_path: Path) -> None:
    assert memory.draw(results.table.assign(kind="scores"), tmp_path) == []
    assert memory.draw(results.table.drop(columns="host_bytes"), tmp_path) == []
