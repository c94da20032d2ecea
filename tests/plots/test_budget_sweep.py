"""The budget sweep draws means by the share of tokens attended, with a line for each method that has several
budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plots import budget_sweep
from plots.style import looks
from tests.plots.support import Results, texts


def samples(score: tuple[float, float], attended: float, **more: Any) -> list[dict[str, Any]]:
    rows = [{"score": value, "attended_tokens": attended, "prompt_tokens": 1000} | more for value in score]
    return [row | {"task": "number"} for row in rows]


@pytest.fixture
def results() -> Results:
    found = Results("needle")
    found.run("full", "full", samples((100, 90), 1000, mass=1.0, output_error=0.0, budget="all"))
    for ratio, score, error in ((0.05, (20, 40), 0.4), (0.2, (80, 100), 0.1)):
        budget = {"budget": {"ratio": ratio}}
        rows = samples(score, 1000 * ratio, mass=1 - error / 2, output_error=error, budget=f"{100 * ratio:g} %")
        found.run("pqcache", "pqcache", rows, budget)
        found.run("h2o", "h2o", samples((0, 10), 1000 * ratio, mass=0.5, output_error=0.5), budget)
    found.run("sparq", "sparq", samples((50, 50), 100, mass=0.9, output_error=0.3), {"budget": {"ratio": 0.1}})
    return found


def test_panels_hold_the_means(results: Results, tmp_path: Path) -> None:
    rows = budget_sweep.swept(
        budget_sweep.families(budget_sweep.measured(results.table, "score", "attended_tokens", "prompt_tokens"))
    )
    assert set(rows["method"]) == {"pqcache", "h2o"}  # sparq has one budget
    full = results.table[results.table["method"] == "full"]
    figure = budget_sweep.panels(rows, full, looks(["pqcache", "h2o"]))
    score, mass, error = figure.axes
    assert [axis.get_title() for axis in figure.axes] == [
        "score",
        "attention probability retained",
        "error of the attention output",
    ]
    lines = {line.get_label(): line for line in (box.lines[0] for box in score.containers)}
    h2o, pqcache = (box.lines[0] for box in score.containers)
    assert set(lines)
    assert list(pqcache.get_xdata()) == pytest.approx([5, 20])
    assert list(pqcache.get_ydata()) == pytest.approx([30, 90])
    assert list(h2o.get_ydata()) == pytest.approx([5, 5])
    assert pqcache.get_color() == looks(["pqcache"])["pqcache"].colour
    assert list(mass.containers[1].lines[0].get_ydata()) == pytest.approx([80, 95])
    assert list(error.containers[1].lines[0].get_ydata()) == pytest.approx([40, 10])
    assert score.get_xscale() == "log"
    assert "tokens attended (% of the prompt)" in score.get_xlabel()
    names = {text.get_text() for text in score.texts}
    assert names == {"full", "h2o", "pqcache"}
    (level,) = [line for line in score.lines if list(line.get_ydata()) == [95, 95]]  # mean score of full attention
    assert level.get_color() == "black"
    assert "n = 2 per point" in texts(figure)
    assert "Test CPU" in texts(figure)
    paths = budget_sweep.draw(results.table, tmp_path)
    assert {path.name for path in paths} == {"budget_sweep_needle_toy.png", "budget_sweep_needle_toy.pdf"}


def test_other_settings_are_another_figure(results: Results, tmp_path: Path) -> None:
    for ratio in (0.05, 0.2):
        rows = samples((10, 10), 1000 * ratio, output_error=0.5)
        results.run("pqcache", "pqcache", rows, {"budget": {"ratio": ratio}}, question="select")
    names = {path.name for path in budget_sweep.draw(results.table, tmp_path) if path.suffix == ".png"}
    assert names == {"budget_sweep_needle_toy.png", "budget_sweep_needle_toy-2.png"}


def test_nothing_without_a_sweep_or_a_column(results: Results, tmp_path: Path) -> None:
    table = results.table
    assert budget_sweep.draw(table[table["method"] == "sparq"], tmp_path) == []
    assert budget_sweep.draw(table.drop(columns="attended_tokens"), tmp_path) == []
    assert budget_sweep.draw(table.assign(status="error"), tmp_path) == []
