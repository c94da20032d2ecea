"""Prefill with offload and index construction beside the computation of the next layers, compared with one after the
other."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.data import alike, emulated, link, machine, measured, samples, setting, unique
from plots.style import footer, headline, save, style, tokens
from pqbench.records.file import plain_name
from pqbench.records.kinds import LATENCY

MADE_BY = "python -m pqbench experiment=overlap"
NEEDS = "latency records of one method with overlap and without"
# Column, name and colour, from left to right up to the second token.
PARTS = (
    ("prefill", "prefill, to the first token", "#0072B2"),
    ("wait", "wait for the index", "#D55E00"),
    ("step", "first decode step", "#009E73"),
)
BUILD = "#E69F00"


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for every method and model that was timed with and without overlap; returns no paths if there is
    none."""
    paths: list[Path] = []
    taken: dict[str, int] = {}
    for run in alike(parts(table), "overlap"):
        both = paired(run)
        if both.empty:
            continue
        first = run.iloc[0]
        name = unique(f"overlap_{plain_name(first['method'])}_{plain_name(first['model'])}", taken)
        with style():
            paths += save(panel(both), folder, name)
    return paths


def parts(table: pd.DataFrame) -> pd.DataFrame:
    """Latency rows with the :data:`PARTS` of the time to the second token in seconds; the column ``overlaps`` says
    whether work overlapped."""
    good = measured(table, "ttft_s", "tt2t_s", "wait_s", "index_build_s", "context", kind=LATENCY)
    overlaps = [setting(settings, "overlap") for settings in good["settings"]]
    step = (good["tt2t_s"] - good["ttft_s"] - good["wait_s"]).clip(lower=0)
    good = good.assign(
        overlaps=overlaps, prefill=good["ttft_s"], wait=good["wait_s"], step=step, build=good["index_build_s"]
    )
    return good[(good["build"] > 0) & good["overlaps"].notna()]


def paired(run: pd.DataFrame) -> pd.DataFrame:
    """The contexts that were timed with and without overlap."""
    ways = run.groupby("context")["overlaps"].transform("nunique")
    return run[ways == 2]


def panel(run: pd.DataFrame) -> Figure:
    """Draw two bars per context; a thin bar below each shows when the index was built."""
    figure = Figure(figsize=(8.6, 1.9 + 0.95 * run["context"].nunique()), layout="constrained")
    bars(figure.subplots(), run)
    first = run.iloc[0]
    title = f"Prefill of {first['method']} on {first['model']}, with and without overlap{link(run)}"
    headline(figure, title, "emulated" if emulated(run) else "")
    count = samples(run.groupby(["context", "overlaps"]).size())
    footer(
        figure,
        f"{count} per bar, medians; index: sum over layers, drawn to end where the wait for it ends; {machine(run)}",
    )
    return figure


def bars(axis: Axes, run: pd.DataFrame) -> None:
    """The figure: a pair of bars for each context."""
    medians = run.groupby(["context", "overlaps"])[["prefill", "wait", "step", "build"]].median()
    labels = []
    for place, (_, row) in enumerate(medians.sort_index(ascending=[True, True]).reset_index().iterrows()):
        context, overlaps = row["context"], row["overlaps"]
        labels.append(f"{tokens(int(context))}, {'overlap' if overlaps else 'one after the other'}")
        left = 0.0
        for name, title, colour in PARTS:
            axis.barh(place, row[name], left=left, height=0.5, color=colour, label=None if place else title)
            left += row[name]
        ready = row["prefill"] + row["wait"]
        axis.barh(
            place + 0.36,
            row["build"],
            left=max(0.0, ready - row["build"]),
            height=0.16,
            color=BUILD,
            label=None if place else "index build",
        )
        axis.annotate(
            f"{left:.2f} s", (left, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, 1.12 * max(row["prefill"] + row["wait"] + row["step"] for _, row in medians.iterrows()))
    axis.set_xlabel("seconds from the prompt to the second token (TT2T)")
    axis.legend(frameon=False, fontsize=8, loc="upper right")
