"""Fidelity figures: output error, and KL to full attention, against the bytes that a step reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from plots.style import BASELINE, Look, footer, headline, looks, name_ends, number, save, style, threads, tokens
from pqbench.records.file import plain_name
from pqbench.records.kinds import FIDELITY
from pqbench.tables.summaries import LEVEL, resampled

MADE_BY = "python -m pqbench benchmark=fidelity method=[oracle,random_tokens,streaming_llm,pqcache,pqcache_plus]"
NEEDS = "records of benchmark=fidelity with a budget"
# Field of a record, title of its panel, and label of its axis.
PANELS = (
    ("output_error", "attention output, clean inputs", "relative error"),
    ("kl", "next token, method in all layers", "KL(full || method), nats"),
)
RUN = ["model", "length", "steps", "texts", "dtype", "device"]  # equal for all rows of one figure
MOST = 16  # with more lines, only the frontier and the rails have a name and a colour
DECADES = 4.0  # largest span of the vertical axis; budgets at which a method is exact fall below it
# The rails, between which a method lies, and their meaning.
RAILS = {"oracle": "(exact scores)", "random_tokens": "(no scores)", "streaming_llm": "(sinks and window only)"}
RAIL = "0.45"
PALE, UNNAMED = "0.75", "further settings, none of them on the frontier"


@dataclass(frozen=True)
class Line:
    """One method in one panel, by budget: means over documents with their bootstrap intervals.

    Attributes:
        size: bytes that one step reads for one KV head: the index, and the attended keys and values.
        documents: the fewest and the most documents behind a point.
    """

    label: str
    method: str
    ratios: list[float]
    size: list[float]
    middle: list[float]
    low: list[float]
    high: list[float]
    documents: tuple[int, int]


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw a figure for each model and length among the fidelity records; returns no paths if there are none.

    The newest figure is called ``fidelity_<model>_<length>``; those of other texts, steps or machines get a number.
    """
    good = measured(table)
    paths: list[Path] = []
    taken: dict[str, int] = {}
    chosen = rails(looks(good["method"]))
    for _, run in reversed(list(good.groupby(RUN, sort=False))):
        if run["ratio"].isna().all():
            continue  # full attention alone is no curve
        first = run.iloc[0]
        name = f"fidelity_{plain_name(str(first['model']))}_{tokens(int(first['length']))}"
        taken[name] = taken.get(name, 0) + 1
        with style():
            paths += save(panels(run, chosen), folder, name if taken[name] == 1 else f"{name}-{taken[name]}")
    return paths


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """The fidelity records that hold figures; the column ``texts`` names the source of their documents."""
    good = table[(table["kind"] == FIDELITY) & (table["status"] == "ok")]
    if good.empty:
        return good.assign(**dict.fromkeys([*RUN, "ratio"], "-"))
    texts = good["document"].astype(str).str.rsplit("-", n=1).str[0]
    good = good.assign(texts=texts, ratio=pd.to_numeric(good["ratio"], errors="coerce"))
    return good.assign(**{name: good[name].fillna("-") for name in RUN})


def panels(run: pd.DataFrame, chosen: Mapping[str, Look]) -> Figure:
    """The figure of one run: two panels side by side."""
    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    counts: set[int] = set()
    many = False
    for axis, (field, title, label) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        lines = lines_of(run, field)
        shown = named(lines)
        many |= len(shown) < len(lines)
        counts |= {count for line in lines for count in line.documents}
        plot(axis, lines, shown, chosen)
        dense = run[run["method"] == BASELINE]
        if len(dense):
            mark_dense(axis, float(dense["bytes_per_head"].astype(float).mean()))
        axis.set_title(title)
        axis.set_ylabel(label)
    first = run.iloc[0]
    headline(figure, f"Fidelity to full attention: {first['model']}, {tokens(int(first['length']))} tokens")
    footer(figure, note(run, counts) + (f"; dots without a name: {UNNAMED}" if many else ""))
    return figure


def note(run: pd.DataFrame, counts: set[int]) -> str:
    """Footer: how many documents of which texts, the budgets, and the machine."""
    first = run.iloc[0]
    count = "n = " + (f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}")
    ratios = ", ".join(f"{100 * ratio:g}" for ratio in sorted(run["ratio"].dropna().unique()))
    bars = f", bars: {LEVEL} % interval by document" if max(counts) > 1 else ""
    machine = f"{first['device']}, {threads(first['threads'])}, {first['dtype']}"
    return (
        f"{count} documents ({first['texts']}), {number(first['steps'])} teacher-forced steps each{bars}; points: "
        f"budgets of {ratios} % of the context;\n{_meaning(run)}pale: no other point beats these in both; {machine}"
    )


def _meaning(run: pd.DataFrame) -> str:
    """The meaning of the grey lines, if there are any."""
    found = [f"{name} {words}" for name, words in RAILS.items() if name in set(run["method"])]
    return f"grey: {', '.join(found)}; " if found else ""


def lines_of(run: pd.DataFrame, field: str) -> list[Line]:
    """The lines of one panel in alphabetical order; a method with several settings has several. A method without a
    budget has none."""
    found = []
    selecting = run[run["ratio"].notna()]
    for (method, key), part in selecting.groupby(["method", "key"], sort=True):
        several = selecting[selecting["method"] == method]["key"].nunique() > 1
        points = []
        for ratio in sorted(part["ratio"].unique()):
            rows = part[part["ratio"] == ratio].sort_values("document")
            values = rows[field].astype(float).dropna().to_numpy()
            if len(values):
                points.append((float(ratio), float(rows["bytes_per_head"].astype(float).mean()), *interval(values)))
        if points:
            ratios, size, middle, low, high, counts = map(list, zip(*points, strict=True))
            label = f"{method} ({str(key)[:4]})" if several else str(method)
            documents = (min(counts), max(counts))
            found.append(Line(label, str(method), ratios, size, middle, low, high, documents))
    return found


def interval(values: np.ndarray) -> tuple[float, float, float, int]:
    """Mean over documents, ends of its bootstrap interval, and the number of documents."""
    draws = resampled("documents", values)  # with one seed, methods on the same documents are resampled alike
    low, high = np.percentile(draws.means, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return draws.value, float(low), float(high), draws.n


def plot(axis: Axes, lines: Sequence[Line], shown: Sequence[Line], chosen: Mapping[str, Look]) -> None:
    """Draw the lines of one panel, those ``shown`` in colour with their names at the right ends."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.plot(*frontier(lines), color="0.88", linewidth=9, zorder=0.5, solid_capstyle="round", label="frontier")
    for line in lines:
        if line not in shown:
            axis.plot(line.size, line.middle, color=PALE, marker=".", markersize=4, linewidth=0.6, zorder=1)
            continue
        look, order = chosen[line.method], np.argsort(line.size)
        size, middle = np.array(line.size)[order], np.array(line.middle)[order]
        middle = np.where(middle > 0, middle, np.nan)  # zero has no place on a logarithmic axis
        spread = np.clip([middle - np.array(line.low)[order], np.array(line.high)[order] - middle], 0, None)
        axis.plot(
            size,
            middle,
            color=look.colour,
            marker=look.marker,
            linestyle=look.dash,
            markersize=5,
            linewidth=1.5,
            label=line.label,
        )
        if line.documents[1] > 1:
            axis.errorbar(size, middle, yerr=spread, fmt="none", ecolor=look.colour, elinewidth=1, capsize=2, alpha=0.6)
    axis.set_ylim(*limits([value for line in lines for value in line.middle]))
    axis.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axis.xaxis.set_major_formatter(FuncFormatter(_bytes))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("bytes read per step and KV head (index + keys and values attended)")
    axis.grid(color="0.92")
    best = [max(zip(line.size, line.middle, strict=True)) for line in shown]  # at the largest budget
    floor = axis.get_ylim()[0]
    name_ends(
        axis,
        [
            (line.label, size, max(value, floor), chosen[line.method].colour)
            for line, (size, value) in zip(shown, best, strict=True)
        ],
    )


def named(lines: Sequence[Line]) -> list[Line]:
    """The lines that get a name: all, or the rails and the lines on the frontier if there are more than
    :data:`MOST`."""
    if len(lines) <= MOST:
        return list(lines)
    best = set(zip(*frontier(lines), strict=True))
    return [line for line in lines if line.method in RAILS or best & set(zip(line.size, line.middle, strict=True))]


def frontier(lines: Sequence[Line]) -> tuple[list[float], list[float]]:
    """Bytes and errors of the points that no other point of any method beats in both, cheapest first."""
    kept: list[tuple[float, float]] = []
    for size, value in sorted(point for line in lines for point in zip(line.size, line.middle, strict=True)):
        if value > 0 and (not kept or value < kept[-1][1]):
            kept.append((size, value))
    return [size for size, _ in kept], [value for _, value in kept]


def rails(chosen: Mapping[str, Look]) -> dict[str, Look]:
    """The looks of all lines, with :data:`RAILS` in grey."""
    return {name: replace(look, colour=RAIL) if name in RAILS else look for name, look in chosen.items()}


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis for the positive ``values``, at most :data:`DECADES` apart."""
    positive = [value for value in values if value > 0]
    if not positive:
        return 0.1, 1.0
    top = max(positive)
    return max(min(positive), top / 10**DECADES) / 1.3, top * 1.3


def mark_dense(axis: Axes, size: float) -> None:
    """Mark full attention, which has no error, by a vertical line at its bytes."""
    axis.axvline(size, color="black", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)
    axis.annotate(
        BASELINE,
        (size, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
    )


def _bytes(size: float, _: object) -> str:
    """Bytes in short form: 65536 becomes 64K."""
    return f"{size / 1024:g}K" if size < 1 << 20 else f"{size / (1 << 20):g}M"
