"""The score figure draws the averages of a suite, with published numbers only for the same model."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from plots import scores
from plots.data import PAPER, published
from plots.style import looks
from tests.plots.support import Results, texts

VALUES = {"full": (100, 80), "pqcache": (90, 80), "pyramidkv": (30, 20)}


def results(model: str = "toy", question_first: bool = False) -> Results:
    found = Results("infinitebench", benchmark={"question_first": question_first})
    for ratio in (0.1, 0.2):
        for method, (passkey, number) in VALUES.items():
            rows = [
                {"task": task, "score": value, "sample_id": f"{task}-{i}", "model": model}
                for task, value in (("passkey", passkey), ("number_string", number))
                for i in range(3)
            ]
            options = {} if method == "full" else {"budget": {"ratio": ratio}}
            if method != "full" or ratio == 0.1:
                found.run(method, method, rows, options)
    return found


def test_dots_are_means_over_tasks(tmp_path: Path) -> None:
    run = scores.families(results().table)
    assert [(name, score.value) for name, _, score in scores.dots(scores.by_ratio(run)["10 %"])] == [
        ("pyramidkv", 25),
        ("pqcache", 85),
        ("full", 90),
    ]
    figure = scores.panels(run, published("infinitebench"), looks(run["family"]))
    left, right = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["10 % of the tokens", "20 % of the tokens"]
    assert [label.get_text() for label in right.get_yticklabels()] == ["pyramidkv", "pqcache", "full"]
    marks = [line for line in left.lines if line.get_linestyle() == "None"]
    assert [line.get_xdata()[0] for line in marks] == [25, 85, 90]
    assert marks[1].get_color() == looks(["pqcache"])["pqcache"].colour
    assert "n = 6 samples per method (passkey, number_string)" in texts(figure)
    assert "published" not in texts(figure)  # of another model
    assert [path.name for path in scores.draw(results().table, tmp_path)] == [
        "scores_infinitebench_toy.png",
        "scores_infinitebench_toy.pdf",
    ]


def test_published_averages_are_hollow() -> None:
    run = scores.families(results("llama31_8b").table)
    figure = scores.panels(run, published("infinitebench"), looks(run["family"]))
    hollow = {
        (axis.get_title(), line.get_xdata()[0], line.get_ydata()[0])
        for axis in figure.axes
        for line in axis.lines
        if line.get_markerfacecolor() == "none"
    }
    assert hollow == {
        ("10 % of the tokens", 46.80, 1),
        ("10 % of the tokens", 44.74, 0),
        ("20 % of the tokens", 47.31, 1),
        ("20 % of the tokens", 46.61, 0),
    }
    assert "third-party note, unverified" in texts(figure)


def test_question_first_is_a_figure_of_its_own(tmp_path: Path) -> None:
    table = pd.concat([results().table, results(question_first=True).table.assign(key=lambda t: "q" + t["key"])])
    names = {path.name for path in scores.draw(table, tmp_path) if path.suffix == ".png"}
    assert names == {"scores_infinitebench_toy.png", "scores_infinitebench_toy_question_first.png"}
    assert scores.draw(table[table["method"] == "full"], tmp_path) == []
    assert scores.draw(table.drop(columns="score"), tmp_path) == []


@pytest.mark.parametrize("name", sorted(path.stem for path in PAPER.glob("*.csv")))
def test_published_numbers_say_where_they_stand_and_how_sure_they_are(name: str) -> None:
    table = published(name)
    assert len(table)
    for column in ("metric", "value", "unit", "certainty", "source"):
        assert (table[column].astype(str) != "").all(), column
    assert pd.to_numeric(table["value"]).notna().all()
