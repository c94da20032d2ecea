"""K-Means iterations, fixed and adaptive: output error, score, and the time they take."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.data import alike, emulated, families, link, machine, measured, numbers, samples, setting, unique
from plots.style import footer, headline, looks, save, style
from pqbench.records.file import plain_name
from pqbench.records.kinds import LATENCY

MADE_BY = "python -m pqbench experiment=iterations and experiment=iterations_latency"
NEEDS = "records of pqcache with two counts of K-Means iterations or more"
# Field, title, unit and factor: first for benchmarks with scores, then for benchmark=latency.
QUALITY = (
    ("score", "score", "%", 1.0),
    ("output_error", "error of the attention output", "% of its norm", 100.0),
    ("index_build_s", "index build, nothing else running", "s per prompt", 1.0),
)
TIMES = (
    ("tt2t_s", "time to second token", "s", 1.0),
    ("index_build_s", "index build beside the prefill", "s", 1.0),
    ("wait_s", "wait for the index after the first token", "s", 1.0),
)


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for every benchmark, model and length with PQCache at two numbers of iterations or more."""
    paths: list[Path] = []
    taken: dict[str, int] = {}
    for run in alike(counted(table), "method.iterations"):
        for context, part in run.groupby(run["context"].fillna(0).astype(int)):  # 0 stands for samples of a suite
            if part["asked"].nunique() < 2:
                continue
            name = f"iterations_{plain_name(run['benchmark'].iloc[0])}_{plain_name(run['model'].iloc[0])}"
            name += f"_{context}" if context else ""
            with style():
                paths += save(panels(part), folder, unique(name, taken))
    return paths


def counted(table: pd.DataFrame) -> pd.DataFrame:
    """Good rows of PQCache whose settings name the iterations, with two more columns: ``asked`` is the number in the
    settings (-1: adaptive), ``done`` the number in the record."""
    good = families(measured(table, "index_build_s"))
    named = [setting(settings, "method.iterations", "-") for settings in good["settings"]]
    facts = good["index_facts"] if "index_facts" in good else [None] * len(good)
    done = [fact.get("iterations") if isinstance(fact, dict) else None for fact in facts]
    good = good.assign(
        asked=[-1 if value is None else value for value in named],
        done=pd.to_numeric(pd.Series(done, good.index, dtype=object)),
    )
    good = good.assign(context=numbers(good, "context"))
    return good[(good["family"] == "pqcache") & (good["asked"] != "-") & good["done"].notna()]


def panels(run: pd.DataFrame) -> Figure:
    """The figure of one benchmark (and context)."""
    timed = run["kind"].iloc[0] == LATENCY
    shown = [panel for panel in (TIMES if timed else QUALITY) if panel[0] in run]
    figure = Figure(figsize=(0.6 + 3.8 * len(shown), 3.9), layout="constrained")
    for axis, (field, title, unit, factor) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        values = run.assign(value=factor * numbers(run, field))
        fixed, adaptive = (values[values["asked"].ge(0) == wanted] for wanted in (True, False))
        line(axis, fixed, adaptive)
        axis.set_ylim(0, 115 if field == "score" else 1.15 * max(values["value"].max(), 1e-9))
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(unit)
    first = run.iloc[0]
    where = f", {first['context']:.0f} tokens" if timed else ""
    headline(
        figure,
        f"K-Means iterations of PQCache: {first['benchmark']}, {first['model']}{where}{link(run)}",
        "emulated" if emulated(run) else "",
    )
    count = samples(run.groupby("key").size())
    footer(figure, f"{count} per point, {'median' if timed else 'mean'}; budget {first['budget']}; {machine(run)}")
    return figure


def line(axis: Axes, fixed: pd.DataFrame, adaptive: pd.DataFrame) -> None:
    """Draw the fixed counts as a line at even distances, and the adaptive choice as a star at its count."""
    look = looks(["pqcache"])["pqcache"]
    middle = "median" if fixed["kind"].eq(LATENCY).all() else "mean"
    points = fixed.groupby("asked")["value"].agg(middle).sort_index()
    counts = [int(count) for count in points.index]
    axis.plot(range(len(counts)), points.to_numpy(), color=look.colour, marker=look.marker, label="fixed")
    axis.set_xticks(range(len(counts)), [str(count) for count in counts])
    if len(adaptive):
        count, value = adaptive["done"].mean(), adaptive["value"].agg(middle)
        where = place(count, counts)
        axis.plot([where], [value], "*", color="#D55E00", markersize=13, linestyle="none", label="adaptive")
        axis.annotate(
            f"adaptive: {count:.0f}",
            (where, value),
            xytext=(0, 9),
            textcoords="offset points",
            color="#D55E00",
            fontsize=9,
            ha="center",
        )
    axis.set_xlim(-0.4, max(0.4, len(counts) - 0.6))
    axis.set_xlabel("iterations")
    axis.grid(axis="y", color="0.9")


def place(count: float, counts: Sequence[int]) -> float:
    """The place of a count on the axis of even distances: between its neighbours, or at an end if it lies beyond
    them."""
    for i, (low, high) in enumerate(pairwise(counts)):
        if low <= count <= high:
            return i + (count - low) / (high - low)
    return 0.0 if not counts or count < counts[0] else len(counts) - 1.0
