"""Sorted attention probabilities: how fast they fall, and how much the heaviest tokens hold (the paper's Figure 6)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from plots.data import machine, measured, unique
from plots.style import footer, headline, number, save, style, tokens
from pqbench.records.file import plain_name
from pqbench.records.kinds import ATTENTION_SCORES

MADE_BY = "python -m pqbench experiment=power_law"
NEEDS = "records of benchmark=attention_scores"
NEEDED = {"ranks", "probabilities", "mass", "mass_shares"}
BLUE, RED = "#0072B2", "#D55E00"


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for every model and context among the attention-score records; returns no paths if there are
    none."""
    good = measured(table, "context", "layer", kind=ATTENTION_SCORES)
    if not set(good.columns) >= NEEDED:
        return []
    paths: list[Path] = []
    taken: dict[str, int] = {}
    for (model, context, _), run in reversed(list(good.groupby(["model", "context", "key"], sort=False))):
        with style():
            paths += save(panels(run), folder, unique(f"power_law_{plain_name(str(model))}_{context:.0f}", taken))
    return paths


def panels(run: pd.DataFrame) -> Figure:
    """Left: probability by rank on logarithmic scales. Right: mass of the heaviest tokens."""
    figure = Figure(figsize=(10.6, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    falling(left, run)
    held(right, run)
    first = run.iloc[0]
    length = tokens(int(first["context"]))
    headline(figure, f"Attention probabilities from large to small: {first['model']}, {length} tokens")
    heads = len(first["probabilities"])
    queries = number(first.get("queries", "-"))
    footer(
        figure,
        f"means over the last {queries} queries of a prompt of prose and query heads; {len(run)} layers "
        f"x {heads} KV heads; band: 10 to 90 % of heads; {machine(run)}",
    )
    return figure


def curve(run: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Ranks, and probabilities ``[layers, ranks]`` as means over KV heads."""
    ranks = np.array(run["ranks"].iloc[0], float)
    return ranks, np.array([np.mean(heads, 0) for heads in run["probabilities"]])


def slope(ranks: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """Fit a and b of log p = a - b log rank to the ranks from 2 to a quarter of all, by least squares. The recorded
    ranks lie at even distances on the logarithmic axis."""
    used = (ranks >= 2) & (ranks <= ranks[-1] / 4) & (probabilities > 0)
    if used.sum() < 2:
        return float("nan"), float("nan")
    fall, start = np.polyfit(np.log(ranks[used]), np.log(probabilities[used]), 1)
    return float(start), float(-fall)


def falling(axis: Axes, run: pd.DataFrame) -> None:
    """Draw a thin line per layer, their mean, and the power law fitted to the mean."""
    ranks, layers = curve(run)
    for probabilities in layers:
        axis.plot(ranks, probabilities, color="0.75", linewidth=0.7)
    mean = layers.mean(0)
    axis.plot(ranks, mean, color=BLUE, linewidth=2.2, label="mean of layers")
    start, fall = slope(ranks, mean)
    if not np.isnan(fall):
        ends = np.array([2, ranks[-1] / 4])
        axis.plot(
            ends,
            np.exp(start) * ends**-fall,
            color=RED,
            linestyle=(0, (4, 2)),
            linewidth=1.6,
            label=f"power law, exponent -{fall:.2f}",
        )
    axis.plot([], [], color="0.75", linewidth=0.7, label="one layer")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(max(1e-8, mean.min() / 3), 1.5)
    axis.set_xlabel("rank of the token")
    axis.set_ylabel("attention probability")
    axis.set_title("probability by rank")
    axis.legend(frameon=False, fontsize=8, loc="lower left")


def held(axis: Axes, run: pd.DataFrame) -> None:
    """Draw the mass of the heaviest tokens: the median over layers and heads, with the 10th to 90th percentile."""
    shares = 100 * np.array(run["mass_shares"].iloc[0], float)
    mass = 100 * np.concatenate([np.array(heads, float) for heads in run["mass"]])  # [layers x heads, shares]
    low, middle, high = np.percentile(mass, [10, 50, 90], axis=0)
    axis.fill_between(shares, low, high, color=BLUE, alpha=0.15, linewidth=0)
    axis.plot(shares, middle, color=BLUE, marker="s", label="median head")
    for x, y in zip(shares, middle, strict=True):
        axis.annotate(f"{y:.0f}", (x, y), xytext=(0, -13), textcoords="offset points", ha="center", fontsize=8)
    axis.set_xscale("log")
    axis.set_xticks(shares, [f"{share:g}" for share in shares])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(0, 102)
    axis.grid(axis="y", color="0.9")
    axis.set_xlabel("heaviest tokens (% of the context)")
    axis.set_ylabel("% of the attention probability")
    axis.set_title("what the heaviest tokens hold")
