"""The latency figure shows the numbers of the records: medians, bands, units, names and origin."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from plots import latency
from plots.data import with_settings
from plots.style import apart, looks
from tests.plots.support import Results

SECONDS = {
    ("full", 1024): (0.1, 0.2, 0.3),
    ("full", 4096): (0.4, 0.5, 0.9),
    ("pqcache", 1024): (0.2, 0.2, 0.2),
    ("pqcache", 4096): (0.3, 0.1, 0.2),
}


def rows(**fields: Any) -> list[dict[str, Any]]:
    return [
        {
            "kind": "latency",
            "benchmark": "latency",
            "model": "toy",
            "method": method,
            "key": f"key-{method}",
            "status": "ok",
            "budget": "all" if method == "full" else "10 %",
            "context": float(context),
            "new_tokens": 32.0,
            "ttft_s": 10 * seconds,
            "tt2t_s": 20 * seconds,
            "tpot_s": seconds,
            "link": None,
            "emulated": False,
            "device": "AMD EPYC",
            "dtype": "float32",
            "threads": 2.0,
            "kernels": "cpu",
        }
        | fields
        for (method, context), repeats in SECONDS.items()
        for seconds in repeats
    ]


@pytest.fixture
def run() -> pd.DataFrame:
    return latency.timed(pd.DataFrame(rows()))


def test_lines_are_medians_and_bands_go_from_min_to_max(run: pd.DataFrame) -> None:
    full, pqcache = latency.lines_of(run, "tpot_s", 1e3)
    assert (full.label, full.contexts, full.middle) == ("full", [1024, 4096], [200.0, 500.0])
    assert (full.low, full.high) == ([100.0, 400.0], [300.0, 900.0])
    assert (pqcache.label, pqcache.middle) == ("pqcache", [200.0, 200.0])


def test_three_panels_show_the_values_with_units(run: pd.DataFrame) -> None:
    figure = latency.panels(run, looks(["full", "pqcache"]))
    assert [axis.get_title() for axis in figure.axes] == [
        "time to first token",
        "time to second token",
        "time per output token",
    ]
    for axis, factor, unit in zip(figure.axes, (10, 20, 1000), ("s", "s", "ms"), strict=True):
        full, pqcache = axis.lines
        assert list(full.get_xdata()) == [1024, 4096]
        assert list(full.get_ydata()) == pytest.approx([0.2 * factor, 0.5 * factor])
        assert list(pqcache.get_ydata()) == pytest.approx([0.2 * factor, 0.2 * factor])
        assert (full.get_color(), pqcache.get_color()) == ("black", looks(["full", "pqcache"])["pqcache"].colour)
        assert full.get_marker() != pqcache.get_marker()
        assert axis.get_xscale() == "log"
        assert [label.get_text() for label in axis.get_xticklabels()] == ["1K", "4K"]
        assert axis.get_ylabel().startswith(f"{unit} ")
        assert axis.get_ylim()[0] == 0
        band = axis.collections[0].get_paths()[0].vertices[:, 1]
        assert (band.min(), band.max()) == pytest.approx((0.1 * factor, 0.9 * factor))
        assert {text.get_text() for text in axis.texts} == {"full", "pqcache"}
    texts = " ".join(text.get_text() for text in figure.texts)
    assert "n = 3 per point, 32 tokens generated; AMD EPYC, 2 threads, float32, kernels: cpu" in texts


def test_an_emulated_link_is_stamped(run: pd.DataFrame) -> None:
    assert latency.headline(run) == "Latency of toy"
    emulated = run.assign(link="emulated PCIe 4.0 x16", emulated=True)
    assert latency.headline(emulated) == "Latency of toy, KV over emulated PCIe 4.0 x16"
    assert "emulated x" in latency.headline(run.assign(link="x", emulated=True))
    assert latency.headline(run.assign(link="local")) == "Latency of toy, KV over local"


def test_several_budgets_of_a_method_are_several_lines(run: pd.DataFrame) -> None:
    other = run[run["method"] == "pqcache"].assign(budget="20 %", key="other")
    labels = [line.label for line in latency.lines_of(pd.concat([run, other]), "ttft_s", 1)]
    assert labels == ["full", "pqcache, 10 %", "pqcache, 20 %"]


def test_names_at_line_ends_do_not_overlap() -> None:
    places = apart([0.1, 0.11, 0.12, 0.5, 0.9], 0.06)
    assert all(round(b - a, 6) >= 0.06 for a, b in pairwise(places))
    assert places[:3] == pytest.approx([0.05, 0.11, 0.17])
    assert places[3:] == [0.5, 0.9]
    assert apart([], 0.1) == []
    assert apart([0.0, 0.0, 0.5], 0.1, lowest=0.0) == pytest.approx([0, 0.1, 0.5])


def test_looks_are_stable_and_distinct() -> None:
    few, many = looks(["pqcache", "h2o"]), looks(["h2o", "pqcache", "h2o", "full"])
    assert few == many
    assert many["full"].colour == "black"
    names = [f"method{i:02}" for i in range(14)]
    assert len({(look.colour, look.dash) for look in looks(names).values()}) == 15


def test_a_figure_for_each_link_and_none_without_times(tmp_path: Path) -> None:
    table = pd.DataFrame(rows() + rows(link="emulated PCIe 4.0 x16", emulated=True))
    paths = latency.draw(table, tmp_path)
    assert {path.name for path in paths} == {f"latency_toy{end}" for end in (".png", ".pdf", "-2.png", "-2.pdf")}
    assert latency.draw(table.assign(status="error"), tmp_path) == []
    assert latency.draw(table.assign(kind="scores"), tmp_path) == []


def test_sweeps_and_short_runs_are_not_latency_figures(tmp_path: Path) -> None:
    table = pd.DataFrame(rows())
    alone = table[table["method"] == "pqcache"]
    other = alone.assign(method="pqcache_30", key="other")
    known: dict[str, Any] = {
        key: ({"method": {"_target_": "methods.pqcache.PQCache"}}, {}) for key in ("key-pqcache", "other")
    }
    assert latency.draw(with_settings(pd.concat([alone, other]), known), tmp_path) == []
    assert latency.draw(alone[alone["context"] == 1024], tmp_path) == []
    assert latency.draw(table.assign(new_tokens=4), tmp_path) == []
    assert len(latency.draw(alone, tmp_path)) == 2  # one method by context


def test_methods_of_one_command_share_a_figure_although_their_code_differs(tmp_path: Path) -> None:
    results = Results("latency")
    for method in ("full", "pqcache"):
        times = {"ttft_s": 1.0, "tt2t_s": 2.0, "tpot_s": 0.1, "new_tokens": 32}
        results.run(method, method, [{**times, "context": context, "repeat": 0} for context in (1024, 2048)])
    codes = {settings["code"] for settings, _ in results.known.values()}
    assert len(codes) == 2
    drawn = latency.draw(results.table, tmp_path)
    assert [path.name for path in drawn] == ["latency_toy.png", "latency_toy.pdf"]
