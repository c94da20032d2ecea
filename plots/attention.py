"""The time of one layer's decode step: stacked bars of select, fetch, attend and append, beside full attention."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.data import measured
from plots.style import BASELINE, footer, number, save, style, threads, tokens
from pqbench.records.file import plain_name
from pqbench.records.kinds import ATTENTION

MADE_BY = "python -m pqbench benchmark=attention method=[full,pqcache]"
NEEDS = "records of benchmark=attention"
# Field of a record, name and colour: blue, orange, green and grey of the colour-blind-safe palette.
PHASES = (
    ("select_s", "select", "#0072B2"),
    ("fetch_s", "fetch", "#E69F00"),
    ("attend_s", "attend", "#009E73"),
    ("append_s", "append", "0.6"),
)
RUN = ["geometry", "context", "keys", "link", "device", "threads", "kernels"]  # equal for all rows of one figure
SLOW = 3.0  # dense kernels slower than this multiple of the fastest are named below, not drawn


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for each geometry and context among the attention records; returns no paths if there are none.

    The newest figure is called ``attention_<geometry>_<context>``; older ones get a number.
    """
    good = timed(table)
    paths: list[Path] = []
    taken: dict[str, int] = {}
    for _, run in reversed(list(good.groupby(RUN, sort=False))):
        first = run.iloc[0]
        name = f"attention_{plain_name(str(first['geometry']))}_{tokens(int(first['context']))}"
        taken[name] = taken.get(name, 0) + 1
        with style():
            paths += save(bars(run), folder, name if taken[name] == 1 else f"{name}-{taken[name]}")
    return paths


def timed(table: pd.DataFrame) -> pd.DataFrame:
    """The attention records that hold times; missing values in the columns of :data:`RUN` are filled in."""
    good = measured(table, *(field for field, _, _ in PHASES), "total_s", "context", kind=ATTENTION)
    good = good if {"dtype", "kernel"} <= set(good) else good.iloc[:0].assign(dtype=None, kernel=None)
    good = good.assign(**{name: "-" for name in [*RUN, "emulated"] if name not in good})
    return good.assign(**{name: good[name].fillna("-") for name in RUN})


def bars(run: pd.DataFrame) -> Figure:
    """The figure of one run: a panel for each dtype and budget, with the dense kernels at the top."""
    dense, methods = run[run["method"] == BASELINE], run[run["method"] != BASELINE]
    cells = list(methods.groupby(["dtype", "budget"], sort=False)) or list(dense.groupby(["dtype", "budget"]))
    shown = [panel(dense[dense["dtype"] == dtype], part) for (dtype, _), part in cells]
    columns = min(2, len(cells))
    rows = -(-len(cells) // columns)
    tall = max(len(part) for part in shown)
    figure = Figure(figsize=(1.2 + 5.6 * columns, 1.3 + rows * (1.0 + 0.34 * tall)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, ((dtype, budget), _), part in zip(axes, cells, shown, strict=False):
        stack(axis, part)
        axis.set_title(f"{dtype}, budget {budget}" if len(methods) else str(dtype))
    for axis in axes[len(cells) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(PHASES), frameon=False, fontsize=9)
    figure.suptitle(headline(run), fontsize=12, x=0.01, ha="left")
    footer(figure, note(run, shown))
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))  # type: ignore[union-attr, call-arg]
    return figure


def panel(dense: pd.DataFrame, methods: pd.DataFrame) -> pd.DataFrame:
    """Rows of one panel from the top: the dense kernels that are drawn, fastest first, then the methods, fastest first.
    Adds ``label`` and ``ratio``, the time of the fastest dense kernel divided by the row's time."""
    dense = dense.assign(total_s=dense["total_s"].astype(float)).sort_values("total_s")
    methods = methods[methods["method"] != BASELINE]
    methods = methods.assign(total_s=methods["total_s"].astype(float)).sort_values("total_s")
    fastest = dense["total_s"].min()
    drawn = dense[dense["total_s"] <= SLOW * fastest]
    both = pd.concat([part for part in (drawn, methods) if len(part)])
    names = [
        f"{row['method']} ({row['kernel']})" if row["method"] == BASELINE else str(row["method"])
        for _, row in both.iterrows()
    ]
    own = pd.to_numeric(both["dense_ratio"], errors="coerce") if "dense_ratio" in both else float("nan")
    return both.assign(label=names, ratio=own)


def stack(axis: Axes, part: pd.DataFrame) -> None:
    """Draw the bars of one panel in ms, with the total and the ratio to full attention at their ends."""
    places = list(range(len(part)))
    left = pd.Series(0.0, index=part.index)
    for field, name, colour in PHASES:
        width = part[field].astype(float) * 1e3
        axis.barh(places, width, left=left, color=colour, label=name, height=0.7)
        left = left + width
    total = part["total_s"] * 1e3  # the median of totals; the bar shows a sum of medians, which differs slightly
    for place, end, time, ratio, method in zip(places, left, total, part["ratio"], part["method"], strict=True):
        text = f"{time:.3g} ms" + ("" if pd.isna(ratio) or method == BASELINE else f", {ratio:.2f}x dense")
        axis.annotate(
            text,
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    dense = total[part["method"] == BASELINE]
    if len(dense):
        axis.axvline(dense.min(), color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.5)
    axis.set_yticks(places, part["label"])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.45 * left.max())
    axis.set_xlabel("ms per decode step and layer (medians)")
    axis.tick_params(axis="y", length=0)


def headline(run: pd.DataFrame) -> str:
    """Geometry, context and where keys and values lie; a link whose times are modelled is called emulated."""
    first = run.iloc[0]
    link, emulated = str(first["link"]), bool((run["emulated"] == True).any())  # noqa: E712 - a column
    stamp = "" if link == "-" else f", KV over {'emulated ' if emulated and 'emulated' not in link else ''}{link}"
    return f"One {first['geometry']} attention layer, {tokens(int(first['context']))} tokens{stamp}"


def note(run: pd.DataFrame, shown: list[pd.DataFrame]) -> str:
    """Footer: what was measured, how often and on which machine, and the dense kernels that are too slow to be
    drawn."""
    first, drawn = run.iloc[0], {place for part in shown for place in part.index}
    steps = run["timed_steps"].max() if "timed_steps" in run else "-"
    left_out = [
        f"{row['kernel']} {float(row['total_s']) * 1e3:.3g} ms ({row['dtype']})"
        for place, row in run[run["method"] == BASELINE].iterrows()
        if place not in drawn
    ]
    copy = pd.to_numeric(run.get("copy_bandwidth_gbps", pd.Series(dtype=float)), errors="coerce").median()
    roof = "" if pd.isna(copy) else f"; copy {copy:.1f} GB/s (read and written)"
    tail = f"; not drawn: {', '.join(left_out)}" if left_out else ""
    machine = f"{first['device']}, {threads(first['threads'])}, kernels: {first['kernels']}"
    return f"median of {number(steps)} steps in turns; {first['keys']} keys; {machine}{roof}{tail}"
