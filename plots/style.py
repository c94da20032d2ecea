"""The common look of all figures: fonts, colours and footer, and how they are saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

HEAT = "cividis"  # readable in grey and by colour-blind eyes
BASELINE = "full"
# Okabe and Ito's colours, which colour-blind eyes tell apart, without the yellow that is too pale for a line.
_COLOURS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#56B4E9")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "h", "*", "p", "d")
_DASHES = ("-", (0, (4, 1.5)), (0, (1.5, 1)))
# A method's place in this list decides its look in every figure; other methods get the remaining looks.
_KNOWN = (
    "pqcache",
    "oracle",
    "sparq",
    "infllm",
    "h2o",
    "snapkv",
    "pqcache_plus",
    "quest",
    "tova",
    "streaming_llm",
    "pyramidkv",
)
_GAP = 0.062  # smallest distance of labels at line ends, as a share of the panel's height

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


@dataclass(frozen=True)
class Look:
    """The way in which one method is drawn in every figure."""

    colour: str
    marker: str
    dash: str | tuple[float, tuple[float, ...]]


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each method, always including full attention (black). A method of this project has the same look in
    every figure; other methods get one by their place in alphabetical order."""
    names = set(names) - {BASELINE}
    found = {name: _look(place) for place, name in enumerate(_KNOWN) if name in names}
    taken = set(found.values())
    free = [_look(place) for place in [*range(len(_KNOWN), len(_COLOURS) * len(_DASHES)), *range(len(_KNOWN))]]
    others = sorted(names - found.keys())
    for name, look in zip(others, cycle([look for look in free if look not in taken] or free)):
        found[name] = look
    return {BASELINE: Look("black", "o", "-")} | {name: found[name] for name in sorted(names)}


def _look(place: int) -> Look:
    return Look(
        _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)], _DASHES[place // len(_COLOURS) % len(_DASHES)]
    )


def name_ends(axis: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write names to the right of the panel, moved apart if they would overlap. Each is given as (name, x, y of the
    line's last point, colour). Scales and limits of the axis must be final."""
    inside = axis.transAxes.inverted()
    heights = [float(inside.transform(axis.transData.transform((x, y)))[1]) for _, x, y, _ in ends]
    order = sorted(range(len(ends)), key=heights.__getitem__)
    for i, place in zip(order, apart([heights[i] for i in order], _GAP, lowest=0.0), strict=True):
        name, x, y, colour = ends[i]
        axis.annotate(
            name,
            (x, y),
            xytext=(1.05, place),
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 3, "relpos": (0, 0.5)},
        )


def apart(heights: Sequence[float], gap: float, lowest: float = -math.inf) -> list[float]:
    """Ascending heights, moved until neighbours are ``gap`` apart and none is below ``lowest``; heights that were too
    close stay around their mean if there is room."""
    blocks: list[tuple[float, int]] = []  # middle and number of heights in a block
    for height in heights:
        middle, count = max(height, lowest), 1
        while blocks and blocks[-1][0] + gap * blocks[-1][1] / 2 > middle - gap * count / 2:
            other, number = blocks.pop()
            middle, count = (other * number + middle * count) / (number + count), number + count
            middle = max(middle, lowest + gap * (count - 1) / 2)
        blocks.append((middle, count))
    return [middle + gap * (i - (count - 1) / 2) for middle, count in blocks for i in range(count)]


def write_cells(axis: Axes, image: AxesImage, texts: pd.DataFrame, size: float | None = None) -> None:
    """Write a text into every cell of a map, in black or white, whichever is readable on its colour; NaN is left
    out."""
    shown = image.get_array()
    for (y, x), text in np.ndenumerate(texts.to_numpy()):
        if shown is not None and isinstance(text, str):
            red, green, blue, _ = image.cmap(image.norm(shown[y, x]))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            axis.text(x, y, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")


@contextmanager
def style() -> Iterator[None]:
    """A context in which figures are drawn in this style."""
    with mpl.rc_context(_RC):
        yield


def number(value: object) -> str:
    """A count without the decimals that a table of mixed records may have added; other text is unchanged."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def threads(value: object) -> str:
    """A number of threads in words: ``1 thread``, ``2 threads``."""
    return f"{number(value)} thread" + ("" if number(value) == "1" else "s")


def tokens(count: int) -> str:
    """A number of tokens in short form: 4096 becomes 4K."""
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


def footer(figure: Figure, text: str, above: float = 0.0) -> None:
    """Write the origin of the numbers in small letters below the panels. The panels make room for it, and leave a share
    ``above`` of the figure's height free above them."""
    figure.text(0.01, 0.01, text, fontsize=7, color="0.35", ha="left", va="bottom", parse_math=False)
    bottom = (0.1 + 0.125 * len(text.splitlines())) / figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, bottom, 1, 1 - bottom - above))  # type: ignore[union-attr, call-arg]


def headline(figure: Figure, text: str, stamp: str = "") -> None:
    """Write the title, with ``emulated`` or ``modelled`` if the numbers are that."""
    figure.suptitle(text + (f" [{stamp}]" if stamp else ""), fontsize=12, x=0.01, ha="left", parse_math=False)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Save the figure ``name`` as png and pdf; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, bbox_inches="tight")
    return paths
