"""``python -m pqbench.progress results/``: what is done, running, failed or stalled in a sweep, and how long it will
take.

It reads the records and the signs of life next to them. It therefore works while runs go on, and on any machine that
can read the folder. It does not know of runs that have not started.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pqbench.errors import PqbenchError
from pqbench.progress.runs import STATES, Run, read_runs
from pqbench.records.heartbeat import SILENCE_S
from pqbench.terminal import log_to_terminal, plain

log = logging.getLogger("pqbench.progress")

BELOW = (
    f"stalled: no sign of life for {SILENCE_S:.0f} s; stopped: ended with samples left; the same command continues "
    "from there. unknown: nothing says how many samples there are. Runs that have not started are not listed."
)


def progress_table(runs: Sequence[Run], styled: bool) -> Table:
    """A table with one row per benchmark, model and method, over all settings, and one row for everything."""
    table = Table(box=box.SIMPLE if styled else None, show_edge=False, pad_edge=False)
    for heading in ("benchmark", "model", "method", "runs"):
        table.add_column(heading, no_wrap=not styled)
    for heading in ("done", "planned", "failed", "per minute", "ETA"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        rows.setdefault((run.benchmark, run.model, run.method), []).append(run)
    for names, members in sorted(rows.items()):
        table.add_row(*(Text(plain(name)) for name in names), *_cells(members))
    if len(rows) > 1:
        table.add_section()
        table.add_row(Text("all", style="bold" if styled else ""), "", "", *_cells(runs))
    return table


def _cells(runs: Sequence[Run]) -> list[str]:
    states = Counter(run.state for run in runs)
    known, unknown = sum(run.planned or 0 for run in runs), any(run.planned is None for run in runs)
    rate, etas = sum(run.rate for run in runs), [run.eta_s for run in runs if run.state == "running"]
    waits = [eta for eta in etas if eta is not None]
    return [
        ", ".join(f"{states[state]} {state}" for state in STATES if states[state]),
        str(sum(run.ok for run in runs)),
        f"{known}+?" if unknown and known else "?" if unknown else str(known),
        str(sum(run.failed for run in runs)),
        f"{60 * rate:.1f}" if rate else "-",
        duration(max(waits)) if waits and len(waits) == len(etas) else "?" if etas else "-",
    ]


def duration(seconds: float) -> str:
    """Seconds as ``45 s``, ``12 min`` or ``3 h 05 min``, rounded up."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m pqbench.progress``. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="pqbench.progress", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"), help="folder of records")
    parser.add_argument(
        "--watch", type=_seconds, metavar="SECONDS", help="show the table again every SECONDS seconds while runs go on"
    )
    options = parser.parse_args(arguments)
    log_to_terminal()
    try:
        _show(options.results, options.watch)
    except PqbenchError as error:
        log.error(error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _show(results: Path, watch: float | None) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a narrower table, as for a pipe, would be unreadable
        while _put(console, read_runs(results)) and watch:
            time.sleep(watch)
        return
    if not watch:
        _put(console, read_runs(results))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            runs = read_runs(results)
            live.update(progress_table(runs, True), refresh=True)
            if not any(run.state == "running" for run in runs):
                return
            time.sleep(watch)


def _put(console: Console, runs: Sequence[Run]) -> bool:
    """Write the table once. Returns whether any run is still running."""
    parts: list[RenderableType] = [progress_table(runs, console.is_terminal), Text(BELOW)]
    for part in parts if runs else [Text("no run has started here")]:
        console.print(part)
    return any(run.state == "running" for run in runs)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds of at least 0.1")
    return value
