"""The ablation grid holds the mean of each variant divided by the mean of the exact top-k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plots import ablation
from plots.data import families
from plots.fidelity import measured
from tests.plots.support import Results, texts

PARTS = {"m": 2, "b": 6, "spread": False}


def rows(*errors: float, **fields: Any) -> list[dict[str, Any]]:
    """One record per document with these output errors; KL is ten times the error."""
    common = {
        "length": 2048,
        "steps": 32,
        "ratio": 0.1,
        "dtype": "float32",
        "threads": 1,
        "device": "AMD EPYC",
        "bytes_per_head": 1e5,
    }
    return [
        common | {"document": f"sotu-{i}", "output_error": error, "kl": 10 * error, "sample_id": f"sotu-{i}"} | fields
        for i, error in enumerate(errors)
    ]


@pytest.fixture
def results() -> Results:
    found = Results("fidelity")
    found.run("oracle", "oracle", rows(0.1, 0.3))
    found.run("a", "pqcache", rows(0.2, 0.4), PARTS | {"codebook": "plain", "tail": "none"})
    found.run("b", "pqcache", rows(0.1, 0.2), PARTS | {"codebook": "plain", "tail": "pq"})
    found.run("c", "pqcache", rows(0.05, 0.05), PARTS | {"codebook": "query_aware", "tail": "pq"})
    found.run("d", "pqcache", rows(0.4, 0.8), PARTS | {"codebook": "query_aware", "tail": "none", "b": 4})
    return found


def test_cells_are_multiples_of_the_exact_top_k(results: Results, tmp_path: Path) -> None:
    good = families(measured(results.table))
    run = ablation.parted(good)
    figure = ablation.panels(run, ablation.rail(good, run))
    for axis in figure.axes:
        assert [label.get_text() for label in axis.get_xticklabels()] == ["none", "pq"]
        assert [text.get_text() for text in axis.texts] == ["3.00", "1.50", "0.75", "0.25"]
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["query-aware  2 x 4", "plain  2 x 6", "query-aware  2 x 6"]  # fewest bits first
    shown = figure.axes[0].images[0].get_array()
    assert shown is not None
    assert shown[1].tolist() == pytest.approx([0.585, -0.415], abs=1e-3)  # log2: 1 is the middle of the colours
    assert "n = 2 documents (sotu), 32 teacher-forced steps" in texts(figure)
    assert "multiples of the exact top-k's" in texts(figure)
    names = sorted(path.name for path in ablation.draw(results.table, tmp_path))
    assert names == ["ablation_toy_2K_10.pdf", "ablation_toy_2K_10.png"]


def test_without_the_exact_top_k_the_numbers_are_plain(results: Results) -> None:
    good = families(measured(results.table))
    run = ablation.parted(good)
    other = ablation.rail(good, run.assign(length=4096))
    assert other.empty
    figure = ablation.panels(run, other)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.60", "0.30", "0.15", "0.05"]
    assert "no oracle was measured" in texts(figure)


def test_no_grid_without_two_codebooks_and_two_tails(results: Results, tmp_path: Path) -> None:
    table = results.table
    assert ablation.draw(table[table["method"].isin(["oracle", "a", "b"])], tmp_path) == []  # one codebook
    assert ablation.draw(table[table["method"].isin(["oracle", "b", "c"])], tmp_path) == []  # one tail
    assert ablation.draw(table.drop(columns="settings"), tmp_path) == []
    assert ablation.draw(table.assign(kind="scores"), tmp_path) == []
    results.run("e", "pqcache", rows(0.3), PARTS | {"codebook": "rotated", "tail": "mean", "iterations": 3})
    assert len(ablation.draw(results.table, tmp_path)) == 2  # a run that differs in other settings is in no grid


def test_every_cell_and_its_unit_are_means_over_the_same_documents(results: Results) -> None:
    results.run("f", "pqcache", rows(0.2), PARTS | {"codebook": "rotated", "tail": "none"})  # the first document alone
    results.run("oracle", "oracle", rows(9.0, 9.0), {"rule": "query_head"})
    results.run("oracle", "oracle", rows(9.0, 9.0, dtype="bfloat16"))
    results.run(
        "g", "pqcache", rows(0.1, 0.2, 7.0), PARTS | {"codebook": "rotated", "tail": "pq"}
    )  # a third, without rail
    good = families(measured(results.table))
    run = ablation.parted(good)
    figure = ablation.panels(run, ablation.rail(good, run))
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == ["3.00", "1.50", "0.75", "2.00", "0.75", "0.25"]


def test_missing_and_exact_figures_leave_the_rows_as_they_are(results: Results) -> None:
    results.run("f", "pqcache", rows(0.0, 0.0, kl=None), PARTS | {"codebook": "rotated", "tail": "none"})
    good = families(measured(results.table))
    run = ablation.parted(good)
    figure = ablation.panels(run, ablation.rail(good, run))
    assert [text.get_text() for text in figure.axes[0].texts] == ["3.00", "1.50", "0.75", "0.00", "0.25"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["3.00", "1.50", "0.75", "0.25"]
    assert len(figure.axes[0].get_yticklabels()) == 4
    assert ablation.panels(run.assign(kl=None), ablation.rail(good, run)).axes  # no KL at all
