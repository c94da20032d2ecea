"""The effect of each part of ``pqcache_plus``: error by codebook and index size (rows) and by tail (columns)."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.data import alike, families, machine, numbers, samples, setting, unique
from plots.fidelity import measured
from plots.style import footer, headline, number, save, style, tokens, write_cells
from pqbench.records.file import plain_name

MADE_BY = "python -m pqbench experiment=ablation"
NEEDS = "fidelity records of pqcache_plus with two codebooks and two tails or more at one length and budget"
PARTS = ("codebook", "m", "b", "tail", "spread")
# Field of a record, and the title of its panel.
PANELS = (("output_error", "error of the attention output"), ("kl", "KL of the next token, method in all layers"))
CODEBOOKS = ("plain", "centred", "rotated", "query_aware")  # simplest first
TAILS = ("none", "mean", "pq", "sampled")
RAIL, RULE = "oracle", "kv_head"
COLOURS = "PuOr_r"  # two hues, below and above the rail, that colour-blind eyes tell apart


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for every model, length and budget that has at least two codebooks and two tails."""
    good = families(measured(table)) if "settings" in table else table.iloc[:0]
    if good.empty:
        return []
    paths: list[Path] = []
    taken: dict[str, int] = {}
    for run in alike(parted(good), *(f"method.{part}" for part in PARTS)):
        for _, part in run.groupby(["length", "ratio"]):
            if part["codebook"].nunique() < 2 or part["tail"].nunique() < 2:
                continue
            first = part.iloc[0]
            size = f"{tokens(int(first['length']))}_{100 * first['ratio']:g}"
            name = f"ablation_{plain_name(str(first['model']))}_{size}"
            with style():
                paths += save(panels(part, rail(good, part)), folder, unique(name, taken))
    return paths


def parted(good: pd.DataFrame) -> pd.DataFrame:
    """The rows whose settings name all parts (only runs of pqcache_plus do), with the parts as columns."""
    own = good[good["ratio"].notna()]
    values = {part: [setting(settings, f"method.{part}") for settings in own["settings"]] for part in PARTS}
    return own.assign(**values).dropna(subset=list(PARTS)).astype({"m": int, "b": int})


def rail(good: pd.DataFrame, run: pd.DataFrame) -> pd.DataFrame:
    """The rail of a figure: the exact top-k per KV head on the documents of ``run``, at the same budget and on the same
    machine. Of several runs the one with the most documents is taken, and of these the newest."""
    first = run.iloc[0]
    same = [good[name] == first[name] for name in ("model", "length", "steps", "ratio", "dtype", "device")]
    found = good[np.logical_and.reduce([good["family"] == RAIL, good["document"].isin(run["document"]), *same])]
    rules = [setting(settings, "method.rule", RULE) for settings in found["settings"]]
    found = found[[rule == RULE for rule in rules]]
    if found.empty:
        return found
    counts = found.groupby("key", sort=False)["document"].nunique()
    return found[found["key"] == counts[counts == counts.max()].index[-1]]


def shared(run: pd.DataFrame, exact: pd.DataFrame) -> pd.DataFrame:
    """The rows of documents on which the rail was also measured; all rows if there is no rail."""
    return run[run["document"].isin(exact["document"])] if len(exact) else run


def grid(run: pd.DataFrame, exact: pd.DataFrame, field: str) -> pd.DataFrame:
    """Means over documents: a row for each codebook and index size, a column for each tail. With a rail, each mean is
    divided by the rail's mean over the same documents."""
    units = numbers(exact, field).groupby(exact["document"]).mean() if len(exact) else None
    unit = 1.0 if units is None else run["document"].map(units)
    values = run.assign(
        value=numbers(run, field),
        unit=unit,
        bits=run["m"] * run["b"],
        place=[CODEBOOKS.index(name) for name in run["codebook"]],
    )
    cells = values.groupby(["spread", "bits", "m", "place", "tail"])[["value", "unit"]].mean()
    relative = (cells["value"] / cells["unit"].where(cells["unit"] > 0)).unstack("tail")
    named = relative.set_axis([_name(*cast(tuple[bool, int, int, int], row)) for row in relative.index])
    return named[[tail for tail in TAILS if tail in named]]


def _name(spread: bool, bits: int, m: int, place: int) -> str:
    """``query-aware 3 x 8, spread``."""
    return f"{CODEBOOKS[place].replace('_', '-')}  {m} x {bits // m}" + (", spread" if spread else "")


def panels(run: pd.DataFrame, exact: pd.DataFrame) -> Figure:
    """The figure of one budget; values are multiples of the rail's error if there is a rail."""
    run = shared(run, exact)
    grids = [grid(run, exact, field) for field, _ in PANELS]
    figure = Figure(figsize=(11.5, 2.2 + 0.27 * len(grids[0])), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, cells, (_, title) in zip(axes, grids, PANELS, strict=True):
        heat(axis, cells, relative=bool(len(exact)))
        axis.set_title(title)
    axes[0].set_ylabel("codebook, sub-spaces x bits")
    first = run.iloc[0]
    where = f"{first['model']}, {tokens(int(first['length']))} tokens, budget {100 * first['ratio']:g} %"
    headline(figure, f"Parts of pqcache_plus: {where}")
    footer(figure, note(run, bool(len(exact))))
    return figure


def note(run: pd.DataFrame, relative: bool) -> str:
    """Footer: what a number means, from how many documents, and on which machine."""
    unit = (
        "multiples of the exact top-k's error (left) and KL (right): below 1 beats it"
        if relative
        else ("relative error (left), KL in nats (right); no oracle was measured")
    )
    count = samples(run.groupby("key").size())
    steps = number(run["steps"].iloc[0])
    return f"{unit}; {count} documents ({run['texts'].iloc[0]}), {steps} teacher-forced steps each;\n{machine(run)}"


def heat(axis: Axes, cells: pd.DataFrame, relative: bool) -> None:
    """One grid with its values written in the cells. Colours show the ratio to 1 if there is a rail, otherwise to the
    median."""
    values = cells.to_numpy(dtype=float)
    positive = values[values > 0]  # without NaN, and without exact answers, which get the best colour
    middle = 1.0 if relative or not len(positive) else float(np.median(positive))
    reach = max(1.0, float(np.abs(np.log2(positive / middle)).max())) if len(positive) else 1.0
    shown = np.where(
        values > 0, np.log2(np.where(values > 0, values, 1.0) / middle), np.where(values == 0, -reach, np.nan)
    )
    image = axis.imshow(shown, cmap=COLOURS, vmin=-reach, vmax=reach, aspect="auto")
    axis.set_xticks(range(cells.shape[1]), [str(tail) for tail in cells.columns])
    axis.set_yticks(range(cells.shape[0]), [str(row) for row in cells.index], family="monospace", fontsize=8)
    axis.set_xlabel("tail")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    write_cells(axis, image, cells.map("{:.2f}".format, na_action="ignore"), size=8)
