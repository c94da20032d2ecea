"""Quality against cost as small drawings. This module computes only geometry; the template turns it into SVG in the
page's colours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import LogLocator, MaxNLocator

from plots.report.leaderboard import COLUMNS, Board, Row
from plots.style import Look

WIDTH, HEIGHT = 460.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 448.0, 14.0, 240.0  # edges of the axes
COSTS = (("step_bytes", "read per decode step, MB"), ("tpot_s", "time per output token, ms"))
POINTS = 400  # of one panel
BARS, NAMED = 12, 30  # most points with intervals, and most methods with names
Box = tuple[float, float, float, float]
Scale = Callable[[float], float]
# Places of a label around its point in the order of trial: right, left, below and above.
_AROUND = (
    (9, 4, "start"),
    (-9, 4, "end"),
    (0, 19, "middle"),
    (0, -9, "middle"),
    (8, 17, "start"),
    (8, -8, "start"),
    (-8, 17, "end"),
    (-8, -8, "end"),
    (0, 33, "middle"),
    (0, -23, "middle"),
    (10, 31, "start"),
    (-10, 31, "end"),
)
_LETTER, _LINE = 6.3, 13.0  # estimated size of a character and of a line of a label


@dataclass(frozen=True)
class Point:
    """One run: its place, its score interval, its label if it has one, and its tooltip."""

    x: float
    y: float
    low: float
    high: float
    method: str
    title: str
    label: tuple[float, float, str, str] | None = None  # x, y, anchor, text


@dataclass(frozen=True)
class Panel:
    """The drawing of one benchmark and model against one cost. Ticks are (position, text)."""

    benchmark: str
    model: str
    x_title: str
    y_title: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: list[Point]
    lines: dict[str, str]  # method -> SVG path through its runs
    frontier: str
    note: str


@dataclass(frozen=True)
class Marker:
    """A method's mark: an SVG path around the origin, and a colour (none stands for the page's text colour)."""

    path: str
    colour: str


def markers(chosen: Mapping[str, Look]) -> dict[str, Marker]:
    """The marks of plots.style as SVG; black becomes the colour of the page's text, which is visible in both themes."""
    found = {}
    for method, look in chosen.items():
        style = MarkerStyle(look.marker)
        (shape, *_) = style.get_path().transformed(style.get_transform()).to_polygons()
        path = "M" + "L".join(f"{9.5 * x:.1f} {-9.5 * y:.1f}" for x, y in shape) + "Z"
        found[method] = Marker(path, "" if look.colour == "black" else look.colour)
    return found


def panels(boards: Sequence[Board]) -> list[Panel]:
    """A panel for each benchmark, model and cost that is known of at least two runs."""
    found = []
    for board in boards:
        for field, title in COSTS:
            rows = [row for row in board.rows if row.figures["score"] is not None and (row.figures[field] or 0) > 0]
            if len(rows) >= 2:
                found.append(_panel(board, rows, field, title))
    return found


def _panel(board: Board, rows: list[Row], field: str, title: str) -> Panel:
    average = all(row.figures["average"] is not None for row in rows)
    quality = "average" if average else "score"
    kept = rows[:POINTS]
    factor = COLUMNS[field][2]
    costs = [(row.figures[field] or 0.0) * factor for row in kept]
    scores = [row.figures[quality] or 0.0 for row in kept]
    spans = [_interval(row, quality, board) for row in kept]
    bars = len(kept) <= BARS
    x_place, x_ticks, log = _horizontal(costs)
    y_place, y_ticks = _vertical([*scores, *(edge for span in spans for edge in span)])
    points = [
        Point(
            x_place(cost),
            y_place(score),
            y_place(low if bars else score),
            y_place(high if bars else score),
            row.names["method"],
            f"{row.names['method']}, budget {row.names['budget']}: {score:.1f} % "
            f"[{low:.1f}, {high:.1f}], {row.shown(field)} {COLUMNS[field][1]}, n = {row.run.n}",
        )
        for row, cost, score, (low, high) in zip(kept, costs, scores, spans, strict=True)
    ]
    links = sorted({row.emulated for row in kept if row.emulated}) if field == "tpot_s" else []
    notes = [
        f"n = {_range([row.run.n for row in kept])} samples per run",
        *([f"time over an emulated link ({', '.join(links)})"] if links else []),
        *([f"first {POINTS} of {len(rows)} runs"] if len(rows) > POINTS else []),
    ]
    return Panel(
        board.rows[0].names["benchmark"],
        board.rows[0].names["model"],
        title + (" (log scale)" if log else ""),
        f"{'average over tasks' if average else 'score'}, %",
        x_ticks,
        y_ticks,
        _labelled(points),
        _lines(points),
        _frontier(points),
        "; ".join(notes),
    )


def frontier(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """The runs, by rising cost, that no other run beats. A run beats another if it is neither worse nor dearer, and
    better in one of the two."""
    best, found = -np.inf, []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if scores[i] > best:
            best = scores[i]
            found.append(i)
    return found


def _interval(row: Row, quality: str, board: Board) -> tuple[float, float]:
    """The bootstrap interval of the drawn score if the run has one, otherwise the score itself."""
    tasks = [name for name in board.suite.columns if name in row.run.scores]
    drawn = row.figures[quality] or 0.0
    known = [row.run.scores[name] for name in tasks if row.run.scores[name].n == row.run.n]
    for estimate in known:
        if estimate.n > 1 and abs(estimate.value - drawn) < 1e-6:
            return estimate.low, estimate.high
    return drawn, drawn


def _horizontal(costs: Sequence[float]) -> tuple[Scale, list[tuple[float, str]], bool]:
    """Scale and ticks of costs; the scale is logarithmic if costs span more than a factor of eight."""
    low, high = min(costs), max(costs)
    log = high > 8 * low
    if log:
        low, high = low / 1.25, high * 1.25
        ticks = LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,), numticks=9).tick_values(low, high)
        edges = np.log(low), np.log(high)
    else:
        margin = 0.06 * (high - low or high)
        low, high = max(0.0, low - margin), high + margin
        ticks = MaxNLocator(5).tick_values(low, high)
        edges = low, high

    def place(value: float) -> float:
        part = ((np.log(value) if log else value) - edges[0]) / (edges[1] - edges[0])
        return round(float(LEFT + part * (RIGHT - LEFT)), 1)

    return place, [(place(tick), f"{tick:g}") for tick in ticks if low <= tick <= high and tick > 0], log


def _vertical(scores: Sequence[float]) -> tuple[Scale, list[tuple[float, str]]]:
    low, high = min(scores), max(scores)
    margin = max(5.0, 0.08 * (high - low))
    top = 100.0 if high <= 100 else high  # no ticks above 100 %
    low, high = low - margin, high + (margin if high > 100 else 0.4 * margin)

    def place(value: float) -> float:
        return round(float(BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP)), 1)

    return place, [(place(tick), f"{tick:g}") for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= top]


def _lines(points: Sequence[Point]) -> dict[str, str]:
    by_method: dict[str, list[Point]] = {}
    for point in points:
        by_method.setdefault(point.method, []).append(point)
    return {
        method: "M" + "L".join(f"{point.x} {point.y}" for point in sorted(members, key=lambda point: point.x))
        for method, members in by_method.items()
        if len(members) > 1
    }


def _frontier(points: Sequence[Point]) -> str:
    best = [points[i] for i in frontier([point.x for point in points], [-point.y for point in points])]
    steps = [f"M{best[0].x} {best[0].y}", *(f"H{point.x}V{point.y}" for point in best[1:]), f"H{RIGHT}"]
    return "".join(steps)


def _labelled(points: list[Point]) -> list[Point]:
    """Write the name of each method once, beside its dearest run, at a place where it covers no mark and no other
    name."""
    last = {point.method: i for i, point in sorted(enumerate(points), key=lambda item: item[1].x)}
    taken = [(point.x - 5, point.y - 5, point.x + 5, point.y + 5) for point in points]
    found = list(points)
    if len(last) > NAMED:
        return found
    for method, i in sorted(last.items(), key=lambda item: points[item[1]].y):
        text = method if len(method) <= 18 else f"{method[:17]}…"
        spot = _spot(points[i], text, taken)
        if spot is not None:
            x, y, anchor, box = spot
            taken.append(box)
            found[i] = replace(points[i], label=(x, y, anchor, text))
    return found


def _spot(point: Point, text: str, taken: Sequence[Box]) -> tuple[float, float, str, Box] | None:
    """A free place for a label around a point; None if there is no room, since the tooltip and the legend name the
    method too."""
    width = _LETTER * len(text)
    for dx, dy, anchor in _AROUND:
        x, y = point.x + dx, point.y + dy
        left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
        box = (left, y - 0.8 * _LINE, left + width, y + 0.2 * _LINE)
        inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= BOTTOM
        if inside and not any(_overlap(box, other) for other in taken):
            return round(x, 1), round(y, 1), anchor, box
    return None


def _overlap(first: Box, second: Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


def _range(counts: Sequence[int]) -> str:
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
