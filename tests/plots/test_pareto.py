"""The Pareto figure: bytes of a step, the frontier, and the samples that all runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from plots import pareto
from plots.style import looks
from tests.plots.support import Results, texts


def row(score: float, error: float, index: float, attended: float, tpot: float) -> dict[str, Any]:
    return {
        "score": score,
        "output_error": error,
        "index_bytes": index,
        "attended_tokens": attended,
        "tpot_s": tpot,
        "kv_tokens": 1000,
        "device_bytes": 2e6,
        "host_bytes": 0,
    }  # 2000 bytes a token


@pytest.fixture
def results() -> Results:
    found = Results("needle")
    found.run("full", "full", [row(100, 0.0, 0, 1000, 0.2)] * 2)
    found.run("pqcache_a", "pqcache", [row(80, 0.1, 1e5, 100, 0.1), row(100, 0.3, 1e5, 100, 0.1)], {"m": 1})
    found.run("pqcache_b", "pqcache", [row(70, 0.4, 5e5, 100, 0.12)] * 2, {"m": 2})
    found.run("h2o", "h2o", [row(10, 0.5, 0, 100, 0.05)] * 2)
    return found


def test_points(results: Results, tmp_path: Path) -> None:
    run = pareto.families(results.table)
    points = pareto.costs(run).set_index("method")
    assert list(points.loc["full", ["mb", "score", "error", "ms"]]) == [2.0, 100, 0, 200]
    assert list(points.loc["pqcache_a", ["mb", "score", "error"]]) == pytest.approx([0.3, 90, 20])
    assert points.loc["h2o", "mb"] == pytest.approx(0.2)
    figure = pareto.panels(run, pareto.costs(run), looks(run["family"]))
    error, score, time = figure.axes
    frontier = next(line for line in score.lines if line.get_label() == "frontier")
    assert list(frontier.get_xdata()) == pytest.approx([0.2, 0.3, 2.0])
    assert list(frontier.get_ydata()) == [10, 90, 100]
    cloud = next(line for line in error.lines if line.get_label() == "pqcache")
    assert sorted(cloud.get_xdata()) == pytest.approx([0.3, 0.7])
    assert sorted(cloud.get_ydata()) == pytest.approx([20, 40])
    assert {text.get_text() for text in time.texts} == {"full", "h2o", "pqcache"}
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "MB read per step",
        "MB read per step",
        "ms per output token (median)",
    ]
    assert "n = 2 per point" in texts(figure)
    assert len(pareto.draw(results.table, tmp_path)) == 2


def test_only_samples_that_every_run_has_count(results: Results) -> None:
    results.run("sparq", "sparq", [row(0, 0.9, 0, 100, 0.1)])
    points = pareto.costs(pareto.families(results.table)).set_index("method")
    assert points["n"].tolist() == [1] * 5
    assert points.loc["pqcache_a", "score"] == 80


def test_best_keeps_what_nothing_beats() -> None:
    points = pd.DataFrame({"cost": [1, 2, 3, 2], "score": [10, 5, 20, 15]})
    assert pareto.best(points, "cost", "score", more=True)["score"].tolist() == [10, 15, 20]
    assert pareto.best(points, "cost", "score", more=False)["score"].tolist() == [10, 5]


def test_too_few_runs_are_no_figure(results: Results, tmp_path: Path) -> None:
    table = results.table
    assert pareto.draw(table[table["method"].str.startswith("pqcache")], tmp_path) == []
    assert pareto.draw(table.drop(columns="kv_tokens"), tmp_path) == []
