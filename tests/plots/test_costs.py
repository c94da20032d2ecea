"""The modelled-latency figures: filled points are records, dashed lines are the model, and the legend says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D

from plots import costs
from plots.latency import timed
from plots.style import looks
from pqbench.costs.fit import Fit, fit_machine
from pqbench.costs.model import HARDWARE, MODELS, MethodProfile, fits, tpot
from tests.costs.test_costs import EXACT, made_by

COMMON: dict[str, Any] = {
    "kind": "latency",
    "benchmark": "latency",
    "model": "smollm2",
    "status": "ok",
    "threads": 2,
    "kernels": "cpu",
    "link": "local",
    "emulated": False,
    "budget": "25 %",
    "key": "k",
    "tt2t_s": 1.0,
}


@pytest.fixture(scope="module")
def run() -> pd.DataFrame:
    return timed(made_by(EXACT, (1024, 2048, 4096, 8192), stretch=1.25).assign(**COMMON))


@pytest.fixture(scope="module")
def fit(run: pd.DataFrame) -> Fit:
    return fit_machine(run, MODELS["smollm2"])


def line(axis: Axes, label: str) -> Line2D:
    [found] = [line for line in axis.lines if line.get_label() == label]
    return found


def test_measured_points_are_filled_and_predictions_dashed(run: pd.DataFrame, fit: Fit) -> None:
    chosen = looks(run["method"]) | {costs.ON_HOST: looks([])["full"]}
    figure = costs.by_context(run, fit, MODELS["smollm2"], chosen)
    assert [axis.get_title() for axis in figure.axes[:4]] == [
        "smollm2 on toy",
        *(f"llama31_8b on {hardware.name}" for hardware in HARDWARE.values()),
    ]
    here = figure.axes[4]
    assert here.get_ylabel() == "time per output token (ms)"
    points = line(here, "pq, measured")
    expected = run[run["method"] == "pq"].groupby("context")["tpot_s"].median() * 1e3
    assert list(points.get_xdata()) == [1024, 2048, 4096, 8192]
    assert list(points.get_ydata()) == pytest.approx(list(expected))
    assert points.get_linestyle() == "None"
    assert points.get_markerfacecolor() == points.get_color() == chosen["pq"].colour
    model = line(here, "pq")
    assert list(model.get_xdata()) == [2**i for i in range(10, 21)]
    assert list(model.get_ydata())[3] == pytest.approx(
        1e3 * tpot(fit.hardware, MODELS["smollm2"], fit.profiles["pq"], 8192, 1, "float32")
    )
    assert model.is_dashed()
    assert all(axis.get_xscale() == axis.get_yscale() == "log" for axis in figure.axes)


def test_a_line_ends_with_a_cross_where_the_memory_does(run: pd.DataFrame, fit: Fit) -> None:
    chosen = looks(run["method"]) | {costs.ON_HOST: looks([])["full"]}
    axis = costs.by_context(run, fit, MODELS["smollm2"], chosen).axes[5]  # TPOT on the A100
    shape, dense = MODELS["llama31_8b"], MethodProfile()
    # Weights 16 GB, 128 KB a token: 80 GB hold 488 thousand tokens.
    assert fits(HARDWARE["a100"], shape, dense, 480_000)
    assert not fits(HARDWARE["a100"], shape, dense, 500_000)
    assert list(line(axis, "full").get_xdata()) == [2**i for i in range(10, 19)]
    [x], [y] = line(axis, "full, memory ends").get_data()
    assert (x, y) == (2**18, pytest.approx(1e3 * tpot(HARDWARE["a100"], shape, dense, 2**18)))
    assert len(line(axis, costs.ON_HOST).get_xdata()) == 11


def test_the_batch_figure_shows_the_whole_batch(run: pd.DataFrame, fit: Fit) -> None:
    chosen = looks(run["method"]) | {costs.ON_HOST: looks([])["full"]}
    figure = costs.by_batch(run, fit, chosen)
    axis = figure.axes[1]
    assert axis.get_title() == "llama31_8b on H100 SXM"
    shown = line(axis, "pq")
    assert list(shown.get_xdata()) == [1, 2, 4, 8, 16, 32, 64][: len(shown.get_xdata())]
    assert list(shown.get_ydata())[2] == pytest.approx(
        1e3 * tpot(HARDWARE["h100"], MODELS["llama31_8b"], fit.profiles["pq"], 32768, 4)
    )


def test_the_figure_says_modelled_and_how_far_off_it_was(run: pd.DataFrame, fit: Fit) -> None:
    chosen = looks(run["method"]) | {costs.ON_HOST: looks([])["full"]}
    for figure in (costs.by_context(run, fit, MODELS["smollm2"], chosen), costs.by_batch(run, fit, chosen)):
        title = figure.get_suptitle()
        assert title.startswith("Modelled latency")
        assert "not measured" in title
        text = " ".join(text.get_text() for text in figure.texts)
        assert "fitted at 1K and 4K" in text
        assert "median error at 2K and 8K" in text
        assert "time per output token 20.0 %" in text
        assert "n = 3 per point" in text


def test_title_legend_and_panels_do_not_overlap(run: pd.DataFrame, fit: Fit) -> None:
    chosen = looks(run["method"]) | {costs.ON_HOST: looks([])["full"]}
    for figure in (costs.by_context(run, fit, MODELS["smollm2"], chosen), costs.by_batch(run, fit, chosen)):
        FigureCanvasAgg(figure).draw()
        [legend] = figure.legends
        panels = max(axis.get_tightbbox().y1 for axis in figure.axes)  # type: ignore[union-attr]
        assert panels <= legend.get_window_extent().y0
        assert legend.get_window_extent().y1 <= figure._suptitle.get_window_extent().y0  # type: ignore[attr-defined]


def test_only_runs_the_model_can_read_are_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = made_by(EXACT, (1024, 2048, 4096)).assign(**COMMON)
    names = {path.name for path in costs.draw(good, tmp_path)}
    assert names == {f"costs{kind}_smollm2.{end}" for kind in ("", "_batch") for end in ("png", "pdf")}
    with caplog.at_level("INFO", logger="plots"):
        assert costs.draw(good.assign(model="tiny"), tmp_path) == []
        assert costs.draw(good[good["context"] == 1024], tmp_path) == []
    assert "does not know the shape of 'tiny'" in caplog.text
    assert "two contexts" in caplog.text
    assert costs.draw(good.assign(status="error"), tmp_path) == []


def test_a_method_is_drawn_with_the_setting_of_most_contexts() -> None:
    """Of two settings with equally many contexts, the newest is drawn; a method with fewer than full attention is
    not."""
    table = made_by(EXACT, (1024, 2048, 4096))
    pq = table[table["method"] == "pq"]
    short = pq[pq["context"] > 1024]
    parts = [
        table.assign(**COMMON),
        pq.assign(**COMMON | {"budget": "50 %", "key": "newer"}),
        short.assign(**COMMON | {"budget": "90 %", "key": "short"}),
        short.assign(**COMMON | {"method": "other"}),
    ]
    kept = costs.one_setting_each(timed(pd.concat(parts, ignore_index=True)))
    assert set(kept["method"]) == {"full", "pq"}
    assert set(kept.loc[kept["method"] == "pq", "key"]) == {"newer"}
    assert len(kept) == len(table)
