"""Latency figures: time to first token, to second token and per output token by context length, with a line per
method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from plots.data import families, measured, without
from plots.style import BASELINE, Look, footer, looks, name_ends, number, save, style, threads, tokens
from pqbench.records.file import plain_name
from pqbench.records.kinds import LATENCY

MADE_BY = "python -m pqbench experiment=latency"
NEEDS = "latency records of two methods, or of two contexts, with more than 4 new tokens"
# Field of a record, title of its panel, factor and unit.
PANELS = (
    ("ttft_s", "time to first token", 1.0, "s"),
    ("tt2t_s", "time to second token", 1.0, "s"),
    ("tpot_s", "time per output token", 1e3, "ms"),
)
FEW = 4  # tokens
RUN = ["model", "link", "device", "dtype", "threads", "kernels"]  # equal for all rows of one figure


@dataclass(frozen=True)
class Line:
    """One method in one panel, by context: medians over repeats with minimum and maximum."""

    label: str
    method: str
    contexts: list[int]
    middle: list[float]
    low: list[float]
    high: list[float]


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for each model, link, machine and setting among the latency records; returns no paths if there are
    none.

    The figure with the most records of a model is called ``latency_<model>``; others get a number. Sweeps of one
    method's settings are left out, since they have figures of their own. Runs of a few tokens are left out, since they
    say nothing about the time per token.
    """
    good = families(timed(table))
    good = good[pd.to_numeric(good["new_tokens"]) > FEW]
    paths: list[Path] = []
    taken: dict[str, int] = {}
    chosen = looks(good["method"])
    alone = good["settings"].map(lambda settings: without(settings, "method"))
    for run in sorted((run for _, run in good.groupby([*RUN, alone], sort=False)), key=len, reverse=True):
        if run["family"].nunique() < 2 and (run["key"].nunique() > 1 or run["context"].nunique() < 2):
            continue
        name = f"latency_{plain_name(str(run['model'].iloc[0]))}"
        taken[name] = taken.get(name, 0) + 1
        with style():
            paths += save(panels(run, chosen), folder, name if taken[name] == 1 else f"{name}-{taken[name]}")
    return paths


def timed(table: pd.DataFrame) -> pd.DataFrame:
    """The latency records that hold times; missing values in the columns of :data:`RUN` are filled in."""
    good = measured(table, *(field for field, _, _, _ in PANELS), "context", "new_tokens", kind=LATENCY)
    missing = {name: "-" for name in [*RUN, "emulated"] if name not in good}
    good = good.assign(**missing)
    return good.assign(**{name: good[name].fillna("-") for name in RUN})


def panels(run: pd.DataFrame, chosen: Mapping[str, Look]) -> Figure:
    """The figure of one run: three panels side by side."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    for axis, (field, title, factor, unit) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        lines = lines_of(run, field, factor)
        plot(axis, lines, chosen)
        axis.set_title(title)
        axis.set_ylabel(f"{unit} (median, band: min to max)")
    figure.suptitle(headline(run), fontsize=12)
    repeats = run.groupby(["method", "context"]).size()
    count = f"{repeats.min()}" if repeats.min() == repeats.max() else f"{repeats.min()} to {repeats.max()}"
    first = run.iloc[0]
    footer(
        figure,
        f"n = {count} per point, {number(first['new_tokens'])} tokens generated; {first['device']}, "
        f"{threads(first['threads'])}, {first['dtype']}, kernels: {first['kernels']}",
    )
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.95), wspace=0.04)  # type: ignore[union-attr, call-arg]
    return figure


def headline(run: pd.DataFrame) -> str:
    """The model and where keys and values lie; a link whose times are modelled is called emulated."""
    link, emulated = str(run["link"].iloc[0]), bool((run["emulated"] == True).any())  # noqa: E712 - a column
    stamp = "" if link == "-" else f", KV over {'emulated ' if emulated and 'emulated' not in link else ''}{link}"
    return f"Latency of {run['model'].iloc[0]}{stamp}"


def lines_of(run: pd.DataFrame, field: str, factor: float) -> list[Line]:
    """The lines of one panel, full attention first; a method with several budgets or settings has several lines."""
    several = {name for name, part in run.groupby("method") if len(part.groupby(["budget", "key"])) > 1}
    found = []
    for (method, budget, key), part in run.groupby(["method", "budget", "key"], sort=False):
        alike = run[(run["method"] == method) & (run["budget"] == budget)]["key"].nunique() > 1
        label = method if method not in several else f"{method}, {budget}" + (f" ({str(key)[:4]})" if alike else "")
        by_context = part.assign(value=part[field].astype(float) * factor).groupby("context")["value"]
        middle, low, high = by_context.median(), by_context.min(), by_context.max()
        contexts = [int(context) for context in middle.index]
        found.append(Line(str(label), str(method), contexts, list(middle), list(low), list(high)))
    return sorted(found, key=lambda line: line.method != BASELINE)


def plot(axis: Axes, lines: Sequence[Line], chosen: Mapping[str, Look]) -> None:
    """Draw the lines of one panel with their names at the right ends."""
    for line in lines:
        look = chosen[line.method]
        axis.fill_between(line.contexts, line.low, line.high, color=look.colour, alpha=0.15, linewidth=0)
        axis.plot(
            line.contexts,
            line.middle,
            color=look.colour,
            marker=look.marker,
            linestyle=look.dash,
            markersize=4.5,
            linewidth=2.2 if line.method == BASELINE else 1.5,
            label=line.label,
        )
    contexts = sorted({context for line in lines for context in line.contexts})
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [tokens(context) for context in contexts])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(contexts[0] / 1.1, contexts[-1] * (1.1 if len(contexts) > 1 else 1.3))
    axis.set_ylim(0, 1.08 * max(max(line.high) for line in lines))
    axis.set_xlabel("context length (tokens)")
    axis.grid(axis="y", color="0.9")
    name_ends(axis, [(line.label, line.contexts[-1], line.middle[-1], chosen[line.method].colour) for line in lines])
