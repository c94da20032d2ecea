"""The time of a decode step of a whole model: stacked bars of the model itself, select, fetch, attend and append."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.attention import PHASES as STEP
from plots.data import alike, emulated, families, link, machine, measured, samples, setting, unique
from plots.latency import FEW
from plots.style import BASELINE, footer, headline, number, save, style, tokens
from pqbench.records.file import plain_name
from pqbench.records.kinds import LATENCY

MADE_BY = "python -m pqbench experiment=breakdown"
NEEDS = "latency records of two methods or more in one setting, with more than 4 new tokens"
PHASES = (
    ("dense_step_s", "model", "0.82"),
    *((field.replace("_s", "_step_s"), name, colour) for field, name, colour in STEP),
)


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for every model and setting that has two methods among the latency records, with a panel per
    context."""
    good = measured(table, *(field for field, _, _ in PHASES), "tpot_s", "context", "new_tokens", kind=LATENCY)
    paths: list[Path] = []
    taken: dict[str, int] = {}
    for run in alike(families(good[good["new_tokens"] > FEW]), "method"):
        if run["family"].nunique() < 2:
            continue  # this is a sweep of one method's settings
        with style():
            paths += save(panels(run), folder, unique(f"breakdown_{plain_name(run['model'].iloc[0])}", taken))
    return paths


def panels(run: pd.DataFrame) -> Figure:
    """The figure of one run, with at most the three longest contexts."""
    contexts = sorted(run["context"].unique())[-3:]
    tall = run["method"].nunique()
    figure = Figure(figsize=(2.0 + 4.6 * len(contexts), 1.7 + 0.42 * tall), layout="constrained")
    axes = figure.subplots(1, len(contexts), squeeze=False)[0]
    for axis, context in zip(axes, contexts, strict=True):
        stack(axis, means(run[run["context"] == context]))
        axis.set_title(f"{tokens(int(context))} tokens")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    first = run.iloc[0]
    headline(figure, f"A decode step of {first['model']}{link(run)}", "emulated" if emulated(run) else "")
    cache = setting(first["settings"], "store.cache_tokens", 0)
    count, new = samples(run.groupby(["method", "context"]).size()), number(first.get("new_tokens"))
    held = f"cache {cache} tokens; " if cache else ""
    footer(figure, f"{count} per bar, means over {new} tokens; {held}{machine(run)}")
    return figure


def means(part: pd.DataFrame) -> pd.DataFrame:
    """Mean milliseconds of every phase by method (and by budget, if a method has several), full attention first."""
    several = part.groupby("method")["key"].transform("nunique") > 1
    label = part["method"].where(~several, part["method"] + ", " + part["budget"])
    table = 1e3 * part.assign(label=label).groupby("label", sort=False)[[field for field, _, _ in PHASES]].mean()
    order = sorted(table.index, key=lambda name: (not str(name).startswith(BASELINE), table.loc[name].sum()))
    return table.loc[order]


def stack(axis: Axes, table: pd.DataFrame) -> None:
    """Draw the bars of one panel, with their sums at the ends."""
    places, left = list(range(len(table))), pd.Series(0.0, index=table.index)
    for field, name, colour in PHASES:
        axis.barh(places, table[field], left=left, color=colour, label=name, height=0.7)
        left = left + table[field]
    for place, total in zip(places, left, strict=True):
        axis.annotate(
            f"{total:.3g} ms", (total, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.set_yticks(places, list(table.index))
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, 1.25 * left.max())
    axis.set_xlabel("ms per decode step")
