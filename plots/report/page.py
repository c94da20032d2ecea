"""The page: the template filled with rows and drawings. Style, script and data are part of it; no other script may
run."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata

import jinja2
from markupsafe import Markup

from plots.report import leaderboard, pareto
from plots.report.load import Loaded
from plots.report.samples import browser
from plots.report.sections import method_sections, provenance
from plots.report.text import name
from plots.style import looks
from pqbench.tables.kinds import sections
from pqbench.tables.section import group_records

ROWS, CELLS, PANELS, METHODS = 1500, 20_000, 60, 100  # limits of the page, which says where they cut something off


@dataclass(frozen=True)
class Tasks:
    """Scores of one benchmark on one model by task; if there are many tasks, only the first ones."""

    board: leaderboard.Board
    columns: list[str]
    rows: list[leaderboard.Row]


@dataclass(frozen=True)
class Timing:
    """One table of records without scores, with the numbers of its cells, by which it can be sorted."""

    benchmark: str
    model: str
    title: str
    headings: list[str]
    rows: list[list[tuple[str, float | None]]]
    labels: int
    whole: int


def render(loaded: Loaded) -> str:
    """The report as one HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("plots.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["name"] = name
    boards = leaderboard.boards(loaded)
    rows = [row for board in boards for row in board.rows]
    methods, names = method_sections(loaded, METHODS)
    panels = pareto.panels(boards)
    environments, distinct = provenance(loaded)
    script = _source(environment, "page.js")
    data = browser(loaded)
    return environment.get_template("page.html").render(
        style=Markup(_source(environment, "page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        loaded=loaded,
        rows=rows[:ROWS],
        all_rows=len(rows),
        columns=leaderboard.columns(boards),
        about=leaderboard.COLUMNS,
        labels=_labels(rows),
        choices={key: _values(loaded, rows, key) for key in ("benchmark", "model", "budget")},
        tasks=_tasks(boards),
        timings=_timings(loaded),
        panels=panels[:PANELS],
        all_panels=len(panels),
        drawn=pareto,
        marks=pareto.markers(looks(names)),
        plotted=list(dict.fromkeys(point.method for panel in panels[:PANELS] for point in panel.points))[:METHODS],
        methods=methods,
        all_methods=len(names),
        browser=data,
        environments=environments,
        distinct=distinct,
        version=_version(),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _labels(rows: list[leaderboard.Row]) -> list[str]:
    """The names that a leaderboard row needs: benchmark and model unless they are the same in all rows. The question,
    the settings that differ and the key are given only if rows would look alike without them."""
    shown = ["method", "budget"]
    if len({(row.names["benchmark"], row.names["model"]) for row in rows}) > 1:
        shown += ["benchmark", "model"]
    for further in ("question", "variant", "key"):
        alike = {tuple(row.names[label] for label in shown) for row in rows}
        if len(alike) < len(rows) and len({row.names[further] for row in rows}) > 1:
            shown.append(further)
    return shown


def _values(loaded: Loaded, rows: list[leaderboard.Row], key: str) -> list[str]:
    """The values to which a filter can be set."""
    others = [name(record[key]) for record in loaded.others if key in record and key != "budget"]
    return list(dict.fromkeys([*(row.names[key] for row in rows), *others]))[:300]


def _tasks(boards: list[leaderboard.Board]) -> list[Tasks]:
    """Boards with scores, shortened so that a browser can show all tables together."""
    found, left = [], CELLS
    for board in boards:
        known = [column for column in board.suite.columns if any(column in row.run.scores for row in board.rows)]
        shown = known[:60]
        rows = board.rows[: left // max(1, len(shown))]
        if shown and rows:
            found.append(Tasks(board, shown, rows))
            left -= len(shown) * len(rows)
    return found


def _timings(loaded: Loaded) -> list[Timing]:
    found, left = [], CELLS
    for (benchmark, model), records in group_records(loaded.others, "benchmark", "model").items():
        for section in sections(records):
            rows = section.rows[: left // max(1, len(section.headings))]
            left -= len(rows) * len(section.headings)
            cells = [[(name(cell), _number(cell)) for cell in row] for row in rows]
            found.append(
                Timing(
                    name(benchmark),
                    name(model),
                    section.title,
                    section.headings,
                    cells,
                    section.labels,
                    len(section.rows),
                )
            )
    return found


def _number(text: str) -> float | None:
    """The number at the start of a cell; an interval or a share may follow it."""
    try:
        return float(text.partition(" ")[0])
    except ValueError:
        return None


def _source(environment: jinja2.Environment, file: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, file)[0]


def _version() -> str:
    try:
        return metadata.version("pqbench")
    except metadata.PackageNotFoundError:
        return "unknown"
