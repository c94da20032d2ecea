"""Scores by method and token budget with intervals: the paper's tables drawn as dots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.data import alike, families, machine, measured, published, setting, unique
from plots.style import BASELINE, Look, footer, headline, looks, save, style
from pqbench.records.file import plain_name
from pqbench.tables.summaries import Estimate, suites

MADE_BY = "python -m pqbench experiment=infinitebench_1_10"
NEEDS = "scores of three methods or more on InfiniteBench, LongBench or RULER"
SUITES = ("infinitebench", "longbench", "ruler")  # the suites with several tasks; needles have heatmaps
AVERAGES = ("pqcache_table2", "all", "mean")  # the first of these that exists is used
Dot = tuple[str, str, Estimate]  # method, its family, score


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for every suite and model with at least three methods, a panel per budget; returns no paths if
    there is none."""
    good = families(measured(table, "score", benchmarks=SUITES))
    chosen = looks(good["family"])
    paths: list[Path] = []
    taken: dict[str, int] = {}
    for run in alike(good, "method", "store", "overlap"):
        if run["method"].nunique() < 3:
            continue
        first = run.iloc[0]
        ask = "_question_first" if setting(first["settings"], "benchmark.question_first") else ""
        name = unique(f"scores_{plain_name(first['benchmark'])}_{plain_name(first['model'])}{ask}", taken)
        with style():
            paths += save(panels(run, published(str(first["benchmark"])), chosen), folder, name)
    return paths


def dots(part: pd.DataFrame) -> list[Dot]:
    """The score of every run in percent with its interval, lowest first; the average over tasks if there are
    several."""
    (suite,) = suites(part)
    names = dict(zip(part["method"], part["family"], strict=True))
    column = next((name for name in AVERAGES if any(name in run.scores for run in suite.runs)), suite.columns[0])
    found = [(run.names["method"], run.scores[column]) for run in suite.runs if column in run.scores]
    return [(name, names[name], score) for name, score in sorted(found, key=lambda pair: pair[1].value)]


def by_ratio(run: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """Rows by the budget in their settings (before any compensation); each group includes full attention."""
    full = run[run["method"] == BASELINE]
    rest = run[run["method"] != BASELINE]
    asked = [
        f"{100 * ratio:g} %" if (ratio := setting(settings, "method.budget.ratio")) else str(label)
        for settings, label in zip(rest["settings"], rest["budget"], strict=True)
    ]
    return {str(name): pd.concat([full, part]) for name, part in rest.groupby(pd.Series(asked, rest.index), sort=True)}


def panels(run: pd.DataFrame, paper: pd.DataFrame, chosen: Mapping[str, Look]) -> Figure:
    """The figure of one suite; published averages are shown only for the model on which they were measured."""
    parts = by_ratio(run)
    first = run.iloc[0]
    paper = paper[paper["model"] == first["model"]]
    rows = max(part["method"].nunique() for part in parts.values())
    figure = Figure(figsize=(1.6 + 4.4 * len(parts), 1.6 + 0.36 * rows), layout="constrained")
    for axis, (label, part) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
        plot(axis, dots(part), paper[paper["budget"] == label], chosen)
        axis.set_title(f"{label} of the tokens")
    ask = ", question first" if setting(first["settings"], "benchmark.question_first") else ""
    headline(figure, f"Scores: {first['benchmark']}, {first['model']}{ask}")
    sure = "; ".join(dict.fromkeys(paper["certainty"].astype(str)))
    counts = run.groupby("key").size()
    tasks = list(dict.fromkeys(run["task"].astype(str)))
    named = ", ".join(tasks) if len(tasks) < 5 else f"{len(tasks)} tasks"
    note = f"\npublished (hollow): {sure}" if sure else ""
    footer(
        figure,
        f"n = {counts.min()} samples per method ({named}), 95 % bootstrap intervals; (C): tokens added for "
        f"unread indices; {machine(run)}{note}",
    )
    return figure


def plot(axis: Axes, found: Sequence[Dot], paper: pd.DataFrame, chosen: Mapping[str, Look]) -> None:
    """Draw a dot with its interval per method, and the published averages."""
    names = [name for name, _, _ in found]
    for place, (_, family, score) in enumerate(found):
        look = chosen[family]
        axis.plot([score.low, score.high], [place, place], color=look.colour, linewidth=1.4)
        axis.plot([score.value], [place], color=look.colour, marker=look.marker, markersize=7, linestyle="none")
        axis.annotate(f"{score.value:.1f}", (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    for _, row in paper[paper["method"].isin(names)].iterrows():
        axis.plot(
            [float(row["value"])],
            [names.index(row["method"])],
            "o",
            markerfacecolor="none",
            markeredgecolor="black",
            markersize=11,
            linestyle="none",
            label="published",
        )
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_xlim(-2, 102)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="0.9")
    axis.set_xlabel("score (%)")
