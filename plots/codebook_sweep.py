"""PQCache's m x b: score and output error by the number of sub-spaces and bits per code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.data import alike, families, machine, measured, numbers, samples, setting, unique
from plots.style import HEAT, footer, headline, save, style, write_cells
from pqbench.records.file import plain_name

MADE_BY = "python -m pqbench experiment=codebooks"
NEEDS = "scores of pqcache with two codebooks or more (m x b)"
# Field, title, factor and colour map; dark means bad in both panels.
PANELS = (("score", "score (%)", 1.0, HEAT), ("output_error", "output error (%)", 100.0, f"{HEAT}_r"))


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for every benchmark, model and setting with PQCache at two codebook sizes or more."""
    paths: list[Path] = []
    taken: dict[str, int] = {}
    for run in alike(sized(table), "method.m", "method.b"):
        if len(run.groupby(["m", "b"])) < 2:
            continue
        name = unique(
            f"codebook_sweep_{plain_name(run['benchmark'].iloc[0])}_{plain_name(run['model'].iloc[0])}", taken
        )
        with style():
            paths += save(panels(run), folder, name)
    return paths


def sized(table: pd.DataFrame) -> pd.DataFrame:
    """Scored rows of PQCache whose settings name m and b, with these as columns."""
    good = families(measured(table, "score"))
    good = good[good["family"] == "pqcache"]
    sizes = {name: [setting(settings, f"method.{name}") for settings in good["settings"]] for name in ("m", "b")}
    return good.assign(**sizes).dropna(subset=["m", "b"])


def grid(run: pd.DataFrame, field: str) -> pd.DataFrame:
    """Means with m as rows and b as columns."""
    values = run.assign(value=numbers(run, field), m=run["m"].astype(int), b=run["b"].astype(int))
    return values.pivot_table(index="m", columns="b", values="value", aggfunc="mean").sort_index()


def panels(run: pd.DataFrame) -> Figure:
    """The figure of one benchmark."""
    shown = [panel for panel in PANELS if numbers(run, panel[0]).notna().any()]
    figure = Figure(figsize=(1.2 + 3.8 * len(shown), 3.9), layout="constrained")
    for axis, (field, title, factor, colours) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
    ):
        heat(axis, factor * grid(run, field), colours, score=field == "score")
        axis.set_title(title)
    first = run.iloc[0]
    headline(figure, f"PQCache, m x b: {first['benchmark']}, {first['model']}, {first['budget']} of the tokens")
    footer(
        figure, f"{samples(run.groupby('key').size())} per cell, mean; bits per key and head = m x b; {machine(run)}"
    )
    return figure


def heat(axis: Axes, cells: pd.DataFrame, colours: str, score: bool) -> None:
    """Draw one grid with its values written in the cells."""
    values = cells.to_numpy()
    low, high = (0.0, 100.0) if score else (0.0, float(np.nanmax(values)))
    image = axis.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axis.set_xticks(range(cells.shape[1]), [str(b) for b in cells.columns])
    axis.set_yticks(range(cells.shape[0]), [str(m) for m in cells.index])
    axis.set_xlabel("b, bits per code")
    axis.set_ylabel("m, sub-spaces")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    write_cells(axis, image, cells.map(("{:.0f}" if score else "{:.1f}").format, na_action="ignore"))
