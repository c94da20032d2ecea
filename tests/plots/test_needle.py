"""The needle heatmap shows the numbers of the records in the right cells."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from plots import needle
from plots.__main__ import main

SCORES = {(1024, 0): 100.0, (1024, 50): 50.0, (2048, 0): 0.0, (2048, 50): 75.0}


def rows(method: str, key: str, budget: str, scale: float) -> list[dict[str, object]]:
    return [
        {
            "benchmark": "needle",
            "model": "toy",
            "method": method,
            "key": key,
            "budget": budget,
            "status": "ok",
            "sample_id": f"{length}-{depth}",
            "score": score * scale,
            "metadata": {"length": length, "depth": depth},
        }
        for (length, depth), score in SCORES.items()
    ]


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(rows("full", "aa", "all", 1.0) + rows("pqcache", "bb", "10 %", 0.5))


def test_cells_hold_the_mean_score_of_their_length_and_depth(table: pd.DataFrame) -> None:
    doubled = pd.concat([table[table.method == "full"], pd.DataFrame(rows("full", "aa", "all", 0.0))])
    cells = needle.grid(needle.placed(doubled))
    assert list(cells.columns) == [1024, 2048]
    assert list(cells.index) == [0, 50]  # depth 0 on top
    assert cells.to_numpy().tolist() == [[50.0, 0.0], [25.0, 37.5]]


def test_the_pair_draws_full_left_and_the_method_right(table: pd.DataFrame) -> None:
    cells = needle.placed(table)
    figure = needle.pair(cells[cells.method == "full"], cells[cells.method == "pqcache"])
    left, right, bar = figure.axes
    assert left.images[0].get_array().tolist() == [[100.0, 0.0], [50.0, 75.0]]
    assert right.images[0].get_array().tolist() == [[50.0, 0.0], [25.0, 37.5]]
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, 100)
    assert [label.get_text() for label in left.get_xticklabels()] == ["1K", "2K"]
    assert left.get_ylabel().startswith("needle depth")
    assert "full" in left.get_title()
    assert "pqcache, budget 10 %" in right.get_title()
    assert "28.1" in right.get_title()  # the mean of the four halved scores
    assert bar.get_ylabel() == "score (%)"


def test_every_run_gets_a_figure_and_the_newest_the_plain_name(table: pd.DataFrame, tmp_path: Path) -> None:
    older = pd.DataFrame(rows("pqcache", "cc", "20 %", 0.9))
    paths = needle.draw(pd.concat([older, table]), tmp_path)
    names = {path.name for path in paths if path.suffix == ".png"}
    assert names == {"needle_pqcache.png", "needle_pqcache-toy-cc.png"}
    assert all(path.stat().st_size > 1000 for path in paths)


def test_failed_samples_are_not_drawn(table: pd.DataFrame, tmp_path: Path) -> None:
    assert needle.draw(table.assign(status="error"), tmp_path) == []


def test_an_empty_folder_names_the_command_that_makes_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([str(tmp_path)]) == 1
    assert "make bench" in caplog.text
    assert main([str(tmp_path / "absent")]) == 1
    assert "no results folder" in caplog.text


@pytest.mark.parametrize("methods", [["full"], ["pqcache"], ["full", "pqcache"]])
@pytest.mark.parametrize("places", [[(1024, 0), (1024, 50)], [(1024, 50), (2048, 50)], [(1024, 50)]])
def test_one_length_one_depth_and_one_method_are_drawn(
    table: pd.DataFrame, tmp_path: Path, methods: list[str], places: list[tuple[int, int]]
) -> None:
    few = table[table["method"].isin(methods) & table["sample_id"].isin([f"{a}-{b}" for a, b in places])]
    names = {path.name for path in needle.draw(few, tmp_path) if path.suffix == ".png"}
    assert names == {f"needle_{methods[-1]}.png"}


def test_of_several_runs_at_one_length_the_newest_is_drawn(table: pd.DataFrame, tmp_path: Path) -> None:
    """Such runs are points of a sweep. A run at several lengths is drawn instead, even if it is older."""
    points = [pd.DataFrame(rows("quest", key, "10 %", 1.0)) for key in ("cc", "dd")]
    swept = pd.concat([table, *[part[part["sample_id"].str.startswith("1024")] for part in points]])
    names = {path.name for path in needle.draw(swept, tmp_path) if path.suffix == ".png"}
    assert names == {"needle_pqcache.png", "needle_quest.png"}
    mapped = pd.concat([table, pd.DataFrame(rows("pqcache", "ee", "5 %", 1.0)).head(2)])
    names = {path.name for path in needle.draw(mapped, tmp_path) if path.suffix == ".png"}
    assert names == {"needle_pqcache.png"}
