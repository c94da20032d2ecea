"""The power-law figure draws the numbers of the records, and finds the exponent of an exact power law."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from plots import power_law
from tests.plots.support import Results, texts

RANKS = [1, 2, 4, 8, 16, 32, 64, 128]


@pytest.fixture
def results() -> Results:
    found = Results("attention_scores")
    rows = []
    for layer, scale in ((0, 0.2), (1, 0.4)):
        heads = [[scale * (1 + head) / 1.5 * rank**-1.5 for rank in RANKS] for head in (0, 1)]
        rows.append(
            {
                "layer": layer,
                "context": 128,
                "ranks": RANKS,
                "probabilities": heads,
                "queries": 64,
                "mass": [[0.5, 0.9], [0.7, 0.9]],
                "mass_shares": [0.01, 0.1],
            }
        )
    found.run("full", "full", rows)
    return found


def test_layers_mean_and_fit(results: Results, tmp_path: Path) -> None:
    figure = power_law.panels(results.table)
    left, right = figure.axes
    first, second, mean, fit = left.lines[:4]
    law = np.array(RANKS, float) ** -1.5
    assert list(first.get_ydata()) == pytest.approx(list(0.2 * law))
    assert list(second.get_ydata()) == pytest.approx(list(0.4 * law))
    assert list(mean.get_ydata()) == pytest.approx(list(0.3 * law))
    assert list(fit.get_ydata()) == pytest.approx([0.3 * x**-1.5 for x in fit.get_xdata()])
    assert fit.get_label() == "power law, exponent -1.50"
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    (median,) = right.lines
    assert (list(median.get_xdata()), list(median.get_ydata())) == ([1, 10], pytest.approx([60, 90]))
    assert "2 layers x 2 KV heads" in texts(figure)
    assert [path.name for path in power_law.draw(results.table, tmp_path)] == [
        "power_law_toy_128.png",
        "power_law_toy_128.pdf",
    ]


def test_nothing_without_probabilities(results: Results, tmp_path: Path) -> None:
    assert power_law.draw(results.table.drop(columns="probabilities"), tmp_path) == []
    assert power_law.draw(results.table.assign(kind="scores"), tmp_path) == []
    assert np.isnan(power_law.slope(np.array([1.0, 2.0]), np.array([0.5, 0.1]))).all()
