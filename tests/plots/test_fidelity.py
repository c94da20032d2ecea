"""The fidelity figure shows the numbers of the records: errors against bytes, intervals over documents, names and
origin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from plots import fidelity
from plots.style import looks

# Method and ratio -> bytes of two documents, output errors of two documents.
POINTS: dict[tuple[str, float | None], tuple[tuple[float, float], tuple[float, float]]] = {
    ("full", None): ((1e6, 1e6), (0.0, 0.0)),
    ("oracle", 0.1): ((5e5, 7e5), (0.1, 0.3)),
    ("oracle", 0.05): ((4e5, 4e5), (0.4, 0.4)),
    ("h2o", 0.05): ((5e4, 5e4), (0.7, 0.9)),
    ("h2o", 0.1): ((1e5, 1e5), (0.5, 0.7)),
}


def rows(**fields: Any) -> list[dict[str, Any]]:
    return [
        {
            "kind": "fidelity",
            "benchmark": "fidelity",
            "model": "toy",
            "method": method,
            "key": f"key-{method}",
            "status": "ok",
            "document": f"sotu-{i:03}",
            "length": 4096.0,
            "steps": 64.0,
            "ratio": ratio,
            "dtype": "float32",
            "threads": 2.0,
            "device": "AMD EPYC",
            "bytes_per_head": size[i],
            "output_error": error[i],
            "kl": error[i] ** 2,
        }
        | fields
        for (method, ratio), (size, error) in POINTS.items()
        for i in range(2)
    ]


@pytest.fixture
def run() -> pd.DataFrame:
    return fidelity.measured(pd.DataFrame(rows()))


def test_points_are_means_over_documents(run: pd.DataFrame) -> None:
    h2o, oracle = fidelity.lines_of(run, "output_error")
    assert (h2o.label, h2o.ratios, h2o.size) == ("h2o", [0.05, 0.1], [5e4, 1e5])
    assert (oracle.label, oracle.ratios, oracle.size) == ("oracle", [0.05, 0.1], [4e5, 6e5])
    assert h2o.middle == pytest.approx([0.8, 0.6])
    assert oracle.middle == pytest.approx([0.4, 0.2])
    assert (oracle.low, oracle.high) == (pytest.approx([0.4, 0.1]), pytest.approx([0.4, 0.3]))
    assert oracle.documents == (2, 2)
    assert fidelity.lines_of(run, "kl")[1].middle == pytest.approx([0.16, 0.05])


def test_two_panels_show_the_values(run: pd.DataFrame) -> None:
    figure = fidelity.panels(run, looks(run["method"]))
    error, kl = figure.axes
    assert (error.get_ylabel(), kl.get_ylabel()) == ("relative error", "KL(full || method), nats")
    assert figure.get_suptitle() == "Fidelity to full attention: toy, 4K tokens"
    for axis, oracle in ((error, [0.4, 0.2]), (kl, [0.16, 0.05])):
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        shown = {line.get_label(): line for line in axis.lines}
        assert list(shown["oracle"].get_xdata()) == [4e5, 6e5]
        assert list(shown["oracle"].get_ydata()) == pytest.approx(oracle)
        assert shown["oracle"].get_color() == looks(run["method"])["oracle"].colour
        assert shown["oracle"].get_marker() != shown["h2o"].get_marker()
        assert {text.get_text() for text in axis.texts} == {"h2o", "oracle", "full"}
        (dense,) = [line for line in axis.lines if list(line.get_xdata()) == [1e6, 1e6]]
        assert dense.get_color() == "black"
        assert len(axis.containers) == 2  # bars of both methods
        bottom, top = axis.get_ylim()
        assert bottom < min(oracle) < top
    bar = error.containers[1].lines[2][0].get_segments()[1]
    assert np.allclose(bar[:, 1], [0.1, 0.3])


def test_the_footer_says_where_the_numbers_come_from(run: pd.DataFrame) -> None:
    texts = " ".join(text.get_text() for text in fidelity.panels(run, looks(run["method"])).texts)
    assert "n = 2 documents (sotu), 64 teacher-forced steps each, bars: 95 % interval by document" in texts
    assert "budgets of 5, 10 % of the context;\ngrey: oracle (exact scores); " in texts
    assert "AMD EPYC, 2 threads, float32" in texts
    one = run[run["document"] == "sotu-000"]
    figure = fidelity.panels(one, looks(one["method"]))
    assert "bars" not in " ".join(text.get_text() for text in figure.texts)
    assert len(figure.axes[0].containers) == 0


def test_the_frontier_is_what_no_point_beats_in_both(run: pd.DataFrame) -> None:
    lines = fidelity.lines_of(run, "output_error")
    assert fidelity.frontier(lines) == ([5e4, 1e5, 4e5, 6e5], pytest.approx([0.8, 0.6, 0.4, 0.2]))
    dearer = replace(lines[1], size=[7e5, 8e5])  # beaten by the oracle's own points at 400K and 600K
    assert fidelity.frontier([*lines, dearer])[0] == [5e4, 1e5, 4e5, 6e5]


def test_rails_are_grey_and_explained(run: pd.DataFrame) -> None:
    chosen = fidelity.rails(looks(run["method"]))
    assert chosen["oracle"].colour == fidelity.RAIL
    assert chosen["h2o"] == looks(run["method"])["h2o"]
    assert "grey: oracle (exact scores); " in " ".join(t.get_text() for t in fidelity.panels(run, chosen).texts)


def test_exact_budgets_do_not_stretch_the_axis() -> None:
    low, high = fidelity.limits([0.5, 0.1, 1e-9, 0.0])
    assert 1e-5 < low < 1e-4
    assert 0.5 < high < 1
    low, high = fidelity.limits([0.5, 0.1])
    assert 0.05 < low < 0.1
    assert fidelity.limits([0.0])[0] > 0
    exact = fidelity.measured(pd.DataFrame([row | {"output_error": 0.0, "kl": 0.0} for row in rows()]))
    assert len(fidelity.panels(exact, looks(exact["method"])).axes) == 2


def test_settings_of_a_method_are_lines_of_their_own(run: pd.DataFrame) -> None:
    both = pd.concat([run, run[run["method"] == "h2o"].assign(key="abcdef")])
    labels = [line.label for line in fidelity.lines_of(both, "output_error")]
    assert labels == ["h2o (abcd)", "h2o (key-)", "oracle"]


def test_a_figure_for_each_length_and_none_without_curves(tmp_path: Path) -> None:
    table = pd.DataFrame([*rows(), *rows(length=8192.0), *rows(steps=8.0)])
    names = {path.name for path in fidelity.draw(table, tmp_path)}
    assert names == {f"fidelity_toy_{end}.{kind}" for end in ("4K", "4K-2", "8K") for kind in ("png", "pdf")}
    assert fidelity.draw(table[table["method"] == "full"], tmp_path) == []
    assert fidelity.draw(table.assign(status="error"), tmp_path) == []
    assert fidelity.draw(table.assign(kind="scores"), tmp_path) == []
    assert (
        fidelity.draw(
            pd.DataFrame([{"kind": "scores", "benchmark": "needle", "status": "ok", "method": "h2o"}]), tmp_path
        )
        == []
    )


def test_of_many_lines_the_frontier_and_the_rails_have_names(run: pd.DataFrame) -> None:
    many = [
        run[(run["method"] == "h2o")].assign(
            method=f"worse_{i:02}", output_error=lambda rows: rows["output_error"] + 0.1
        )
        for i in range(fidelity.MOST)
    ]
    crowded = pd.concat([run, *many])
    figure = fidelity.panels(crowded, looks(crowded["method"]))
    assert {text.get_text() for text in figure.axes[0].texts} == {"h2o", "oracle", "full"}
    assert fidelity.UNNAMED in " ".join(text.get_text() for text in figure.texts)
    shown = [line for line in figure.axes[0].lines if line.get_color() == fidelity.PALE]
    assert len(shown) == fidelity.MOST
    assert shown[0].get_ydata() == pytest.approx([0.9, 0.7])
    assert fidelity.UNNAMED not in " ".join(
        text.get_text() for text in fidelity.panels(run, looks(run["method"])).texts
    )
