"""The communication sweep draws quality by index bytes over key bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from plots import communication_sweep
from plots.style import looks
from tests.plots.support import Results, texts

KEYS = 1000.0  # bytes of all keys of a sample; keys and values are twice that


@pytest.fixture
def results() -> Results:
    found = Results("needle")
    both = {"device_bytes": 2 * KEYS, "host_bytes": 0}
    found.run("full", "full", [{"score": 100, "index_bytes": 0, "budget": "all"} | both])
    found.run("oracle", "oracle", [{"score": 90, "index_bytes": KEYS, "output_error": 0.05} | both])
    for m, index, score, error in ((1, 125 / 8, 20, 0.3), (4, 62.5, 60, 0.2), (8, 125, 80, 0.1)):
        row = {"score": score, "index_bytes": index, "output_error": error} | both
        found.run(f"pqcache_{m}", "pqcache", [row], {"m": m, "b": 8})
    worse = {"score": 99, "index_bytes": 62.5, "output_error": 0.5} | both
    found.run("pqcache_4x4", "pqcache", [worse], {"m": 4, "b": 4})
    for rank, index in ((1, 250), (2, 500)):
        row = {"score": 40, "index_bytes": index, "output_error": 0.25} | both
        found.run(f"sparq_{rank}", "sparq", [row], {"rank": rank})
    found.run("quest", "quest", [{"score": 1, "index_bytes": 125, "output_error": 0.9} | both], {"page_size": 16})
    return found


def test_lines_and_levels(results: Results, tmp_path: Path) -> None:
    table = communication_sweep.families(
        communication_sweep.measured(results.table, "score", "index_bytes", "kv_bytes")
    )
    full = table[table["method"] == "full"]
    rows = communication_sweep.swept(table[table["method"] != "full"], full)
    assert set(rows["family"]) == {"pqcache", "sparq"}  # quest has one size; the oracle is not charged
    levels = table[table["family"].isin(["full", "oracle"])]
    figure = communication_sweep.panels(rows, levels, looks(table["family"]))
    score, error = figure.axes
    pqcache, sparq = (box.lines[0] for box in score.containers)
    assert list(pqcache.get_xdata()) == pytest.approx([1 / 64, 1 / 16, 1 / 8])
    assert list(pqcache.get_ydata()) == [20, 60, 80]  # of the two that read 1/16, the one with the smaller error
    assert list(sparq.get_xdata()) == pytest.approx([1 / 4, 1 / 2])
    assert list(error.containers[0].lines[0].get_ydata()) == pytest.approx([30, 20, 10])
    assert [label.get_text() for label in score.get_xticklabels()] == ["1/64", "1/32", "1/16", "1/8", "1/4", "1/2"]
    assert {text.get_text() for text in score.texts} == {"full", "pqcache", "sparq"}
    assert {text.get_text() for text in error.texts} == {"oracle", "pqcache", "sparq"}
    assert "communication budget: needle, toy, 10 % of the tokens" in texts(figure)
    names = [path.name for path in communication_sweep.draw(results.table, tmp_path)]
    assert names == ["communication_sweep_needle_toy.png", "communication_sweep_needle_toy.pdf"]


def test_nothing_without_full_attention_or_bytes(results: Results, tmp_path: Path) -> None:
    table = results.table
    assert communication_sweep.draw(table[table["method"] != "full"], tmp_path) == []
    assert communication_sweep.draw(table.drop(columns="kv_bytes"), tmp_path) == []
    assert len(communication_sweep.draw(table.drop(columns="output_error"), tmp_path)) == 2  # the scores alone
