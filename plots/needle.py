"""Needle heatmaps: score by context length and needle depth, with full attention beside a method."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from plots.data import measured
from plots.style import HEAT, footer, save, style, tokens
from pqbench.records.file import plain_name

BASELINE = "full"

MADE_BY = "make bench METHOD=pqcache"
NEEDS = "scores of benchmark=needle"


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw one figure per run of every method in ``table`` (rows of records, see
    :func:`pqbench.tables.summaries.frame`).

    The newest run of a method is called ``needle_<method>``; older runs and other models get a suffix. Runs at a single
    length are usually points of a sweep. Only the newest of them is drawn, and only if the method has no run at several
    lengths. Returns no paths if there are no needle records.
    """
    cells = placed(table)
    if cells.empty:
        return []
    paths: list[Path] = []
    taken: set[str] = set()
    done: set[tuple[Hashable, Hashable]] = set()  # pairs of model and method
    runs = list(cells.groupby(["model", "method", "key"], sort=False))[::-1]  # newest first
    beside = bool((cells["method"] != BASELINE).any())  # full attention stands beside each method
    for (model, method, key), run in sorted(runs, key=lambda named: named[1]["length"].nunique() < 2):  # maps first
        if (method == BASELINE and beside) or ((model, method) in done and run["length"].nunique() < 2):
            continue
        done.add((model, method))
        full = cells[
            (cells["model"] == model) & (cells["method"] == BASELINE) & cells["sample_id"].isin(run["sample_id"])
        ]
        name = f"needle_{plain_name(str(method))}"
        if name in taken:
            name = f"{name}-{plain_name(str(model))}-{key}"
        taken.add(name)
        with style():
            paths += save(pair(full, run), folder, name)
    return paths


def placed(table: pd.DataFrame) -> pd.DataFrame:
    """The needle records that have a score, with their ``length`` and ``depth`` as columns."""
    good = measured(table, "score", benchmarks=["needle"])
    found = good["metadata"] if "metadata" in good else pd.Series(None, good.index, dtype=object)
    known = [isinstance(place, dict) and {"length", "depth"} <= set(place) for place in found]
    good, places = good[known], list(found[known])
    return good.assign(length=[place["length"] for place in places], depth=[place["depth"] for place in places])


def pair(full: pd.DataFrame, run: pd.DataFrame) -> Figure:
    """The figure of one run; without full attention on the same samples, the left panel is left out."""
    parts, cells = [part for part in (full, run) if not part.empty], grid(run)
    rows, columns = cells.shape
    figure = Figure(figsize=(1.6 + len(parts) * max(2.6, 0.95 * columns), 1.7 + 0.5 * rows), layout="constrained")
    titles = []
    for part in parts:
        budget = part["budget"].iloc[0]
        title = part["method"].iloc[0] + ("" if budget == "all" else f", budget {budget}")
        titles.append(f"{title}\nmean score {mean_score(part):.1f} %")
    panels(figure, parts, titles)
    count = run["sample_id"].nunique()
    each = "one" if count == cells.size else "mean"
    footer(figure, f"{run['model'].iloc[0]}, {count} prompts, {each} per cell")
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))  # type: ignore[union-attr, call-arg]
    return figure


def row(cells: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """One panel for each of several methods, side by side, on the prompts of the first method.

    Args:
        cells: needle records with their places, see :func:`placed`; one run for each method.
        methods: the methods in the order of the panels; methods without records are left out.
    """
    parts = [part for part in (cells[cells["method"] == method] for method in methods) if not part.empty]
    figure = Figure(figsize=(1.4 + 2.6 * len(parts), 3.4), layout="constrained")
    panels(figure, parts, [f"{part['method'].iloc[0]}: {mean_score(part):.0f} %" for part in parts])
    budgets = ", ".join(dict.fromkeys(part["budget"].iloc[0] for part in parts if part["budget"].iloc[0] != "all"))
    footer(figure, f"{parts[0]['model'].iloc[0]}, {len(parts[0])} prompts, budget {budgets} of the context (full: all)")
    return figure


def panels(figure: Figure, parts: Sequence[pd.DataFrame], titles: Sequence[str]) -> None:
    """Draw one heatmap for each part, side by side, with one scale of depths and one of colours."""
    axes = np.atleast_1d(figure.subplots(1, len(parts), sharey=True))
    for axis, part, title in zip(axes, parts, titles, strict=True):
        image = heatmap(axis, grid(part))
        axis.set_title(title, parse_math=False)
    axes[0].set_ylabel("needle depth (% of context)")
    figure.colorbar(image, ax=list(axes), label="score (%)", shrink=0.9)


def mean_score(part: pd.DataFrame) -> float:
    """Mean score in percent."""
    return float(part["score"].astype(float).mean())


def grid(part: pd.DataFrame) -> pd.DataFrame:
    """Mean score with depths as rows (0 on top) and lengths as columns."""
    scores = part.assign(score=part["score"].astype(float))
    return scores.pivot_table(index="depth", columns="length", values="score", aggfunc="mean").sort_index()


def heatmap(axis: Axes, cells: pd.DataFrame) -> AxesImage:
    """Draw one grid with its values written in the cells."""
    image = axis.imshow(cells.to_numpy(), cmap=HEAT, vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(cells.shape[1]), [tokens(int(length)) for length in cells.columns])
    axis.set_yticks(range(cells.shape[0]), [f"{depth:g}" for depth in cells.index])
    axis.set_xlabel("context length (tokens)")
    axis.spines[:].set_visible(False)
    for ticks, count in ((axis.set_xticks, cells.shape[1]), (axis.set_yticks, cells.shape[0])):
        ticks(np.arange(0.5, count - 1), minor=True)  # white lines between the cells
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.tick_params(which="both", length=0)
    if cells.size <= 150:
        for (y, x), value in np.ndenumerate(cells.to_numpy()):
            if not np.isnan(value):
                axis.text(
                    x, y, f"{value:.0f}", ha="center", va="center", fontsize=9, color="white" if value < 50 else "black"
                )
    return image
