"""Quality against the communication budget: score and output error by the index bytes that a step reads per byte of
keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from plots.curves import baseline, curves, draw_curves, name_curves
from plots.data import alike, families, machine, measured, numbers, samples, setting, unique
from plots.style import BASELINE, Look, footer, headline, looks, save, style
from pqbench.records.file import plain_name

MADE_BY = "python -m pqbench experiment=communication_budget"
NEEDS = "scores of full and of two methods at one token budget, each of these with two sizes of its index or more"
PANELS = (
    ("score", "score", "% of the official metric", 1.0),
    ("output_error", "error of the attention output", "% of its norm", 100.0),
)
ORACLE = "oracle"  # reads every key, which is not counted, so it is a level and not a line


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for every benchmark, model and token budget with at least two methods at two index sizes or
    more."""
    good = families(measured(table, "score", "index_bytes", "kv_bytes"))
    chosen = looks(good["family"])
    paths: list[Path] = []
    taken: dict[str, int] = {}
    for run in alike(good, "method"):
        full = run[run["method"] == BASELINE]
        for _, part in run[run["method"] != BASELINE].groupby("budget", sort=False):
            lines = swept(part, full)
            if lines["family"].nunique() < 2:
                continue
            levels = pd.concat([full, part[part["family"] == ORACLE]])
            name = unique(
                f"communication_sweep_{plain_name(run['benchmark'].iloc[0])}_{plain_name(run['model'].iloc[0])}", taken
            )
            with style():
                paths += save(panels(lines, levels, chosen), folder, name)
    return paths


def swept(run: pd.DataFrame, full: pd.DataFrame) -> pd.DataFrame:
    """Rows of methods with several index sizes. The column ``phi`` is the index bytes read per step divided by the
    bytes of all keys, which are known from full attention on the same sample; without full attention there are no rows.
    If several runs of a method read equally much, the one with the smallest error is kept (without errors, the best
    score)."""
    keys = full.drop_duplicates("sample_id").set_index("sample_id")["kv_bytes"] / 2
    run = run.assign(phi=run["index_bytes"] / run["sample_id"].map(keys)).dropna(subset="phi")
    run = run[(run["phi"] > 0) & (run["family"] != ORACLE)]
    runs = (
        run.assign(error=numbers(run, "output_error"))
        .groupby(["family", "key"])
        .agg({"phi": "mean", "error": "mean", "score": "mean"})
    )
    runs = runs.assign(size=runs["phi"].map("{:.3g}".format), loss=-runs["score"]).sort_values(["error", "loss"])
    best = runs.reset_index().drop_duplicates(["family", "size"])
    best = best[best.groupby("family")["size"].transform("size") > 1]
    return run.drop(columns="phi").merge(best[["key", "phi"]], on="key")


def panels(rows: pd.DataFrame, levels: pd.DataFrame, chosen: Mapping[str, Look]) -> Figure:
    """The figure of one benchmark and budget."""
    filled = [panel for panel in PANELS if numbers(rows, panel[0]).notna().any()]
    figure = Figure(figsize=(1.0 + 4.8 * len(filled), 4.4), layout="constrained")
    for axis, (field, title, unit, factor) in zip(
        figure.subplots(1, len(filled), squeeze=False)[0], filled, strict=True
    ):
        lines = curves(rows.assign(value=factor * numbers(rows, field)), "phi", "value")
        draw_curves(axis, lines, chosen)
        axis.set_xscale("log", base=2)
        low, high = min(min(line.x) for line in lines), max(max(line.x) for line in lines)
        ticks = [2.0**-n for n in range(10, -1, -1) if 0.8 * low <= 2.0**-n <= 1.25 * high]
        axis.set_xticks(ticks, [f"1/{round(1 / tick)}" if tick < 1 else "1" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_formatter(NullFormatter())
        shown = levels[(levels["method"] == BASELINE) | (field != "score")]
        marks = factor * numbers(shown, field).groupby(shown["method"]).mean()
        top = max([max(line.y) for line in lines])
        axis.set_ylim(0, 105 if field == "score" else 1.15 * top)
        for name, value in marks.items():
            if name != BASELINE or field == "score":
                baseline(axis, float(value), str(name))
        axis.set_title(title)
        axis.set_xlabel("index bytes read per step / bytes of all keys")
        axis.set_ylabel(unit)
        name_curves(axis, lines, chosen)
    first = rows.iloc[0]
    what = f"{first['benchmark']}, {first['model']}, {first['budget']} of the tokens"
    headline(figure, f"Quality against the communication budget: {what}")
    dtype = setting(first["settings"], "model.dtype", "-")
    footer(
        figure,
        f"{samples(rows.groupby('key').size())} per point, mean and standard error; keys in {dtype}, "
        f"codes one byte each; of equal sizes the best; {machine(rows)}",
    )
    return figure
