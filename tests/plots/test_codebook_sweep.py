"""The m x b grid holds the mean of each codebook size."""

from __future__ import annotations

from pathlib import Path

import pytest

from plots import codebook_sweep
from tests.plots.support import Results, texts


@pytest.fixture
def results() -> Results:
    found = Results("needle")
    for (m, b), score in {(1, 4): 0, (1, 8): 50, (2, 4): 25, (2, 8): 100}.items():
        rows = [{"score": score, "output_error": 0.5 - score / 250}, {"score": score / 2, "output_error": 0.5}]
        found.run(f"pqcache_{m}x{b}", "pqcache", rows, {"m": m, "b": b})
    found.run("oracle", "oracle", [{"score": 77, "output_error": 0.0}], {"m": 2, "b": 6})
    return found


def test_cells_hold_means(results: Results, tmp_path: Path) -> None:
    figure = codebook_sweep.panels(codebook_sweep.sized(results.table))
    score, error = figure.axes
    assert score.images[0].get_array().tolist() == [[0, 37.5], [18.75, 75]]
    assert error.images[0].get_array().ravel().tolist() == pytest.approx([50, 40, 45, 30])
    assert score.images[0].get_clim() == (0, 100)
    assert [label.get_text() for label in score.get_xticklabels()] == ["4", "8"]
    assert [label.get_text() for label in score.get_yticklabels()] == ["1", "2"]
    assert [text.get_text() for text in error.texts] == ["50.0", "40.0", "45.0", "30.0"]
    assert (score.get_xlabel(), score.get_ylabel()) == ("b, bits per code", "m, sub-spaces")
    assert "n = 2 per cell" in texts(figure)
    names = {path.name for path in codebook_sweep.draw(results.table, tmp_path)}
    assert names == {"codebook_sweep_needle_toy.png", "codebook_sweep_needle_toy.pdf"}


def test_runs_that_differ_otherwise_are_not_mixed(results: Results, tmp_path: Path) -> None:
    results.run("pqcache", "pqcache", [{"score": 1}], {"m": 4, "b": 8, "iterations": 3})
    assert len(codebook_sweep.draw(results.table, tmp_path)) == 2  # the run that differs is in no grid
    only = results.table[results.table["method"] == "pqcache"]
    assert codebook_sweep.draw(only, tmp_path) == []
    assert codebook_sweep.draw(results.table.drop(columns="settings"), tmp_path) == []
