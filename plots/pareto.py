"""Quality against cost: output error and score by the bytes that a step reads, and score by the time per token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from plots.data import alike, families, machine, measured, numbers, samples, unique
from plots.style import Look, footer, headline, looks, name_ends, save, style
from pqbench.records.file import plain_name

MADE_BY = "make bench METHOD=pqcache"
NEEDS = "scores of three runs or more of two methods on one benchmark and model"


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for every benchmark and model with at least three runs of two methods; returns no paths if there is
    none."""
    good = families(measured(table, "score", "attended_tokens", "index_bytes", "kv_bytes", "kv_tokens", "tpot_s"))
    chosen = looks(good["family"])
    paths: list[Path] = []
    taken: dict[str, int] = {}
    for run in alike(good, "method", "overlap"):
        points = costs(run)
        if len(points) < 3 or points["family"].nunique() < 2:
            continue
        name = unique(f"pareto_{plain_name(run['benchmark'].iloc[0])}_{plain_name(run['model'].iloc[0])}", taken)
        with style():
            paths += save(panels(run, points, chosen), folder, name)
    return paths


def costs(run: pd.DataFrame) -> pd.DataFrame:
    """A row per run: mean score and output error in percent, ``mb`` read per step (the index, and keys and values of
    the attended tokens), and median time per token in ms. Only samples that every run has are used."""
    wanted = run.groupby("sample_id")["key"].nunique()
    common = run[run["sample_id"].isin(wanted[wanted == run["key"].nunique()].index)]
    run = run if common.empty else common
    row = run["kv_bytes"] / run["kv_tokens"]  # bytes of one token in all layers
    rows = run.assign(
        mb=(run["index_bytes"] + run["attended_tokens"] * row) / 1e6,
        error=numbers(run, "output_error"),
        ms=1e3 * run["tpot_s"],
    )
    points = rows.groupby(["family", "method", "budget", "key"], sort=False).agg(
        score=("score", "mean"), error=("error", "mean"), mb=("mb", "mean"), ms=("ms", "median"), n=("score", "size")
    )
    return points.assign(error=100 * points["error"]).reset_index()


def best(points: pd.DataFrame, cost: str, quality: str, more: bool) -> pd.DataFrame:
    """The points that no other point beats in both cost and quality, cheapest first; ``more`` says whether high values
    are good."""
    kept, record = [], None
    for i, row in points.sort_values([cost, quality], ascending=[True, not more]).iterrows():
        value = row[quality] if more else -row[quality]
        if record is None or value > record:
            kept.append(i)
            record = value
    return points.loc[kept]


def panels(run: pd.DataFrame, points: pd.DataFrame, chosen: Mapping[str, Look]) -> Figure:
    """The figure of one benchmark."""
    figure = Figure(figsize=(14.4, 4.5), layout="constrained")
    wide = (
        ("mb", "error", "MB read per step", "output error (% of its norm)"),
        ("mb", "score", "MB read per step", "score (%)"),
        ("ms", "score", "ms per output token (median)", "score (%)"),
    )
    shown = [panel for panel in wide if points[panel[1]].notna().any()]
    for axis, (cost, quality, xlabel, ylabel) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
    ):
        plot(axis, points.dropna(subset=[cost, quality]), cost, quality, chosen)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
    first = run.iloc[0]
    headline(figure, f"Quality against cost: {first['benchmark']}, {first['model']}")
    footer(
        figure,
        f"{samples(points['n'])} per point; a line joins a method's runs that none of its own beats in "
        f"both; grey: the frontier of all; bytes: index and attended keys and values; {machine(run)}",
    )
    return figure


def plot(axis: Axes, points: pd.DataFrame, cost: str, quality: str, chosen: Mapping[str, Look]) -> None:
    """Draw the points of each method, with a line through its best ones, and the frontier of all methods."""
    more, ends = quality == "score", []
    frontier = best(points, cost, quality, more)
    axis.plot(
        frontier[cost],
        frontier[quality],
        color="0.8",
        linewidth=6,
        zorder=0.5,
        solid_capstyle="round",
        label="frontier",
    )
    for method, part in points.groupby("family", sort=True):
        look, joined = chosen[str(method)], best(part, cost, quality, more)
        axis.plot(
            part[cost],
            part[quality],
            color=look.colour,
            marker=look.marker,
            linestyle="none",
            markersize=6,
            alpha=0.45,
            label=str(method),
        )
        axis.plot(
            joined[cost],
            joined[quality],
            color=look.colour,
            marker=look.marker,
            linestyle=look.dash,
            linewidth=1.2,
            markersize=6,
        )
        end = joined.iloc[-1]
        ends.append((str(method), float(end[cost]), float(end[quality]), look.colour))
    axis.set_ylim(0, 105 if more else 1.1 * max(points[quality].max(), 1e-9))
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", color="0.92")
    name_ends(axis, ends)
