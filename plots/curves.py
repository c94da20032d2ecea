"""The lines of one panel: their values, and how they are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes

from plots.style import BASELINE, Look, name_ends


@dataclass(frozen=True)
class Curve:
    """A line of means over the rows at each x, with their standard errors; ``family`` decides how it looks."""

    label: str
    family: str
    x: list[float]
    y: list[float]
    error: list[float]


def curves(rows: pd.DataFrame, x: str, y: str, by: str = "family") -> list[Curve]:
    """One curve for every value of ``by``, ascending in ``x``; rows without a number are left out. Needs the column
    ``family``."""
    found = []
    numbers = rows.assign(**{name: pd.to_numeric(rows[name], errors="coerce") for name in (x, y)}).dropna(subset=[x, y])
    for label, part in numbers.groupby(by, sort=True):
        points = part.groupby(x)[y].agg(["mean", "sem"])
        found.append(
            Curve(
                str(label),
                str(part["family"].iloc[0]),
                [float(value) for value in points.index],
                points["mean"].tolist(),
                points["sem"].fillna(0.0).tolist(),
            )
        )
    return found


def draw_curves(axis: Axes, lines: Sequence[Curve], chosen: Mapping[str, Look]) -> None:
    """Draw lines with markers and bars of one standard error."""
    for line in lines:
        look = chosen[line.family]
        axis.errorbar(
            line.x,
            line.y,
            yerr=line.error if any(line.error) else None,
            color=look.colour,
            marker=look.marker,
            linestyle=look.dash,
            markersize=5,
            linewidth=1.5,
            elinewidth=0.8,
            label=line.label,
        )
    axis.grid(axis="y", color="0.9")


def name_curves(axis: Axes, lines: Sequence[Curve], chosen: Mapping[str, Look]) -> None:
    """Write names at the right ends; call this when scales and limits are final."""
    name_ends(axis, [(line.label, line.x[-1], line.y[-1], chosen[line.family].colour) for line in lines])


def baseline(axis: Axes, value: float, name: str = BASELINE) -> None:
    """Draw full attention as a dashed level with its name above it, since it has no x of its own."""
    axis.axhline(value, color="black", linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)
    axis.annotate(
        name,
        (0.01, value),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        fontsize=8,
        va="bottom",
    )
