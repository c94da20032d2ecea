"""One look for every figure: fonts, colours, footer, and where files go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

HEAT = "cividis"  # readable in grey and by colour-blind eyes
BASELINE = "full"
# Okabe and Ito's colours, which colour-blind eyes tell apart, without the yellow that is too pale for a line.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*", "p")
_DASHES = ("-", (0, (4, 1.5)), (0, (1.5, 1)))

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
    """How one method is drawn, in every figure."""

    colour: str
    marker: str
    dash: str | tuple[float, tuple[float, ...]]


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each method: by its place among ``names`` in alphabetical order, so give all methods of the records.
    Full attention is black."""
    found = {BASELINE: Look("black", "o", "-")}
    for i, name in enumerate(sorted(set(names) - {BASELINE})):
        found[name] = Look(
            _COLOURS[i % len(_COLOURS)],
            _MARKERS[(i + 1) % len(_MARKERS)],
            _DASHES[i // len(_COLOURS) % len(_DASHES)],
        )
    return found


@contextmanager
def style() -> Iterator[None]:
    """Draw inside this block."""
    with mpl.rc_context(_RC):
        yield


def number(value: object) -> str:
    """A count without decimals that a table of mixed records may have given it; text as it is."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def threads(value: object) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{number(value)} thread" + ("" if number(value) == "1" else "s")


def tokens(count: int) -> str:
    """4096 as 4K."""
    return f"{count // 1024}K" if count % 1024 == 0 else str(count)


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
