"""Quality against the token budget: score, retained mass and output error by the share of tokens attended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from plots.curves import Curve, baseline, curves, draw_curves, name_curves
from plots.data import alike, families, machine, measured, numbers, samples, unique, without
from plots.style import BASELINE, Look, footer, headline, looks, save, style
from pqbench.records.file import plain_name

MADE_BY = "python -m pqbench experiment=token_budget"
NEEDS = "scores of one method at two budgets or more"
# Field of a record, title, unit of the axis, factor, and the value that full attention has by definition.
PANELS = (
    ("score", "score", "% of the official metric", 1.0, None),
    ("mass", "attention probability retained", "%", 100.0, 100.0),
    ("output_error", "error of the attention output", "% of its norm", 100.0, 0.0),
)


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for every benchmark and model with a method at two budgets or more; returns no paths if there is
    none."""
    good = families(measured(table, "score", "attended_tokens", "prompt_tokens"))
    chosen = looks(good["family"])
    paths: list[Path] = []
    taken: dict[str, int] = {}
    for run in alike(good, "method"):
        lines = swept(run)
        if lines.empty:
            continue
        full = run[run["method"] == BASELINE]
        name = unique(f"budget_sweep_{plain_name(run['benchmark'].iloc[0])}_{plain_name(run['model'].iloc[0])}", taken)
        with style():
            paths += save(panels(lines, full, chosen), folder, name)
    return paths


def swept(run: pd.DataFrame) -> pd.DataFrame:
    """Rows of methods that ran at several budgets with otherwise equal settings. The column ``share`` is the share of
    tokens attended in percent, the mean over the samples of a budget."""
    run = run[run["method"] != BASELINE]
    budgets = run.groupby(["method", "key"])["attended_tokens"].transform("mean")
    lengths = run.groupby(["method", "key"])["prompt_tokens"].transform("mean")
    line = [without(settings, "method.budget") for settings in run["settings"]]
    run = run.assign(share=100 * budgets / lengths, line=line)
    several = run.groupby(["method", "line"])["key"].transform("nunique") > 1
    return run[several]


def panels(rows: pd.DataFrame, full: pd.DataFrame, chosen: Mapping[str, Look]) -> Figure:
    """The figure of one benchmark; a panel without numbers is left out."""
    shown = [panel for panel in PANELS if numbers(rows, panel[0]).notna().any()]
    figure = Figure(figsize=(1.0 + 4.3 * len(shown), 4.4), layout="constrained")
    for axis, (field, title, unit, factor, exact) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
    ):
        lines = [
            Curve(line.label, line.family, line.x, [factor * y for y in line.y], [factor * e for e in line.error])
            for line in curves(rows, "share", field, by="method")
        ]
        draw_curves(axis, lines, chosen)
        level = exact if exact is not None else (full["score"].mean() if len(full) else None)
        top = max([max(line.y) for line in lines] + ([level] if level is not None else []))
        axis.set_ylim(0, 1.08 * top if field == "output_error" else 105)
        ticks = sorted({round(x, 0 if x >= 2 else 1) for line in lines for x in line.x})
        axis.set_xscale("log")
        axis.set_xticks(spread_out(ticks))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_title(title)
        axis.set_xlabel("tokens attended (% of the prompt)")
        axis.set_ylabel(unit)
        if level is not None and field != "output_error":
            baseline(axis, float(level))
        name_curves(axis, lines, chosen)
    first = rows.iloc[0]
    headline(figure, f"Quality against the token budget: {first['benchmark']}, {first['model']}")
    footer(
        figure,
        f"{samples(rows.groupby('key').size())} per point, mean and standard error; mass and error "
        f"teacher-forced on the reference answer; {machine(rows)}",
    )
    return figure


def spread_out(ticks: list[float]) -> list[float]:
    """Ticks that are far enough apart to be read on a logarithmic axis."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick >= 1.35 * kept[-1]:
            kept.append(tick)
    return kept
