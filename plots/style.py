"""One look for every figure: fonts, colours, footer, and where files go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

HEAT = "cividis"  # readable in grey and by colour-blind eyes

_RC = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw inside this block."""
    with mpl.rc_context(_RC):
        yield


def footer(figure: Figure, text: str) -> None:
    """Where the numbers come from, small, below the figure."""
    figure.text(0.01, 0.01, text, fontsize=7, color="0.35", ha="left", va="bottom")


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name`` as png and pdf; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, bbox_inches="tight")
    return paths
